"""Lens distortion: where a camera's pixels lie, against those of a pinhole camera of the same intrinsics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pycolmap
from jaxtyping import Float

from dust3r_sfm.colmap_versions import new_camera

PINHOLES = ("SIMPLE_PINHOLE", "PINHOLE")
WITHOUT_PINHOLE = ("INVALID", "EQUIRECTANGULAR")
SAME_PX = 0.5
"""Pixels that come back no nearer after they were bent and straightened lie where the model folds."""
MIN_FOCAL = 0.4
"""Shortest focal of a straightened view over its longer side: 103 degrees."""
MAX_ZOOM = 16.0
BORDER_STEPS = 16
SQUARE_PIXELS = 1e-6
"""Focal lengths of x and y that differ relatively by less are one."""


@dataclass(frozen=True)
class Lens:
    """What a camera model of COLMAP has besides focal lengths and principal point."""

    model: str
    """COLMAP's name, such as OPENCV."""
    coefficients: tuple[float, ...]
    """In COLMAP's order."""
    was_known: bool = False
    """Whether the network saw the photo without the distortion; else it was found afterwards."""


def lens_of(camera: pycolmap.Camera, was_known: bool = False) -> Lens | None:
    """The distortion of a camera; None for a pinhole. ValueError for cameras without a focal length."""
    if len(camera.focal_length_idxs()) == 0:
        raise ValueError(f"cameras of the model {camera.model.name} have no pinhole behind them")
    if camera.model.name in PINHOLES:
        return None
    return Lens(camera.model.name, tuple(float(camera.params[i]) for i in camera.extra_params_idxs()), was_known)


def camera_with_lens(
    K: Float[np.ndarray, "3 3"], size: tuple[int, int], lens: Lens | None = None, camera_id: int = 1
) -> pycolmap.Camera:
    """COLMAP's camera of (width, height) pixels; without a lens SIMPLE_PINHOLE or, of unequal focals, PINHOLE."""
    fx, fy, cx, cy = (float(K[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    if lens is None:
        square = abs(fx - fy) <= SQUARE_PIXELS * fx
        model, params = ("SIMPLE_PINHOLE", [fx, cx, cy]) if square else ("PINHOLE", [fx, fy, cx, cy])
        return pycolmap.Camera(camera_id=camera_id, model=model, width=size[0], height=size[1], params=params)
    if lens.model not in pycolmap.CameraModelId.__members__ or lens.model in WITHOUT_PINHOLE:
        raise ValueError(f"{lens.model} is no camera model here: expected one of COLMAP's, such as OPENCV or RADIAL")
    camera = new_camera(camera_id, pycolmap.CameraModelId.__members__[lens.model], 1.0, size)
    params = np.array(camera.params)
    focals = list(camera.focal_length_idxs())
    params[focals] = [fx, fy] if len(focals) == 2 else (fx + fy) / 2
    params[list(camera.principal_point_idxs())] = cx, cy
    if len(lens.coefficients) != len(camera.extra_params_idxs()):
        raise ValueError(
            f"{lens.model} has {len(camera.extra_params_idxs())} distortion coefficients, got {len(lens.coefficients)}"
        )
    params[list(camera.extra_params_idxs())] = lens.coefficients
    camera.params = params
    return camera


def straightened(
    pixels: Float[np.ndarray, "n 2"], K: Float[np.ndarray, "3 3"], lens: Lens | None
) -> Float[np.ndarray, "n 2"]:
    """Where a pinhole of the same K sees what the camera sees at its pixels; NaN where the model cannot be inverted."""
    if lens is None or len(pixels) == 0:
        return pixels
    in_cam = camera_with_lens(K, (1, 1), lens).cam_from_img(np.asarray(pixels, dtype=np.float64))
    return in_cam * np.diag(K)[:2] + K[:2, 2]


def bent(pixels: Float[np.ndarray, "n 2"], K: Float[np.ndarray, "3 3"], lens: Lens | None) -> Float[np.ndarray, "n 2"]:
    """Where the camera sees what a pinhole of the same K sees at `pixels`: the inverse of `straightened`.

    NaN beyond the angles that the model is made for, where its polynomial folds back into the image.
    """
    if lens is None or len(pixels) == 0:
        return pixels
    camera = camera_with_lens(K, (1, 1), lens)
    in_cam = (np.asarray(pixels, dtype=np.float64) - K[:2, 2]) / np.diag(K)[:2]
    found = camera.img_from_cam(np.pad(in_cam, ((0, 0), (0, 1)), constant_values=1.0))
    back = camera.cam_from_img(found)
    same = np.abs((back - in_cam) * np.diag(K)[:2]).max(axis=1) <= SAME_PX + 1e-3 * np.abs(pixels).max(axis=1)
    return np.where(same[:, None], found, np.nan)  # NaN is not the same as anything


def border_of(size: tuple[int, int]) -> Float[np.ndarray, "n 2"]:
    """Points along the border of an image of (width, height) pixels."""
    width, height = size
    t = np.linspace(0, 1, BORDER_STEPS + 1)
    sides = [(0 * t, height * t), (0 * t + width, height * t), (width * t, 0 * t), (width * t, 0 * t + height)]
    return np.concatenate([np.stack(side, axis=1) for side in sides])


def bend_px(K: Float[np.ndarray, "3 3"], size: tuple[int, int], lens: Lens | None) -> float:
    """How far the lens moves a pixel of an image of (width, height) pixels, at most; infinite where it folds."""
    border = border_of(size)
    moved = np.linalg.norm(straightened(border, K, lens) - border, axis=1)
    return float(np.where(np.isfinite(moved), moved, np.inf).max())


def straightening_zoom(K: Float[np.ndarray, "3 3"], size: tuple[int, int], lens: Lens) -> float:
    """Factor on the focal of the widest pinhole view of (width, height) pixels that the photo fills to its borders.

    No wider than `MIN_FOCAL` allows, for lenses that see more than a pinhole can.
    """
    border, center = border_of(size), K[:2, 2]

    def is_filled(zoom: float) -> bool:
        seen = bent(center + (border - center) / zoom, K, lens)
        return bool(((seen >= -SAME_PX) & (seen <= np.array(size) + SAME_PX)).all())

    low, high = MIN_FOCAL * max(size) / float(np.diag(K)[:2].mean()), MAX_ZOOM
    if is_filled(low):
        return low
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if is_filled(middle) else (middle, high)
    return high


def zoomed_from_straight(K: Float[np.ndarray, "3 3"], zoom: float) -> Float[np.ndarray, "3 3"]:
    """The affine map of pixels that a zoom about the principal point makes."""
    cx, cy = K[:2, 2]
    return np.array([[zoom, 0, cx * (1 - zoom)], [0, zoom, cy * (1 - zoom)], [0, 0, 1]])
