import dataclasses
import shutil

import numpy as np
import pycolmap
import pytest
import torch
from aligned import true_scene
from PIL import Image
from procedural import make_scene

from dust3r_sfm.alignment.tracks import build_tracks
from dust3r_sfm.colmap_versions import solved
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.colmap import colmap_from_scene, read_colmap, write_colmap
from dust3r_sfm.match_dense import match_dense
from dust3r_sfm.views import load_view

TURNS_TO_STORED = {1: 0, 6: 1, 3: 2, 8: -1}
"""Quarter turns, anticlockwise, from upright pixels to the stored ones, by EXIF orientation."""


@pytest.fixture(scope="module")
def procedural():
    return make_scene(4, (48, 64), seed=3, vary_focal=True, mix_orientations=True)


@pytest.fixture(scope="module")
def scene(procedural):
    built = build_tracks(
        true_scene(procedural), match_dense(procedural.views, procedural.predictions), procedural.views
    )
    return dataclasses.replace(built, names=("a.jpg", "sub/b.jpg", "sub/deep er/c.jpg", "ü.png"))


def store(view, orientation, path):
    """Saves a view's image as a camera held in another way would, and loads it again."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.rot90(view.image.numpy(), TURNS_TO_STORED[orientation])
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    return load_view(path, max(view.size))


@pytest.mark.parametrize("orientation", TURNS_TO_STORED)
def test_a_pixel_s_point_projects_to_its_centre_in_the_stored_file(procedural, orientation, tmp_path):
    """The truth is the rays that were cast through pixel centres, and array indices: no formula of a camera."""
    views = [store(view, orientation, tmp_path / f"{i}.png") for i, view in enumerate(procedural.views)]
    for view, original in zip(views, procedural.views, strict=True):
        assert torch.equal(view.image, original.image)
    net_from_img = torch.stack([view.net_from_img for view in views])
    scene = true_scene(procedural, net_from_img, tuple(view.original_size for view in views))
    model = colmap_from_scene(scene)
    for index, points in enumerate(procedural.points_in_world):
        stored_points = np.rot90(points.numpy(), TURNS_TO_STORED[orientation])
        image = model.images[index + 1]
        assert (model.cameras[image.camera_id].height, model.cameras[image.camera_id].width) == stored_points.shape[:2]
        for row, column in ((0, 0), (0, 40), (40, 0), (17, 23), (-1, -1)):
            expected = np.array([column % stored_points.shape[1], row % stored_points.shape[0]]) + 0.5
            np.testing.assert_allclose(image.project_point(stored_points[row, column]), expected, atol=1e-3)


def test_cropped_and_scaled_files_have_their_pixels_where_the_crop_puts_them(procedural):
    """Stored at thrice the size, with 5 columns cut off to the left and 7 rows above."""
    img_from_net = torch.tensor([[3.0, 0, 5], [0, 3, 7], [0, 0, 1]], dtype=torch.float64)
    scene = true_scene(procedural, torch.linalg.inv(img_from_net).repeat(4, 1, 1), ((205, 160),) * 4)
    image = colmap_from_scene(scene).images[1]
    # pixel 10 of the network covers 30 to 33 of the cut file: its centre is 31.5
    expected = [31.5 + 5, 61.5 + 7]
    np.testing.assert_allclose(image.project_point(procedural.points_in_world[0][20, 10].double()), expected, atol=1e-3)


def test_unequal_scales_make_a_pinhole_and_equal_ones_a_simple_pinhole(procedural):
    scales = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64), torch.tensor([0.5, 0.501, 1.0], dtype=torch.float64)
    models = [colmap_from_scene(true_scene(procedural, torch.diag(s).repeat(4, 1, 1))) for s in scales]
    assert [m.cameras[1].model.name for m in models] == ["SIMPLE_PINHOLE", "PINHOLE"]
    for model in models:
        expected = procedural.K[0, [0, 1, 0, 1], [0, 1, 2, 2]].double() / scales[models.index(model)][[0, 1, 0, 1]]
        np.testing.assert_allclose(model.cameras[1].calibration_matrix()[[0, 1, 0, 1], [0, 1, 2, 2]], expected)


def test_poses_names_sizes_and_tracks_come_back(scene, tmp_path):
    write_colmap(scene, tmp_path / "sparse" / "0")
    model = read_colmap(tmp_path / "sparse" / "0")
    assert sorted(path.name for path in (tmp_path / "sparse" / "0").iterdir()) == [
        *("cameras.bin", "frames.bin", "images.bin", "points3D.bin", "rigs.bin")
    ]
    assert [path.name for path in (tmp_path / "sparse").iterdir()] == ["0"]
    assert sorted(model.images) == [1, 2, 3, 4]
    assert model.num_points3D() == len(scene.tracks.errors)
    for index, name in enumerate(scene.names):
        image = model.images[index + 1]
        assert image.name == name
        assert (image.camera.width, image.camera.height) == scene.original_sizes[index]
        np.testing.assert_allclose(image.cam_from_world().matrix(), scene.cam_from_world[index, :3], atol=1e-6)
    assert model.compute_mean_track_length() == pytest.approx(len(scene.tracks.keypoints) / len(scene.tracks.errors))


def test_observations_belong_to_their_points(scene):
    """COLMAP's own reprojection errors are the tracks', point by point, and so are colours."""
    model = colmap_from_scene(scene)
    errors = [model.points3D[i + 1].error for i in range(len(scene.tracks.errors))]
    np.testing.assert_allclose(errors, scene.tracks.errors, atol=1e-3)
    assert np.median(errors) < 0.1
    for i in (0, 100, len(errors) - 1):
        point = model.points3D[i + 1]
        assert point.color.tolist() == scene.tracks.colors[i].tolist()
        here = scene.tracks.point_indices == i
        found = {e.image_id: model.images[e.image_id].points2D[e.point2D_idx].xy for e in point.track.elements}
        for image_id, xy in found.items():
            keypoint = scene.tracks.keypoints[here & (scene.tracks.image_indices == image_id - 1)]
            np.testing.assert_allclose(xy, keypoint[0])
        assert len(found) == int(here.sum())


def test_a_scene_without_tracks_is_a_model_without_points(procedural, tmp_path):
    write_colmap(true_scene(procedural), tmp_path)
    model = read_colmap(tmp_path)
    assert (model.num_reg_images(), model.num_points3D()) == (4, 0)


def test_shared_cameras_are_one_for_each_stored_size(scene):
    model = colmap_from_scene(scene, shared_camera=True)
    assert len(model.cameras) == 2
    focal = 2 * scene.K[[0, 2], 0, 0].mean().item()
    assert model.cameras[1].focal_length == pytest.approx(focal, rel=1e-6)
    assert [model.images[i].camera_id for i in (1, 2, 3, 4)] == [1, 2, 1, 2]


def test_images_of_equal_intrinsics_share_a_camera_in_what_is_written(scene, tmp_path):
    K = scene.K.clone()
    K[2] = K[0]
    write_colmap(dataclasses.replace(scene, K=K), tmp_path)
    model = read_colmap(tmp_path)
    assert [model.images[i].camera_id for i in (1, 2, 3, 4)] == [1, 2, 1, 3]
    assert len(colmap_from_scene(dataclasses.replace(scene, K=K)).cameras) == 4


def test_text_models_hold_the_same(scene, tmp_path):
    scene = dataclasses.replace(scene, names=("a.jpg", "b.jpg", "sub/c.jpg", "ü.png"))
    write_colmap(scene, tmp_path, text=True)
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    model = read_colmap(tmp_path)
    assert [model.images[i].name for i in sorted(model.images)] == list(scene.names)
    assert model.num_points3D() == len(scene.tracks.errors)


def test_names_with_blanks_cannot_be_written_as_text(scene, tmp_path):
    with pytest.raises(InputError, match=r"'sub/deep er/c\.jpg'"):
        write_colmap(scene, tmp_path / "0", text=True)
    assert not list(tmp_path.iterdir())


def test_a_second_model_replaces_the_first_and_leaves_other_files(scene, procedural, tmp_path):
    write_colmap(dataclasses.replace(scene, names=("a", "b", "c", "d")), tmp_path, text=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path.parent / f".{tmp_path.name}.tmp" / "of a killed run").mkdir(parents=True)
    write_colmap(true_scene(procedural), tmp_path)
    assert not (tmp_path.parent / f".{tmp_path.name}.tmp").exists()
    assert not (tmp_path / "images.txt").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert read_colmap(tmp_path).num_points3D() == 0


@pytest.mark.parametrize("part", ["cameras", "images", "points3D", "rigs", "frames"])
@pytest.mark.parametrize("fault", ["cut", "garbage", "empty", "long"])
def test_broken_files_are_named(scene, part, fault, tmp_path):
    write_colmap(scene, tmp_path)
    path = tmp_path / f"{part}.bin"
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[: len(data) // 3], "garbage": b"\xff" * 99, "empty": b"", "long": data + b"00"}[fault]
    )
    with pytest.raises(InputError, match=rf"{part}\.bin is cut short or broken"):
        read_colmap(tmp_path)


def test_models_that_are_missing_or_contradict_themselves_are_named(scene, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_colmap(tmp_path / "none")
    with pytest.raises(InputError, match=r"expected cameras, images and points3D"):
        read_colmap(tmp_path)
    write_colmap(scene, tmp_path / "whole")
    write_colmap(dataclasses.replace(scene, tracks=None), tmp_path / "bare")
    shutil.copy(tmp_path / "bare" / "images.bin", tmp_path / "whole" / "images.bin")
    with pytest.raises(InputError, match="is broken"):
        read_colmap(tmp_path / "whole")


def test_models_of_three_files_are_read(scene, tmp_path):
    write_colmap(scene, tmp_path)
    (tmp_path / "rigs.bin").unlink()
    (tmp_path / "frames.bin").unlink()
    assert read_colmap(tmp_path).num_images() == 4


@pytest.mark.parametrize("name", ["points3D.bin", "images.txt"])
def test_files_cut_short_by_the_disk_are_an_oserror_and_keep_the_old_model(
    scene, procedural, name, tmp_path, monkeypatch
):
    write_colmap(true_scene(procedural), tmp_path)

    def cut(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])

    class Cut(pycolmap.Reconstruction):
        def write(self, folder):
            super().write(folder)
            cut(folder) if name.endswith(".bin") else None

        def write_text(self, folder):
            super().write_text(folder)
            cut(folder) if name.endswith(".txt") else None

    monkeypatch.setattr(pycolmap, "Reconstruction", Cut)
    with pytest.raises(OSError, match="is the disk full"):
        write_colmap(dataclasses.replace(scene, names=("a", "b", "c", "d")), tmp_path, text=True)
    monkeypatch.undo()
    assert read_colmap(tmp_path).num_points3D() == 0
    assert len(list(tmp_path.iterdir())) == 5


def test_cameras_that_are_not_finite_are_refused(procedural):
    scene = true_scene(procedural)
    with pytest.raises(ValueError, match="not finite"):
        colmap_from_scene(dataclasses.replace(scene, cam_from_world=scene.cam_from_world * torch.nan))


def test_bundle_adjustment_takes_a_perturbed_model_back_to_the_truth(procedural, scene):
    """Poses a degree and points 2 % off: the tracks alone lead back, so another's solver reads them as we mean them."""
    truth = colmap_from_scene(scene)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(scene.tracks.points_in_world.shape, generator=generator) * 0.05
    turn = torch.tensor(pycolmap.Rotation3d(np.array([0.01, -0.015, 0.005])).matrix(), dtype=torch.float32)
    poses = scene.cam_from_world.clone()
    poses[2:, :3] = turn @ poses[2:, :3]
    tracks = dataclasses.replace(scene.tracks, points_in_world=scene.tracks.points_in_world + noise)
    model = colmap_from_scene(dataclasses.replace(scene, cam_from_world=poses, tracks=tracks))
    before = model.compute_mean_reprojection_error()

    options = pycolmap.BundleAdjustmentOptions(print_summary=False)
    config = pycolmap.BundleAdjustmentConfig()
    for image_id in model.reg_image_ids():
        config.add_image(image_id)
    config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    assert solved(pycolmap.create_default_bundle_adjuster(options, config, model))
    model.update_point_3d_errors()
    assert before > 2
    assert model.compute_mean_reprojection_error() < before / 10
    for image_id in truth.images:
        error = model.images[image_id].cam_from_world() * truth.images[image_id].cam_from_world().inverse()
        assert np.rad2deg(error.rotation.angle()) < 0.2


def test_tracks_without_a_point_make_a_model_of_cameras_alone(scene, tmp_path):
    tracks = scene.tracks
    none = {f.name: getattr(tracks, f.name)[:0] for f in dataclasses.fields(tracks)}
    write_colmap(dataclasses.replace(scene, tracks=dataclasses.replace(tracks, **none)), tmp_path / "model")
    model = read_colmap(tmp_path / "model")
    assert model.num_reg_images() == 4
    assert model.num_points3D() == 0
