"""Photos with poses and depth, read back from each form as they were written."""

import json

import numpy as np
import pytest
import torch
from depth_folders import write_colmap, write_rgbd, write_tum
from procedural import make_scene

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.dense import write_array
from dust3r_sfm.formats.depth_scenes import read_depth_scene

NUM_VIEWS, SIZE = 3, (48, 64)


@pytest.fixture(scope="module")
def procedural():
    return make_scene(NUM_VIEWS, SIZE, seed=2)


@pytest.mark.parametrize("write", [write_rgbd, write_tum, write_colmap])
def test_photos_poses_and_depth_come_back(procedural, tmp_path, write):
    folder = tmp_path / "scene"
    folder.mkdir()
    write(procedural, folder)
    views = sorted(read_depth_scene(folder, 64), key=lambda view: view.name)
    assert len(views) == NUM_VIEWS
    for i, view in enumerate(views):
        assert view.image.shape == (*SIZE, 3)
        assert (view.image.float() - procedural.views[i].image.float()).abs().mean() < 6  # JPEG
        assert torch.allclose(view.K, procedural.K[i], atol=1e-3)
        assert torch.allclose(view.cam_from_world, procedural.cam_from_world[i], atol=1e-5)
        known = view.depth > 0
        assert known.float().mean() > 0.9
        assert torch.allclose(view.depth[known], procedural.depth[i][known], atol=1e-3)


def test_photos_keep_their_size_where_they_are_small_enough(procedural, tmp_path):
    write_rgbd(procedural, tmp_path)
    assert read_depth_scene(tmp_path, 999)[0].image.shape == (96, 128, 3)
    assert read_depth_scene(tmp_path, 999)[0].depth.shape == (96, 128)


def test_stereo_without_a_geometric_map_gives_its_photometric_one(procedural, tmp_path):
    folder = tmp_path / "scene"
    write_colmap(procedural, folder)
    maps = folder / "stereo" / "depth_maps"
    for i, name in enumerate(procedural.names):
        (maps / f"{name}.geometric.bin").unlink()
        if i:
            write_array(maps / f"{name}.photometric.bin", np.full((24, 32), 2.5, dtype=np.float32))
    views = read_depth_scene(folder, 64)
    assert [view.depth.unique().tolist() for view in views] == [[2.5]] * (NUM_VIEWS - 1)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "cameras.json").unlink(), "is no scene to train on: expected a cameras.json"),
        (lambda folder: (folder / "depth/1.png").write_bytes(b"x"), "cannot be read"),
        (lambda folder: (folder / "images/photos/001.jpg").write_bytes(b"x"), "cannot be read as a photo"),
        (lambda folder: keep_frames(folder, 1), "has 1 photos with a pose and a depth map: expected at least 2"),
    ],
)
def test_a_mistake_gets_one_sentence(procedural, tmp_path, spoil, sentence):
    write_rgbd(procedural, tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=sentence):
        read_depth_scene(tmp_path, 64)


def keep_frames(folder, count):
    path = folder / "cameras.json"
    path.write_text(json.dumps({"frames": json.loads(path.read_text())["frames"][:count]}))


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("calibration.txt", None, "there is no calibration.txt"),
        ("calibration.txt", "500 500\n", "must have 4 numbers a line"),
        ("depth.txt", None, "there is no depth.txt"),
        ("groundtruth.txt", "a b c d e f g h\n", "is not a table of numbers"),
        ("rgb.txt", "1.0\n", "is not a list of times and files"),
    ],
)
def test_a_broken_tum_folder_is_named(procedural, tmp_path, file, content, sentence):
    write_tum(procedural, tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_depth_scene(tmp_path, 64)
