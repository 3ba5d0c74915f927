"""The order of pairs: each once, never more encodings than there is room for, and no image encoded more than twice."""

import random
from collections import Counter

import pytest

from dust3r_sfm.pairs import Pair
from dust3r_sfm.schedule import encoding_passes


def directed(edges, seed=0):
    edges = sorted(edges)
    random.Random(seed).shuffle(edges)
    return [Pair(f"{i}.jpg", f"{j}.jpg") for a, b in edges for i, j in ((a, b), (b, a))]


def neighbours_in_a_plane(num_images, num_matched, seed):
    dice = random.Random(seed)
    places = [complex(dice.random(), dice.random()) for _ in range(num_images)]
    near = [sorted(range(num_images), key=lambda j, i=i: abs(places[i] - places[j])) for i in range(num_images)]
    return {tuple(sorted((i, j))) for i in range(num_images) for j in near[i][1 : num_matched + 1]}


def sequence_with_loops(num_images, window, num_loops, seed):
    dice = random.Random(seed)
    near = {(i, j) for i in range(num_images) for j in range(i + 1, min(i + window + 1, num_images))}
    return near | {tuple(sorted(dice.sample(range(num_images), 2))) for _ in range(num_loops)}


def random_graph(num_images, num_pairs, seed):
    dice = random.Random(seed)
    return {tuple(sorted(dice.sample(range(num_images), 2))) for _ in range(num_pairs)}


def most_kept(names, pairs):
    """Encodings held at once by one who encodes in this order and forgets what no later pair of the pass needs."""
    turn = {name: t for t, name in enumerate(names)}
    until = {}
    for pair in pairs:
        for name in pair:
            until[name] = max(until.get(name, 0), *(turn[n] for n in pair))
    return max(sum(turn[n] <= t <= until[n] for n in names) for t in range(len(names)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [2, 9, 40])
@pytest.mark.parametrize(
    "edges", [lambda seed: neighbours_in_a_plane(60, 6, seed), lambda seed: random_graph(40, 160, seed)]
)
def test_every_pair_comes_once_within_the_capacity_beside_its_reverse(edges, capacity, seed):
    pairs = directed(edges(seed), seed)
    passes = encoding_passes(pairs, capacity)
    assert Counter(pair for one in passes for pair in one.pairs) == Counter(pairs)
    for one in passes:
        assert len(set(one.names)) == len(one.names)
        assert most_kept(one.names, one.pairs) <= capacity
        assert all(a == b.reversed() for a, b in zip(one.pairs[::2], one.pairs[1::2], strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("edges", "capacity"),
    [
        (lambda seed: sequence_with_loops(300, 8, 40, seed), 48),
        (lambda seed: neighbours_in_a_plane(250, 12, seed), 40),
    ],
)
def test_no_image_of_a_collection_is_encoded_more_than_twice(edges, capacity, seed):
    passes = encoding_passes(directed(edges(seed), seed), capacity)
    times = Counter(name for one in passes for name in one.names)
    assert max(times.values()) <= 2
    assert times.total() <= 1.5 * len(times)


def test_where_all_encodings_fit_every_image_is_encoded_once():
    pairs = directed(random_graph(40, 300, 0))
    (only,) = encoding_passes(pairs, 40)
    assert len(only.pairs) == len(pairs)


def test_single_directions_no_pairs_and_no_room_are_handled():
    (only,) = encoding_passes([Pair("b", "a"), Pair("a", "c"), Pair("b", "a")], 5)
    assert sorted(only.pairs) == [Pair("a", "c"), Pair("b", "a")]
    assert encoding_passes([], 5) == []
    with pytest.raises(ValueError, match="needs 2 encodings at once, the capacity is 1"):
        encoding_passes([Pair("a", "b")], 1)
