"""Intrinsics and poses that are known beforehand: from a `cameras.json` or from a COLMAP model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import torch

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.cameras_json import read_cameras_json
from dust3r_sfm.formats.colmap import read_colmap
from dust3r_sfm.geometry.lens import lens_of
from dust3r_sfm.views import KnownCamera


def read_known_cameras(path: Path, names: Collection[str]) -> dict[str, KnownCamera]:
    """What is known of the named images. InputError where the file names none of them."""
    found = _from_json(path) if path.is_file() or (path / "cameras.json").is_file() else _from_colmap(path)
    known = {name: camera for name, camera in found.items() if name in names}
    if not known:
        raise InputError(
            f"{path} has cameras of {len(found)} images, none of which is among the {len(names)} photos "
            f"(such as {min(names)}): names are paths below the image folder"
        )
    return known


def _from_json(path: Path) -> dict[str, KnownCamera]:
    known = {}
    for frame in read_cameras_json(path):
        lens = frame.lens and dataclasses.replace(frame.lens, was_known=True)
        sigmas = frame.focal_sigma, frame.position_sigma
        known[frame.name] = KnownCamera(frame.K, frame.cam_from_world, lens, frame.size, *sigmas)
    return known


def _from_colmap(path: Path) -> dict[str, KnownCamera]:
    model = read_colmap(path)
    known: dict[str, KnownCamera] = {}
    for image in model.images.values():
        camera = model.cameras[image.camera_id]
        try:
            lens = lens_of(camera, was_known=True)
        except ValueError as error:
            raise InputError(f"the camera of {image.name} in {path} cannot be used: {error}") from error
        K = torch.from_numpy(camera.calibration_matrix())
        pose = torch.eye(4, dtype=torch.float64)
        if image.has_pose:
            pose[:3] = torch.from_numpy(image.cam_from_world().matrix())
        known[image.name] = KnownCamera(K, pose if image.has_pose else None, lens, (camera.width, camera.height))
    return known
