"""hloc's files of localisation: lists of queries with intrinsics, poses, and logs, as JSON where hloc pickles them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pycolmap
from jaxtyping import Float64

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes


def read_queries(path: Path) -> dict[str, pycolmap.Camera | None]:
    """Names of an image list and their cameras: `name`, or `name MODEL width height params...` as hloc writes it.

    Empty lines and those that begin with # are passed over.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"there are no queries at {path}: expected a folder of photos, a photo, or a list") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the list of queries {path} cannot be read ({error}): expected one name a line") from error
    queries: dict[str, pycolmap.Camera | None] = {}
    for number, line in enumerate(lines, start=1):
        name, *rest = line.split() or [""]
        if not name or name.startswith("#"):
            continue
        if name in queries:
            raise InputError(f"{path}, line {number}: {name} is listed twice")
        queries[name] = _camera(rest, f"{path}, line {number}") if rest else None
    if not queries:
        raise InputError(f"the list of queries {path} is empty: expected one image name a line")
    return queries


def write_poses(path: Path, poses: Mapping[str, Float64[np.ndarray, "3 4"]], basenames: bool = False) -> None:
    """Lines `name qw qx qy qz tx ty tz` of cam_from_world, as hloc and the benchmarks read them; whole or not at all.

    Names are paths below the image folder or, as hloc writes them, file names alone; InputError
    where two of these are equal.
    """
    names = {name: PurePosixPath(name).name if basenames else name for name in poses}
    if len(set(names.values())) < len(names):
        repeated = sorted(name for name in names if list(names.values()).count(names[name]) > 1)
        raise InputError(f"file names alone do not tell {repeated[0]} and {repeated[1]} apart: omit basenames")
    lines = []
    for name, pose in poses.items():
        rigid = pycolmap.Rigid3d(pose)
        x, y, z, w = rigid.rotation.quat
        lines.append(" ".join([names[name], *(repr(float(v)) for v in (w, x, y, z, *rigid.translation))]))
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def read_poses(path: Path) -> dict[str, Float64[np.ndarray, "3 4"]]:
    """What `write_poses` or hloc wrote."""
    try:
        rows = [line.rsplit(maxsplit=7) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        numbers = {row[0]: [float(x) for x in row[1:]] for row in rows}
        poses = {
            name: np.array(pycolmap.Rigid3d(pycolmap.Rotation3d([x, y, z, w]), t).matrix())
            for name, (w, x, y, z, *t) in numbers.items()
        }
    except FileNotFoundError:
        raise InputError(f"there are no poses at {path}: run localize first") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} holds no poses: expected lines `name qw qx qy qz tx ty tz` ({error})") from error
    return poses


def write_logs(path: Path, logs: Mapping[str, Any]) -> None:
    """JSON with the fields of hloc's logs. Unlike the pickles that hloc writes it runs no code when it is read."""
    write_bytes(path, json.dumps(logs, indent=1, default=_plain).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not fit into JSON")


def _camera(words: list[str], place: str) -> pycolmap.Camera:
    try:
        model, width, height, *params = words
        camera = pycolmap.Camera(
            model=model, width=int(width), height=int(height), params=[float(value) for value in params]
        )
        valid = camera.verify_params() and np.isfinite(camera.params).all() and camera.mean_focal_length() > 0
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{place}: expected `name MODEL width height params...` with a camera model of COLMAP ({reason})"
        ) from error
    if not valid:
        raise InputError(f"{place}: {model} of {width} x {height} pixels cannot have the parameters {params}")
    return camera
