"""Chains of frames that drift, drawn to measured positions: laws."""

import pytest
import torch

from dust3r_sfm.geometry.bending import Anchors, Joints, bending_similarities
from dust3r_sfm.geometry.registration import register_similarity, similarity_matrix
from dust3r_sfm.geometry.transforms import rigid_transform, rotation_from_rotvec, transform_points

NUM, TOLERANCE = 60, 0.01
CORNERS = torch.tensor([[0.0, 0, 0], [0.5, 0, 1], [-0.25, 0.43, 1], [-0.25, -0.43, 1]], dtype=torch.float64)


def chains(drift_deg, seed=0):
    """world_from_frame of a curve of steps of 1 m, and of an estimate whose steps are off at random."""
    generator = torch.Generator().manual_seed(seed)
    turn = rotation_from_rotvec(torch.tensor([0.0, 0.0, 0.05], dtype=torch.float64))
    step = rigid_transform(turn, torch.tensor([1.0, 0, 0], dtype=torch.float64))
    truth, estimate = [torch.eye(4, dtype=torch.float64)], [torch.eye(4, dtype=torch.float64)]
    for _ in range(NUM - 1):
        w = torch.randn(3, generator=generator, dtype=torch.float64) * drift_deg * torch.pi / 180
        error = similarity_matrix(1 + w[0], rotation_from_rotvec(w), 0.5 * w)
        truth.append(truth[-1] @ step)
        estimate.append(estimate[-1] @ step @ error)
    truth, estimate = torch.stack(truth), torch.stack(estimate)
    best = similarity_matrix(*register_similarity(estimate[:, :3, 3], truth[:, :3, 3]))
    return truth, best @ estimate


def bent_centers(estimate, positions, sigma, rows=slice(None)):
    rows = torch.arange(NUM)[rows]
    edges = torch.tensor([(i, j) for i in range(NUM) for j in range(i + 1, min(NUM, i + 4))]).T
    points = transform_points(estimate, CORNERS.expand(NUM, 4, 3))
    scales = torch.det(estimate[:, :3, :3]) ** (1 / 3)
    joints = Joints(
        edges, torch.cat([points[i] for i in edges], dim=1), TOLERANCE * (scales[edges[0]] * scales[edges[1]]).sqrt()
    )
    anchors = Anchors(rows, estimate[rows, :3, 3], positions[rows], torch.full((len(rows), 3), sigma).double())
    return transform_points(bending_similarities(joints, anchors, NUM), estimate[:, None, :3, 3])[:, 0]


def measured(truth, sigma, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return truth[:, :3, 3] + sigma * torch.randn(NUM, 3, generator=generator, dtype=torch.float64)


def farthest(centers, truth):
    return float((centers - truth[:, :3, 3]).norm(dim=-1).max())


def test_exact_positions_of_an_exact_chain_move_it_as_one():
    truth, _ = chains(0.0)
    wrong = similarity_matrix(
        torch.tensor(1.05, dtype=torch.float64),
        rotation_from_rotvec(torch.tensor([0.02, -0.03, 0.05], dtype=torch.float64)),
        torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64),
    )
    assert farthest(bent_centers(wrong @ truth, truth[:, :3, 3], 0.1), truth) < 1e-3


@pytest.mark.parametrize("known", [slice(None), slice(None, None, 4)])
def test_the_drift_of_a_chain_is_corrected_also_between_positions(known):
    truth, estimate = chains(0.7)
    assert farthest(estimate[:, :3, 3], truth) > 0.6
    assert farthest(bent_centers(estimate, measured(truth, 0.05), 0.05, known), truth) < 0.3


def test_a_fifth_of_wrong_positions_does_not_win():
    truth, estimate = chains(0.7)
    positions = measured(truth, 0.05)
    right = bent_centers(estimate, positions, 0.05)
    generator = torch.Generator().manual_seed(2)
    positions[::5] += 20 * torch.randn(NUM // 5, 3, generator=generator, dtype=torch.float64)
    assert farthest(bent_centers(estimate, positions, 0.05), truth) < farthest(right, truth) + 0.1


@pytest.mark.parametrize("stated", [1.0, 0.3])
def test_noise_of_positions_bends_little_even_where_they_err_more_than_they_say(stated):
    truth, _ = chains(0.0)
    positions = measured(truth, 1.0)
    centers = bent_centers(truth, positions, stated)
    scale, rotation, shift = register_similarity(centers, truth[:, :3, 3])
    shape = (scale * centers @ rotation.T + shift - truth[:, :3, 3]).norm(dim=-1)
    assert float(shape.median()) < 0.3
    assert float((positions - truth[:, :3, 3]).norm(dim=-1).median()) > 1.3
