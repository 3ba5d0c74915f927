import pytest
import torch

from dust3r_sfm.geometry.camera import K_from_focal, project, unproject
from dust3r_sfm.geometry.registration import relative_pose_from_pointmaps
from dust3r_sfm.geometry.resection import absolute_pose, absolute_pose_unknown_focal, relative_pose_from_pointmap
from dust3r_sfm.geometry.transforms import (
    camera_center,
    inverse,
    rigid_transform,
    rotation_angle_deg,
    rotation_from_rotvec,
    transform_points,
)

SIZE = (240, 320)
K = K_from_focal(torch.tensor(300.0, dtype=torch.float64), torch.tensor([160.0, 120.0]))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


CAM_FROM_WORLD = rigid_transform(rotation_from_rotvec(vector(0.1, 0.3, -0.2)), vector(0.5, 0.2, 0.1))


def observations(n, noise_px=0.0, outlier_share=0.0, planar=False):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(n, 3, generator=generator, dtype=torch.float64) * vector(4, 3, 4) + vector(-2, -1.5, 3)
    if planar:
        points[:, 2] = 4
    keypoints = project(K, transform_points(CAM_FROM_WORLD, points))
    keypoints = keypoints + noise_px * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    num_outliers = int(outlier_share * n)
    keypoints[:num_outliers] = 240 * torch.rand(num_outliers, 2, generator=generator, dtype=torch.float64)
    return points, keypoints


def assert_pose_near(pose, expected, max_deg, max_distance):
    assert rotation_angle_deg(pose[:3, :3], expected[:3, :3]) < max_deg
    assert torch.linalg.vector_norm(camera_center(pose) - camera_center(expected)) < max_distance


def test_exact_points_give_the_exact_pose():
    found = absolute_pose(*observations(50), K)
    assert found.inliers.all()
    torch.testing.assert_close(found.cam_from_world, CAM_FROM_WORLD, atol=1e-8, rtol=0)


def test_noise_and_seven_tenths_of_outliers_move_the_pose_little():
    found = absolute_pose(*observations(1000, noise_px=0.5, outlier_share=0.7), K, max_error_px=2.0)
    assert_pose_near(found.cam_from_world, CAM_FROM_WORLD, max_deg=0.1, max_distance=0.01)
    assert found.inliers[:700].float().mean() < 0.02
    assert found.inliers[700:].float().mean() > 0.98


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_pose_follows_the_unit_of_the_scene(factor):
    points, keypoints = observations(50, noise_px=1.0)
    expected = absolute_pose(points, keypoints, K).cam_from_world.clone()
    expected[:3, 3] *= factor
    found = absolute_pose(factor * points, keypoints, K)
    torch.testing.assert_close(found.cam_from_world, expected, atol=1e-6 * max(1, factor), rtol=0)


@pytest.mark.parametrize("planar", [False, True])
def test_the_focal_is_found_with_the_pose(planar):
    points, keypoints = observations(500, noise_px=0.2, outlier_share=0.3, planar=planar)
    found, focal = absolute_pose_unknown_focal(points, keypoints, SIZE, max_error_px=2.0)
    assert focal == pytest.approx(300, rel=0.02)
    assert_pose_near(found.cam_from_world, CAM_FROM_WORLD, max_deg=0.6, max_distance=0.1)
    assert found.inliers[150:].float().mean() > 0.95


def test_the_same_points_give_the_same_pose_and_keep_their_dtype():
    points, keypoints = (x.float() for x in observations(100, noise_px=1.0, outlier_share=0.4))
    first, second = (absolute_pose(points, keypoints, K.float()) for _ in range(2))
    assert first.cam_from_world.dtype == torch.float32
    assert torch.equal(first.cam_from_world, second.cam_from_world)


def test_points_that_are_not_finite_are_left_out():
    points, keypoints = observations(30)
    points[3, 0], keypoints[7, 1] = torch.nan, torch.inf
    found = absolute_pose(points, keypoints, K)
    assert found.inliers.logical_not().nonzero()[:, 0].tolist() == [3, 7]
    torch.testing.assert_close(found.cam_from_world, CAM_FROM_WORLD, atol=1e-8, rtol=0)


@pytest.mark.parametrize("case", ["none", "three", "one repeated", "not finite", "random", "behind the camera"])
def test_without_enough_agreeing_points_there_is_no_pose(case, capfd):
    points, keypoints = observations(200)
    generator = torch.Generator().manual_seed(1)
    if case == "not finite":
        points = points * torch.nan
    if case == "random":
        keypoints = 240 * torch.rand(200, 2, generator=generator, dtype=torch.float64)
    if case == "behind the camera":
        points = 10 * torch.rand(200, 3, generator=generator, dtype=torch.float64) * vector(1, 1, -1) - vector(
            5, 5, 0.2
        )
        keypoints = project(K, points)
    chosen = {"none": [], "three": range(3), "one repeated": [0] * 50}.get(case, range(200))
    chosen = torch.tensor(list(chosen), dtype=torch.int64)
    assert absolute_pose(points[chosen], keypoints[chosen], K, max_error_px=1.0) is None
    assert absolute_pose_unknown_focal(points[chosen], keypoints[chosen], SIZE, max_error_px=1.0) is None
    assert capfd.readouterr() == ("", "")


def wavy_pointmap(h=60, w=80):
    """Points in camera 1 at its pixels' centres, and its intrinsics."""
    generator = torch.Generator().manual_seed(3)
    K1 = K_from_focal(torch.tensor(75.0, dtype=torch.float64), torch.tensor([w / 2, h / 2]))
    return unproject(K1, 2 + 2 * torch.rand(h, w, generator=generator, dtype=torch.float64)), K1


def test_the_pose_comes_from_the_pointmap_of_the_other_image():
    pointmap_in_cam1, K1 = wavy_pointmap()
    cam1_from_cam0 = CAM_FROM_WORLD
    pointmap1_in_cam0 = transform_points(inverse(cam1_from_cam0), pointmap_in_cam1.flatten(0, 1)).unflatten(0, (60, 80))
    confidence1 = torch.ones(60, 80)
    exact = relative_pose_from_pointmap(pointmap1_in_cam0, confidence1, K1)
    torch.testing.assert_close(exact, cam1_from_cam0, atol=1e-6, rtol=0)
    pointmap1_in_cam0[:20] = 5.0
    pointmap1_in_cam0[20, 3] = torch.nan
    confidence1[:20] = 0.5
    torch.testing.assert_close(
        relative_pose_from_pointmap(pointmap1_in_cam0, confidence1, K1), exact, atol=1e-6, rtol=0
    )


def test_a_pointmap_that_fits_no_camera_has_no_pose():
    _, K1 = wavy_pointmap()
    noise = torch.randn(60, 80, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative_pose_from_pointmap(noise, torch.ones(60, 80), K1, max_error_px=0.5) is None
    assert relative_pose_from_pointmap(noise, torch.zeros(60, 80), K1) is None
    assert relative_pose_from_pointmap(noise * torch.nan, torch.ones(60, 80), K1) is None
    assert relative_pose_from_pointmap(noise[:0], torch.ones(0, 80), K1) is None


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("outlier_share", [0.0, 0.4])
def test_two_pointmaps_of_the_same_pixels_give_pose_and_scale(batch, outlier_share):
    pointmap_in_cam1, _ = wavy_pointmap()
    pointmap_in_cam0 = transform_points(inverse(CAM_FROM_WORLD), pointmap_in_cam1.flatten(0, 1)).unflatten(0, (60, 80))
    generator = torch.Generator().manual_seed(0)
    outlying = torch.rand(60, 80, generator=generator) < outlier_share
    pointmap_in_cam0[outlying] += 3 * torch.rand(int(outlying.sum()), 3, generator=generator, dtype=torch.float64)
    weights = torch.ones(*batch, 60, 80).double()
    pointmap_in_cam0, pointmap_in_cam1 = (
        p.expand(*batch, 60, 80, 3).clone() for p in (pointmap_in_cam0, pointmap_in_cam1)
    )
    weights[..., 0, 0], pointmap_in_cam0[..., 0, 0, :] = 0, torch.nan
    cam1_from_cam0, scale = relative_pose_from_pointmaps(pointmap_in_cam0, 2.5 * pointmap_in_cam1, weights)
    torch.testing.assert_close(scale, torch.full(batch, 2.5, dtype=torch.float64))
    torch.testing.assert_close(cam1_from_cam0, CAM_FROM_WORLD.expand(*batch, 4, 4))


def test_two_pointmaps_without_weight_have_no_pose():
    pointmap, _ = wavy_pointmap()
    cam1_from_cam0, scale = relative_pose_from_pointmaps(pointmap, pointmap, torch.zeros(60, 80).double())
    assert cam1_from_cam0[:3].isnan().all()
    assert scale.isnan()
