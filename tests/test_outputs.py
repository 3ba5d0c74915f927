"""Every stage with an output: one run at a time, and nothing is left of one that was asked in vain."""

from contextlib import nullcontext

import pytest
from PIL import Image

from dust3r_sfm.__main__ import main
from dust3r_sfm.files import holding, writing
from dust3r_sfm.formats.pointmaps import PointmapShards

PHOTOS, OUTPUT = ["--image_dir", "no_photos"], "new/output"
STAGES = {
    "extract-frames": ["--video", "none.mp4"],
    "pairs-from-retrieval": ["--descriptors", "none.h5", "--num_matched", "5"],
    "filter-pairs": ["--pointmaps", "none.h5"],
    "match-dense": ["--pointmaps", "none.h5"],
    "align-scene": ["--pointmaps", "none.h5", *PHOTOS],
    "sparse-features": PHOTOS,
    "refine-scene": ["--scene", "none.h5", "--matches", "none.h5", *PHOTOS],
    "export-scene": ["--scene", "none.h5", *PHOTOS],
    "reconstruct": PHOTOS,
    "convert-weights": ["--checkpoint", "none.pt"],
}
FOLDERS = {"export-scene", "reconstruct"}


@pytest.mark.parametrize("is_share", [False, True])
def test_two_runs_that_match_do_not_meet(tmp_path, capsys, is_share):
    PointmapShards(tmp_path / "empty.h5").finish([], []).close()
    arguments = ["match-dense", "--pointmaps", str(tmp_path / "empty.h5"), "--output", str(tmp_path / "matches.h5")]
    with holding(tmp_path / "matches.shards", "1-2" if is_share else None):
        assert main([*arguments, *(["--shard", "1/2"] if is_share else [])]) == 2
        assert "another run is working" in capsys.readouterr().err
        assert main([*arguments, "--shard", "2/2"]) == (0 if is_share else 2)


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """What a stage says that is refused, with the output held meanwhile or not."""
    monkeypatch.chdir(tmp_path)

    def run(stage, is_held, *more):
        output = tmp_path / OUTPUT
        hold = holding(output) if stage in FOLDERS else writing(output, is_folder=True)
        with hold if is_held else nullcontext():
            assert main([stage, *STAGES[stage], "--output", OUTPUT, *more]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "match-dense"])
def test_a_second_run_on_an_output_is_refused_in_a_sentence(refusal, stage):
    assert "another run is" in refusal(stage, is_held=True)


def test_a_second_training_in_a_folder_is_refused(tmp_path, capsys):
    with writing(tmp_path / "run", is_folder=True):
        assert main(["train", "--output", str(tmp_path / "run")]) == 2
    assert "another run is writing" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_inputs_that_are_not_there_leave_no_output(refusal, tmp_path, stage):
    assert refusal(stage, is_held=False)
    assert not list(tmp_path.iterdir())


def test_a_previous_model_that_is_not_there_leaves_no_output(refusal, tmp_path):
    photo = tmp_path / "no_photos" / "a.png"
    photo.parent.mkdir()
    Image.new("RGB", (32, 32)).save(photo)
    assert "no_sparse" in refusal("reconstruct", False, "--previous_model", "no_sparse")
    assert list(tmp_path.iterdir()) == [photo.parent]
