"""Photos out of archives that strangers made: nothing leaves the folder, and nothing else is unpacked."""

from __future__ import annotations

import errno
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from io import BufferedIOBase, FileIO
from pathlib import Path, PurePosixPath

from dust3r_sfm.errors import InputError
from dust3r_sfm.serving.limits import Allowance, TimeLimitError
from dust3r_sfm.views import SUFFIXES

CHUNK = 1 << 20
MAX_MEMBERS = 100_000
"""Of an archive, photos or not."""

MAX_DIRECTORY = 1 << 25
"""Bytes of a zip file's list of entries: zipfile reads all of it before they can be counted."""
MAX_HEADER = 1 << 16
"""Bytes of a long name or other extension of a tar file's entry, which tarfile unpacks and holds at once."""
LONG_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError),
    *(EOFError, RuntimeError, UnicodeDecodeError),
)
"""What the readers raise on damaged, encrypted and unusual archives."""
BROKEN_NUMBERS = (None, errno.EINVAL, errno.ENAMETOOLONG)
"""Of an OSError: of the readers' own, of places before a file's start, and of names that no file can have here."""


def is_archive(path: Path) -> bool:
    try:
        if zipfile.is_zipfile(path):
            return True
        with _tar(path):
            return True
    except tarfile.TarError:
        return False
    except EOFError:  # it began as one
        return True


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
    except TimeLimitError:
        raise
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno not in BROKEN_NUMBERS:
            raise
        reason = getattr(error, "strerror", None) or str(error)  # without the folder of the job
        raise InputError(f"the archive cannot be unpacked ({reason}): expected a zip or tar file of photos") from error
    if not names:
        raise InputError(f"the archive holds no photos: expected files ending in {', '.join(SUFFIXES)}")
    return names


def _zip_photos(path: Path, allowance: Allowance) -> Iterator[tuple[str, BufferedIOBase]]:
    with _DirectoryReader(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_members(len(members))
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind in (0, stat.S_IFREG) and not member.is_dir() and _is_photo(member.filename):
                _check_method(member)
                with archive.open(member) as file:
                    yield member.filename, file


def _check_method(member: zipfile.ZipInfo) -> None:
    """InputError for bzip2 and LZMA, of which zipfile unpacks a piece of any size at once."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{member.filename!r} is compressed by an unusual method: pack it anew, by deflate")


def _tar_photos(path: Path, allowance: Allowance) -> Iterator[tuple[str, BufferedIOBase]]:
    with _tar(path) as archive:
        for count, member in enumerate(archive, start=1):
            _check_members(count)
            if member.isreg() and _is_photo(member.name):
                yield member.name, archive.extractfile(member)
            else:
                allowance.spend(max(0, member.size))  # it has to be unpacked to be skipped


def _tar(path: Path) -> tarfile.TarFile:
    return tarfile.open(path, tarinfo=_Entry)


class _DirectoryReader(FileIO):
    """A zip file of which no more is read at once than a list of entries takes."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise InputError(f"the archive's list of entries has {size} bytes: expected photos alone")
        return super().read(size)


class _Entry(tarfile.TarInfo):
    """An entry of a tar file, without what takes more memory than the archive has bytes."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in LONG_HEADERS and self.size > MAX_HEADER:
            raise InputError(f"the archive has an entry with a header of {self.size} bytes: pack it anew")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._proc_gnusparse_10()
        return super()._proc_member(archive)

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise InputError("the archive has a sparse file: pack it anew")


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
