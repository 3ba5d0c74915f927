from pathlib import Path

import numpy as np
import pytest
import torch

from dust3r_sfm.geometry.neighbors import reciprocal_neighbors

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "geometry.npz")


def test_neighbors_equal_the_published_figures():
    indices0, indices1 = reciprocal_neighbors(torch.tensor(GOLDEN["match_a"]), torch.tensor(GOLDEN["match_b"]))
    assert sorted(indices1.tolist()) == np.flatnonzero(GOLDEN["match_reciprocal_in_b"]).tolist()
    assert (GOLDEN["match_nn_b_in_a"][indices1.numpy()] == indices0.numpy()).all()


@pytest.mark.parametrize("dim", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbors_are_nearest_both_ways_and_none_is_missed(dim, dtype):
    generator = torch.Generator().manual_seed(0)
    points0 = torch.rand(70, dim, generator=generator, dtype=dtype)
    points1 = torch.rand(90, dim, generator=generator, dtype=dtype)
    distances = torch.cdist(points0.double(), points1.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest1, nearest0 = distances.argmin(dim=1), distances.argmin(dim=0)
    expected = [(i, j) for i, j in enumerate(nearest1.tolist()) if nearest0[j] == i]
    indices0, indices1 = reciprocal_neighbors(points0, points1)
    assert list(zip(indices0.tolist(), indices1.tolist(), strict=True)) == expected


def test_swapping_the_sets_swaps_the_indices():
    points0, points1 = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)), torch.rand(40, 3)
    forward = set(zip(*(x.tolist() for x in reciprocal_neighbors(points0, points1)), strict=True))
    backward = set(zip(*(x.tolist() for x in reciprocal_neighbors(points1, points0)[::-1]), strict=True))
    assert forward == backward


def test_repeated_points_pair_once_each_at_most():
    points = torch.zeros(3, 3).index_fill(0, torch.tensor([2]), 5.0)
    indices0, indices1 = reciprocal_neighbors(points, points)
    assert set(indices0.tolist()) == {0, 2}
    assert len(set(indices1.tolist())) == len(indices1) == 2
    torch.testing.assert_close(points[indices0], points[indices1])


def test_many_equal_points_are_no_trouble():
    indices0, indices1 = reciprocal_neighbors(torch.zeros(3000, 3), torch.zeros(3000, 3))
    assert len(indices0) == len(indices1) == 1


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sets_have_no_neighbors(n, m):
    indices0, indices1 = reciprocal_neighbors(torch.zeros(n, 3), torch.zeros(m, 3))
    assert len(indices0) == len(indices1) == 0
    assert indices0.dtype == indices1.dtype == torch.int64


def test_points_that_are_not_finite_have_no_partner():
    points0, points1 = torch.arange(12.0).reshape(4, 3), torch.arange(12.0).reshape(4, 3)
    points0[0, 1], points1[2, 0] = torch.nan, torch.inf
    indices0, indices1 = reciprocal_neighbors(points0, points1)
    assert indices0.tolist() == indices1.tolist() == [1, 3]
