"""Video files, read by PyAV: where their frames lie in time, and the frames, upright."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dust3r_sfm.errors import InputError

logger = logging.getLogger(__name__)

CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,h264,hevc"
"""Files of pictures and sound alone; playlists, which name other files and addresses, are not opened."""
FALLBACK_RATE = 25.0
"""Frames a second where a file does not say."""


@dataclass(frozen=True)
class Timeline:
    """When a video's frames are shown, by its packets."""

    start_s: float
    end_s: float
    """The last frame's end."""
    rate: float
    """Frames a second."""
    has_times: bool
    """Whether the frames say themselves when they are shown."""

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, eq=False)
class Frame:
    """A decoded frame; its pixels are converted when they are asked for."""

    time_s: float
    stored: Any
    """PyAV's frame, before its rotation."""
    pixel_aspect: float
    """Width of a pixel over its height."""

    def upright(self) -> UInt8[np.ndarray, "h w 3"]:
        """RGB of square pixels, turned as the file says."""
        width = round(self.stored.width * self.pixel_aspect)
        pixels = self.stored.to_ndarray(format="rgb24", width=width, height=self.stored.height)
        return np.ascontiguousarray(np.rot90(pixels, round(self.stored.rotation / 90)))

    def gray(self, width: int) -> UInt8[np.ndarray, "h w"]:
        """Gray values at some width, or as stored where that is less; not turned."""
        width = min(width, self.stored.width)
        height = max(1, round(width * self.stored.height / self.stored.width))
        return self.stored.to_ndarray(format="gray", width=width, height=height)


def read_timeline(path: Path) -> Timeline:
    """When the first frame begins and the last ends, without decoding; InputError where there is no video."""
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or FALLBACK_RATE)
        packets = [packet for packet in container.demux(stream) if packet.size]
        times = [float(packet.pts * packet.time_base) for packet in packets if packet.pts is not None]
    if not packets:
        raise InputError(f"{path} holds no frames: expected a video that plays")
    if len(times) < len(packets):
        return Timeline(0.0, len(packets) / rate, rate, has_times=False)
    return Timeline(min(times), max(times) + 1 / rate, rate, has_times=True)


def read_frames(path: Path, timeline: Timeline) -> Iterator[Frame]:
    """All frames that can be decoded, in the order they are shown.

    What cannot is left out and logged; InputError where nothing can be decoded.
    """
    num_frames = num_broken = 0
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except _ffmpeg_errors():
                num_broken += 1
                continue
            for frame in frames:
                counted = timeline.start_s + num_frames / timeline.rate
                time_s = float(frame.time) if timeline.has_times and frame.time is not None else counted
                num_frames += 1
                yield Frame(time_s, frame, float(stream.sample_aspect_ratio or 1))
    if num_frames == 0:
        raise InputError(f"{path} has no frame that can be decoded: expected a video that plays")
    if num_broken:
        logger.warning("%s is damaged: %d of its packets cannot be decoded.", path, num_broken)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its first video stream; what FFmpeg says of a file becomes one sentence."""
    av = _av()
    if not Path(path).is_file():
        raise InputError(f"{path} is no video file: expected one such as clip.mp4")
    try:
        with av.open(str(path), options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no pictures, only sound or text: expected a video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except _ffmpeg_errors() as error:
        raise InputError(
            f"{path} cannot be read as a video ({error.strerror}): expected a file of pictures, such as an MP4"
        ) from error


def _ffmpeg_errors() -> type[Exception]:
    return _av().error.FFmpegError


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError('videos need PyAV: pip install "dust3r_sfm[video]"') from error
    return av
