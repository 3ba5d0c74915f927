"""Figures of retrieval on descriptors and poses whose answer can be counted by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dust3r_sfm.__main__ import main
from dust3r_sfm.evaluate_retrieval import evaluate_retrieval
from dust3r_sfm.formats.descriptors import ImageDescriptor, write_descriptors


def test_perfect_descriptors_find_all_of_a_scene():
    rows = np.repeat(np.eye(3), 6, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(18, 3))
    scenes = [f"scene{i // 6}" for i in range(18)]
    overlap = torch.block_diag(*[torch.ones(6, 6)] * 3).bool()
    figures = evaluate_retrieval(rows, scenes, overlap)
    assert list(figures) == ["scene0", "scene1", "scene2", "all"]
    assert all(figure.precision_at_5 == 1 and figure.recall_at_10 == 1 for figure in figures.values())


def test_what_is_missed_is_counted():
    # image 0 and 1 are like the other scene; of the other scene, nothing overlaps
    angles = np.radians([0.0, 1, 90, 91, 92, 93, 2, 3, 4, 5, 6, 7])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    overlap = torch.zeros(12, 12, dtype=torch.bool)
    overlap[0, 1] = overlap[1, 0] = overlap[0, 5] = overlap[5, 0] = True
    figures = evaluate_retrieval(rows, ["a"] * 6 + ["b"] * 6, overlap)
    # 0 finds 1 and four of b; 1 the same way; 2 to 5 find three of a and two of b
    assert figures["a"].precision_at_5 == pytest.approx((2 * 0.2 + 4 * 0.6) / 6)
    # among eleven others, the farthest alone is not in the ten: 0 misses 5, and 5 misses 0
    assert figures["a"].recall_at_10 == pytest.approx((0.5 + 1 + 0) / 3)
    assert figures["b"].recall_at_10 is None


def test_a_folder_of_scenes_is_judged_by_its_reference_poses(tmp_path, capsys):
    items = []
    for scene in ("one", "two"):
        (tmp_path / "scenes" / scene / "images").mkdir(parents=True)
        frames = []
        for i in range(3):
            Image.new("RGB", (64, 48)).save(tmp_path / "scenes" / scene / "images" / f"{i}.png")
            pose = np.eye(4)
            pose[0, 3] = -0.1 * i
            K = [[60, 0, 32], [0, 60, 24], [0, 0, 1]]
            frames.append(
                {"image": f"images/{i}.png", "width": 64, "height": 48, "K": K, "cam_from_world": pose.tolist()}
            )
            items.append(
                ImageDescriptor(f"{scene}/images/{i}.png", f"{scene}{i}", (64, 48), np.eye(2)[int(scene == "two")])
            )
        (tmp_path / "scenes" / scene / "cameras.json").write_text(json.dumps({"frames": frames}))
    write_descriptors(tmp_path / "f.h5", items)
    options = ["--scenes_dir", tmp_path / "scenes", "--descriptors", tmp_path / "f.h5", "--json", tmp_path / "out.json"]
    assert main(["evaluate-retrieval", *map(str, options)]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["all"] == {"num_images": 6, "precision_at_5": pytest.approx(0.4), "recall_at_10": 1.0}
    assert "precision@5" in capsys.readouterr().out
