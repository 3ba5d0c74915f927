"""Photos beside a model: copied, under one folder's flat names, and in smaller sizes."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import replacing, write_bytes

CONVERTED = (".heic", ".heif")
"""Suffixes that training code cannot read: such photos become PNG."""
SAVING = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}


def flat_names(names: Sequence[str]) -> dict[str, str]:
    """For each image name one without folders; no two are equal but for their suffix or for upper and lower case.

    `a/b.jpg` becomes `a__b.jpg`. Readers that take the file's name alone, replace the suffix or
    sort the folder find each image once, and the order of the names is kept where it can be.
    """
    flat, taken = {}, set()
    for name in sorted(names, key=lambda name: ("/" in name, name)):  # names without folders keep theirs
        path = PurePosixPath(name)
        suffix = ".png" if path.suffix.lower() in CONVERTED else path.suffix
        stem = "__".join(path.with_suffix("").parts)
        candidates = (stem if i == 1 else f"{stem}_{i}" for i in range(1, len(names) + 1))
        free = next(candidate for candidate in candidates if candidate.lower() not in taken)
        taken.add(free.lower())
        flat[name] = free + suffix
    return {name: flat[name] for name in names}


def copy_images(names: Mapping[str, str], image_dir: Path, folder: Path) -> None:
    """Copies photos to `folder` under their new names; other files of the folder go, as readers count them.

    A copy that is there already, of the same size and time, stays. The pixels are the stored
    ones: no EXIF orientation is applied.
    """
    for name, new_name in names.items():
        source, target = image_dir / name, folder / new_name
        if not source.is_file():
            raise InputError(f"there is no image {source}: expected the photos that the scene was made of")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix.lower() != target.suffix.lower():
            write_bytes(target, encoded(decoded(source), ".png"))
        elif not _is_copy(source, target):
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
                status = source.stat()
                os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
    _remove_others(folder, set(names.values()))


def shrink_images(names: Sequence[str], folder: Path, target: Path, factor: int) -> None:
    """Writes the photos of `folder` to `target` at a `factor`-th of their sizes, rounded down, under the same names."""
    for name in names:
        image = decoded(folder / name)
        size = tuple(max(1, side // factor) for side in image.size)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target / name, encoded(image.resize(size, Image.Resampling.LANCZOS), Path(name).suffix))
    _remove_others(target, set(names))


def decoded(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def encoded(image: Image.Image, suffix: str) -> bytes:
    kind = Image.registered_extensions()[suffix.lower()]
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **SAVING.get(kind, {}))
    return buffer.getvalue()


def _is_copy(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    a, b = source.stat(), target.stat()
    return (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)


def _remove_others(folder: Path, names: set[str]) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()
