"""Benchmark: runs that are killed at random moments and started again, compared with runs that were not.

Each run is a process that `kill -9` ends. What it leaves must hold no file that is not whole, and the same command must
end as an uninterrupted run does, byte by byte, having repeated one shard at most.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from dust3r_sfm.errors import InputError, ReconstructionError
from dust3r_sfm.files import LOCK_NAME

logger = logging.getLogger(__name__)

SHARD = 4
"""Pairs or images of a shard here, so that few photos make several."""
STAGES = {
    "extract-descriptors": ["--image_dir", "{photos}", "--output", "{out}/global-feats.h5"],
    "pairs-from-retrieval": [
        "--descriptors",
        "{out}/global-feats.h5",
        "--output",
        "{out}/pairs.txt",
        "--num_matched",
        "9",
    ],
    "infer-pairs": ["--image_dir", "{photos}", "--pairs", "{out}/pairs.txt", "--output", "{out}/pointmaps.h5"],
    "filter-pairs": ["--pointmaps", "{out}/pointmaps.h5", "--output", "{out}/kept.txt"],
    "match-dense": ["--pointmaps", "{out}/pointmaps.h5", "--output", "{out}/matches.h5"],
    "align-scene": ["--pointmaps", "{out}/pointmaps.h5", "--image_dir", "{photos}", "--output", "{out}/aligned.h5"],
    "sparse-features": ["--image_dir", "{photos}", "--output", "{out}/features.db"],
    "refine-scene": ["--scene", "{out}/aligned.h5", "--image_dir", "{photos}", "--matches", "{out}/matches.h5"]
    + ["--output", "{out}/scene.h5"],
    "export-scene": ["--scene", "{out}/scene.h5", "--image_dir", "{photos}", "--matches", "{out}/matches.h5"]
    + ["--output", "{out}/export"],
    "reconstruct": ["--image_dir", "{photos}", "--output", "{out}/all", "--formats", "colmap", "database", "ply"],
}
"""In turn, each with what those before it wrote."""


class Interruptions(NamedTuple):
    """What killing one stage did."""

    stage: str
    seconds: float
    """Of a run that nothing ends."""
    kills: int
    """Runs that were killed before they had ended."""
    unequal: int
    """Of them, those that continued to another result."""
    repeated: int
    """The most shards that a continued run wrote again."""


def main(image_dir: Path, stages: Sequence[str] = tuple(STAGES), kills: int = 20, seed: int = 0) -> list[Interruptions]:
    """Kill each stage at random moments, run the same command again, and compare with an uninterrupted run.

    Args:
        image_dir: A few photos, such as the demo's.
        stages: Which stages; their inputs are made by those before them.
        kills: How often each is killed.
        seed: Of the random moments.
    """
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        raise InputError(f"there is no stage {unknown[0]}: expected some of {', '.join(STAGES)}")
    for stage in STAGES:  # the children are copies of this process: nothing to load again
        import_module(f"dust3r_sfm.{stage.replace('-', '_')}")
    import_module("dust3r_sfm.infer_pairs").SHARD_PAIRS = SHARD
    import_module("dust3r_sfm.match_dense").SHARD_PAIRS = SHARD
    import_module("dust3r_sfm.extract_descriptors").SHARD_IMAGES = SHARD
    moments, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        for stage in STAGES:
            before = Path(folder) / "before"
            shutil.copytree(whole, before)
            start = time.perf_counter()
            _finish(stage, image_dir, whole)
            seconds = time.perf_counter() - start
            if stage in stages:
                found.append(_interrupt(stage, image_dir, before, whole, seconds, kills, moments))
                logger.info("%s: %.1f s, killed %d times, %d unequal, at most %d shards repeated.", *found[-1])
            shutil.rmtree(before)
    return found


def _interrupt(
    stage: str, image_dir: Path, before: Path, whole: Path, seconds: float, kills: int, moments: random.Random
) -> Interruptions:
    expected = contents_of(whole)
    killed = unequal = repeated = 0
    for _ in range(kills):
        out = before.with_name("killed")
        shutil.copytree(before, out)
        run = _start(stage, image_dir, out)
        killed += _kill_after(run, moments.uniform(0, seconds))
        time.sleep(0.2)  # COLMAP's process sees it
        shards = {path: path.stat().st_mtime_ns for path in out.rglob("*.shards/*.h5")}
        _finish(stage, image_dir, out)
        again = [path for path, written in shards.items() if path.exists() and path.stat().st_mtime_ns != written]
        repeated, found = max(repeated, len(again)), contents_of(out)
        if found != expected:
            unequal += 1
            names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            logger.warning("%s: differs in %s", stage, ", ".join(names))
        shutil.rmtree(out)
    return Interruptions(stage, seconds, killed, unequal, repeated)


def _start(stage: str, image_dir: Path, out: Path) -> int:
    """A copy of this process that does one stage."""
    arguments = [part.format(photos=image_dir, out=out) for part in STAGES[stage]]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            from dust3r_sfm.__main__ import main as run

            code = run([stage, *arguments])
        finally:  # an error must not unwind the copy of the caller, who removes the folder
            os._exit(code)
    return child


def _kill_after(run: int, seconds: float) -> bool:
    """Whether the run was still at work then."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if os.waitpid(run, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(run, signal.SIGKILL)
    return os.waitpid(run, 0)[1] != 0


def _finish(stage: str, image_dir: Path, out: Path) -> None:
    """A run that nothing ends; ReconstructionError where it fails."""
    code = os.waitstatus_to_exitcode(os.waitpid(_start(stage, image_dir, out), 0)[1])
    if code:
        raise ReconstructionError(f"{stage} of {image_dir} ends with {code} without being killed: run it to see why")


def contents_of(folder: Path) -> dict[str, str]:
    """What each file says, by its name: temporary files too, which must not be left; no times, no locks, no pages."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in files
        if path.suffix != ".html" and not path.name.startswith(LOCK_NAME)
    }


def _content(path: Path) -> str:
    if path.suffix == ".db":
        with closing(sqlite3.connect(path)) as database:  # threads write it in any order
            return sha256("\n".join(sorted(database.iterdump())).encode()).hexdigest()
    if path.name == "summary.json":
        summary = json.loads(path.read_text())
        return repr({key: value for key, value in summary.items() if key != "timings_s"})
    return sha256(path.read_bytes()).hexdigest()
