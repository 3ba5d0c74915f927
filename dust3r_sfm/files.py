"""Files that are whole or absent, and a folder that one process works in at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from dust3r_sfm.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no flock: two runs on one folder are not told apart there
    fcntl = None


LOCK_NAME = ".dust3r_sfm.lock"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write a file to.

    Flushed to the disk and renamed to `path` at the end of the block; removed where the block fails.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


@contextmanager
def holding(folder: Path, share: str | None = None) -> Iterator[None]:
    """Make `folder` and keep other runs out of it until the block ends; InputError where one is in it already.

    Runs that do different shares of the work, each by its name, may be in it together. The lock belongs to the process:
    a killed run leaves none behind.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            lock = files.enter_context(open(folder / LOCK_NAME, "w"))
            own = files.enter_context(open(folder / f"{LOCK_NAME}.{share}", "w")) if share else None
            _lock(folder, lock, is_shared=share is not None)
            if own is not None:
                _lock(folder, own)
            files = files.pop_all()
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}): choose another output folder") from error
    with files:
        yield


def _lock(folder: Path, file: IO[str], is_shared: bool = False) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is working in {folder}: wait for it or choose another folder") from None
