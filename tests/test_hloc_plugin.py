"""Our extractor and matcher inside a package laid out as hloc is: its loader, base class and dictionaries of confs.

hloc itself cannot be installed from a package index; what stands here follows its documented layout.
"""

import sys
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from procedural import STORED_PER_NET, make_scene

import dust3r_sfm as ds
from dust3r_sfm.errors import InputError
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3rConfig
from dust3r_sfm.pairs import PairPrediction

BASE_MODEL = '''
import inspect
from abc import ABCMeta, abstractmethod
from copy import copy
from importlib import import_module

from torch import nn


class BaseModel(nn.Module, metaclass=ABCMeta):
    default_conf = {}
    required_inputs = []

    def __init__(self, conf):
        super().__init__()
        self.conf = conf = {**self.default_conf, **conf}
        self.required_inputs = copy(self.required_inputs)
        self._init(conf)

    def forward(self, data):
        for key in self.required_inputs:
            assert key in data, f"Missing key {key} in data"
        return self._forward(data)

    @abstractmethod
    def _init(self, conf): ...

    @abstractmethod
    def _forward(self, data): ...


def dynamic_load(root, model):
    """The one model class that the module `model` of a package defines."""
    module = import_module(f"{root.__name__}.{model}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass)]
    (found,) = [c for c in classes if c.__module__ == module.__name__ and issubclass(c, BaseModel)]
    return found
'''


@pytest.fixture
def hloc(tmp_path, monkeypatch):
    for folder in ("extractors", "matchers", "utils"):
        (tmp_path / "hloc" / folder).mkdir(parents=True)
        (tmp_path / "hloc" / folder / "__init__.py").touch()
    (tmp_path / "hloc/__init__.py").touch()
    (tmp_path / "hloc/utils/base_model.py").write_text(BASE_MODEL)
    for module in ("extract_features", "match_dense"):
        (tmp_path / f"hloc/{module}.py").write_text("confs = {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module("hloc")
    for name in [name for name in sys.modules if name.split(".")[0] == "hloc"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    small = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2, "dec_embed_dim": 32, "dec_depth": 1}
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(ds.Dust3r(Dust3rConfig(image_size=96, dec_num_heads=2, **small)), path, {"name": "tiny"})
    return str(path)


def load(kind, name, weights):
    """As hloc's stages do it."""
    dynamic_load = import_module("hloc.utils.base_model").dynamic_load
    conf = import_module(f"hloc.{name}").confs["dust3r_sfm"]["model"]
    return dynamic_load(import_module(f"hloc.{kind}"), conf["name"])(conf | {"weights": weights}).eval()


def test_the_extractor_gives_a_unit_vector_an_image(hloc, weights):
    ds.register_with_hloc()
    ds.register_with_hloc()
    model = load("extractors", "extract_features", weights)
    with torch.no_grad():
        found = model({"image": torch.rand(1, 3, 131, 203)})["global_descriptor"]
    assert found.shape == (1, 64)
    assert abs(float(found.norm()) - 1) < 1e-5
    assert len([p for p in import_module("hloc.extractors").__path__ if "hloc_plugin" in p]) == 1


def test_the_matcher_s_keypoints_are_hloc_s_pixels_of_the_same_points(hloc, weights, monkeypatch):
    """The network is replaced by the truth: two photos of a room, in twice the network's size."""
    scene = make_scene(2, (64, 96), seed=3)
    truth = iter(scene.predictions.values())  # 0 with 1, then 1 with 0

    def decode(*_):
        prediction = next(truth)
        return PairPrediction(*(value[None] for value in vars(prediction).values()))

    ds.register_with_hloc()
    model = load("matchers", "match_dense", weights)
    monkeypatch.setattr(model.net, "decode", decode)
    images = [view.image.permute(2, 0, 1)[None].float() / 255 for view in scene.views]
    images = [image.repeat_interleave(STORED_PER_NET, 2).repeat_interleave(STORED_PER_NET, 3) for image in images]
    with torch.no_grad():
        found = model({"image0": images[0], "image1": images[1]})
    assert len(found["keypoints0"]) == len(found["keypoints1"]) == len(found["scores"]) > 300
    column, row = ((found["keypoints0"] + 0.5) / STORED_PER_NET).long().T
    points = scene.points_in_world[0][row, column] @ scene.cam_from_world[1, :3, :3].T
    pixels = (points + scene.cam_from_world[1, :3, 3]) @ scene.K[1].T
    error = (pixels[:, :2] / pixels[:, 2:] * STORED_PER_NET - 0.5 - found["keypoints1"]).norm(dim=1)
    assert np.median(error) < STORED_PER_NET / 2


@pytest.mark.skipif(find_spec("hloc") is not None, reason="hloc is installed")
def test_without_hloc_it_is_said_what_to_install():
    with pytest.raises(InputError, match="install it beside dust3r_sfm"):
        ds.register_with_hloc()
