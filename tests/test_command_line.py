"""The command line: every stage by either spelling, quick help, and exit codes that say what happened."""

import os
import signal
import subprocess
import sys
import time
import weakref
from importlib import import_module

import pytest

import dust3r_sfm
from dust3r_sfm import __main__ as command_line
from dust3r_sfm.errors import InputError, ReconstructionError


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def stage(monkeypatch):
    """Makes `demo` do what a test wants."""

    def replace(main):
        monkeypatch.setattr(import_module("dust3r_sfm.demo"), "main", main)

    return replace


def test_help_lists_every_command_and_loads_no_heavy_package(capsys):
    assert command_line.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(command in usage for command in command_line.COMMANDS)
    assert command_line.main([]) == 2
    script = (
        "import sys, dust3r_sfm.__main__ as m; m.main(['--help']); m.main(['--version']); "
        "sys.exit(bool({'torch', 'numpy', 'pycolmap', 'tyro'} & set(sys.modules)))"
    )
    assert python("-c", script).returncode == 0


def test_version_is_the_packages(capsys):
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dust3r-sfm {dust3r_sfm.__version__}\n"


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_every_command_has_help_in_either_spelling(command, capsys):
    for spelling in (command, command.replace("-", "_")):
        with pytest.raises(SystemExit) as exit_:
            command_line.main([spelling, "--help"])
        assert exit_.value.code == 0
        assert f"dust3r-sfm {command}" in capsys.readouterr().out


@pytest.mark.parametrize("options", [("--image_dir", "--pairs", "--output"), ("--image-dir", "--pairs", "--output")])
def test_options_are_taken_with_underscores_and_hyphens(options, tmp_path, capsys):
    values = [str(tmp_path / name) for name in ("photos", "pairs.txt", "p.h5")]
    arguments = [text for pair in zip(options, values, strict=True) for text in pair]
    missing = ["--model", str(tmp_path / "none.pth")]
    assert command_line.main(["infer_pairs", *arguments, *missing]) == 2
    assert "none.pth" in capsys.readouterr().err


def test_an_unknown_command_or_option_is_exit_code_2(capsys):
    assert command_line.main(["recontruct"]) == 2
    assert "no command recontruct; there are: reconstruct, demo" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["demo", "--colour", "red"])
    assert exit_.value.code == 2


def test_a_stage_runs_as_a_module():
    run = python("-m", "dust3r_sfm.infer_pairs", "--image_dir", "no/photos", "--pairs", "p.txt", "--output", "p.h5")
    assert run.returncode == 2
    assert run.stderr.startswith("dust3r-sfm: ")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("error", [InputError("no photos: take some"), ReconstructionError("no photos: take some")])
def test_what_a_user_can_mend_is_one_sentence(stage, capsys, error):
    def main():
        raise error

    stage(main)
    assert command_line.main(["demo"]) == 2
    assert capsys.readouterr().err == "dust3r-sfm: no photos: take some\n"


def test_a_full_disk_is_one_sentence_with_the_file(stage, capsys):
    def main():
        raise OSError(28, "No space left on device", "out/pointmaps.h5")

    stage(main)
    assert command_line.main(["demo"]) == 2
    expected = "out/pointmaps.h5: No space left on device. Once that is mended, the same command continues."
    assert capsys.readouterr().err == f"dust3r-sfm: {expected}\n"


def test_an_interrupted_run_exits_with_130(stage, capsys):
    def main():
        raise KeyboardInterrupt

    stage(main)
    assert command_line.main(["demo"]) == 130
    assert "the same command" in capsys.readouterr().err


def test_our_own_faults_are_not_hidden(stage):
    def main():
        raise AssertionError

    stage(main)
    with pytest.raises(AssertionError):
        command_line.main(["demo"])


def test_every_public_name_resolves():
    for name in dust3r_sfm.__all__:
        assert getattr(dust3r_sfm, name) is not None
        assert name in dir(dust3r_sfm)
    with pytest.raises(AttributeError, match="has no attribute 'reconstrukt'"):
        dust3r_sfm.reconstrukt  # noqa: B018


@pytest.mark.parametrize(
    "script",
    [
        "import dust3r_sfm as ds, dust3r_sfm.infer_pairs; assert callable(ds.infer_pairs)",
        "import dust3r_sfm as ds; f = ds.infer_pairs; import dust3r_sfm.infer_pairs; assert f is ds.infer_pairs",
    ],
)
def test_a_stage_of_a_functions_name_does_not_hide_the_function(script):
    run = python("-c", script)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("told", "insist_after_s"), [(True, 60.0), (False, 0.2)])
def test_an_interrupt_that_python_drops_comes_again_and_prints_no_traceback(monkeypatch, capsys, told, insist_after_s):
    """What is raised in a weak reference's callback, as when a file is closed, never arrives; Python may tell of it."""

    class Thing:
        pass

    def run(command, arguments):
        thing = Thing()
        reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
        del thing
        assert reference() is None
        time.sleep(60)

    def run_untold(command, arguments):
        sys.unraisablehook = lambda _: None
        run(command, arguments)

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(command_line, "INSIST_AFTER_S", insist_after_s)
    monkeypatch.setattr(command_line, "_run", run if told else run_untold)
    assert command_line.main(["demo"]) == 130
    assert capsys.readouterr().err == "dust3r-sfm: interrupted; run the same command to continue\n"
    assert sys.unraisablehook is sys.__unraisablehook__


def test_an_interrupt_that_a_library_turns_into_another_error_is_one(monkeypatch, capsys):
    """As when a tensor is read from a file."""

    def run(command, arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None

    monkeypatch.setattr(command_line, "_run", run)
    assert command_line.main(["demo"]) == 130
    assert capsys.readouterr().err == "dust3r-sfm: interrupted; run the same command to continue\n"
