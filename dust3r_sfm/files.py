"""Files that are whole or absent, and outputs that one run works on at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from dust3r_sfm.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no flock: two runs on one folder are not told apart there
    fcntl = None


LOCK_NAME = ".dust3r_sfm.lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
"""What file systems say that have no locks; two runs are not told apart there."""


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
    a killed run leaves none behind, only its file, which tells that the folder is ours. Where the block fails
    before it has written anything, folders that were made for it go again.
    """
    locks = [folder / LOCK_NAME] + ([folder / f"{LOCK_NAME}.{share}"] if share else [])
    taken = f"another run is working in {folder}: wait for it or choose another folder"
    made = _make(folder)
    with ExitStack() as held:
        for lock in locks:
            held.enter_context(_lock(lock, taken, is_shared=share is not None and lock == locks[0]))
        held.enter_context(_unmaking(made, {lock.name for lock in locks}))
        yield


@contextmanager
def writing(path: Path, is_folder: bool = False) -> Iterator[None]:
    """Keep other runs from writing `path`, a file or a folder, until the block ends; InputError where one does already.

    The folder that it is in is made, and goes again where the block fails before it has written anything there.
    """
    if path.is_dir() and not is_folder:
        raise InputError(f"{path} is a folder: name the file to write")
    lock = path.with_name(f".{path.name}.lock")
    made = _make(path.parent)
    with (
        _lock(lock, f"another run is writing {path}: wait for it or choose another output"),
        _unmaking(made, {lock.name}),
    ):
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def _make(folder: Path) -> list[Path]:
    """Make a folder; those that were made for it, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    return missing


@contextmanager
def _unmaking(made: Sequence[Path], locks: Collection[str]) -> Iterator[None]:
    """Where the block fails, remove the folders that were made if there is nothing but these locks in them."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if made and {path.name for path in made[0].iterdir()} <= set(locks):
                for name in locks:
                    (made[0] / name).unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        raise


def _lock(path: Path, taken: str, is_shared: bool = False) -> IO[str]:
    """The open file of a lock, which is held until it is closed; InputError that says `taken` where another has it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # the run that held it may have removed it
            file = open(path, "w")  # noqa: SIM115  returned
        except OSError as error:
            raise _not_writable(path.parent, error) from error
        try:
            if fcntl is None:
                return file
            fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise InputError(taken) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            file.close()
            raise
        file.close()  # of a run that has ended since, and removed it


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(f"{folder} cannot be written to ({error.strerror}): choose another output folder")
