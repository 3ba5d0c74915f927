"""The process apart: its stages, its end, and the smaller tries after it ran out of memory."""

import sys

import pytest
import torch

from dust3r_sfm.errors import ReconstructionError
from dust3r_sfm.serving.child import OUT_OF_MEMORY, is_out_of_memory
from dust3r_sfm.serving.isolation import SMALLER, OutOfMemoryError, reconstruct_apart
from dust3r_sfm.serving.limits import Allowance, Limits, TimeLimitError


def run(script, tmp_path, seconds=60.0):
    """Tries of a small program in place of the reconstruction, and the stages it told."""
    told = []
    child = (sys.executable, "-S", "-c", f"import os, sys, time\nargv = sys.argv\n{script}")
    allowance = Allowance(Limits(max_seconds=seconds))
    return reconstruct_apart(["--output", str(tmp_path)], tmp_path / "log", allowance, told.append, child), told


def test_each_stage_is_told_and_other_lines_are_not(tmp_path):
    tries, told = run("print('stage load')\nprint('hello')\nprint('stage export_scene')", tmp_path)
    assert (tries, told) == (1, ["load", "export_scene"])


def test_the_sentence_of_the_command_line_is_handed_on(tmp_path):
    script = "sys.stderr.write('Loaded.\\ndust3r-sfm: 2 images cannot be used:\\n  a.jpg is empty\\n'); sys.exit(2)"
    with pytest.raises(ReconstructionError, match="^2 images cannot be used:\n  a.jpg is empty$"):
        run(script, tmp_path)


def test_what_the_parser_of_the_command_line_says_is_handed_on_too(tmp_path):
    with pytest.raises(ReconstructionError, match="^Unrecognized options: --ratio$"):
        run("sys.stderr.write('Unrecognized options: --ratio\\n'); sys.exit(2)", tmp_path)


@pytest.mark.parametrize("end", [f"sys.exit({OUT_OF_MEMORY})", "os.kill(os.getpid(), 9)"])
def test_out_of_memory_is_tried_again_smaller(tmp_path, end):
    tries, told = run(f"if '--infer.batch_size' not in argv: {end}\nprint('stage done')", tmp_path)
    assert (tries, told) == (2, ["smaller", "done"])
    with pytest.raises(OutOfMemoryError, match="send fewer or smaller photos"):
        run(f"open('{tmp_path}/tries', 'a').write(repr(argv[3:]) + ';'); {end}", tmp_path)
    tries = (tmp_path / "tries").read_text().split(";")[:-1]
    assert tries == [repr(list(smaller)) for smaller in SMALLER]


def test_a_run_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    script = """
import subprocess
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
print('stage load', flush=True)
time.sleep(60)
"""
    with pytest.raises(TimeLimitError, match="longer than 0.5 s"):
        run(script, tmp_path, seconds=0.5)


def test_a_job_whose_time_is_over_starts_no_run(tmp_path):
    with pytest.raises(TimeLimitError):
        run(f"open('{tmp_path}/started', 'w'); time.sleep(1)", tmp_path, seconds=0.0)
    assert not (tmp_path / "started").exists()


def test_memory_that_cannot_be_had_is_told_from_our_own_faults():
    with pytest.raises(RuntimeError) as beside:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(beside.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to reserve 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"))


def test_our_own_faults_are_told_as_such(tmp_path):
    with pytest.raises(RuntimeError, match=r"the reconstruction failed \(1\): ZeroDivisionError"):
        run("1 / 0", tmp_path)


def test_the_smaller_tries_are_options_that_reconstruct_has():
    import tyro

    from dust3r_sfm.reconstruct import ReconstructConfig

    for smaller in SMALLER:
        tyro.cli(ReconstructConfig, args=smaller, use_underscores=True)
