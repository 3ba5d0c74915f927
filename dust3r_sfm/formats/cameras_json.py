"""Reference cameras from a `cameras.json`: a scene folder holds it, `images/` and perhaps depth maps.

Its `frames` give for each image `image` (path relative to the scene folder), `width`, `height`, and where known
- `K` (pixels of the stored file, corner origin), `focal_sigma` (relative) where it is a prior and not to be held,
- `opencv_distortion_k1_k2_p1_p2` or, of any of COLMAP's camera models, `camera_model` (such as OPENCV_FISHEYE) and
  `distortion` (its coefficients),
- `cam_from_world` (4x4, OpenCV axes), `position_sigma` (in the world's unit) where it is a prior,
- `gps` (latitude, longitude, altitude in metres),
- `depth` (a 16-bit PNG) with `depth_scale` (its values in a metre).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.geometry.lens import PINHOLES, Lens, camera_with_lens, straightened

IMAGE_FOLDER = "images"


@dataclass(frozen=True, eq=False, kw_only=True)
class ReferenceFrame:
    """What is known of one image; float64, in pixels of the stored file."""

    name: str
    """Posix path below the scene's image folder, as the names of a model made from that folder."""
    size: tuple[int, int]
    """(width, height)."""
    K: Float[Tensor, "3 3"] | None = None
    cam_from_world: Float[Tensor, "4 4"] | None = None
    lens: Lens | None = None
    """None for a pinhole camera."""
    focal_sigma: float = 0.0
    """Relative standard deviation of K's focal lengths; 0 where they are exact."""
    position_sigma: float | None = None
    """Standard deviation of the pose's position; None where the pose is exact."""
    gps: tuple[float, float, float | None] | None = None
    """Latitude and longitude in degrees, altitude in metres."""
    depth_path: Path | None = None
    depth_scale: float = 1.0


def read_cameras_json(path: Path) -> list[ReferenceFrame]:
    """Frames of a scene folder's `cameras.json`, or of such a file; InputError where it is not one."""
    path = path / "cameras.json" if path.is_dir() else path
    try:
        frames = json.loads(path.read_text(encoding="utf-8"))["frames"]
        names = names_below_images([frame["image"] for frame in frames])
        parsed = [_frame(frame, name, path.parent) for frame, name in zip(frames, names, strict=True)]
    except FileNotFoundError:
        raise InputError(f"there is no {path}: expected a folder with a cameras.json, or such a file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is not a cameras.json with a list of frames ({reason})") from error
    if len(set(names)) < len(names):
        raise InputError(f"{path} lists an image more than once: expected one frame an image")
    return parsed


def names_below_images(paths: Sequence[str]) -> list[str]:
    """Names relative to the image folder: the leading `images/` goes where every path has it, and nothing else."""
    prefix = f"{IMAGE_FOLDER}/"
    paths = [path.removeprefix("./") for path in paths]
    if all(path.startswith(prefix) for path in paths):
        return [path.removeprefix(prefix) for path in paths]
    return paths


def undistort(frame: ReferenceFrame, pixels: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b 2"]:
    """Where a pinhole camera of the same K sees what the frame's camera sees at `pixels`, both of the stored file.

    NaN where the distortion's polynomial cannot be inverted, as towards the corners of strongly distorted images.
    """
    if frame.lens is None or frame.K is None:
        return pixels
    pinhole = straightened(pixels.reshape(-1, 2).double().numpy(), frame.K.numpy(), frame.lens)
    return torch.from_numpy(pinhole).reshape(pixels.shape).to(pixels.dtype)


def read_depth(frame: ReferenceFrame) -> Float[Tensor, "h w"] | None:
    """Depth along the optical axis in metres, 0 where it is not known; None for a frame without a depth map."""
    if frame.depth_path is None:
        return None
    from PIL import Image

    try:
        with Image.open(frame.depth_path) as image:
            values = np.array(image).astype(np.float32)
    except OSError as error:
        raise InputError(f"the depth map {frame.depth_path} of {frame.name} cannot be read: {error}") from error
    if values.shape != frame.size[::-1]:
        raise InputError(f"{frame.depth_path} is of shape {values.shape}, its image {frame.name} of {frame.size[::-1]}")
    return torch.from_numpy(values / frame.depth_scale)


def _frame(frame: dict[str, Any], name: str, folder: Path) -> ReferenceFrame:
    return ReferenceFrame(
        name=name,
        size=(int(frame["width"]), int(frame["height"])),
        K=_matrix(frame.get("K"), 3),
        cam_from_world=_matrix(frame.get("cam_from_world"), 4),
        lens=_lens(frame),
        focal_sigma=_sigma(frame, "focal_sigma") or 0.0,
        position_sigma=_sigma(frame, "position_sigma"),
        gps=_gps(frame.get("gps")),
        depth_path=folder / frame["depth"] if frame.get("depth") else None,
        depth_scale=float(frame.get("depth_scale", 1.0)),
    )


def _lens(frame: dict[str, Any]) -> Lens | None:
    coefficients = frame.get("opencv_distortion_k1_k2_p1_p2")
    if coefficients is not None:
        k1, k2, p1, p2 = (float(x) for x in coefficients)
        return Lens("OPENCV", (k1, k2, p1, p2)) if any((k1, k2, p1, p2)) else None
    model = frame.get("camera_model", "PINHOLE")
    if model in PINHOLES:
        return None
    lens = Lens(model, tuple(float(x) for x in frame["distortion"]))
    camera_with_lens(np.eye(3), (1, 1), lens)  # ValueError where there is no such model or it has other coefficients
    return lens


def _sigma(frame: dict[str, Any], key: str) -> float | None:
    if frame.get(key) is None:
        return None
    sigma = float(frame[key])
    if not 0 < sigma < float("inf"):
        raise ValueError(f"{key} must be positive, got {sigma}")
    return sigma


def _gps(values: Any) -> tuple[float, float, float | None] | None:
    if values is None:
        return None
    latitude, longitude, *altitude = (None if x is None else float(x) for x in values)
    if not (abs(latitude) <= 90 and abs(longitude) <= 180) or len(altitude) > 1:
        raise ValueError(f"gps must be a latitude, a longitude and perhaps an altitude, got {values}")
    return latitude, longitude, altitude[0] if altitude else None


def _matrix(values: Any, size: int) -> Float[Tensor, "n n"] | None:
    if values is None:
        return None
    matrix = torch.tensor(values, dtype=torch.float64)
    if matrix.shape != (size, size) or not matrix.isfinite().all():
        raise ValueError(f"expected a finite {size}x{size} matrix, got {values}")
    return matrix
