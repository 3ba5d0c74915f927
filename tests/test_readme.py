"""The README's commands run as they stand, in its order, on photos of a procedural room and exact predictions."""

import json
import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from clips import encode
from PIL import Image
from procedural import make_scene

from dust3r_sfm.__main__ import main as dust3r_sfm
from dust3r_sfm.models import weights
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.pairs import Pair
from dust3r_sfm.serving.request import parse_request

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

ELSEWHERE = {
    "pip install": "the set-up, which CI runs",
    "python -m pytest": "this",
    "colmap gui": "needs a screen",
    "ns-train": "needs a GPU",
    "python examples/simple_trainer.py": "gsplat's, and needs a GPU",
    "docker build": "needs docker",
    "docker run": "needs docker",
    "dust3r-sfm train": "needs hours on a GPU",
    "dust3r-sfm plot-training": "needs a run of training",
    "dust3r-sfm evaluate-pairs": "needs a run of training",
    "curl": "needs an account of Runpod",
    "python docker/runpod/handler.py": "needs the runpod package",
}
"""Commands that are not run here, by how they begin, and why."""
QUICK = ["--refine", "none", "--align.max_iters", "10", "--align.max_samples", "300"]
"""SIFT and COLMAP's mapping would take most of the time; their own tests have them."""
NUM_PHOTOS = 3


def commands():
    """Every line of a shell block, less those that are run elsewhere."""
    lines = [line for kind, text in BLOCKS if kind in ("sh", "bash") for line in text.splitlines()]
    return [line for line in lines if not line.startswith(tuple(ELSEWHERE))]


@pytest.fixture(scope="module")
def scene():
    return make_scene(NUM_PHOTOS + 1, (32, 48))


@pytest.fixture
def folder(scene, tmp_path, monkeypatch):
    """What the README speaks of: photos/, queries/, clip.mp4, cameras.json, reference/; the network tells the truth."""
    monkeypatch.chdir(tmp_path)
    photos = [np.asarray(Image.fromarray(v.image.numpy()).resize(v.original_size)) for v in scene.views]
    for i, pixels in enumerate(photos):
        path = tmp_path / ("queries" if i == NUM_PHOTOS else "photos") / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    encode(tmp_path / "clip.mp4", photos[:NUM_PHOTOS], rate=2, crf="10")
    (tmp_path / "reference").mkdir()
    for path in (tmp_path / "cameras.json", tmp_path / "reference" / "cameras.json"):
        path.write_text(json.dumps({"frames": [known_camera(scene, i) for i in range(NUM_PHOTOS)]}))
    torch.manual_seed(0)
    shape = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2}
    shape |= {key.replace("enc", "dec"): value for key, value in shape.items()}
    tiny = tmp_path / "tiny.safetensors"
    save_weights(Dust3r(Dust3rConfig(image_size=48, **shape)), tiny, {"name": "tiny", "licence": "Apache-2.0"})
    monkeypatch.setattr(weights, "SHIPPED", tiny)

    def predict(self, pairs, bar):
        indices = {pair: (int(re.findall(r"\d+", name)[-1]) for name in pair) for pair in pairs}
        return {pair: scene.predictions[Pair(*(scene.names[i] for i in ij))] for pair, ij in indices.items()}

    monkeypatch.setattr(import_module("dust3r_sfm.infer_pairs").PairNetwork, "predict", predict)
    return tmp_path


def known_camera(scene, i):
    width, height = scene.views[i].original_size
    K = scene.K[i].double().clone()
    K[:2] *= width / scene.views[i].size[1]
    pose = scene.cam_from_world[i].tolist()
    return {"image": f"images/{i:03d}.png", "width": width, "height": height, "K": K.tolist(), "cam_from_world": pose}


def run(line, monkeypatch):
    """One command line of the README in this process."""
    words = shlex.split(line)
    if words[0] == "dust3r-sfm":
        words += QUICK if words[1] == "reconstruct" else []
        return dust3r_sfm(words[1:])
    assert words[0] == "python"
    monkeypatch.setattr(sys, "argv", words[1:])
    runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    return 0


def test_every_command_runs_and_writes_what_the_readme_says(folder, scene, monkeypatch):
    lines = [line for line in commands() if "demo" not in line]
    assert len(lines) > 12
    for line in lines:
        assert run(line, monkeypatch) == 0, line
    for text in (text for kind, text in BLOCKS if kind == "python"):
        exec(compile(text, "README.md", "exec"), {})
    written = [
        *("out/sparse/0/cameras.bin", "out/database.db", "out/points.ply", "out/report.html", "out/pair_graph.html"),
        *("out/summary.json", "out/scene.html", "out/nerfstudio/transforms.json", "out/nerfstudio/images_2"),
        *("out/gsplat/sparse/0/images.bin", "out/gsplat/images_4", "out/dense/stereo/fusion.cfg"),
        *("out/hloc/feats.h5", "out/hloc/global-feats.h5", "out/hloc/pairs-queries.txt"),
        *("frames/frame_00002.jpg", "work/pairs.txt"),
        *("out_python/sparse/0/points3D.bin", "out_hloc/sparse/0/images.bin", "out_more/sparse/0"),
    ]
    for path in written:
        assert (folder / path).exists(), path
    video = pycolmap.Reconstruction("out_video/sparse/0")
    assert sorted(image.name for image in video.images.values()) == [f"frame_{i:05d}.jpg" for i in range(NUM_PHOTOS)]
    known = pycolmap.Reconstruction("out_known/sparse/0")
    for image in known.images.values():
        truth = scene.cam_from_world[int(image.name[:3])].numpy()[:3]
        np.testing.assert_allclose(image.cam_from_world().matrix(), truth, atol=1e-4)
    assert (folder / "poses.txt").read_text().split()[0] == f"{NUM_PHOTOS:03d}.png"


def test_each_exception_is_still_in_the_readme():
    for start in ELSEWHERE:
        assert any(start in text for _, text in BLOCKS), start


def test_the_job_of_the_readme_is_a_request():
    (job,) = [json.loads(text) for kind, text in BLOCKS if kind == "json"]
    assert parse_request(job["input"]).options.formats == ["colmap", "database", "gsplat"]


def test_the_two_commands_come_first_as_ci_takes_them():
    assert [kind for kind, _ in BLOCKS][:2] == ["sh", "sh"]
    assert "dust3r-sfm demo" in BLOCKS[0][1]
    assert "pytest" in BLOCKS[1][1]
    assert [kind for kind, _ in BLOCKS].count("sh") == 2


def test_what_the_readme_shows_and_names_is_there():
    shown = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    named = re.findall(r"`((?:docker|pipelines|\.runpod|dust3r_sfm)/[\w./]*)`", README)
    assert len(named) > 2
    for path in shown + named:
        assert (ROOT / path).exists(), path
