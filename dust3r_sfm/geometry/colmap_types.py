"""What pycolmap's estimators take and give, from and to tensors."""

from __future__ import annotations

import pycolmap
import torch
from jaxtyping import Float
from torch import Tensor


def colmap_camera(K: Float[Tensor, "3 3"], size: tuple[int, int] | None = None) -> pycolmap.Camera:
    """A PINHOLE camera; without a `size` (height, width) the principal point is taken for the centre."""
    fx, fy, cx, cy = (K[i, j].item() for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    height, width = size or (max(1, round(2 * cy)), max(1, round(2 * cx)))
    return pycolmap.Camera(model="PINHOLE", width=width, height=height, params=[fx, fy, cx, cy])


def ransac_options(max_error_px: float) -> dict[str, float | int]:
    """Options of every RANSAC here: the same input gives the same result, and pure noise does not take long."""
    return {"max_error": max_error_px, "random_seed": 0, "min_inlier_ratio": 0.05, "max_num_trials": 10_000}


def transform_from_rigid3d(rigid: pycolmap.Rigid3d) -> Float[Tensor, "4 4"]:
    """target_from_source in float64."""
    transform = torch.eye(4, dtype=torch.float64)
    transform[:3] = torch.tensor(rigid.matrix())
    return transform
