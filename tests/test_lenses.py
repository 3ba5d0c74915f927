"""Lens distortion from the photo to every export, on a procedural room photographed ray by ray through lenses."""

import dataclasses
import json

import numpy as np
import pycolmap
import pytest
import torch
from bent import LENSES, grid, intrinsics, photo, save
from observed import observed_scene
from PIL import Image
from procedural import make_scene

from dust3r_sfm.errors import InputError
from dust3r_sfm.export_scene import load_scene_views
from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.formats.dense import write_dense
from dust3r_sfm.formats.depths import depth_map
from dust3r_sfm.formats.known_cameras import read_known_cameras
from dust3r_sfm.formats.nerfstudio import write_gsplat, write_nerfstudio
from dust3r_sfm.formats.scenes import read_scenes, write_scenes
from dust3r_sfm.formats.undistortion import pinhole_scene, straight_views
from dust3r_sfm.geometry.lens import Lens, bend_px, bent, camera_with_lens, straightened, straightening_zoom
from dust3r_sfm.scene import Tracks
from dust3r_sfm.views import KnownCamera, load_views

SIZE = (192, 144)


@pytest.fixture(scope="module")
def procedural():
    return make_scene(2, (96, 128), pairs=[])


def camera_of(procedural, lens, index=0):
    return camera_with_lens(intrinsics(procedural, index, 1.5), SIZE, lens)


def known_camera(procedural, lens):
    return KnownCamera(torch.from_numpy(intrinsics(procedural, 0, 1.5)), None, lens, SIZE)


@pytest.fixture(scope="module", params=["OPENCV", "OPENCV_FISHEYE"])
def shots(request, procedural, tmp_path_factory):
    """Two photos through a lens, and their views as the network gets them."""
    lens = LENSES[request.param]
    folder = tmp_path_factory.mktemp("bent")
    for index in range(2):
        save(photo(procedural, index, camera_of(procedural, lens, index))[0], folder / f"{index}.png")
    return (
        lens,
        folder,
        load_views(folder, 128, cameras=dict.fromkeys(["0.png", "1.png"], known_camera(procedural, lens))),
    )


@pytest.fixture(scope="module")
def scene(shots, procedural):
    """The truth in the views' pixels, with tracks in those of the bent photos."""
    lens, _, views = shots
    net_from_img = torch.stack([view.net_from_img for view in views])
    K = net_from_img @ torch.from_numpy(intrinsics(procedural, 0, 1.5))
    cast = [photo(procedural, i, camera_with_lens(K[i].numpy(), (128, 96)))[1] for i in range(2)]
    poses = procedural.cam_from_world.double()
    depth = [(points @ poses[i, :3, :3].T + poses[i, :3, 3])[..., 2] for i, points in enumerate(cast)]
    template = observed_scene(procedural)
    points = torch.cat([p.reshape(-1, 3)[:: len(p) + 1] for p in cast])
    rows = []
    for index in range(2):
        camera = camera_of(procedural, lens, index)
        in_cam = points @ poses[index, :3, :3].T + poses[index, :3, 3]
        seen = torch.from_numpy(camera.img_from_cam(in_cam.numpy()))
        usable = (in_cam[:, 2] > 0) & (seen >= 0).all(1) & (seen <= torch.tensor(SIZE)).all(1)
        rows.append((seen, usable))
    kept = rows[0][1] & rows[1][1]
    number = int(kept.sum())
    tracks = Tracks(
        points_in_world=points[kept].float(),
        colors=torch.full((number, 3), 128, dtype=torch.uint8),
        errors=torch.zeros(number),
        point_indices=torch.arange(number).repeat_interleave(2),
        image_indices=torch.tensor([0, 1]).repeat(number),
        keypoints=torch.stack([seen[kept] for seen, _ in rows], dim=1).reshape(-1, 2).float(),
    )
    assert number > 50
    return dataclasses.replace(
        template,
        names=("0.png", "1.png"),
        K=K.float(),
        depth=tuple(d.float() for d in depth),
        net_from_img=net_from_img,
        original_sizes=(SIZE, SIZE),
        lenses=(lens, lens),
        tracks=tracks,
    )


@pytest.mark.parametrize("name", LENSES)
def test_what_is_bent_is_straightened_again(procedural, name):
    K, pixels = intrinsics(procedural, 0, 1.5), grid((48, 36)) * 4 - 0.5
    straight = straightened(pixels, K, LENSES[name])
    np.testing.assert_allclose(bent(straight, K, LENSES[name]), pixels, atol=1e-3)
    truth = camera_with_lens(K, SIZE, LENSES[name]).cam_from_img(pixels)
    np.testing.assert_allclose(straight, truth * K[0, 0] + K[:2, 2], atol=1e-9)


def test_what_lies_beyond_the_fold_of_a_polynomial_is_nowhere(procedural):
    K, lens = intrinsics(procedural, 0, 1.5), LENSES["SIMPLE_RADIAL"]
    assert np.isnan(bent(K[:2, 2] + [[3 * K[0, 0], 0.0]], K, lens)).all()
    assert np.isinf(bend_px(K, SIZE, dataclasses.replace(lens, coefficients=(-2.0,))))


def test_the_network_sees_what_a_pinhole_would_have_taken(shots, procedural):
    lens, _, views = shots
    K = views[0].net_from_img.numpy() @ intrinsics(procedural, 0, 1.5)
    expected, _ = photo(procedural, 0, camera_with_lens(K, (128, 96)))
    difference = np.abs(expected.astype(float) - views[0].image.numpy().astype(float))
    assert np.median(difference) < 6
    bent_photo, _ = photo(procedural, 0, camera_with_lens(K, (128, 96), lens))
    unlike = np.abs(bent_photo.astype(float) - views[0].image.numpy().astype(float))
    assert difference.mean() < 0.6 * unlike.mean()
    assert views[0].lens == lens


def test_a_straightened_view_is_filled_to_its_borders_and_no_wider_than_a_pinhole_may_be(procedural):
    K = intrinsics(procedural, 0, 1.5)
    for lens in LENSES.values():
        zoom = straightening_zoom(K, SIZE, lens)
        corners = np.array([[0.0, 0], [192, 0], [0, 144], [192, 144]])
        seen = bent(K[:2, 2] + (corners - K[:2, 2]) / zoom, K, lens)
        assert (seen >= -0.5).all()
        assert (seen <= np.array(SIZE) + 0.5).all()
        assert 0.7 < zoom < 1.3
    wide = np.diag([60.0, 60.0, 1.0]) + [[0, 0, 96], [0, 0, 72], [0, 0, 0]]
    assert straightening_zoom(wide, SIZE, LENSES["OPENCV_FISHEYE"]) * 60 >= 0.4 * 192


def test_a_colmap_model_has_the_lens_and_its_points_project_onto_the_keypoints(scene, shots, tmp_path):
    model = colmap_from_scene(scene)
    assert {camera.model.name for camera in model.cameras.values()} == {shots[0].model}
    assert model.compute_mean_reprojection_error() < 0.01
    model.write(tmp_path)
    assert read_known_cameras(tmp_path, scene.names)["0.png"].lens == shots[0]


def test_scenes_keep_their_lenses(scene, tmp_path):
    write_scenes(tmp_path / "scene.h5", [scene])
    (back,) = read_scenes(tmp_path / "scene.h5")
    assert back.lenses == scene.lenses


def test_views_of_a_scene_are_straightened_as_they_were(scene, shots):
    _, folder, views = shots
    again = load_scene_views([scene], folder)
    for a, b in zip(again, views, strict=True):
        assert (a.image.int() - b.image.int()).abs().max() <= 1  # the scene's K has float32
        torch.testing.assert_close(a.net_from_img, b.net_from_img, atol=0.1, rtol=0)


def test_depths_lie_on_the_pixels_of_the_bent_photo(scene, shots, procedural):
    found = depth_map(scene, 0, "original").depth
    _, points = photo(procedural, 0, camera_of(procedural, shots[0]))
    pose = procedural.cam_from_world[0].double()
    truth = (points @ pose[:3, :3].T + pose[:3, 3])[..., 2].numpy()
    known = found > 0
    assert known.mean() > 0.6
    assert np.median(np.abs(found[known] / truth[known] - 1)) < 0.005


@pytest.mark.parametrize("write", [write_dense, write_gsplat])
def test_readers_of_pinholes_get_photos_and_models_without_a_lens(scene, shots, procedural, tmp_path, write):
    write(scene, shots[1], tmp_path)
    model = pycolmap.Reconstruction(tmp_path / "sparse" / ("0" if write is write_gsplat else ""))
    assert {camera.model.name for camera in model.cameras.values()} <= {"PINHOLE", "SIMPLE_PINHOLE"}
    assert model.num_points3D() > 30
    assert model.compute_mean_reprojection_error() < 0.01
    expected, _ = photo(procedural, 0, model.cameras[1])
    written = np.asarray(Image.open(tmp_path / "images" / "0.png"))
    assert written.shape == expected.shape
    assert np.median(np.abs(expected.astype(float) - written.astype(float))) < 6


def test_nerfstudio_gets_the_coefficients_that_it_knows(scene, shots, tmp_path):
    lens, folder, views = shots
    write_nerfstudio(scene, views, folder, tmp_path)
    content = json.loads((tmp_path / "transforms.json").read_text())
    keys = ("k1", "k2", "k3", "k4") if lens.model == "OPENCV_FISHEYE" else ("k1", "k2", "p1", "p2")
    expected = (*lens.coefficients, 0.0, 0.0, 0.0)[:4]
    assert content["camera_model"] == ("OPENCV_FISHEYE" if lens.model == "OPENCV_FISHEYE" else "OPENCV")
    assert [content["frames"][0][key] for key in keys] == list(expected)
    assert (tmp_path / "images" / "0.png").read_bytes() == (folder / "0.png").read_bytes()


def test_nerfstudio_gets_pinholes_for_lenses_that_it_does_not_know(scene, shots, tmp_path):
    other = dataclasses.replace(shots[0], model="FULL_OPENCV", coefficients=(-0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    write_nerfstudio(dataclasses.replace(scene, lenses=(other, other)), shots[2], shots[1], tmp_path)
    frame = json.loads((tmp_path / "transforms.json").read_text())["frames"][0]
    assert {frame[key] for key in ("k1", "k2", "p1", "p2")} == {0.0}


def test_a_lens_found_after_the_network_saw_the_photo_moves_matches_and_images_to_the_pinhole(scene, shots, procedural):
    lens, folder, _ = shots
    (view, _) = load_views(folder, 128)
    since = dataclasses.replace(lens, was_known=False)
    net_from_img = view.net_from_img.expand(2, 3, 3)
    K = net_from_img @ torch.from_numpy(intrinsics(procedural, 0, 1.5))
    found = dataclasses.replace(scene, lenses=(since, since), net_from_img=net_from_img, K=K)
    pixels = np.array([[20.0, 15.0], [64.0, 48.0], [100.0, 80.0]])
    straight = found.net_from_seen(0, pixels)
    truth = camera_with_lens(K[0].numpy(), (128, 96), lens).cam_from_img(pixels) * K[0, 0, 0].item() + [64.0, 48.0]
    np.testing.assert_allclose(straight, truth, atol=1e-6)
    np.testing.assert_allclose(found.seen_from_net(0, straight), pixels, atol=1e-3)
    (straight_view,) = straight_views([view], [found])
    inside = np.isfinite(found.seen_from_net(0, grid((128, 96)))).all(axis=1).reshape(96, 128)[10:-10, 10:-10]
    expected, _ = photo(procedural, 0, camera_with_lens(K[0].numpy(), (128, 96)))
    difference = np.abs(expected.astype(float) - straight_view.image.numpy().astype(float))[10:-10, 10:-10][inside]
    assert np.median(difference) < 6


def test_a_camera_of_another_size_than_its_photo_is_refused(shots, procedural):
    lens, folder, _ = shots
    camera = known_camera(procedural, lens)._replace(size=(640, 480))
    with pytest.raises(InputError, match="0.png is 192 x 144 pixels, but its given camera is of 640 x 480"):
        load_views(folder, 128, ["0.png"], cameras={"0.png": camera})


@pytest.mark.parametrize("model", ["FISH", "EQUIRECTANGULAR", "OPENCV"])
def test_models_that_there_are_not_and_wrong_coefficients_are_named(procedural, model):
    with pytest.raises(ValueError, match=r"is no camera model here|OPENCV has 4 distortion coefficients, got 1"):
        camera_of(procedural, Lens(model, (0.1,)))


def test_pinhole_scenes_stay_as_they_are(procedural):
    scene = observed_scene(procedural)
    assert pinhole_scene(scene) is scene
    view = procedural.views[0]
    assert straight_views([view], [scene])[0] is view
