"""The mean of two relative poses."""

import math

import pytest
import torch

from dust3r_sfm.geometry.averaging import mean_relative_pose
from dust3r_sfm.geometry.metrics import relative_rotation_error_deg, relative_translation_error_deg
from dust3r_sfm.geometry.transforms import camera_center, rigid_transform, rotation_from_rotvec


def random_poses(batch):
    generator = torch.Generator().manual_seed(0)
    rotvecs, centers = torch.randn((2, *batch, 3), generator=generator, dtype=torch.float64)
    return pose(rotation_from_rotvec(rotvecs), centers)


def pose(rotation, center):
    return rigid_transform(rotation, -(rotation @ center[..., None])[..., 0])


def turn(deg, axis):
    return rotation_from_rotvec(math.radians(deg) * torch.eye(3, dtype=torch.float64)[axis])


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("deg", [0.0, 5.0, 60.0])
def test_opposite_errors_average_to_the_true_pose_whatever_the_scales(batch, deg):
    true = random_poses(batch)
    rotation, center = true[..., :3, :3], camera_center(true)
    across = torch.linalg.cross(center, center.roll(1, dims=-1), dim=-1)
    axis = math.radians(deg) * torch.nn.functional.normalize(across, dim=-1)
    there, back = rotation_from_rotvec(axis), rotation_from_rotvec(-axis)
    first = pose(turn(deg, 1) @ rotation, 0.1 * (there @ center[..., None])[..., 0])
    second = pose(turn(-deg, 1) @ rotation, 7 * (back @ center[..., None])[..., 0])
    mean = mean_relative_pose(first, second)
    assert mean.shape == (*batch, 4, 4)
    assert (relative_rotation_error_deg(mean, true) < 1e-6).all()
    assert (relative_translation_error_deg(mean, true) < 1e-6).all()


def test_the_mean_is_half_way_and_does_not_depend_on_the_order():
    first = random_poses((5,))
    second = pose(turn(30, 0) @ first[:, :3, :3], camera_center(first))
    mean = mean_relative_pose(first, second)
    assert torch.allclose(mean, mean_relative_pose(second, first))
    for one in (first, second):
        error = relative_rotation_error_deg(mean, one)
        assert torch.allclose(error, torch.full_like(error, 15.0))


def test_the_mean_rotation_is_the_sum_projected_to_rotations():
    first, second = random_poses((2, 20))
    total = first[:, :3, :3] + second[:, :3, :3]
    u, _, vh = torch.linalg.svd(total)
    proper = torch.diag_embed(torch.stack([torch.ones(20), torch.ones(20), torch.det(u @ vh)], dim=-1).double())
    assert torch.allclose(mean_relative_pose(first, second)[:, :3, :3], u @ proper @ vh)


def test_where_one_estimate_is_missing_the_other_stays():
    first, second = random_poses((2, 3))
    nothing = torch.full_like(first[0], torch.nan)
    first[0] = second[1] = nothing
    first[2] = second[2] = nothing
    mean = mean_relative_pose(first, second)
    assert torch.equal(mean[0], second[0])
    assert torch.equal(mean[1], first[1])
    assert mean[2].isnan().all()
