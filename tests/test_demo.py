"""The demo: photos and their truth on the disk, a reconstruction, the error against the truth."""

import json
from functools import partial
from importlib import import_module

import pytest
import torch
from PIL import Image
from procedural import make_scene

from dust3r_sfm import demo
from dust3r_sfm.errors import InputError
from dust3r_sfm.evaluate import evaluate_model
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.pairs import Pair
from dust3r_sfm.training.synthetic import SyntheticViews


@pytest.fixture
def exact(monkeypatch):
    """Photos of the test scene in place of the rendered ones, and exact predictions in place of the network's."""
    scene = make_scene(4, (48, 64))
    renamed = {view.name: f"{i:03d}.png" for i, view in enumerate(scene.views)}
    images, depth = torch.stack([view.image for view in scene.views]), torch.stack(scene.depth)

    def demo_views(num_views, size, seed):
        return SyntheticViews(
            images[:num_views], scene.K[:num_views], scene.cam_from_world[:num_views], depth[:num_views]
        )

    def predict(self, pairs, bar):
        named = {Pair(renamed[p.name0], renamed[p.name1]): prediction for p, prediction in scene.predictions.items()}
        return {pair: named[pair] for pair in pairs}

    monkeypatch.setattr(demo, "demo_views", demo_views)
    monkeypatch.setattr(import_module("dust3r_sfm.infer_pairs").PairNetwork, "predict", predict)
    # matches of photos of 64 pixels are worse than exact predictions: refinement has tests of its own
    monkeypatch.setattr(demo.reconstruct, "main", partial(demo.reconstruct.main, refine="none"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    small = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2, "dec_embed_dim": 32, "dec_depth": 1}
    save_weights(Dust3r(Dust3rConfig(image_size=64, dec_num_heads=2, **small)), path, {"name": "tiny one"})
    return str(path)


def test_the_demo_reconstructs_its_photos_and_prints_the_error(exact, weights, tmp_path, capsys):
    report = demo.main(tmp_path, weights, num_views=4)
    assert report.num_registered == 4
    assert report.median_rotation_deg < 0.1
    assert f"rotation {report.median_rotation_deg:.2f}" in capsys.readouterr().out
    with Image.open(tmp_path / "images" / "003.png") as photo:
        assert photo.size == (64, 48)
    again = evaluate_model(tmp_path / "sparse", tmp_path)
    assert again.median_rotation_deg == report.median_rotation_deg


def test_a_smaller_demo_in_the_same_folder_leaves_no_photo_of_the_former(exact, weights, tmp_path):
    demo.main(tmp_path, weights, num_views=4)
    demo.main(tmp_path, weights, num_views=3)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["000.png", "001.png", "002.png"]
    assert len(json.loads((tmp_path / "summary.json").read_text())["images"]) == 3


def test_the_demo_leaves_other_photos_alone(exact, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000.png").write_text("mine")
    with pytest.raises(InputError, match="holds other photos"):
        demo.main(tmp_path, num_views=4)
    assert (tmp_path / "images" / "000.png").read_text() == "mine"


def test_one_view_is_no_scene(tmp_path):
    with pytest.raises(InputError, match="at least 2 views, got 1"):
        demo.main(tmp_path, num_views=1)
