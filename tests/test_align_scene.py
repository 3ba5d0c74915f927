"""The align_scene stage: files in, a file out."""

import json

import pytest
import torch
from PIL import Image
from procedural import STORED_PER_NET, make_scene

from dust3r_sfm.align_scene import main
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.pairs import write_pairs
from dust3r_sfm.formats.pointmaps import PointmapShards
from dust3r_sfm.formats.scenes import read_scenes
from dust3r_sfm.geometry.metrics import all_pairs_errors_deg
from dust3r_sfm.pairs import PredictionsOn


@pytest.fixture(scope="module")
def truth():
    return make_scene(4, (48, 64))


@pytest.fixture(scope="module")
def folder(truth, tmp_path_factory):
    """Photos, and the pointmaps that a perfect network would have written."""
    folder = tmp_path_factory.mktemp("align")
    (folder / "photos").mkdir()
    for view in truth.views:
        Image.fromarray(view.image.numpy()).resize(view.original_size).save(folder / view.name)
    shards = PointmapShards(folder / "pointmaps.h5")
    keys = [f"{i:064d}" for i in range(len(truth.predictions))]
    shards.add(keys, list(truth.predictions.values()))
    shards.finish(list(truth.predictions), keys).close()
    return folder


def test_predictions_come_on_the_device_that_is_asked_for(truth):
    there = PredictionsOn(truth.predictions, torch.device("meta"))
    assert list(there) == list(truth.predictions)
    assert len(there) == len(truth.predictions)
    assert {value.device.type for pair in there for value in vars(there[pair]).values()} == {"meta"}


def rotation_errors(scene, truth):
    expected = truth.cam_from_world[[truth.names.index(name) for name in scene.names]]
    return all_pairs_errors_deg(scene.cam_from_world.double(), expected.double())[0]


def test_pointmaps_become_a_scene_file_and_a_line_with_counts(truth, folder, tmp_path, caplog):
    caplog.set_level("INFO")
    main(folder, folder / "pointmaps.h5", tmp_path / "new" / "scene.h5")
    (scene,) = read_scenes(tmp_path / "new" / "scene.h5")
    assert set(scene.names) == set(truth.names)
    assert scene.original_sizes[0] == truth.views[0].original_size
    assert rotation_errors(scene, truth).max() < 0.2  # of float16 pointmaps
    assert "Aligned 4 of 4 images in 1 scene" in caplog.text


def test_only_listed_pairs_are_used(truth, folder, tmp_path):
    names = truth.names
    pairs = [pair for pair in truth.predictions if set(pair) in ({names[0], names[1]}, {names[2], names[3]})]
    write_pairs(tmp_path / "pairs.txt", pairs)
    scenes = main(folder, folder / "pointmaps.h5", tmp_path / "scene.h5", pairs=tmp_path / "pairs.txt")
    assert sorted(map(sorted, (scene.names for scene in scenes))) == [names[:2], names[2:]]


def test_known_cameras_come_from_a_file(truth, folder, tmp_path):
    stored_from_net = torch.diag(torch.tensor([STORED_PER_NET, STORED_PER_NET, 1.0]))
    width, height = truth.views[1].original_size
    frame = {
        "image": truth.names[1],
        "width": width,
        "height": height,
        "K": (stored_from_net @ truth.K[1]).tolist(),
        "cam_from_world": truth.cam_from_world[1].tolist(),
    }
    (tmp_path / "cameras.json").write_text(json.dumps({"frames": [frame]}))
    (scene,) = main(folder, folder / "pointmaps.h5", tmp_path / "scene.h5", cameras=tmp_path / "cameras.json")
    torch.testing.assert_close(scene.cam_from_world[1], truth.cam_from_world[1])
    torch.testing.assert_close(scene.K[1], truth.K[1])


def test_what_is_missing_is_a_sentence(truth, folder, tmp_path):
    with pytest.raises(InputError, match="run infer_pairs first"):
        main(folder, tmp_path / "pointmaps.h5", tmp_path / "scene.h5")
    shards = PointmapShards(tmp_path / "some.h5")
    pairs = list(truth.predictions)[:1]
    shards.add(["0" * 64], [truth.predictions[pair] for pair in pairs])
    shards.finish(pairs, ["0" * 64]).close()
    write_pairs(tmp_path / "pairs.txt", [pairs[0].reversed()])
    with pytest.raises(InputError, match="1 of 1 pairs in .* have no pointmaps"):
        main(folder, tmp_path / "some.h5", tmp_path / "scene.h5", pairs=tmp_path / "pairs.txt")
    assert not (tmp_path / "scene.h5").exists()
