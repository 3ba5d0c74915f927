"""The whole path on a procedural room with exact predictions: what is written, and what a second run does."""

import itertools
import json
from dataclasses import replace
from importlib import import_module

import h5py
import pycolmap
import pytest
import torch
from features import true_matches, write_features, write_matches
from observed import observed_scene
from PIL import Image
from procedural import make_scene

from dust3r_sfm import reconstruct
from dust3r_sfm.errors import InputError, ReconstructionError
from dust3r_sfm.evaluate import evaluate_poses, read_model
from dust3r_sfm.export_scene import ExportConfig
from dust3r_sfm.files import holding
from dust3r_sfm.formats.matches import read_matches
from dust3r_sfm.formats.pointmaps import PointmapFile
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.pairs import PairPrediction

inference = import_module("dust3r_sfm.infer_pairs")  # the package's attribute of this name is the function


@pytest.fixture(scope="module")
def scene():
    return make_scene(5, (48, 64))


@pytest.fixture(scope="module")
def image_dir(scene, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    (folder / "photos").mkdir()
    for view in scene.views:
        photo = Image.fromarray(view.image.numpy()).resize(view.original_size)
        photo.save(folder / view.name, quality=95)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    config = Dust3rConfig(
        image_size=64,
        enc_embed_dim=32,
        enc_depth=1,
        enc_num_heads=2,
        dec_embed_dim=32,
        dec_depth=1,
        dec_num_heads=2,
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    save_weights(Dust3r(config), path, {"name": "tiny", "licence": "Apache-2.0"})
    return str(path)


@pytest.fixture
def exact(scene, monkeypatch):
    """The network is replaced by the truth; the pairs that it was asked for."""
    asked = []

    def predict(self, pairs, bar):
        asked.extend(pairs)
        return {pair: scene.predictions[pair] for pair in pairs}

    monkeypatch.setattr(inference.PairNetwork, "predict", predict)
    return asked


@pytest.fixture
def counted_alignments(monkeypatch):
    calls, align = [], reconstruct.align_views

    def counting(*arguments):
        calls.append(1)
        return align(*arguments)

    monkeypatch.setattr(reconstruct, "align_views", counting)
    return calls


def test_photos_become_a_colmap_model_with_the_true_poses(scene, image_dir, weights, exact, tmp_path):
    config = reconstruct.ReconstructConfig(export=ExportConfig(formats=("colmap", "database", "ply", "depths")))
    summary = reconstruct.main(image_dir, tmp_path / "out", weights, text=True, config=config)
    truth = dict(zip(scene.names, scene.cam_from_world, strict=True))
    report = evaluate_poses(read_model(tmp_path / "out" / "sparse"), truth)
    assert report.num_registered == 5
    assert report.median_rotation_deg < 0.1
    assert report.median_translation_deg < 0.3
    model = pycolmap.Reconstruction(tmp_path / "out" / "sparse" / "0")
    assert {image.name for image in model.images.values()} == set(scene.names)
    assert all((camera.width, camera.height) == (128, 96) for camera in model.cameras.values())
    assert model.num_points3D() > 100
    assert model.compute_mean_reprojection_error() < 1
    assert (tmp_path / "out" / "sparse" / "0" / "cameras.txt").is_file()
    assert (tmp_path / "out" / "points.ply").read_bytes().startswith(b"ply\nformat binary_little_endian 1.0\n")
    assert len(PointmapFile(tmp_path / "out" / "pointmaps.h5")) == len(exact) == 20
    assert h5py.is_hdf5(tmp_path / "out" / "scene.h5")
    assert len(read_matches(tmp_path / "out" / "matches.h5")) == 10
    assert (tmp_path / "out" / "depths" / "units.json").is_file()
    database = pycolmap.Database.open(str(tmp_path / "out" / "database.db"))
    assert [database.num_keypoints_for_image(i) for i in range(1, 6)] == [
        len(model.images[i].points2D) for i in range(1, 6)
    ]
    database.close()
    assert summary.closing_line().startswith("5 of 5 images registered in 1 model with")


def test_the_summary_accounts_for_every_image_and_pair(image_dir, weights, exact, tmp_path):
    reconstruct.main(image_dir, tmp_path / "out", weights)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["images"] == {f"photos/{i:03d}.jpg": {"registered": True, "model": 0} for i in range(5)}
    assert len(summary["pairs"]) == 20
    assert all(pair["kept"] and pair["reason"] and pair["score"] > 1 for pair in summary["pairs"])
    assert summary["network"] == {"name": "tiny", "licence": "Apache-2.0"}
    assert {"python", "torch", "pycolmap", "dust3r_sfm"} <= set(summary["versions"])
    assert {"load", "infer_pairs", "align_scene", "export_scene"} <= set(summary["timings_s"])
    assert summary["counts"]["points"] == summary["models"][0]["points"] > 100
    assert summary["models"][0]["mean_track_length"] > 2
    assert summary["image_dir"] == str(image_dir.resolve())
    for page in ("report.html", "pair_graph.html"):
        assert "photos/004.jpg" in (tmp_path / "out" / page).read_text()


def test_a_second_run_predicts_and_aligns_nothing_and_gives_the_same(
    image_dir, weights, exact, counted_alignments, tmp_path
):
    reconstruct.main(image_dir, tmp_path, weights)
    files = (tmp_path / "sparse" / "0" / "points3D.bin", tmp_path / "points.ply")
    first = [file.read_bytes() for file in files]
    exact.clear()
    reconstruct.main(image_dir, tmp_path, weights)
    assert not exact
    assert len(counted_alignments) == 1
    assert [file.read_bytes() for file in files] == first


@pytest.mark.parametrize("stage", ["decide_pairs", "align_views", "match_dense", "build_tracks", "export_scenes"])
def test_a_run_interrupted_in_any_stage_continues(image_dir, weights, exact, tmp_path, monkeypatch, stage):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reconstruct, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            reconstruct.main(image_dir, tmp_path, weights)
    assert not (tmp_path / "sparse").exists()
    exact.clear()
    reconstruct.main(image_dir, tmp_path, weights)
    assert not exact, "the predictions of the first run are used"
    assert pycolmap.Reconstruction(tmp_path / "sparse" / "0").num_reg_images() == 5


def test_two_parts_become_two_models_and_a_lone_photo_is_named_with_its_reason(
    scene, image_dir, weights, exact, tmp_path, monkeypatch
):
    names = scene.names
    unsure = {
        pair: PairPrediction(p.pointmap0_in_cam0, 0 * p.confidence0 + 1, p.pointmap1_in_cam0, 0 * p.confidence1 + 1)
        for pair, p in scene.predictions.items()
        if {*pair} not in ({names[0], names[1]}, {names[2], names[3]})
    }
    for pair, prediction in unsure.items():
        monkeypatch.setitem(scene.predictions, pair, prediction)
    reconstruct.main(image_dir, tmp_path, weights)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [model["images"] for model in summary["models"]] == [2, 2]
    assert summary["images"][names[1]]["model"] != summary["images"][names[2]]["model"]
    assert summary["images"][names[4]]["registered"] is False
    assert "all of its 8 directed pairs were dropped" in summary["images"][names[4]]["reason"]
    assert pycolmap.Reconstruction(tmp_path / "sparse" / "1").num_reg_images() == 2


def test_a_model_of_a_former_run_that_had_more_parts_is_gone(image_dir, weights, exact, tmp_path):
    with holding(tmp_path):
        (tmp_path / "sparse" / "1").mkdir(parents=True)
        (tmp_path / "sparse" / "1" / "images.bin").touch()
    reconstruct.main(image_dir, tmp_path, weights)
    assert [path.name for path in (tmp_path / "sparse").iterdir()] == ["0"]


def test_known_cameras_are_kept(scene, image_dir, weights, exact, tmp_path):
    scale = torch.diag(torch.tensor([2.0, 2.0, 1.0]))  # the stored files are twice the network's size
    frames = [
        {"image": name, "width": 128, "height": 96, "K": (scale @ K).tolist(), "cam_from_world": pose.tolist()}
        for name, K, pose in zip(scene.names, scene.K, scene.cam_from_world, strict=True)
    ][:3]
    (tmp_path / "cameras.json").write_text(json.dumps({"frames": frames}))
    reconstruct.main(image_dir, tmp_path / "out", weights, cameras=tmp_path / "cameras.json")
    model = pycolmap.Reconstruction(tmp_path / "out" / "sparse" / "0")
    for image in model.images.values():
        expected = scene.cam_from_world[scene.names.index(image.name)].double()
        found = torch.from_numpy(image.cam_from_world().matrix())
        tolerance = 1e-5 if image.name in scene.names[:3] else 2e-2
        torch.testing.assert_close(found, expected[:3], rtol=0, atol=tolerance)
    again = tmp_path / "again"
    reconstruct.main(image_dir, again, weights, cameras=tmp_path / "out" / "sparse" / "0")
    found = read_model(again / "sparse")
    assert all(
        (found[name] - pose).abs().max() < 1e-5 for name, pose in read_model(tmp_path / "out" / "sparse").items()
    )


def test_other_options_align_again(image_dir, weights, exact, counted_alignments, tmp_path):
    reconstruct.main(image_dir, tmp_path, weights)
    config = reconstruct.ReconstructConfig(align=reconstruct.AlignConfig(max_iters=5))
    reconstruct.main(image_dir, tmp_path, weights, config=config)
    assert len(counted_alignments) == 2


def test_pairs_come_from_a_file_or_by_kind(scene, image_dir, weights, exact, tmp_path):
    lines = [f"{name0} {name1}" for name0, name1 in itertools.pairwise(scene.names)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    reconstruct.main(image_dir, tmp_path / "file", weights, pairs_file=tmp_path / "pairs.txt")
    assert len(exact) == 8
    exact.clear()
    reconstruct.main(image_dir, tmp_path / "kind", weights, pairs="sequential", window=1)
    assert len(exact) == 10


def test_many_photos_are_paired_with_those_that_look_alike(image_dir, weights, exact, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "MAX_EXHAUSTIVE", 4)
    reconstruct.main(image_dir, tmp_path, weights, num_matched=2)
    assert 8 <= len(exact) <= 10  # a tree at least, and at most two for each of the five


def test_matches_of_the_photos_alone_map_them_where_no_pair_is_kept(
    scene, image_dir, weights, exact, monkeypatch, tmp_path
):
    for pair, p in scene.predictions.items():
        nothing = PairPrediction(p.pointmap0_in_cam0, 0 * p.confidence0, p.pointmap1_in_cam0, 0 * p.confidence1)
        monkeypatch.setitem(scene.predictions, pair, nothing)
    keypoints, matches = true_matches(observed_scene(scene, width=128, num_points=80, noise_px=0.1))
    features = write_features(tmp_path / "feats.h5", keypoints, dict.fromkeys(keypoints, (128, 96)))
    paired = write_matches(tmp_path / "matches.h5", matches)
    reconstruct.main(image_dir, tmp_path / "out", weights, features=features, matches=paired)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["counts"]["registered"] == 5
    assert "none of 20 pairs is worth aligning" in summary["refinement"]["alignment"]
    truth = dict(zip(scene.names, scene.cam_from_world, strict=True))
    assert evaluate_poses(read_model(tmp_path / "out" / "sparse"), truth).median_rotation_deg < 0.3


def test_nothing_to_align_is_said_and_the_summary_still_accounts_for_the_images(
    scene, image_dir, weights, monkeypatch, tmp_path
):
    def predict(self, pairs, bar):
        none = {pair: torch.zeros_like(scene.predictions[pair].confidence0) for pair in pairs}
        return {p: replace(scene.predictions[p], confidence0=zero, confidence1=zero) for p, zero in none.items()}

    monkeypatch.setattr(inference.PairNetwork, "predict", predict)
    with pytest.raises(ReconstructionError, match="none of 20 pairs is worth aligning"):
        reconstruct.main(image_dir, tmp_path, weights)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not any(image["registered"] for image in summary["images"].values())
    assert summary["counts"] == {"images": 5, "registered": 0, "pairs": 20, "kept_pairs": 0, "models": 0, "points": 0}


def test_a_second_run_in_the_same_folder_is_told_so(image_dir, weights, tmp_path):
    with holding(tmp_path), pytest.raises(InputError, match="another run is working in"):
        reconstruct.main(image_dir, tmp_path, weights)


def test_the_model_of_another_program_is_not_overwritten(image_dir, weights, tmp_path):
    (tmp_path / "sparse").mkdir()
    for _ in range(2):
        with pytest.raises(InputError, match="was not made here: choose another output"):
            reconstruct.main(image_dir, tmp_path, weights)
