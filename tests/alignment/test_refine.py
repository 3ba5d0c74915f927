"""Bundle adjustment on procedural rooms: it finds the truth, keeps what is held, never hands out something worse."""

import dataclasses

import numpy as np
import pycolmap
import pytest
import torch
from observed import observed_scene, perturbed
from procedural import make_scene

from dust3r_sfm.alignment import refine as module
from dust3r_sfm.alignment.refine import (
    RefineConfig,
    refine,
    support,
    with_distortion,
    with_shared_cameras,
    with_tracks,
    without_needless_distortion,
)
from dust3r_sfm.colmap_versions import is_valid
from dust3r_sfm.evaluate import evaluate_poses
from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.formats.colmap_scenes import scene_from_colmap

LOOSE = RefineConfig(max_error_px=40.0)


@pytest.fixture(scope="module")
def procedural():
    return make_scene(8, (96, 128), pairs=[])


@pytest.fixture(scope="module")
def observed(procedural):
    return observed_scene(procedural)


def poses_of(reconstruction):
    poses = {}
    for image in reconstruction.images.values():
        poses[image.name] = torch.eye(4, dtype=torch.float64)
        poses[image.name][:3] = torch.from_numpy(image.cam_from_world().matrix())
    return poses


def report(reconstruction, procedural):
    return evaluate_poses(poses_of(reconstruction), dict(zip(procedural.names, procedural.cam_from_world, strict=True)))


def focals(reconstruction):
    return np.array([camera.mean_focal_length() for _, camera in sorted(reconstruction.cameras.items())])


def test_a_pixel_of_noise_at_1024_leaves_poses_within_a_twentieth_of_a_degree(procedural):
    observed = observed_scene(procedural, num_points=500)
    given = colmap_from_scene(perturbed(observed))
    assert report(given, procedural).auc[5] < 0.6
    adjusted = refine(given, LOOSE)
    assert not adjusted.kept_input
    assert report(adjusted.reconstruction, procedural).auc[1] > 0.95
    assert adjusted.after.score > adjusted.before.score
    truth = float(observed.K[0, 0, 0] * 8)
    assert np.abs(focals(adjusted.reconstruction) / truth - 1).max() < 0.01


def test_one_camera_for_all_photos_of_a_size_is_at_least_as_accurate(procedural, observed):
    adjusted = refine(colmap_from_scene(perturbed(observed)), LOOSE).reconstruction
    shared = refine(with_shared_cameras(adjusted))
    assert not shared.kept_input
    assert shared.reconstruction.num_cameras() == 1
    assert shared.after.score > 0.98 * support(adjusted).score
    assert report(shared.reconstruction, procedural).auc[1] > 0.95
    assert with_shared_cameras(shared.reconstruction) is None


def test_wrong_observations_are_dropped_and_do_not_bend_the_poses(procedural, observed):
    tracks = observed.tracks
    wrong = torch.rand(len(tracks.keypoints), generator=torch.Generator().manual_seed(1)) < 0.15
    keypoints = torch.where(wrong[:, None], tracks.keypoints + 60, tracks.keypoints)
    spoilt = dataclasses.replace(observed, tracks=dataclasses.replace(tracks, keypoints=keypoints))
    adjusted = refine(colmap_from_scene(spoilt))
    assert report(adjusted.reconstruction, procedural).auc[1] > 0.93
    assert adjusted.reconstruction.compute_num_observations() <= int((~wrong).sum())


def test_known_poses_and_intrinsics_stay(observed):
    given = colmap_from_scene(perturbed(observed, angle_deg=0.5, shift=0.02))
    before = poses_of(given)
    held, fixed = observed.names[:2], observed.names[2]
    adjusted = refine(given, LOOSE, constant_poses=held, constant_intrinsics=[fixed])
    after = poses_of(adjusted.reconstruction)
    assert not adjusted.kept_input
    assert all(torch.allclose(before[name], after[name], atol=1e-12) for name in held)
    assert (before[observed.names[5]] - after[observed.names[5]]).norm() > 1e-3
    assert focals(adjusted.reconstruction)[2] == focals(given)[2]


def test_a_known_focal_may_be_of_any_lens(observed, monkeypatch):
    monkeypatch.setattr("dust3r_sfm.alignment.refine.FOCAL_BOUNDS", (10.0, 20.0))
    given = colmap_from_scene(perturbed(observed, angle_deg=0.5, shift=0.02))
    assert not refine(given, LOOSE, constant_intrinsics=observed.names).kept_input
    assert "left all bounds" in refine(given, LOOSE).reason


def test_an_adjustment_that_ends_worse_keeps_the_input(observed, monkeypatch):
    given = colmap_from_scene(observed)
    poses = poses_of(given)

    def diverge(reconstruction, *_):
        for frame in reconstruction.frames.values():
            frame.rig_from_world.translation[:] = frame.rig_from_world.translation + 5.0 * frame.frame_id
        return ""

    monkeypatch.setattr(module, "_adjust", diverge)
    adjusted = refine(given)
    assert adjusted.kept_input
    assert "observations were explained afterwards" in adjusted.reason
    assert adjusted.reconstruction is given
    assert all(torch.equal(pose, poses[name]) for name, pose in poses_of(given).items())
    assert adjusted.after == adjusted.before


def test_a_solver_that_finds_nothing_keeps_the_input(observed, monkeypatch):
    monkeypatch.setattr(module, "_adjust", lambda *_: "the solver found no solution")
    given = colmap_from_scene(observed)
    adjusted = refine(given)
    assert adjusted.reconstruction is given
    assert adjusted.reason == "the solver found no solution"


def test_too_few_points_are_no_reason_to_move_cameras(procedural):
    adjusted = refine(colmap_from_scene(observed_scene(procedural, num_points=2)))
    assert adjusted.kept_input
    assert "too few" in adjusted.reason


def test_a_focal_that_runs_away_is_set_back_to_its_prior(observed, monkeypatch):
    monkeypatch.setattr(module, "MAX_FOCAL_RATIO", 1.05)
    given = colmap_from_scene(observed)
    wrong = list(given.camera(1).params)
    wrong[0] *= 1.3
    given.camera(1).params = wrong
    adjusted = refine(given, LOOSE)
    assert adjusted.reconstruction.camera(1).mean_focal_length() == wrong[0]


def test_support_counts_what_two_images_or_more_see_within_the_limit(observed):
    model = colmap_from_scene(observed)
    counted = support(model, RefineConfig(max_error_px=2.0))
    tracks = observed.tracks
    # of two-dimensional Gaussian noise of 1 px, 1 - exp(-2) lies within 2 px
    assert counted.observations == pytest.approx(0.8647 * len(tracks.keypoints), rel=0.08)
    assert counted.images == 8
    assert 0 < counted.score < counted.observations
    far = support(model, RefineConfig(max_error_px=1e-3))
    assert far.images == 0
    assert counted.explains_more_than(far)
    assert not far.explains_more_than(counted)


def test_evidence_is_less_where_tracks_are_split_and_errors_larger(procedural):
    def counted(noise_px):
        return support(colmap_from_scene(observed_scene(procedural, noise_px=noise_px)))

    exact, noisy = counted(0.0), counted(1.0)
    # of the two numbers of each observation, points that are exact leave all but their own three unverified
    assert exact.evidence == pytest.approx(exact.observations - 1.5 * exact.points, rel=1e-3)
    assert noisy.evidence < 0.85 * exact.evidence
    assert noisy.score > 0.85 * exact.score  # it hardly sees the noise
    whole = colmap_from_scene(observed_scene(procedural, noise_px=0.0))
    for point_id in sorted(whole.points3D)[::2]:  # every other point becomes two of half its observations
        point = whole.point3D(point_id)
        elements = [(e.image_id, e.point2D_idx) for e in point.track.elements]
        if len(elements) >= 4:
            xyz = point.xyz.copy()
            whole.delete_point3D(point_id)
            for half in (elements[::2], elements[1::2]):
                whole.add_point3D(xyz, pycolmap.Track([pycolmap.TrackElement(*e) for e in half]))
    split = support(whole)
    assert split.observations == exact.observations
    assert split.evidence < exact.evidence - 10
    assert exact.explains_more_than(split)


def test_lens_distortion_is_found_and_left_out_where_it_bends_nothing(procedural, observed):
    bent = bend(observed, 0.1)
    model = colmap_from_scene(bent)
    with_distortion(model, set(observed.names))
    adjusted = refine(model, LOOSE).reconstruction
    assert [float(camera.params[3]) for camera in adjusted.cameras.values()] == pytest.approx([0.1] * 8, abs=0.02)
    without_needless_distortion(adjusted, set(observed.names))
    assert {camera.model for camera in adjusted.cameras.values()} == {pycolmap.CameraModelId.SIMPLE_RADIAL}
    straight = colmap_from_scene(observed)
    with_distortion(straight, set(observed.names))
    without_needless_distortion(straight, set(observed.names))
    assert {camera.model for camera in straight.cameras.values()} == {pycolmap.CameraModelId.SIMPLE_PINHOLE}


def bend(scene, k1):
    """The scene's keypoints as a lens of SIMPLE_RADIAL distortion k1 would show them."""
    tracks, scale = scene.tracks, 1 / scene.net_from_img[0, 0, 0]
    focal, center = scene.K[0, 0, 0] * scale, scene.K[0, :2, 2] * scale
    rays = (tracks.keypoints - center) / focal
    keypoints = rays * (1 + k1 * rays.square().sum(1, keepdim=True)) * focal + center
    return dataclasses.replace(scene, tracks=dataclasses.replace(tracks, keypoints=keypoints.float()))


def test_tracks_are_added_with_keypoints_of_their_own(observed):
    model = colmap_from_scene(observed)
    more = with_tracks(model, observed.tracks, range(1, 9))
    assert more.num_points3D() == 2 * model.num_points3D()
    assert more.compute_num_observations() == 2 * model.compute_num_observations()
    assert is_valid(more)
    more.update_point_3d_errors()
    assert more.compute_mean_reprojection_error() == pytest.approx(model.compute_mean_reprojection_error(), rel=1e-6)


def test_a_refined_model_becomes_a_scene_of_network_images_again(procedural, observed):
    views = [
        dataclasses.replace(view, original_size=size, net_from_img=net_from_img)
        for view, size, net_from_img in zip(
            procedural.views, observed.original_sizes, observed.net_from_img, strict=True
        )
    ]
    half = {
        name: (depth / 2, torch.ones_like(depth)) for name, depth in zip(observed.names, observed.depth, strict=True)
    }
    del half[observed.names[3]]
    scene = scene_from_colmap(colmap_from_scene(observed), views, half)
    assert scene.names == observed.names
    torch.testing.assert_close(scene.K, observed.K.double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(scene.cam_from_world, observed.cam_from_world.double(), atol=1e-6, rtol=0)
    assert torch.equal(scene.tracks.keypoints, observed.tracks.keypoints)
    torch.testing.assert_close(scene.depth[0], observed.depth[0], rtol=0.02, atol=0)  # scaled to the points
    assert (scene.depth[3] == 0).all()
    assert (scene.confidence[3] == 0).all()
