"""What is known beforehand puts scenes where they belong, and what it errs by does not bend them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from observed import observed_scene, perturbed
from PIL import ExifTags, Image
from procedural import make_scene

from dust3r_sfm.alignment.anchoring import anchored, placed
from dust3r_sfm.alignment.refine import RefineConfig, refine, support, with_shared_cameras
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.formats.exif import GpsFix, enu_positions, exif_focal_px, read_exif
from dust3r_sfm.geometry.transforms import camera_center, rotation_from_rotvec
from dust3r_sfm.mapping import known_of, share_cameras
from dust3r_sfm.priors import PriorConfig, depth_scale, in_known_frame, with_known_depths, with_priors
from dust3r_sfm.views import KnownCamera, load_views

NUM_VIEWS = 6
ENU_FROM_WORLD = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64)
"""The procedural world has y down; its unit is taken for ten metres here."""


@pytest.fixture(scope="module")
def procedural():
    return make_scene(NUM_VIEWS, (96, 128), pairs=[])


@pytest.fixture(scope="module")
def observed(procedural):
    return observed_scene(procedural, noise_px=0.5)


def true_positions(procedural):
    return 10 * camera_center(procedural.cam_from_world.double()) @ ENU_FROM_WORLD.T


def measured(procedural, sigma, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = true_positions(procedural)
    noisy = truth + sigma * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    sigmas = torch.full((3,), float(sigma), dtype=torch.float64)
    return {name: (position, sigmas) for name, position in zip(procedural.names, noisy, strict=True)}


def centers_of(model):
    images = sorted(model.images.values(), key=lambda image: image.image_id)
    return torch.from_numpy(np.stack([image.projection_center() for image in images]))


def shape_error(centers, truth):
    """How far distances between cameras are off, relative to the largest, free of scale."""
    distances, true_distances = torch.cdist(centers, centers), torch.cdist(truth, truth)
    return float(((distances / distances.mean() - true_distances / true_distances.mean()).abs()).max())


def save_photo(path, gps=None, focal_35mm=None, model="Camera 1", size=(64, 48)):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = "Maker", model
    if focal_35mm is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = focal_35mm
    if gps is not None:
        ifd = exif.get_ifd(ExifTags.IFD.GPSInfo)
        for tag, reference, value, letters in ((2, 1, gps[0], "NS"), (4, 3, gps[1], "EW")):
            minutes, seconds = divmod(abs(value) * 3600, 60)
            ifd[tag] = (minutes // 60, minutes % 60, seconds)
            ifd[reference] = letters[value < 0]
        ifd[6], ifd[5] = abs(gps[2]), b"\x01" if gps[2] < 0 else b"\x00"
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(path.as_posix().encode()))
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path, exif=exif)


def test_exif_tells_place_camera_and_focal(tmp_path):
    save_photo(tmp_path / "a.jpg", (-33.856784, 151.215297, -12.5), focal_35mm=36)
    found = read_exif(tmp_path / "a.jpg")
    assert found.gps.latitude_deg == pytest.approx(-33.856784, abs=1e-7)
    assert found.gps.longitude_deg == pytest.approx(151.215297, abs=1e-7)
    assert found.gps.altitude_m == -12.5
    assert found.camera.startswith("Maker Camera 1")
    assert exif_focal_px(tmp_path / "a.jpg", (64, 48)) == pytest.approx(64, rel=0.05)  # 36 mm film is as wide as this
    save_photo(tmp_path / "none.jpg", (0.0, 0.0, 0.0))
    assert read_exif(tmp_path / "none.jpg").gps is None
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe1\x00\x10Exif")
    assert read_exif(tmp_path / "broken.jpg").gps is None


def test_metres_east_north_and_up_of_the_middle():
    degree = 111_319.49  # on the equator
    fixes = {"a": GpsFix(0.0, 179.9999, 10.0), "b": GpsFix(0.0, -179.9999, None), "c": GpsFix(0.0, 180.0, 14.0)}
    origin, positions = enu_positions(fixes)
    assert positions["b"][0] - positions["a"][0] == pytest.approx(2e-4 * degree, rel=1e-3)
    assert positions["c"][2] - positions["a"][2] == pytest.approx(4.0, abs=1e-3)
    assert positions["b"][2] == pytest.approx(0.0, abs=1e-3)  # without altitude: the usual one
    assert origin.altitude_m == 12.0


@pytest.mark.parametrize("stated", [3.0, 1.5])
def test_noise_of_positions_does_not_bend_a_model(procedural, observed, stated):
    adjusted = refine(colmap_from_scene(observed)).reconstruction
    before = shape_error(centers_of(adjusted), true_positions(procedural))
    positions = measured(procedural, sigma=3.0)
    sigmas = torch.full((3,), stated, dtype=torch.float64)
    result = anchored(adjusted, {name: (p, sigmas) for name, (p, _) in positions.items()}, RefineConfig())
    after = shape_error(centers_of(result), true_positions(procedural))
    noisy = torch.stack([position for position, _ in positions.values()])
    assert after < before + 0.005
    assert after < 0.05 * shape_error(noisy, true_positions(procedural))
    assert support(result).score > 0.99 * support(adjusted).score


def test_precise_positions_straighten_a_bent_model_and_make_it_metric(procedural, observed):
    bent = colmap_from_scene(perturbed(observed, angle_deg=0.0, shift=0.0, focal=0.0))
    result = anchored(bent, measured(procedural, sigma=0.02), RefineConfig())
    assert (centers_of(result) - true_positions(procedural)).norm(dim=1).max() < 0.1


def test_a_wrong_position_and_a_focal_prior_take_part_in_one_adjustment(procedural, observed):
    truth, name = true_positions(procedural), observed.names[1]
    bent = colmap_from_scene(perturbed(observed, angle_deg=0.0, shift=0.0, focal=1e-4))
    positions = dict(measured(procedural, sigma=0.02))
    positions[name] = positions[name][0] + 30.0, positions[name][1]
    focal = 8 * float(observed.K[0, 0, 0])
    priors = {observed.names[0]: (1.05 * focal, 0.001)}
    free, held = (anchored(bent, positions, RefineConfig(), focal_priors=p) for p in ({}, priors))
    assert held.num_reg_images() == len(held.images) == len(observed.names)
    assert (centers_of(free) - truth).norm(dim=1).max() < 0.2
    assert held.camera(1).mean_focal_length() > free.camera(1).mean_focal_length() + 0.01 * focal


def test_a_scene_is_put_into_the_frame_of_its_positions(procedural, observed):
    turn = rotation_from_rotvec(torch.tensor([0.3, 0.2, -0.5], dtype=torch.float64))
    cam_from_world = observed.cam_from_world.double()
    cam_from_world[:, :3, :3] = cam_from_world[:, :3, :3] @ turn
    scene = dataclasses.replace(observed, cam_from_world=cam_from_world)  # another world: x_old = turn x_new
    result, placement = placed(scene, measured(procedural, sigma=0.1))
    assert placement.agreeing.all()
    errors = (camera_center(result.cam_from_world.double()) - true_positions(procedural)).norm(dim=1)
    assert errors.max() < 0.5
    assert torch.median(result.depth[0] / scene.depth[0]) == pytest.approx(10, rel=0.02)


def test_gps_of_photos_and_of_a_cameras_json_become_positions_with_an_origin(tmp_path):
    for i in range(3):
        save_photo(tmp_path / "photos" / f"{i}.jpg", (48.0, 11.0 + 1e-3 * i, 500.0))
    frames = [{"image": "2.jpg", "width": 64, "height": 48, "gps": [48.001, 11.0, 520.0]}]
    (tmp_path / "cameras.json").write_text(json.dumps({"frames": frames}))
    views = load_views(tmp_path / "photos", 64)
    known, origin = with_priors(views, tmp_path / "photos", PriorConfig(), tmp_path / "cameras.json")
    assert origin.longitude_deg == pytest.approx(11.0)
    assert (known[1].known_position - known[0].known_position)[0] == pytest.approx(74.6, abs=0.3)
    assert (known[2].known_position - known[0].known_position)[1] == pytest.approx(111.2, abs=0.3)
    assert known[0].position_sigma.tolist() == [5.0, 5.0, 10.0]
    ignored, origin = with_priors(views, tmp_path / "photos", PriorConfig(gps="ignore"))
    assert origin is None
    assert all(view.known_position is None for view in ignored)
    lone, origin = with_priors(views[:2], tmp_path / "photos", PriorConfig())
    assert origin is None


def test_photos_share_cameras_as_they_are_told_to(tmp_path, procedural, observed):
    for name, model in (("a/0.jpg", "A"), ("a/1.jpg", "B"), ("b/2.jpg", "A")):
        save_photo(tmp_path / name, model=model)
    views = load_views(tmp_path, 64)

    def groups(share):
        return [v.camera_group for v in with_priors(views, tmp_path, PriorConfig(share_camera=share))[0]]

    assert groups("auto") == [None] * 3
    assert len(set(groups("all"))) == 1
    assert len(set(groups("none"))) == 3
    assert groups("folder")[0] == groups("folder")[1] != groups("folder")[2]
    assert groups("exif")[0] == groups("exif")[2] != groups("exif")[1]
    two = [dataclasses.replace(v, camera_group=f"{i % 2}") for i, v in enumerate(procedural.views)]
    model = colmap_from_scene(perturbed(observed, angle_deg=0.0, shift=0.0, focal=1e-4))  # cameras of their own
    shared = share_cameras(model, support(model), known_of(two), RefineConfig()).reconstruction
    assert shared.num_cameras() == 2
    own = [dataclasses.replace(v, camera_group=v.name) for v in procedural.views]
    assert share_cameras(model, support(model), known_of(own), RefineConfig()) is None


def adjusted_focal(observed, priors):
    """Of the first image, in true focals."""
    given = colmap_from_scene(perturbed(observed, angle_deg=0.0, shift=0.0, focal=1e-4))  # cameras of their own
    adjusted = refine(given, RefineConfig(num_rounds=1), focal_priors=priors)
    assert not adjusted.kept_input
    assert adjusted.reconstruction.num_reg_images() == len(observed.names)
    assert len(adjusted.reconstruction.images) == len(observed.names)
    return adjusted.reconstruction.camera(1).mean_focal_length() / (8 * float(observed.K[0, 0, 0]))


def test_a_focal_prior_weighs_as_a_gaussian_of_its_standard_deviation(observed):
    """The point of balance between a prior and what the points say divides the way as their variances are."""
    wrong, prior = 1.05, 8 * float(observed.K[0, 0, 0]) * 1.05
    free = adjusted_focal(observed, {})
    near, middle = (adjusted_focal(observed, {observed.names[0]: (prior, sigma)}) for sigma in (0.003, 0.01))
    tight = adjusted_focal(observed, {observed.names[0]: (prior, 1e-4)})
    assert tight == pytest.approx(wrong, abs=1e-3)
    assert free < middle < near < tight
    shares = [(wrong - found) / (found - free) for found in (near, middle)]
    assert shares[1] / shares[0] == pytest.approx((0.01 / 0.003) ** 2, rel=0.3)


def test_photos_of_one_camera_have_one_focal_prior(observed):
    shared = with_shared_cameras(colmap_from_scene(observed))
    own = {observed.names[0]: (8 * float(observed.K[0, 0, 0]) * 1.05, 0.003)}
    every = dict.fromkeys(observed.names, own[observed.names[0]])
    found = [refine(shared, RefineConfig(num_rounds=1), focal_priors=priors) for priors in (own, every)]
    one, all_alike = (adjusted.reconstruction.camera(1).mean_focal_length() for adjusted in found)
    assert all_alike == pytest.approx(one, rel=1e-6)
    assert one < 8 * float(observed.K[0, 0, 0]) * 1.04


def test_exif_focals_are_priors(tmp_path):
    save_photo(tmp_path / "a.jpg", focal_35mm=36)
    save_photo(tmp_path / "b.jpg")
    views = load_views(tmp_path, 64)
    known, _ = with_priors(views, tmp_path, PriorConfig(focal="exif", focal_sigma=0.02))
    assert known[0].focal_sigma == 0.02
    assert known[0].known_K[0, 0].item() == pytest.approx(64, rel=0.05)
    assert known[1].known_K is None


def test_a_pose_with_a_standard_deviation_is_a_position(tmp_path):
    save_photo(tmp_path / "a.jpg")
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    (view,) = load_views(tmp_path, 64, cameras={"a.jpg": KnownCamera(cam_from_world=pose, position_sigma=0.5)})
    assert view.known_cam_from_world is None
    assert view.known_position.tolist() == [-1.0, -2.0, -3.0]
    assert view.position_sigma.tolist() == [0.5] * 3


def test_depths_in_metres_give_the_scale(procedural, observed, tmp_path):
    scale = 3.7
    for index in (0, 3):
        depth = np.kron(procedural.depth[index].numpy(), np.ones((2, 2)))
        (tmp_path / "photos").mkdir(exist_ok=True)
        if index:
            np.save(tmp_path / f"{procedural.names[index]}.npy", scale * depth)
        else:
            millimetres = Image.fromarray((scale * depth * 1000).astype(np.uint16))
            millimetres.save(tmp_path / f"{procedural.names[index]}.png")
    views = with_known_depths(procedural.views, tmp_path)
    assert depth_scale(observed, views) == pytest.approx(scale, rel=1e-3)
    (scene,), (line,) = in_known_frame([observed], views)
    assert line["frame"] == "depth"
    torch.testing.assert_close(scene.depth[1], scale * observed.depth[1], rtol=1e-3, atol=0)
    assert depth_scale(observed, procedural.views) is None
    with pytest.raises(InputError, match=r"no depths in .*: expected photos/000.jpg.npy or .png"):
        with_known_depths(procedural.views, tmp_path / "photos")
    np.save(tmp_path / f"{procedural.names[0]}.npy", np.ones((10, 90)))
    with pytest.raises(InputError, match="is not that of photos/000.jpg"):
        with_known_depths(procedural.views, tmp_path)
