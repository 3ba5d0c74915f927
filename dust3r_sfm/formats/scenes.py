"""Aligned scenes in one HDF5 file: a group per scene ("0" is the largest), and in it one per image ("0", "1", ...)."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import h5py
import numpy as np
import torch

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.geometry.lens import Lens
from dust3r_sfm.pairs import Pair
from dust3r_sfm.scene import Scene, SceneIds, Tracks

FORMAT = "dust3r_sfm scenes 1"
FLOAT16_MAX = 65504.0
STACKED = ("K", "cam_from_world", "net_from_img")


def write_scenes(path: Path | str, scenes: Sequence[Scene]) -> None:
    """Write scenes with their tracks, whole or not at all; depths keep float32, confidences float16."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["format"] = FORMAT
        file.attrs["num_scenes"] = len(scenes)
        for i, scene in enumerate(scenes):
            _write_scene(file.create_group(str(i)), scene)
    write_bytes(Path(path), buffer.getbuffer())


def read_scenes(path: Path | str) -> list[Scene]:
    """The scenes that `write_scenes` wrote, in its order."""
    if not Path(path).is_file():
        raise InputError(f"no scene at {path}: run align_scene first")
    try:
        with h5py.File(path, "r") as file:
            if file.attrs["format"] != FORMAT:
                raise InputError(
                    f"{path} is of format {file.attrs['format']}, expected {FORMAT}: run align_scene again"
                )
            return [_read_scene(file[str(i)]) for i in range(file.attrs["num_scenes"])]
    except (OSError, KeyError) as error:
        raise InputError(f"{path} is no file of scenes or is cut short: run align_scene again") from error


def _write_scene(group: h5py.Group, scene: Scene) -> None:
    group.create_dataset("names", data=np.array(scene.names, dtype=object), dtype=h5py.string_dtype())
    group["original_sizes"] = np.array(scene.original_sizes, dtype=np.int64)
    group.attrs["lenses"] = json.dumps([lens and asdict(lens) for lens in scene.lenses])
    group["doubts"] = json.dumps([[*pair, reason] for pair, reason in scene.doubts.items()])
    if scene.ids is not None:
        group["ids"] = json.dumps(asdict(scene.ids))
    for field in STACKED:
        group[field] = getattr(scene, field).numpy()
    for i, (depth, confidence) in enumerate(zip(scene.depth, scene.confidence, strict=True)):
        image = group.create_group(f"images/{i}")
        image["depth"] = depth.numpy()
        image["confidence"] = confidence.clamp(max=FLOAT16_MAX).to(torch.float16).numpy()
    if scene.tracks is not None:
        for field in fields(Tracks):
            group[f"tracks/{field.name}"] = getattr(scene.tracks, field.name).numpy()


def _read_scene(group: h5py.Group) -> Scene:
    names = tuple(group["names"].asstr()[()])
    images = [group[f"images/{i}"] for i in range(len(names))]
    tracks = None
    if "tracks" in group:
        tracks = Tracks(**{field.name: torch.from_numpy(group[f"tracks/{field.name}"][()]) for field in fields(Tracks)})
    lenses = json.loads(group.attrs.get("lenses", "[]"))
    doubts = json.loads(group["doubts"].asstr()[()]) if "doubts" in group else []
    ids = json.loads(group["ids"].asstr()[()]) if "ids" in group else None
    return Scene(
        names=names,
        doubts={Pair(name0, name1): reason for name0, name1, reason in doubts},
        lenses=tuple(lens and Lens(**lens | {"coefficients": tuple(lens["coefficients"])}) for lens in lenses),
        **{field: torch.from_numpy(group[field][()]) for field in STACKED},
        depth=tuple(torch.from_numpy(image["depth"][()]) for image in images),
        confidence=tuple(torch.from_numpy(image["confidence"][()]).float() for image in images),
        original_sizes=tuple((int(width), int(height)) for width, height in group["original_sizes"][()]),
        tracks=tracks,
        ids=SceneIds(**{key: _tuple(value) for key, value in ids.items()}) if ids else None,
    )


def _tuple(value: list[int] | int) -> tuple[int, ...] | int:
    return tuple(value) if isinstance(value, list) else value
