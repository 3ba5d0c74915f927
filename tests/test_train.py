"""The train stage from the command line: weights that load, a run that continues, one sentence for a mistake."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dust3r_sfm.__main__ import main
from dust3r_sfm.models.dust3r import Dust3r


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


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--textures", "nowhere"], "no folder nowhere: expected one of photos for textures"),
        (["--textures", "."], "no photos in .: expected JPEG, PNG or WebP files"),
        (["--init", "nowhere.safetensors"], "no model at nowhere.safetensors"),
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
    for option in ("--output", "--init", "--textures", "--minutes", "--learning_rate", "--enc_depth", "--no_compile"):
        assert said.count(option + " ") == 1, option
    assert "Folder of photos for textures" in said
    assert "loop." not in said.replace("config.loop options", "")
