import pytest
import torch

from dust3r_sfm.geometry import epipolar
from dust3r_sfm.geometry.camera import K_from_focal, project
from dust3r_sfm.geometry.transforms import (
    inverse,
    rigid_transform,
    rotation_angle_deg,
    rotation_from_rotvec,
    transform_points,
)

K0 = K_from_focal(torch.tensor(300.0, dtype=torch.float64), torch.tensor([160.0, 120.0]))
K1 = K_from_focal(torch.tensor(250.0, dtype=torch.float64), torch.tensor([150.0, 130.0]))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


CAM1_FROM_CAM0 = rigid_transform(rotation_from_rotvec(vector(0.1, 0.3, -0.2)), vector(0.6, 0.0, 0.8))


def points_in_front(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 3, generator=generator, dtype=torch.float64) * vector(4, 3, 4) + vector(-2, -1.5, 3)


def matches(n, noise_px=0.0, outlier_share=0.0):
    generator = torch.Generator().manual_seed(1)
    points = points_in_front(n)
    keypoints0, keypoints1 = project(K0, points), project(K1, transform_points(CAM1_FROM_CAM0, points))
    keypoints1 = keypoints1 + noise_px * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    num_outliers = int(outlier_share * n)
    keypoints1[:num_outliers] = 300 * torch.rand(num_outliers, 2, generator=generator, dtype=torch.float64)
    return keypoints0, keypoints1


def assert_pose_near(pose, expected, max_deg):
    assert rotation_angle_deg(pose[:3, :3], expected[:3, :3]) < max_deg
    cosine = torch.nn.functional.cosine_similarity(pose[:3, 3], expected[:3, 3], dim=0)
    assert torch.rad2deg(torch.arccos(cosine.clamp(max=1))) < max_deg


def test_exact_matches_give_the_exact_pose_with_a_unit_translation():
    found = epipolar.relative_pose_from_matches(*matches(100), K0, K1)
    assert found.inliers.all()
    torch.testing.assert_close(found.cam1_from_cam0, CAM1_FROM_CAM0, atol=1e-6, rtol=0)


def test_noise_and_half_of_outliers_move_the_pose_little():
    keypoints0, keypoints1 = matches(500, noise_px=0.5, outlier_share=0.5)
    found = epipolar.relative_pose_from_matches(keypoints0, keypoints1, K0, K1)
    assert_pose_near(found.cam1_from_cam0, CAM1_FROM_CAM0, max_deg=1.5)
    assert found.inliers[:250].float().mean() < 0.15
    assert found.inliers[250:].float().mean() > 0.95


def test_the_same_matches_give_the_same_pose():
    keypoints = matches(200, noise_px=0.5, outlier_share=0.4)
    first, second = (epipolar.relative_pose_from_matches(*keypoints, K0, K1) for _ in range(2))
    assert torch.equal(first.cam1_from_cam0, second.cam1_from_cam0)


def test_matches_that_are_not_finite_are_left_out_and_the_dtype_stays():
    keypoints0, keypoints1 = (k.float() for k in matches(100))
    keypoints0[3, 0], keypoints1[7] = torch.nan, torch.inf
    found = epipolar.relative_pose_from_matches(keypoints0, keypoints1, K0.float(), K1.float())
    assert found.cam1_from_cam0.dtype == torch.float32
    assert found.inliers.logical_not().nonzero()[:, 0].tolist() == [3, 7]


@pytest.mark.parametrize("case", ["none", "five", "one repeated", "random"])
def test_without_enough_agreeing_matches_there_is_no_pose(case, capfd):
    keypoints0, keypoints1 = matches(300)
    chosen = {"none": [], "five": range(5), "one repeated": [0] * 50, "random": range(300)}[case]
    if case == "random":
        keypoints1 = 300 * torch.rand(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = torch.tensor(list(chosen), dtype=torch.int64)
    assert epipolar.relative_pose_from_matches(keypoints0[chosen], keypoints1[chosen], K0, K1) is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_matches_satisfy_the_matrices_of_their_pose(batch):
    points = points_in_front(*batch, 20)
    essential = epipolar.essential_from_pose(CAM1_FROM_CAM0.expand(*batch, 4, 4))
    rays0, rays1 = points, transform_points(CAM1_FROM_CAM0, points)
    assert (rays1 * (rays0 @ essential.mT)).sum(-1).abs().max() < 1e-10
    fundamental = epipolar.fundamental_from_essential(essential, K0, K1)
    keypoints0, keypoints1 = project(K0, rays0), project(K1, rays1)
    assert epipolar.sampson_errors_px(fundamental, keypoints0, keypoints1).max() < 1e-9


def test_the_sampson_error_is_the_shift_off_the_epipolar_line_shared_by_both_views():
    """A sideways stereo pair has rows for epipolar lines: a shift of d rows is d / sqrt(2) from the nearest fit."""
    sideways = rigid_transform(torch.eye(3), torch.tensor([1.0, 0.0, 0.0])).double()
    fundamental = epipolar.fundamental_from_essential(epipolar.essential_from_pose(sideways), K0, K0)
    errors = epipolar.sampson_errors_px(fundamental, vector(10, 50)[None], vector(3, 52)[None])
    assert errors.item() == pytest.approx(2 / 2**0.5)


def cameras(v):
    generator = torch.Generator().manual_seed(2)
    rotation = rotation_from_rotvec(0.1 * torch.randn(v, 3, generator=generator, dtype=torch.float64))
    return rigid_transform(rotation, torch.randn(v, 3, generator=generator, dtype=torch.float64))


def observe(cam_from_world, points):
    """Keypoints `*b v 2` of points `*b 3` in all cameras."""
    flat = torch.stack([project(K0, transform_points(pose, points.reshape(-1, 3))) for pose in cam_from_world], dim=1)
    return flat.reshape(*points.shape[:-1], len(cam_from_world), 2)


@pytest.mark.parametrize("batch", [(), (1,), (4, 3)])
@pytest.mark.parametrize("num_views", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_are_triangulated_from_their_keypoints(batch, num_views, dtype):
    cam_from_world, points = cameras(num_views), points_in_front(*batch) + vector(0, 0, 5)
    keypoints = observe(cam_from_world, points)
    found = epipolar.triangulate(K0.to(dtype).expand(num_views, 3, 3), cam_from_world.to(dtype), keypoints.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, points.to(dtype), atol=1e-2 if dtype == torch.float32 else 1e-9, rtol=0)


def test_triangulation_follows_the_world_however_far_its_origin():
    cam_from_world, points = cameras(3), points_in_front(10) + vector(0, 0, 5)
    keypoints = observe(cam_from_world, points)
    old_from_new = rigid_transform(rotation_from_rotvec(vector(1, 2, 3)), vector(5e4, -3e5, 100))
    found = epipolar.triangulate(K0.expand(3, 3, 3), cam_from_world @ old_from_new, keypoints)
    torch.testing.assert_close(found, transform_points(inverse(old_from_new), points), atol=1e-4, rtol=0)


def test_views_of_weight_zero_are_left_out_and_one_view_is_not_enough():
    cam_from_world, points = cameras(4), points_in_front(3) + vector(0, 0, 5)
    keypoints, weights = observe(cam_from_world, points), torch.ones(3, 4)
    keypoints[0, 1], weights[0, 1] = torch.nan, 0
    keypoints[1, 2], weights[1, 2] = 1000, 0
    weights[2, 1:] = 0
    found = epipolar.triangulate(K0.expand(4, 3, 3), cam_from_world, keypoints, weights)
    torch.testing.assert_close(found[:2], points[:2])
    assert found[2].isnan().all()


def test_reprojection_errors_are_pixels_and_infinite_behind_the_camera():
    points = points_in_front(3)
    keypoints = project(K0, points) + vector(3, 4)
    points[2] *= -1
    errors = epipolar.reprojection_errors(K0, torch.eye(4).double(), points, keypoints)
    assert errors.tolist() == pytest.approx([5, 5, float("inf")])
