"""Stage: sharp frames of a video, spread evenly over it, as photos.

python -m dust3r_sfm.extract_frames --video clip.mp4 --output frames --fps 2
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes, writing
from dust3r_sfm.formats.video import Frame, Timeline, read_frames, read_timeline

logger = logging.getLogger(__name__)

NOTE = ".frames.json"
SHARPNESS_WIDTH = 640
"""Wide enough to see blur that matters to matching, narrow enough not to see the codec's noise."""
ROUNDING = 1e-6
"""Of times, in slots: a frame at a slot's very beginning belongs to it."""
MOTION_WIDTH = 64
MIN_MOTION = 1.0
"""Mean change of 8-bit gray values since the last frame taken, below which the camera stood still."""


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    fps: float = 2.0
    """Frames to take of a second of video: the sharpest about the middle of each half second."""
    max_frames: int = 500
    """Of longer clips fewer frames a second are taken."""


def main(
    video: Path,
    output: Path,
    config: FrameConfig = FrameConfig(),  # noqa: B008  frozen
) -> list[str]:
    """Write sharp frames of a video, spread evenly over it, as JPEG files; their names.

    Args:
        video: The video file.
        output: Folder for the frames, upright and in order of time; one that an earlier call made is replaced.
        config: How many frames to take.
    """
    names = extract_frames(video, output, config)
    logger.info("%d frames of %s are in %s.", len(names), video, output)
    return names


def extract_frames(video: Path, output: Path, config: FrameConfig = FrameConfig()) -> list[str]:  # noqa: B008  frozen
    """Names of the frames in `output`, as an earlier call left them where video and config are the same.

    The clip is cut into slots of 1 / fps; of each the sharpest frame of its middle half is taken,
    so that frames lie between half and one and a half slots apart, and none where nothing moved.
    """
    if not (config.fps > 0 and config.max_frames >= 2):
        raise InputError(f"expected fps above 0 and max_frames of 2 or more, got {config.fps} and {config.max_frames}")
    note = output / NOTE
    with writing(output, is_folder=True), _beside(output) as (temporary, old):
        key = _key(video, config)
        if output.exists() and any(output.iterdir()) and not note.is_file():
            raise InputError(f"{output} holds other files: choose another folder for the frames")
        earlier = json.loads(note.read_text()) if note.is_file() else {}
        if earlier.get("key") == key:
            return list(earlier["times_s"])
        times = _write_frames(video, read_timeline(video), temporary, config)
        write_bytes(temporary / NOTE, json.dumps({"key": key, "times_s": times}, indent=1).encode())
        if output.exists():
            os.replace(output, old)  # at once: a kill must leave no half of it
        os.replace(temporary, output)
    return list(times)


@contextmanager
def _beside(output: Path) -> Iterator[tuple[Path, Path]]:
    """A new folder and the name of none, which are gone before and after, also those of a killed run."""
    folders = output.with_name(f".{output.name}.tmp"), output.with_name(f".{output.name}.old")
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        folders[0].mkdir()
        yield folders
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _write_frames(video: Path, timeline: Timeline, folder: Path, config: FrameConfig) -> dict[str, float]:
    """The time of each frame by its name."""
    duration_s = timeline.duration_s
    slot_s = max(1 / config.fps, duration_s / config.max_frames)
    if slot_s > 1 / config.fps:
        logger.info("%.0f s of video: %.2f frames a second, %d in all.", duration_s, 1 / slot_s, config.max_frames)
    frames, times = read_frames(video, timeline), {}
    total = max(1, round(duration_s / slot_s))
    chosen = moving(sharpest(frames, timeline.start_s, slot_s))
    for frame in tqdm(chosen, desc="Frames", unit="frame", total=total, disable=None):
        name = f"frame_{len(times):05d}.jpg"
        Image.fromarray(frame.upright()).save(folder / name, quality=95, subsampling=0)
        times[name] = round(frame.time_s, 3)
    if len(times) < 2:
        raise InputError(
            f"{video} lasts {duration_s:.2f} s and gives {len(times)} differing frame at {config.fps:g} fps: "
            "at least two are needed, from a camera that moves"
        )
    return times


def sharpest(frames: Iterable[Frame], start_s: float, slot_s: float) -> Iterator[Frame]:
    """Of each slot the sharpest frame of its middle half, or of all where none lies there."""
    current, best, best_rank = None, None, (False, 0.0)
    for frame in frames:
        slot, place = divmod((frame.time_s - start_s) / slot_s + ROUNDING, 1)
        if slot != current and best is not None:
            yield best
        if slot != current:
            current, best = slot, None
        in_middle = 0.25 <= place <= 0.75
        if best is not None and best_rank[0] and not in_middle:
            continue
        rank = in_middle, sharpness(frame.gray(SHARPNESS_WIDTH))
        if best is None or rank > best_rank:
            best, best_rank = frame, rank
    if best is not None:
        yield best


def moving(frames: Iterable[Frame]) -> Iterator[Frame]:
    """The frames less those that show what the last one did."""
    last: np.ndarray | None = None
    for frame in frames:
        gray = frame.gray(MOTION_WIDTH).astype(np.int16)
        if last is None or last.shape != gray.shape or np.abs(gray - last).mean() >= MIN_MOTION:
            last = gray
            yield frame


def sharpness(gray: UInt8[np.ndarray, "h w"]) -> float:
    """Mean squared difference of neighbouring pixels."""
    values = gray.astype(np.float32)
    return float(sum(np.square(np.diff(values, axis=axis)).mean() for axis in (0, 1)))


def _key(video: Path, config: FrameConfig) -> str:
    if not video.is_file():
        raise InputError(f"{video} is no video file: expected one such as clip.mp4")
    status = video.stat()
    return repr((video.name, status.st_size, status.st_mtime_ns, config))


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["extract-frames", *sys.argv[1:]]))
