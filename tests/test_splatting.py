"""What splats are trained from: cameras and points in units of the cameras' extent, and Gaussians at the points."""

from importlib.util import find_spec

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from dust3r_sfm.benchmarks import splatting
from dust3r_sfm.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pinhole cameras around 40 points, as COLMAP's own generator places them, with photos of noise."""
    folder = tmp_path_factory.mktemp("gsplat")
    pycolmap.set_random_seed(0)
    options = pycolmap.SyntheticDatasetOptions()
    options.num_frames_per_rig, options.num_points3D = 4, 40
    options.camera_model_id = pycolmap.CameraModelId.PINHOLE
    options.camera_width, options.camera_height, options.camera_params = 64, 48, [60, 61, 32, 24]
    model = pycolmap.synthesize_dataset(options)
    (folder / "sparse" / "0").mkdir(parents=True)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for image in model.images.values():
        Image.fromarray(rng.integers(256, size=(48, 64, 3), dtype=np.uint8)).save(folder / "images" / image.name)
    model.write(folder / "sparse" / "0")
    return folder


def read(folder, model=None):
    model = pycolmap.Reconstruction(folder / "sparse" / "0") if model is None else model
    return splatting.splat_scene(model, folder / "images", sorted(image.name for image in model.images.values()))


def test_points_of_a_splat_scene_project_onto_the_keypoints(folder):
    model, scene = pycolmap.Reconstruction(folder / "sparse" / "0"), read(folder)
    index = {point_id: i for i, point_id in enumerate(model.points3D)}
    for image in model.images.values():
        i = scene.names.index(image.name)
        seen = [(index[p.point3D_id], p.xy) for p in image.points2D if p.has_point3D()]
        points, keypoints = scene.points[[i for i, _ in seen]], torch.tensor(np.stack([xy for _, xy in seen])).float()
        pixels = (points @ scene.cam_from_world[i, :3, :3].T + scene.cam_from_world[i, :3, 3]) @ scene.K[i].T
        torch.testing.assert_close(pixels[:, :2] / pixels[:, 2:], keypoints, atol=0.02, rtol=0)


def test_a_splat_scene_does_not_depend_on_the_place_and_size_of_the_model(folder):
    moved = pycolmap.Reconstruction(folder / "sparse" / "0")
    moved.transform(pycolmap.Sim3d(7.0, pycolmap.Rotation3d(np.array([0.3, -0.2, 1.0])), np.array([5.0, 4, -3])))
    first, second = read(folder), read(folder, moved)
    centers = [-(s.cam_from_world[:, :3, :3].mT @ s.cam_from_world[:, :3, 3:])[..., 0] for s in (first, second)]
    assert float(centers[0].norm(dim=1).max()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(*(torch.cdist(c, s.points) for c, s in zip(centers, (first, second), strict=True)))


def test_gaussians_start_at_the_points_with_their_colors_and_as_large_as_the_gaps_between(folder):
    scene = read(folder)
    start = splatting.start(scene)
    torch.testing.assert_close(start["means"].detach(), scene.points)
    torch.testing.assert_close(start["colors"].detach().sigmoid(), scene.colors.clamp(0.01, 0.99))
    gaps = torch.cdist(scene.points, scene.points).sort(dim=1).values[:, 1:4].mean(dim=1)
    torch.testing.assert_close(start["scales"].detach().exp(), gaps[:, None].expand(-1, 3), atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(torch.cuda.is_available() and find_spec("gsplat") is not None, reason="has both")
def test_a_scene_without_gsplat_or_a_device_is_refused_in_one_sentence(folder):
    with pytest.raises(InputError, match="^training splats needs "):
        splatting.main(folder, folder)


def test_photos_of_another_size_than_their_cameras_and_a_share_of_all_are_refused(folder, tmp_path):
    model = pycolmap.Reconstruction(folder / "sparse" / "0")
    for image in model.images.values():
        Image.new("RGB", (32, 24)).save(tmp_path / image.name)
    with pytest.raises(InputError, match=r"has \(32, 24\) pixels, but its camera \(64, 48\)"):
        splatting.splat_scene(model, tmp_path, [image.name for image in model.images.values()])
    with pytest.raises(InputError, match="hold_out is 1: expected 2 or more"):
        splatting.main(folder, folder, splatting.SplatConfig(hold_out=1))


def test_a_lens_is_refused_with_the_way_to_write_the_scene(folder, tmp_path):
    model = pycolmap.Reconstruction(folder / "sparse" / "0")
    for camera in model.cameras.values():
        camera.model, camera.params = pycolmap.CameraModelId.SIMPLE_RADIAL, [60, 32, 24, 0.1]
    (tmp_path / "sparse" / "0").mkdir(parents=True)
    model.write(tmp_path / "sparse" / "0")
    with pytest.raises(InputError, match="without distortion, as export-scene writes them"):
        splatting.main(tmp_path, folder)
