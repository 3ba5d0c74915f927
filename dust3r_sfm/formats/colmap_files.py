"""The files of a COLMAP model, and whether the binary ones are whole."""

from __future__ import annotations

import struct
from pathlib import Path

import pycolmap

from dust3r_sfm.colmap_versions import new_camera
from dust3r_sfm.errors import InputError

PARTS = ("cameras", "images", "points3D", "rigs", "frames")


def model_files(folder: Path) -> list[Path]:
    """The files of a COLMAP model that are in a folder."""
    names = (f"{part}{suffix}" for part in PARTS for suffix in (".bin", ".txt"))
    return [folder / name for name in names if (folder / name).is_file()]


def check_binary_model(folder: Path) -> None:
    """InputError for files cut short or too long: COLMAP's reader loops for ever on some, and takes others as whole."""
    ends = {"cameras": _end_of_cameras, "images": _end_of_images, "points3D": _end_of_points}
    for part, end_of in (ends | {"rigs": _end_of_rigs, "frames": _end_of_frames}).items():
        path = folder / f"{part}.bin"
        if part not in ends and not path.is_file():  # models older than rigs
            continue
        data = path.read_bytes()
        try:
            end = end_of(data)
        except (struct.error, ValueError, OverflowError) as error:
            raise InputError(f"{path} is cut short or broken: {len(data)} bytes") from error
        if end != len(data):
            raise InputError(f"{path} is cut short or broken: {len(data)} bytes, {end} expected")


def _end_of_cameras(data: bytes) -> int:
    position = 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        model = struct.unpack_from("<i", data, position + 4)[0]
        camera = new_camera(1, pycolmap.CameraModelId(model), 1.0, (1, 1))
        position += 24 + 8 * len(camera.params)
    return position


def _end_of_images(data: bytes) -> int:
    position = 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        name_end = data.index(b"\0", position + 64)
        position = name_end + 9 + 24 * struct.unpack_from("<Q", data, name_end + 1)[0]
    return position


def _end_of_points(data: bytes) -> int:
    position = 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        position += 51 + 8 * struct.unpack_from("<Q", data, position + 43)[0]
    return position


def _end_of_rigs(data: bytes) -> int:
    position = 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        num_sensors = struct.unpack_from("<I", data, position + 4)[0]
        position += 8 + 8 * min(num_sensors, 1)
        for _ in range(num_sensors - 1):
            has_pose = struct.unpack_from("<B", data, position + 8)[0]
            position += 9 + 56 * has_pose
    return position


def _end_of_frames(data: bytes) -> int:
    position = 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        position += 68 + 16 * struct.unpack_from("<I", data, position + 64)[0]
    return position
