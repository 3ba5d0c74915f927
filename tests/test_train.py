"""The train stage from the command line: weights that load, a run that continues, one sentence for a mistake."""

import inspect
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from depth_folders import write_rgbd
from PIL import Image
from procedural import make_scene
from safetensors import safe_open
from xfeat import write_xfeat

from dust3r_sfm import evaluate_pairs, plot_training
from dust3r_sfm import train as train_stage
from dust3r_sfm.__main__ import main
from dust3r_sfm.errors import InputError
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.models.stem import read_xfeat
from dust3r_sfm.train import TrainConfig, configured
from dust3r_sfm.training.config import LoopConfig
from dust3r_sfm.training.stage_files import stage_names, with_stage


def options(**values):
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


TINY = options(
    image_size=64, enc_embed_dim=32, enc_depth=1, enc_num_heads=2, dec_embed_dim=32, dec_depth=1, dec_num_heads=2
)
SHORT = options(num_generated=2, batch=1, heights=32, width=32, easy_heights=32, easy_width=32, samples=1, log_steps=1)


def train(output, steps, *more):
    return main(["train", *options(output=output, max_steps=steps), *SHORT, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of two steps, by `python -m dust3r_sfm.train`, and what it said."""
    output = tmp_path_factory.mktemp("trained") / "new" / "run"
    command = [sys.executable, "-m", "dust3r_sfm.train", *options(output=output, max_steps=2), *SHORT, *TINY]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return output, done.stderr


def test_a_run_writes_weights_that_load(trained):
    output, said = trained
    assert sorted(path.name for path in output.iterdir()) == ["history.json", "state.pt", "weights.safetensors"]
    model = Dust3r.from_pretrained(output / "weights.safetensors")
    assert (model.config.image_size, model.config.enc_depth, model.config.square_ok) == (64, 1, True)
    images = torch.zeros((1, 3, 32, 32))
    prediction = model(images, images)
    assert prediction.pointmap0_in_cam0.isfinite().all()
    assert [row["pairs"] for row in json.loads((output / "history.json").read_text())] == [1, 2]
    assert said.splitlines()[-1].endswith(f"weights in {output / 'weights.safetensors'}.")
    assert "error" in said.splitlines()[0]


def test_the_same_command_continues(trained, tmp_path, caplog):
    output = tmp_path / "run"
    assert train(output, 1, *TINY) == 0
    first = Dust3r.from_pretrained(output / "weights.safetensors").state_dict()
    assert train(output, 3, *TINY) == 0
    assert "Continuing after 0.0 minutes" in caplog.text
    assert [row["pairs"] for row in json.loads((output / "history.json").read_text())] == [1, 2, 3]
    second = Dust3r.from_pretrained(output / "weights.safetensors").state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_run_starts_from_given_weights(trained, tmp_path):
    weights = trained[0] / "weights.safetensors"
    assert train(tmp_path / "run", 1, "--init", str(weights), "--learning_rate", "1e-9") == 0
    before, after = (Dust3r.from_pretrained(p).state_dict() for p in (weights, tmp_path / "run/weights.safetensors"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.allclose(after[name], value, atol=1e-6), name


def test_a_network_learns_to_see_xfeats_features_and_keeps_them_from_run_to_run(trained, tmp_path):
    write_xfeat(tmp_path / "xfeat.pt")
    given = ["--init", str(trained[0] / "weights.safetensors")]
    assert train(tmp_path / "seeing", 2, *given, "--xfeat", str(tmp_path / "xfeat.pt")) == 0
    seeing = Dust3r.from_pretrained(tmp_path / "seeing/weights.safetensors")
    assert seeing.config.stem == "xfeat"
    assert seeing.stem.proj.weight.abs().max() > 0
    frozen = read_xfeat(tmp_path / "xfeat.pt")
    for name, value in seeing.stem.xfeat.state_dict().items():
        assert torch.allclose(value, frozen[name], rtol=1e-3, atol=1e-6), name
    again = ["--init", str(tmp_path / "seeing/weights.safetensors"), "--reshape", *TINY]
    assert train(tmp_path / "again", 1, *again) == 0
    assert Dust3r.from_pretrained(tmp_path / "again/weights.safetensors").config.stem == "xfeat"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ((*TINY, "--stem", "xfeat"), "needs them: give --xfeat, or --init"),
        ((*TINY, "--xfeat", "xfeat.pt"), "cannot read XFeat's weights from xfeat.pt"),
    ],
)
def test_xfeats_features_without_their_weights_are_refused(tmp_path, monkeypatch, capsys, more, sentence):
    monkeypatch.chdir(tmp_path)
    assert train("run", 1, *more) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_stage_s_settings_are_the_defaults(tmp_path):
    stage = tmp_path / "stage.json"
    stage.write_text(
        json.dumps({"about": "tiny", "num_generated": 3, "loop": {"heights": [32], "width": 64, "minutes": 7}})
    )
    for given in ([f"--config={stage}"], ["--config", str(stage)]):
        default = inspect.signature(configured([*given, "--batch", "2"])).parameters["config"].default
        assert (default.num_generated, default.loop.width, default.loop.heights) == (3, 64, (32,))
        assert default.loop.minutes == 7.0
        assert default.loop.batch == LoopConfig().batch
    assert configured(["--output", "run"]) is train_stage.main


@pytest.mark.parametrize("name", ["small_256", "large_512", "dpt_512"])
def test_the_stages_that_come_with_the_package_are_whole(name):
    assert name in stage_names()
    config = with_stage(TrainConfig(), name)
    assert (config.loop.constant_share, config.loop.pose) == (0.0, 0.4)
    assert config.model.image_size == config.loop.width
    assert config.reshape == (name != "small_256")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "must hold an object of settings, got list"),
        ("{", "is not JSON"),
        ('{"loop": {"bach": 3}}', "loop has the unknown setting bach: there are minutes, "),
        ('{"loop": {"batch": "3"}}', "loop: batch must be of the kind of 64, got '3'"),
        ('{"loop": {"heights": [32, 32.5]}}', "heights must be of the kind of 192, got 32.5"),
        ('{"loop": {"heights": [100]}}', "must be multiples of 16"),
        (None, "there is no stage stage.json: expected dpt_512, large_512, small_256, or a JSON file"),
    ],
)
def test_a_mistake_in_a_stage_gets_one_sentence(tmp_path, monkeypatch, capsys, text, sentence):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "stage.json").write_text(text)
    assert main(["train", "--config", "stage.json", "--output", "run"]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_next_stage_carries_weights_over_by_name_and_starts_its_head(tmp_path, caplog):
    deep = [*TINY, *options(dec_depth=4)]
    assert train(tmp_path / "linear", 1, *deep) == 0
    given = tmp_path / "linear" / "weights.safetensors"
    dpt = ["--reshape", "--init", str(given), *deep, *options(head="dpt", dpt_feature_dim=16, image_size=96)]
    dpt += ["--dpt_layer_dims", "8", "8", "8", "8"]
    assert train(tmp_path / "dpt", 1, *dpt, "--learning_rate", "1e-9") == 0
    assert "new: downstream_head1, downstream_head2." in caplog.text
    first, second = (Dust3r.from_pretrained(tmp_path / run / "weights.safetensors") for run in ("linear", "dpt"))
    assert (second.config.head, second.config.image_size, second.config.dpt_feature_dim) == ("dpt", 96, 16)
    before, after = first.state_dict(), second.state_dict()
    kept = [name for name in before if "head" not in name]
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in kept)
    assert not set(after) & {name for name in before if "head" in name}
    images = torch.zeros((1, 3, 32, 48))
    assert second(images, images).pointmap1_in_cam0.shape == (1, 32, 48, 3)


def test_weights_that_do_not_fit_the_next_stage_are_refused(trained, tmp_path, capsys):
    weights = str(trained[0] / "weights.safetensors")
    assert train(tmp_path / "run", 1, "--reshape", "--init", weights, *TINY, "--enc_embed_dim", "64") == 2
    assert "the weights to start from do not fit the model's shape in " in capsys.readouterr().err


def test_a_run_on_own_scenes_is_measured_on_dev_pairs(tmp_path, caplog):
    """Both are one procedural scene, as photos with cameras and depth."""
    scene = tmp_path / "scenes" / "room"
    write_rgbd(make_scene(3, (48, 64), seed=4), scene)
    names = [f"photos/00{i}.jpg" for i in range(3)]
    pairs = [[names[0], names[1]], [names[1], names[2]]]
    (scene.parent / "pairs_within_60deg.json").write_text(json.dumps({"room": pairs}))
    more = ["--scenes", str(scene), "--dev_scenes", str(scene.parent), *options(scene_share=1.0, batch=2)]
    assert train(tmp_path / "run", 2, *TINY, *more) == 0
    assert "3 pairs of 3 photos of 1 scenes." in caplog.text
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    measured = [row for row in history if "rra15" in row]
    assert [row["pairs"] for row in measured] == [0, history[-1]["pairs"]]
    assert all(0 <= row["maa30"] <= row["rra15"] + 0.5 for row in measured)
    assert {"own_rta15", "both_ways_rta15", "own_both_ways_rta15", "focal_error", "depth_error"} <= measured[0].keys()
    plot_training.main(tmp_path / "run")
    with Image.open(tmp_path / "run" / "history.png") as picture:
        assert picture.size[0] > 1000


def test_what_is_measured_is_the_network_that_is_saved(tmp_path, monkeypatch):
    """With what is frozen in it, too."""
    scene = tmp_path / "scenes" / "room"
    write_rgbd(make_scene(2, (48, 64), seed=4), scene)
    pairs = {"room": [["photos/000.jpg", "photos/001.jpg"]]}
    (scene.parent / "pairs_within_60deg.json").write_text(json.dumps(pairs))
    write_xfeat(tmp_path / "xfeat.pt")
    measured, evaluate = [], evaluate_pairs.evaluate_pairs

    def spied(model, *args, **kwargs):
        measured.append({name: x.clone() for name, x in model.state_dict().items()})
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(evaluate_pairs, "evaluate_pairs", spied)
    more = ["--xfeat", str(tmp_path / "xfeat.pt"), "--dev_scenes", str(scene.parent)]
    assert train(tmp_path / "run", 2, *TINY, *more) == 0
    saved = Dust3r.from_pretrained(tmp_path / "run" / "weights.safetensors").state_dict()
    assert saved.keys() == measured[-1].keys()
    for name, value in measured[-1].items():
        assert torch.allclose(value.float(), saved[name].float(), rtol=1e-3, atol=1e-4), name


def test_a_run_waits_for_a_slow_disk_at_its_end_alone(tmp_path, monkeypatch):
    over, in_time, written = threading.Event(), [], []
    write, ask = train_stage._Saver._write, train_stage._Saver.__call__

    def slow_write(self, weights, state, history, pairs_seen):
        in_time.append(over.wait(60))
        written.append(pairs_seen)
        write(self, weights, state, history, pairs_seen)

    def asked(self, trainer):
        if trainer.is_over:
            over.set()
        ask(self, trainer)

    monkeypatch.setattr(train_stage._Saver, "_write", slow_write)
    monkeypatch.setattr(train_stage._Saver, "__call__", asked)
    assert train(tmp_path / "run", 4, *TINY, *options(save_minutes=0)) == 0
    assert all(in_time)
    assert written == [1, 4]
    with safe_open(tmp_path / "run" / "weights.safetensors", "pt") as weights:
        assert weights.metadata()["pairs_seen"] == "4"


def test_own_scenes_without_overlap_are_refused(tmp_path, capsys):
    write_rgbd(make_scene(2, (48, 64), seed=4), tmp_path / "room")
    frames = tmp_path / "room" / "cameras.json"
    content = json.loads(frames.read_text())
    content["frames"][1]["cam_from_world"][2][3] += 1000.0
    frames.write_text(json.dumps(content))
    assert train(tmp_path / "run", 1, *TINY, "--scenes", str(tmp_path / "room")) == 2
    assert "no two of the 2 photos of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no"), ("x", "is not JSON"), ("[]", "is not the history of a run"), ('[{"a": 1}]', "is not the")],
)
def test_a_history_that_cannot_be_drawn_gets_one_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "history.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        plot_training.main(tmp_path / "history.json")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--textures", "nowhere"], "no folder nowhere: expected one of photos for textures"),
        (["--textures", "."], "no photos in .: expected JPEG, PNG or WebP files"),
        (["--init", "nowhere.safetensors"], "no model at nowhere.safetensors"),
        (["--scenes", "."], ". is no scene to train on: expected a cameras.json"),
        (["--dev_scenes", "."], "there is no pairs_within_60deg.json"),
        (["--num_generated", "0"], "there are no textures"),
    ],
)
def test_a_mistake_gets_one_sentence_and_no_folder(tmp_path, monkeypatch, capsys, more, sentence):
    monkeypatch.chdir(tmp_path)
    assert train("run", 1, *TINY, *more) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", ["of another model", "broken", "empty"])
def test_a_foreign_state_is_refused_and_stays(trained, tmp_path, capsys, state):
    content = (trained[0] / "state.pt").read_bytes() if state == "of another model" else b"junk" * (state == "broken")
    (tmp_path / "state.pt").write_bytes(content)
    assert train(tmp_path, 1, *TINY, *options(enc_depth=2)) == 2
    assert "state.pt is not the state of a run of this model: choose another output folder" in capsys.readouterr().err
    assert (tmp_path / "state.pt").read_bytes() == content
    assert not (tmp_path / "weights.safetensors").exists()


def test_help_names_every_option_once_with_hyphens_or_underscores(capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    for option in (
        "--output",
        "--init",
        "--textures",
        "--minutes",
        "--learning_rate",
        "--enc_depth",
        "--no_compile",
        "--config",
    ):
        assert said.count(option + " ") == 1, option
    assert "Folder of photos for textures" in said
    assert "loop." not in said.replace("config.loop options", "")
