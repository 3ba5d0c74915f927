"""A reconstruction in its own process: watched, ended when its time is over, tried smaller when memory runs out."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dust3r_sfm.errors import ReconstructionError
from dust3r_sfm.serving.child import OUT_OF_MEMORY
from dust3r_sfm.serving.limits import Allowance

logger = logging.getLogger(__name__)

SMALLER: tuple[tuple[str, ...], ...] = (
    (),
    ("--infer.batch_size", "4", "--infer.max_encodings_gb", "0.5"),
    ("--infer.batch_size", "1", "--infer.max_encodings_gb", "0.1", "--align.max_samples", "400"),
)
"""What is added to the command line in each try; a later one continues what an earlier one has written."""
KILLED = -signal.SIGKILL
"""How a process ends that the machine's memory was too small for."""
CHILD = (sys.executable, "-m", "dust3r_sfm.serving.child")


class OutOfMemoryError(RuntimeError):
    """Memory ran out in the smallest try as well."""


def reconstruct_apart(
    arguments: Sequence[str],
    log: Path,
    allowance: Allowance,
    progress: Callable[[str], None],
    child: Sequence[str] = CHILD,
) -> int:
    """Run `reconstruct` with a command line; how many tries it took.

    ReconstructionError with the command line's own sentence where the input gives no scene,
    TimeLimitError and OutOfMemoryError where the machine does not suffice, RuntimeError where we are at fault.
    """
    for number, smaller in enumerate(SMALLER, start=1):
        code = _run([*child, *arguments, *smaller], log, allowance, progress)
        if code == 0:
            return number
        last_line = (log.read_text(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        if code == 2:
            raise ReconstructionError(_told(log))
        if code not in (OUT_OF_MEMORY, KILLED):
            raise RuntimeError(f"the reconstruction failed ({code}): {last_line}")
        logger.warning("Out of memory in try %d: %s", number, last_line)
        progress("smaller")
    raise OutOfMemoryError("memory ran out: send fewer or smaller photos, or choose a larger GPU")


def _run(command: Sequence[str], log: Path, allowance: Allowance, progress: Callable[[str], None]) -> int:
    """The exit code of a command whose standard error goes to `log`; TimeLimitError where it was ended."""
    seconds_left = allowance.seconds_left()
    with open(log, "wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    with process, _ended_after(seconds_left, process):
        for line in process.stdout or ():
            if line.startswith("stage "):
                progress(line.removeprefix("stage ").strip())
        code = process.wait()
    if code == KILLED:
        allowance.seconds_left()  # by us, where nothing is left
    return code


@contextmanager
def _ended_after(seconds: float, process: subprocess.Popen) -> Iterator[None]:
    """Ends the process and all that it started after some time, and when the block ends in any way."""
    timer = threading.Timer(seconds, _end, [process])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _end(process)
        process.wait()


def _end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _told(log: Path) -> str:
    """The sentence, of one line or more, that the command line ended with; all it said where that is none of ours."""
    return log.read_text(errors="replace").rpartition("dust3r-sfm: ")[2].strip()
