from dataclasses import fields, replace

import pytest
import torch
from aligned import true_scene
from procedural import make_scene

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.scenes import read_scenes, write_scenes
from dust3r_sfm.pairs import Pair
from dust3r_sfm.scene import Scene, Tracks


@pytest.fixture(scope="module")
def scenes():
    """Two scenes, one with tracks; images of two sizes, a name in a sub-folder and one that is not ASCII."""
    first = true_scene(make_scene(3, (32, 48), mix_orientations=True, pairs=[]))
    tracks = Tracks(
        points_in_world=torch.randn(5, 3),
        colors=torch.randint(0, 256, (5, 3), dtype=torch.uint8),
        errors=torch.rand(5),
        point_indices=torch.tensor([0, 0, 1, 2, 3, 4]),
        image_indices=torch.tensor([0, 1, 0, 2, 1, 1]),
        keypoints=torch.rand(6, 2),
    )
    second = true_scene(make_scene(2, (32, 32), seed=1, pairs=[]))
    doubts = {Pair("a/ä b.jpg", "2.jpg"): "contradicts the others"}
    return [replace(first, tracks=tracks, names=("a/ä b.jpg", "a/1.jpg", "2.jpg"), doubts=doubts), second]


def assert_equal(found, expected):
    for field in fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        elif isinstance(b, Tracks):
            assert_equal(a, b)
        elif field.name in ("depth", "confidence"):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), field.name
        else:
            assert a == b, field.name


def test_scenes_come_back_as_they_were_written(scenes, tmp_path):
    write_scenes(tmp_path / "scene.h5", scenes)
    found = read_scenes(tmp_path / "scene.h5")
    assert len(found) == 2
    for scene, expected in zip(found, scenes, strict=True):
        assert isinstance(scene, Scene)
        assert_equal(scene, expected)


def test_confidences_are_kept_to_three_digits_and_never_become_infinite(scenes, tmp_path):
    confidence = (torch.full((32, 48), 1e9), *scenes[0].confidence[1:2], scenes[0].confidence[2] * 3.14159)
    write_scenes(tmp_path / "scene.h5", [replace(scenes[0], confidence=confidence)])
    found = read_scenes(tmp_path / "scene.h5")[0].confidence
    assert (found[0] == 65504).all()
    torch.testing.assert_close(found[2], confidence[2], rtol=1e-3, atol=0)


def test_only_the_file_itself_is_left_and_it_replaces_an_older_one(scenes, tmp_path):
    write_scenes(tmp_path / "scene.h5", scenes)
    write_scenes(tmp_path / "scene.h5", scenes[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["scene.h5"]
    assert len(read_scenes(tmp_path / "scene.h5")) == 1


def test_missing_foreign_and_cut_files_are_named(scenes, tmp_path):
    path = tmp_path / "scene.h5"
    with pytest.raises(InputError, match="no scene at"):
        read_scenes(path)
    path.write_text("not HDF5")
    with pytest.raises(InputError, match="no file of scenes"):
        read_scenes(path)
    write_scenes(path, scenes)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="cut short"):
        read_scenes(path)
