"""The graph from neighbours: connected wherever the neighbours are, bounded in degree, the same on every run."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.descriptors import ImageDescriptor, write_descriptors
from dust3r_sfm.formats.pairs import read_pairs
from dust3r_sfm.graph import connected_components
from dust3r_sfm.pair_graph import nearest_positions, pairs_from_neighbors, rank_edges, sequences_of
from dust3r_sfm.pairs import Pair
from dust3r_sfm.pairs_from_retrieval import main


def nearest(points, k):
    """Indices and scores of the k nearest others of points on a line or plane."""
    scores = 1 / (1 + torch.cdist(points, points))
    scores.fill_diagonal_(-1)
    found = scores.topk(k, dim=-1)
    return found.indices, found.values


def image_names(n):
    return [f"{i:03d}.jpg" for i in range(n)]


def components_of_neighbors(names, neighbors):
    edges = [Pair(names[i], names[j]) for i, row in enumerate(neighbors.tolist()) for j in row if j >= 0]
    return connected_components(names, edges)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_degree", [3, 4, 8])
def test_parts_stay_connected_and_degrees_stay_bounded(seed, max_degree):
    points = torch.rand(60, 2, generator=torch.Generator().manual_seed(seed))
    points[30:] += 10  # two places
    names, (neighbors, scores) = image_names(60), nearest(points, 8)
    pairs = pairs_from_neighbors(names, neighbors, scores, max_degree)
    assert connected_components(names, pairs) == components_of_neighbors(names, neighbors)
    degrees = Counter(name for pair in pairs for name in pair)
    assert max(degrees.values()) <= max_degree
    assert set(degrees) == set(names)


def test_an_image_that_all_others_are_nearest_to_keeps_them_although_they_are_more_than_the_limit():
    names = image_names(10)
    neighbors, scores = torch.tensor([[1], *[[0]] * 9]), torch.linspace(0.9, 0.1, 10)[:, None]
    pairs = pairs_from_neighbors(names, neighbors, scores, max_degree=3)
    assert len(connected_components(names, pairs)) == 1
    assert set(pairs.values()) == {"tree"}


def test_the_limit_bends_the_tree_before_it_breaks():
    # 0 is near to all, and the others form a chain: the tree can go along the chain
    chain = [[0, i - 1] if i > 1 else [0, 2] for i in range(1, 9)]
    neighbors = torch.tensor([[1, 2], *chain])
    pairs = pairs_from_neighbors(image_names(9), neighbors, torch.ones(9, 2), max_degree=3)
    assert max(Counter(name for pair in pairs for name in pair).values()) <= 3
    assert len(connected_components(image_names(9), pairs)) == 1


def test_neighbours_of_each_other_come_before_those_of_one_side():
    neighbors = torch.tensor([[1, 2], [0, 3], [1, 0], [1, 0]])
    ranked, mutual = rank_edges(neighbors, torch.tensor([[0.9, 0.5], [0.9, 0.8], [0.7, 0.5], [0.8, 0.1]]))
    assert mutual == {(0, 1), (0, 2), (1, 3)}
    assert ranked == [(0, 1), (1, 3), (0, 2), (1, 2), (0, 3)]


def test_equal_ranks_go_by_score_and_equal_scores_by_index():
    neighbors = torch.tensor([[1], [0], [3], [2], [5], [4]])
    scores = torch.tensor([[0.5], [0.5], [0.9], [0.9], [0.5], [0.5]])
    assert rank_edges(neighbors, scores)[0] == [(2, 3), (0, 1), (4, 5)]


def test_links_join_distant_parts_and_missing_neighbours_are_passed_over():
    neighbors = torch.tensor([[1], [0], [3], [2], [-1]])
    pairs = pairs_from_neighbors(image_names(5), neighbors, torch.ones(5, 1), max_degree=4, links=[(3, 0), (4, 4)])
    assert pairs[Pair("000.jpg", "003.jpg")] == "key"
    assert connected_components(image_names(5), pairs) == [image_names(4), ["004.jpg"]]


def test_sequences_pair_what_follows_in_a_folder_by_the_numbers_in_the_names():
    names = ["b/10.jpg", "b/9.jpg", "a/1.jpg", "b/11.jpg", "a/02.jpg"]
    assert sequences_of(names) == [[2, 4], [1, 0, 3]]
    none = torch.full((5, 1), -1)
    pairs = pairs_from_neighbors(names, none, torch.zeros(5, 1), max_degree=4, sequence_window=1)
    assert {frozenset(pair) for pair in pairs} == {
        frozenset(pair) for pair in [("a/1.jpg", "a/02.jpg"), ("b/9.jpg", "b/10.jpg"), ("b/10.jpg", "b/11.jpg")]
    }


def test_the_graph_depends_on_nothing_but_its_input():
    neighbors, scores = nearest(torch.rand(40, 2, generator=torch.Generator().manual_seed(3)), 6)
    links = [(3, 30), (9, 20)]
    first = pairs_from_neighbors(image_names(40), neighbors, scores, 5, links)
    again = pairs_from_neighbors(image_names(40), neighbors.clone(), scores.clone(), 5, iter(links))
    assert list(first.items()) == list(again.items())


def test_each_pair_is_there_once_and_never_of_an_image_with_itself():
    neighbors = torch.tensor([[0, 1], [1, 0], [2, 0]])
    pairs = pairs_from_neighbors(image_names(3), neighbors, torch.ones(3, 2), 5, sequence_window=2)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 3
    assert all(pair.name0 != pair.name1 for pair in pairs)


def test_a_limit_of_no_pairs_is_an_error_with_a_sentence():
    with pytest.raises(InputError, match="at least one pair"):
        pairs_from_neighbors(["a", "b"], torch.tensor([[1], [0]]), torch.ones(2, 1), max_degree=0)


def test_images_taken_near_each_other_are_paired_where_their_places_are_known():
    """Four look alike in pairs that were taken far apart, and one has no position."""
    places = np.array([[0.0, 0.0], [500.0, 0.0], [3.0, 0.0], [503.0, 4.0], [np.nan, np.nan]])
    near = nearest_positions(places, 1)
    assert near == [(0, 2), (1, 3)]
    neighbors = torch.tensor([[1], [0], [3], [2], [0]])
    pairs = pairs_from_neighbors(image_names(5), neighbors, torch.ones(5, 1), 4, near=near)
    assert pairs[Pair("000.jpg", "002.jpg")] == pairs[Pair("001.jpg", "003.jpg")] == "position"
    assert nearest_positions(np.full((3, 2), np.nan), 2) == []


def test_gps_of_exif_pairs_photos_taken_side_by_side(tmp_path):
    """Two and two photos along a meridian, 3 m apart and 60 m from the next, whose descriptors say nothing."""
    names = [f"{i:02d}.jpg" for i in range(20)]
    for i, name in enumerate(names):
        exif = Image.Exif()
        seconds = 2.0 * (i // 2) + 0.1 * (i % 2)
        exif.get_ifd(ExifTags.IFD.GPSInfo).update({1: "S", 2: (33.0, 51.0, seconds), 3: "E", 4: (151.0, 12.0, 0.0)})
        Image.new("RGB", (48, 32)).save(tmp_path / name, exif=exif)
    rows = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    items = [ImageDescriptor(name, name, (48, 32), row.numpy()) for name, row in zip(names, rows, strict=True)]
    write_descriptors(tmp_path / "feats.h5", items)
    beside = {frozenset(pair) for pair in zip(names[::2], names[1::2], strict=True)}
    found = []
    for image_dir in (None, tmp_path):
        main(tmp_path / "feats.h5", tmp_path / "pairs.txt", num_matched=5, graph=True, image_dir=image_dir)
        found.append(len(beside & {frozenset(pair) for pair in read_pairs(tmp_path / "pairs.txt", names)}))
    assert found[0] < 6
    assert found[1] == 10
