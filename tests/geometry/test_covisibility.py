"""Which cameras see the same: known for cameras on a circle, side by side, and back to back."""

import math

import pytest
import torch

from dust3r_sfm.geometry.covisibility import focus_depths, frustum_overlaps


def look_from(center, target):
    """cam_from_world of a camera that looks from one point at another, y down."""
    center, target = (torch.tensor(x, dtype=torch.float64) for x in (center, target))
    z = torch.nn.functional.normalize(target - center, dim=0)
    x = torch.nn.functional.normalize(torch.linalg.cross(z, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)), dim=0)
    rotation = torch.stack([x, torch.linalg.cross(z, x), z])
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ center
    return pose


def cameras(poses):
    """K, sizes and poses of equal cameras of 90 degrees."""
    n = len(poses)
    K = torch.tensor([[50.0, 0, 50], [0, 50, 50], [0, 0, 1]], dtype=torch.float64)
    return K.expand(n, 3, 3), torch.full((n, 2), 100.0, dtype=torch.float64), torch.stack(poses)


def circle(angles_deg, radius=3.0, inward=True):
    points = [(radius * math.cos(math.radians(a)), radius * math.sin(math.radians(a)), 0.0) for a in angles_deg]
    return [look_from(p, (0, 0, 0) if inward else (2 * p[0], 2 * p[1], 0)) for p in points]


def test_cameras_on_a_circle_have_their_subject_in_its_middle():
    assert focus_depths(torch.stack(circle(range(0, 360, 40)))) == pytest.approx([3.0] * 9)


def test_a_camera_that_looks_away_is_given_the_others_depth():
    poses = [*circle([0, 50, 100]), *circle([200], inward=False)]
    assert focus_depths(torch.stack(poses))[3] == pytest.approx(3.0)


def test_cameras_that_all_look_the_same_way_see_ten_steps_ahead():
    poses = [look_from((0, 2.0 * i, 0), (0, 2.0 * i + 1, 0)) for i in range(5)]
    assert focus_depths(torch.stack(poses)) == pytest.approx([20.0] * 5)


def test_the_same_camera_sees_all_and_one_behind_it_nothing():
    poses = [*circle([0, 0]), *circle([0], inward=False)]
    overlaps = frustum_overlaps(*cameras(poses), torch.full((3,), 3.0, dtype=torch.float64))
    assert overlaps[0, 1] == overlaps[1, 0] == 1
    assert overlaps[0, 2] == overlaps[2, 0] == 0


def test_cameras_on_opposite_sides_see_other_faces_of_the_subject():
    overlaps = frustum_overlaps(*cameras(circle([0, 30, 180])), torch.full((3,), 3.0, dtype=torch.float64))
    assert overlaps[0, 1] > 0.6
    assert overlaps[0, 2] == 0


def test_cameras_side_by_side_share_what_their_distance_leaves():
    # 90 degrees at depth 10 see 20 across: moved by 5, three quarters are shared
    poses = [look_from((x, 0, 0), (x, 1, 0)) for x in (0.0, 5.0)]
    overlaps = frustum_overlaps(*cameras(poses), torch.full((2,), 10.0, dtype=torch.float64))
    assert overlaps[0, 1] == pytest.approx(0.75, abs=1e-6)
    assert overlaps[1, 0] == pytest.approx(0.75, abs=1e-6)
