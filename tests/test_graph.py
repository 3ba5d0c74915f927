import itertools
import json
import random
from pathlib import Path

import pytest

from dust3r_sfm.errors import InputError
from dust3r_sfm.graph import (
    connected_components,
    limit_sequence_distance,
    make_pairs,
    maximum_spanning_tree,
    pairs_exhaustive,
    pairs_logarithmic,
    pairs_one_reference,
    pairs_sequential,
    symmetrize,
)
from dust3r_sfm.pairs import Pair

GOLDEN = json.loads((Path(__file__).parent / "data" / "facts.json").read_text())["pair_graphs"]
MAKERS = {
    "complete": lambda names: make_pairs(names, "exhaustive"),
    "swin-2": lambda names: make_pairs(names, "sequential", window=2),
    "swin-2-noncyclic": lambda names: make_pairs(names, "sequential", window=2, cyclic=False),
    "logwin-3": lambda names: make_pairs(names, "logarithmic", window=3),
    "logwin-3-noncyclic": lambda names: make_pairs(names, "logarithmic", window=3, cyclic=False),
    "oneref-1": lambda names: make_pairs(names, "one_reference", reference=1),
}


def image_names(n):
    return [f"{i:02d}.jpg" for i in range(n)]


@pytest.mark.parametrize("case", GOLDEN)
def test_pair_graphs_equal_those_of_the_published_code(case):
    count, kind, prefilter, _ = case.split(", ")
    names = image_names(int(count.split()[0]))
    pairs = MAKERS[kind](names)
    if prefilter != "prefilter None":
        pairs = limit_sequence_distance(pairs, names, int(prefilter[-1]), cyclic="cyc" in prefilter)
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) == {Pair(names[i], names[j]) for i, j in GOLDEN[case]}


@pytest.mark.parametrize("maker", [pairs_exhaustive, pairs_sequential, pairs_logarithmic, pairs_one_reference])
def test_two_images_are_a_pair_in_both_directions(maker):
    assert set(maker(["a", "b"])) == {Pair("a", "b"), Pair("b", "a")}


@pytest.mark.parametrize("window", [3, 100])
def test_a_window_wider_than_the_sequence_gives_every_pair_once(window):
    names = image_names(4)
    assert sorted(pairs_sequential(names, window)) == sorted(pairs_exhaustive(names))
    assert len(pairs_logarithmic(names, window)) == 12


@pytest.mark.parametrize("names", [[], ["a.jpg"]])
@pytest.mark.parametrize("kind", ["exhaustive", "sequential", "logarithmic", "one_reference"])
def test_fewer_than_two_images_are_an_error_with_a_sentence(names, kind):
    with pytest.raises(InputError, match=f"{len(names)} images? give no pairs: at least two are needed"):
        make_pairs(names, kind)


def test_a_window_or_reference_out_of_range_is_an_error():
    with pytest.raises(InputError, match="window must be at least 1, got 0"):
        pairs_sequential(["a", "b"], window=0)
    with pytest.raises(InputError, match="index from 0 to 1, got 2"):
        pairs_one_reference(["a", "b"], reference=2)


def test_symmetrize_adds_the_missing_directions_and_drops_doubles_and_self_pairs():
    pairs = [Pair("a", "b"), Pair("c", "c"), Pair("b", "a"), Pair("c", "a")]
    assert symmetrize(pairs) == [Pair("a", "b"), Pair("b", "a"), Pair("c", "a"), Pair("a", "c")]


def test_components_come_largest_first_in_the_order_of_the_names_with_lone_images():
    pairs = [Pair("e", "b"), Pair("d", "e"), Pair("f", "c")]
    assert connected_components(list("abcdefg"), pairs) == [["b", "d", "e"], ["c", "f"], ["a"], ["g"]]


def test_a_chain_of_ten_thousand_images_is_one_component():
    names = image_names(10_000)
    chain = [Pair(*pair) for pair in itertools.pairwise(names)]
    assert connected_components(names, reversed(chain)) == [names]


def brute_force_best_sum(names, scores):
    """Highest score sum over all sets of len(names) - 1 pairs that connect the names."""
    undirected = {}
    for pair, score in scores.items():
        key = tuple(sorted(pair))
        undirected[key] = max(score, undirected.get(key, 0.0))
    sums = []
    for edges in itertools.combinations(undirected, len(names) - 1):
        reached = {names[0]}
        for _ in names:
            reached |= {name for edge in edges if reached & set(edge) for name in edge}
        if len(reached) == len(names):
            sums.append(sum(undirected[edge] for edge in edges))
    return max(sums)


@pytest.mark.parametrize("seed", range(5))
def test_the_spanning_tree_has_the_highest_sum_of_all_trees(seed):
    names, generator = image_names(5), random.Random(seed)
    scores = {pair: generator.random() for pair in pairs_exhaustive(names)}
    tree = maximum_spanning_tree(names, scores)
    assert len(tree) == 4
    assert len(connected_components(names, tree)) == 1
    assert sum(scores[pair] for pair in tree) == pytest.approx(brute_force_best_sum(names, scores))
    assert [scores[pair] for pair in tree] == sorted((scores[pair] for pair in tree), reverse=True)


def test_the_spanning_tree_does_not_depend_on_the_order_of_equal_scores():
    names, generator = image_names(6), random.Random(0)
    pairs = pairs_exhaustive(names)
    trees = []
    for _ in range(5):
        generator.shuffle(pairs)
        trees.append(maximum_spanning_tree(names, dict.fromkeys(pairs, 1.0)))
    assert all(tree == trees[0] for tree in trees)


def test_a_graph_in_parts_gives_a_tree_for_each_and_nan_takes_no_part():
    scores = {Pair("a", "b"): 1.0, Pair("d", "c"): 3.0, Pair("c", "d"): 2.0, Pair("b", "c"): float("nan")}
    assert maximum_spanning_tree(list("abcde"), scores) == [Pair("d", "c"), Pair("a", "b")]
