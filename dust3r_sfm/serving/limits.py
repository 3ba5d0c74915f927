"""What one job may cost, and what of it is spent."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dust3r_sfm.errors import InputError

PREFIX = "DUST3R_SFM_"


class TimeLimitError(RuntimeError):
    """The job took longer than it may."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Set by who runs the worker, each by an environment variable: DUST3R_SFM_MAX_IMAGES, ..."""

    max_images: int = 500
    """Photos, or frames of a video."""
    max_gb: float = 4.0
    """Input of a job in all, unpacked."""
    max_seconds: float = 3000.0
    """From the start of a job to its end; stay below the endpoint's execution timeout."""
    model: str = ""
    """Checkpoint file, folder or hub name of the network; empty for the shipped weights."""
    volume: str = "/runpod-volume"
    """The folder that volume paths of jobs are below."""
    scratch: str = tempfile.gettempdir()
    """Where jobs work, each in a folder of its own."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Limits:
        """The limits that the environment sets; InputError where a number is none."""
        found = {}
        for field in dataclasses.fields(cls):
            text = environment.get(f"{PREFIX}{field.name.upper()}")
            if text is None or (text == "" and field.name != "model"):
                continue
            try:
                found[field.name] = type(field.default)(text)
            except ValueError:
                raise InputError(f"{PREFIX}{field.name.upper()} must be a number, got {text!r}") from None
        return cls(**found)

    @property
    def max_bytes(self) -> int:
        return int(self.max_gb * 1e9)

    @property
    def volume_path(self) -> Path:
        return Path(self.volume)


class Allowance:
    """What a job may still spend; threads of one job share it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._bytes_left = limits.max_bytes
        self._end_s = time.monotonic() + limits.max_seconds
        self._lock = threading.Lock()

    def spend(self, num_bytes: int) -> None:
        """Count bytes of input; InputError where they are too many, TimeLimitError where it is too late."""
        self.seconds_left()
        with self._lock:
            self._bytes_left -= num_bytes
            if self._bytes_left < 0:
                raise InputError(f"the input is larger than {self.limits.max_gb:g} GB: send less, or smaller photos")

    def give_back(self, num_bytes: int) -> None:
        """Count bytes no longer: they are not kept."""
        with self._lock:
            self._bytes_left += num_bytes

    def seconds_left(self) -> float:
        """Above zero; TimeLimitError where nothing is left."""
        left = self._end_s - time.monotonic()
        if left <= 0:
            raise TimeLimitError(f"the job took longer than {self.limits.max_seconds:g} s: send fewer photos")
        return left

    def check_count(self, num_images: int) -> None:
        """InputError where there are too many images."""
        if num_images > self.limits.max_images:
            raise InputError(f"{num_images} images are more than the {self.limits.max_images} allowed: send fewer")
