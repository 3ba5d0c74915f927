"""Figures by which poses are judged, against cases worked out by hand."""

import math

import pytest
import torch

from dust3r_sfm.geometry import metrics


def rotation_z(deg):
    c, s = math.cos(math.radians(deg)), math.sin(math.radians(deg))
    return torch.tensor([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)


def translated(pose, xyz):
    pose = pose.clone()
    pose[:3, 3] = torch.tensor(xyz, dtype=pose.dtype)
    return pose


def cameras(seed=0, n=5):
    """Random rigid cam_from_world."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn((n, 3, 3), generator=generator, dtype=torch.float64)
    rotations = torch.linalg.qr(matrices).Q
    rotations = rotations * torch.det(rotations)[:, None, None]
    poses = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    poses[:, :3, :3] = rotations
    poses[:, :3, 3] = torch.randn((n, 3), generator=generator, dtype=torch.float64)
    return poses


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("deg", [0.0, 1e-5, 10.0, 90.0, 179.9, 180.0])
def test_rotation_error_is_the_angle_turned(batch, deg):
    estimated = rotation_z(30 + deg).expand(*batch, 4, 4)
    error = metrics.relative_rotation_error_deg(estimated, rotation_z(30))
    assert error.shape == batch
    assert torch.allclose(error, torch.full(batch, deg, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("estimated", "deg"),
    [([1, 0, 0], 0.0), ([5, 0, 0], 0.0), ([1, 1, 0], 45.0), ([0, 0, 3], 90.0), ([-2, 0, 0], 180.0), ([0, 0, 0], 180.0)],
)
def test_translation_error_is_the_signed_angle_between_directions(estimated, deg):
    eye = torch.eye(4, dtype=torch.float64)
    error = metrics.relative_translation_error_deg(translated(eye, estimated), translated(eye, [0.01, 0, 0]))
    assert float(error) == pytest.approx(deg, abs=1e-9)


def test_any_direction_is_right_where_the_reference_has_no_baseline():
    eye = torch.eye(4, dtype=torch.float64)
    assert metrics.relative_translation_error_deg(translated(eye, [3, 2, 1]), eye) == 0
    almost = translated(eye, [0.01, 0, 0])
    assert metrics.relative_translation_error_deg(translated(eye, [0, 1, 0]), almost, min_baseline=0.1) == 0


def test_pairs_of_a_pose_that_was_not_estimated_have_infinite_errors():
    reference = cameras()
    estimated = reference.clone()
    estimated[2] = torch.nan
    rotation, translation = metrics.all_pairs_errors_deg(estimated, reference)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    missing = torch.tensor([2 in pair for pair in pairs])
    assert torch.equal(rotation.isinf(), missing)
    assert torch.equal(translation.isinf(), missing)
    assert rotation[~missing].max() < 1e-4
    assert translation[~missing].max() < 1e-4


def test_a_similarity_of_the_world_changes_no_error():
    reference, estimated = cameras(0), cameras(1)
    similarity = cameras(2, 1)[0]
    moved = estimated @ similarity
    moved[:, :3, 3] *= 7.0
    before, after = (metrics.all_pairs_errors_deg(poses, reference) for poses in (estimated, moved))
    assert torch.allclose(before[0], after[0])
    assert torch.allclose(before[1], after[1])


def test_inverted_or_mirrored_poses_are_not_forgiven():
    reference = cameras(n=8)
    inverted = torch.linalg.inv(reference)
    mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))
    for wrong in (inverted, mirror @ reference @ mirror):
        rotation, translation = metrics.all_pairs_errors_deg(wrong, reference)
        assert rotation.median() > 15
        assert translation.median() > 15


def test_accuracy_is_the_fraction_below_each_threshold():
    errors = torch.tensor([0.0, 4.0, 5.0, 14.0, 20.0, torch.inf])
    assert metrics.accuracy_at(errors, [5, 15, 30]) == pytest.approx((2 / 6, 4 / 6, 5 / 6))


def test_auc_equals_areas_worked_out_by_hand():
    # (0, 0) - (2, 1/4) - (4, 1/2) - (10, 1/2): two pairs of four below 10.
    errors = torch.tensor([4.0, torch.inf, 2.0, 12.0])
    assert metrics.auc(errors, 10) == pytest.approx((0.25 + 0.75 + 3.0) / 10)
    assert metrics.auc(errors, 2) == 0
    assert metrics.auc(torch.zeros(3), 1) == 1
    assert metrics.auc(torch.full((3,), torch.inf), 30) == 0


def test_auc_of_evenly_spread_errors_is_the_triangle():
    errors = torch.linspace(0, 20, 20001)
    assert metrics.auc(errors, 20) == pytest.approx(0.5, abs=1e-3)
    assert metrics.auc(errors, 10) == pytest.approx(0.25, abs=1e-3)


def test_mean_average_accuracy_asks_for_both_errors():
    rotation = torch.tensor([0.0, 0.0, 29.5, torch.inf])
    translation = torch.tensor([0.0, 14.5, 0.0, torch.inf])
    # The first counts at all 30 thresholds, the second from 15 on, the third at 30 only.
    expected = (30 + 16 + 1 + 0) / (4 * 30)
    assert metrics.mean_average_accuracy(rotation, translation) == pytest.approx(expected)


def test_focal_error_is_relative_and_infinite_without_an_estimate():
    error = metrics.focal_error(torch.tensor([110.0, 90.0, torch.nan]), torch.tensor([100.0, 100.0, 100.0]))
    assert torch.allclose(error, torch.tensor([0.1, 0.1, torch.inf]))


def test_roc_auc_counts_ordered_pairs_of_scores():
    assert metrics.roc_auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert metrics.roc_auc(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == pytest.approx((0.5 + 0 + 1 + 1) / 4)


def test_depth_errors_are_relative_and_after_one_scale():
    reference = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    depth = torch.tensor([2.0, 4.0, 6.0, 8.0, 15.0])
    assert torch.allclose(metrics.relative_depth_errors(depth, reference), torch.tensor([0, 0, 0, 0, 0.5]))
    assert metrics.relative_depth_errors(-depth, reference).isinf().all()
