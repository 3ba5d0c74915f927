"""What is known of the cameras before anything is estimated, for the network's images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.geometry.camera import K_from_focal, split_rotation
from dust3r_sfm.views import View

MAX_SKEWNESS = 1e-3
"""How far R R^T of a known pose may be from the identity."""


@dataclass(frozen=True, eq=False)
class Cameras:
    """Intrinsics up to a factor on the focal length, and known poses, of the upright network images (float64)."""

    base_K: Float[Tensor, "n 3 3"]
    """Of focal factor 1: the known K, or the stored photo's square pixels with its centre as principal point."""
    is_focal_known: Bool[Tensor, " n"]
    """Where the focal factor is 1."""
    focal_sigma: Float[Tensor, " n"]
    """Standard deviation of the logarithm of the focal factor about 0: zero where it is known, infinite where not."""
    cam_from_world: Float[Tensor, "n 4 4"]
    """The known pose; the identity where none is known."""
    is_pose_known: Bool[Tensor, " n"]

    @property
    def base_focal_px(self) -> Float[Tensor, " n"]:
        """Network pixels of focal factor 1."""
        return (self.base_K[:, 0, 0] * self.base_K[:, 1, 1]).sqrt()


def cameras_of_views(views: Sequence[View]) -> Cameras:
    """Cameras of the network images; InputError where a known K or pose is none."""
    sigma = [math.inf if view.known_K is None else view.focal_sigma for view in views]
    sigma = torch.tensor(sigma, dtype=torch.float64)
    base_K, cam_from_world = [], []
    for view in views:
        width, height = view.original_size
        stored = K_from_focal(torch.tensor(1.0), torch.tensor([width / 2, height / 2])).double()
        if view.known_K is not None:
            stored = _checked_K(view)
        K, netcam_from_imgcam = split_rotation(view.net_from_img.double(), stored)
        base_K.append(K)
        cam_from_world.append(torch.eye(4, dtype=torch.float64))
        if view.known_cam_from_world is not None:
            cam_from_world[-1] = netcam_from_imgcam @ _checked_pose(view)
    return Cameras(
        base_K=torch.stack(base_K),
        is_focal_known=sigma == 0,
        focal_sigma=sigma,
        cam_from_world=torch.stack(cam_from_world),
        is_pose_known=torch.tensor([view.known_cam_from_world is not None for view in views]),
    )


def _checked_K(view: View) -> Float[Tensor, "3 3"]:  # noqa: N802
    K = view.known_K.double()
    if not K.isfinite().all() or K[0, 0] <= 0 or K[1, 1] <= 0 or (K[2] != torch.tensor([0.0, 0.0, 1.0])).any():
        raise InputError(
            f"{view.name}: known intrinsics must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]], got {K.tolist()}"
        )
    return K


def _checked_pose(view: View) -> Float[Tensor, "4 4"]:
    pose = view.known_cam_from_world.double()
    skewness = (pose[:3, :3] @ pose[:3, :3].mT - torch.eye(3)).abs().max()
    if not pose.isfinite().all() or skewness > MAX_SKEWNESS or torch.det(pose[:3, :3]) < 0:
        raise InputError(f"{view.name}: a known pose must be a rotation and a translation, got {pose.tolist()}")
    return pose
