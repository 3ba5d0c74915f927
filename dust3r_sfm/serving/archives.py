"""Photos out of archives that strangers made: nothing leaves the folder, and nothing else is unpacked."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path, PurePosixPath

from dust3r_sfm.errors import InputError
from dust3r_sfm.serving.limits import Allowance
from dust3r_sfm.views import SUFFIXES

CHUNK = 1 << 20
MAX_MEMBERS = 100_000
"""Of an archive, photos or not."""

BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError, NotImplementedError)
"""What the readers raise on damaged, encrypted and unusual archives."""


def is_archive(path: Path) -> bool:
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


def unpack_photos(archive: Path, folder: Path, allowance: Allowance) -> list[str]:
    """Unpack the photos of a zip or tar file below `folder`; their names.

    Links, devices, hidden files and what is no photo are left out. InputError where a name leads
    out of the folder, comes twice, or where there is more than the job may have.
    """
    names: list[str] = []
    try:
        opened = _zip_photos if zipfile.is_zipfile(archive) else _tar_photos
        for name, file in opened(archive, allowance):
            allowance.check_count(len(names) + 1)
            _write(file, folder, name, allowance)
            names.append(name)
    except BROKEN as error:
        raise InputError(f"the archive cannot be unpacked ({error}): expected a zip or tar file of photos") from error
    if not names:
        raise InputError(f"the archive holds no photos: expected files ending in {', '.join(SUFFIXES)}")
    return names


def _zip_photos(path: Path, allowance: Allowance) -> Iterator[tuple[str, BufferedIOBase]]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_members(len(members))
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind in (0, stat.S_IFREG) and not member.is_dir() and _is_photo(member.filename):
                with archive.open(member) as file:
                    yield member.filename, file


def _tar_photos(path: Path, allowance: Allowance) -> Iterator[tuple[str, BufferedIOBase]]:
    with tarfile.open(path) as archive:
        for count, member in enumerate(archive, start=1):
            _check_members(count)
            if member.isreg() and _is_photo(member.name):
                yield member.name, archive.extractfile(member)
            else:
                allowance.spend(max(0, member.size))  # it has to be unpacked to be skipped


def _check_members(count: int) -> None:
    if count > MAX_MEMBERS:
        raise InputError(f"the archive has more than {MAX_MEMBERS} entries: expected photos alone")


def _is_photo(name: str) -> bool:
    """Whether a name is a photo's, which is checked to stay below the folder."""
    path = PurePosixPath(name)
    if path.suffix.lower() not in SUFFIXES:
        return False
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise InputError(f"the archive has an entry {name!r}, which leads out of its folder: pack it anew")
    return not any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _write(file: BufferedIOBase, folder: Path, name: str, allowance: Allowance) -> None:
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = open(path, "xb")  # noqa: SIM115  closed below
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"the archive has {name!r} twice: pack it anew") from None
    with target:
        while chunk := file.read(CHUNK):
            allowance.spend(len(chunk))
            target.write(chunk)


def pack(folder: Path, files: list[str], archive: Path) -> None:
    """Write the files below a folder to a zip file; photos and numbers as they are, text compressed."""
    with zipfile.ZipFile(archive, "w", allowZip64=True) as packed:
        for name in files:
            is_text = name.endswith((".json", ".txt", ".html"))
            packed.write(folder / name, name, zipfile.ZIP_DEFLATED if is_text else zipfile.ZIP_STORED)


def copy(folder: Path, files: list[str], target: Path) -> None:
    """Copy the files below a folder to another."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
