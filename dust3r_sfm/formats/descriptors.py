"""Descriptors of images in hloc's layout: a group for each image name, with `global_descriptor` and `image_size`.

Descriptors are float16, as hloc writes them; `image_size` is (width, height). While a file is being made its
content lies in shards beside it, each whole or absent; the file itself appears when all is there. The attribute
`key` of a group, which hloc passes over, says what the descriptor was made of, so that a second run finds it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import mkstemp
from typing import NamedTuple

import h5py
import numpy as np
from jaxtyping import Float, Float16

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import replacing, write_bytes

FIELD = "global_descriptor"
MAX_IN_MEMORY_BYTES = 1024**3
BLOCK_ROWS = 4096


class ImageDescriptor(NamedTuple):
    """What is stored of one image."""

    name: str
    key: str
    size: tuple[int, int]
    """(width, height) of the stored image."""
    descriptor: Float[np.ndarray, " d"]


class DescriptorFile:
    """The descriptors of one file, or of several where the last that has a name counts; read when asked for."""

    def __init__(self, *paths: Path | str) -> None:
        self._files = [_open(Path(path)) for path in paths]
        self._homes = {name: file for file in self._files for name in _names_in(file)}
        self.names = sorted(self._homes)
        """All image names, sorted."""
        if not self.names:
            raise InputError(f"{paths[0]} holds no descriptors: expected groups with {FIELD}; run extract_descriptors")
        self.dim = int(self._homes[self.names[0]][self.names[0]][FIELD].shape[0])

    def read(self, names: Sequence[str]) -> Float16[np.ndarray, "n d"]:
        """The descriptors of some images, in their order."""
        rows = np.empty((len(names), self.dim), np.float16)
        for row, name in zip(rows, names, strict=True):
            if name not in self._homes:
                raise InputError(f"{name} has no descriptor in {self._places()}: run extract_descriptors with it")
            dataset = self._homes[name][name][FIELD]
            if dataset.shape != (self.dim,):
                raise InputError(f"the descriptor of {name} is {dataset.shape}, that of {self.names[0]} ({self.dim},)")
            dataset.read_direct(row)
        if not np.isfinite(rows).all():
            broken = names[int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])]
            raise InputError(f"the descriptor of {broken} in {self._places()} holds numbers that are not finite")
        return rows

    @contextmanager
    def matrix(self, names: Sequence[str], folder: Path) -> Iterator[Float16[np.ndarray, "n d"]]:
        """The descriptors of some images as an array, which is a temporary file in `folder` where it is large."""
        if len(names) * self.dim * 2 <= MAX_IN_MEMORY_BYTES:
            yield self.read(names)
            return
        _check_space(len(names) * self.dim * 2, folder)
        handle, path = mkstemp(prefix="descriptors", suffix=".tmp", dir=folder)
        try:
            os.close(handle)
            matrix = np.memmap(path, np.float16, "w+", shape=(len(names), self.dim))
            for start in range(0, len(names), BLOCK_ROWS):
                matrix[start : start + BLOCK_ROWS] = self.read(names[start : start + BLOCK_ROWS])
            yield matrix
        finally:
            os.unlink(path)

    def _places(self) -> str:
        return ", ".join(file.filename for file in self._files)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> DescriptorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DescriptorStore:
    """A descriptor file in the making: what is there already, and a place for more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = descriptor_folder(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, tuple[Path, str]] = {}
        for file in [path, *sorted(self.folder.glob("*.h5"))]:
            self._register(file)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def add(self, items: Sequence[ImageDescriptor]) -> None:
        """Write one shard; it exists as a whole or not at all."""
        buffer = BytesIO()  # a full disk is an OSError of Python's here, where HDF5 fails again on every close
        with h5py.File(buffer, "w", libver="latest") as file:
            for item in items:
                _write(file, item)
        shard = self.folder / f"{items[0].key[:16]}.h5"
        write_bytes(shard, buffer.getbuffer())
        self._register(shard)

    def finish(self, keys: Mapping[str, str]) -> None:
        """Write the file of the images whose `keys` are given by name, from what is there; shards are removed."""
        with replacing(self.path) as temporary, h5py.File(temporary, "w", libver="latest") as file:
            for place, names in _grouped((self._places[key][0], name) for name, key in keys.items()):
                with h5py.File(place, "r") as source:
                    for name in names:
                        source.copy(self._places[keys[name]][1], file, name)
        shutil.rmtree(self.folder)

    def _register(self, path: Path) -> None:
        """Notes what a file holds; nothing of one that is not there or that a crash of the machine left unreadable."""
        try:
            with h5py.File(path, "r") as file:
                found = {str(file[name].attrs["key"]): (path, name) for name in _names_in(file)}
        except (OSError, KeyError):
            return
        self._places.update(found)


def descriptor_folder(path: Path) -> Path:
    """Where the shards of a descriptor file lie while it is being made."""
    return path.with_name(f"{path.stem}.shards")


def write_descriptors(path: Path, items: Iterable[ImageDescriptor]) -> None:
    """Write a descriptor file at once; it appears whole or not at all."""
    with replacing(Path(path)) as temporary, h5py.File(temporary, "w", libver="latest") as file:
        for item in items:
            _write(file, item)


def _write(file: h5py.File, item: ImageDescriptor) -> None:
    group = file.create_group(item.name)
    group.attrs["key"] = item.key
    group[FIELD] = item.descriptor.astype(np.float16)
    group["image_size"] = np.array(item.size, np.int64)


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise InputError(f"no descriptors at {path}: run extract_descriptors first")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} is no descriptor file, or is cut short: run extract_descriptors again") from error


def _names_in(file: h5py.File) -> list[str]:
    names: list[str] = []

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and name.endswith(f"/{FIELD}"):
            names.append(name.removesuffix(f"/{FIELD}"))

    file.visititems(visit)
    return names


def _grouped(places: Iterable[tuple[Path, str]]) -> Iterator[tuple[Path, list[str]]]:
    groups: dict[Path, list[str]] = {}
    for place, name in places:
        groups.setdefault(place, []).append(name)
    yield from groups.items()


def _check_space(need: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(f"the search needs {need / 1e6:,.1f} MB in {folder}, {free / 1e6:,.1f} MB are free: make room")
