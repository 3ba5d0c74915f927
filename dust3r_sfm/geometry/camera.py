"""Pinhole cameras: pixels with their origin at the image's corner, cameras with x right, y down, z forward."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.geometry.transforms import rigid_transform


def pixel_grid(
    height: int, width: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "h w 2"]:
    """(x, y) of every pixel's centre; the first is (0.5, 0.5)."""
    x = torch.arange(width, device=device, dtype=dtype) + 0.5
    y = torch.arange(height, device=device, dtype=dtype) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def K_from_focal(focal: Float[Tensor, "*b"], principal_point: Float[Tensor, "*#b 2"]) -> Float[Tensor, "*b 3 3"]:  # noqa: N802
    """Intrinsics with square pixels, no skew."""
    cx, cy = (x.expand(focal.shape) for x in principal_point.to(focal.dtype).unbind(-1))
    zero, one = torch.zeros_like(focal), torch.ones_like(focal)
    return torch.stack([focal, zero, cx, zero, focal, cy, zero, zero, one], dim=-1).unflatten(-1, (3, 3))


def project(K: Float[Tensor, "*#b 3 3"], points_in_cam: Float[Tensor, "*#b n 3"]) -> Float[Tensor, "*#b n 2"]:
    """Pixels of points; meaningless for points that are not in front (z <= 0), which the caller leaves out."""
    homogeneous = points_in_cam @ K.mT
    return homogeneous[..., :2] / homogeneous[..., 2:]


def unproject(K: Float[Tensor, "*b 3 3"], depth: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h w 3"]:
    """Points in the camera's frame at the centres of all pixels; depth is z along the optical axis."""
    grid = pixel_grid(depth.shape[-2], depth.shape[-1], device=depth.device, dtype=depth.dtype)
    K = K[..., None, None, :, :]
    y = (grid[..., 1] - K[..., 1, 2]) / K[..., 1, 1]
    x = (grid[..., 0] - K[..., 0, 2] - K[..., 0, 1] * y) / K[..., 0, 0]
    return torch.stack([x * depth, y * depth, depth], dim=-1)


def transform_K(K: Float[Tensor, "*#b 3 3"], affine: Float[Tensor, "*#b 3 3"]) -> Float[Tensor, "*#b 3 3"]:  # noqa: N802
    """Intrinsics after a crop and scale of the pixels, in the finer dtype; for turned images see `split_rotation`."""
    dtype = torch.promote_types(K.dtype, affine.dtype)
    return affine.to(dtype) @ K.to(dtype)


def split_rotation(
    img_from_net: Float[Tensor, "*b 3 3"], K_net: Float[Tensor, "*b 3 3"]
) -> tuple[Float[Tensor, "*b 3 3"], Float[Tensor, "*b 4 4"]]:
    """Intrinsics and turn of the camera behind an image that was scaled, cropped and turned by quarter turns.

    Returns (K_img, imgcam_from_netcam) with K_img @ R = img_from_net @ K_net, R the quarter
    turn about the optical axis. Maps that mirror or shear have no such camera: ValueError.
    """
    dtype = torch.promote_types(img_from_net.dtype, K_net.dtype)
    affine = img_from_net.to(dtype)
    linear = affine[..., :2, :2]
    largest = linear.abs().amax(dim=-1, keepdim=True)
    turn = torch.where(linear.abs() > 1e-6 * largest, linear.sign(), torch.zeros_like(linear))
    is_rotation = (turn @ turn.mT == torch.eye(2, dtype=dtype, device=turn.device)).all() & (
        torch.det(turn) > 0.5
    ).all()
    if not is_rotation:
        raise ValueError(
            f"the pixel map must scale, crop and turn by quarter turns, not mirror or shear: {linear.tolist()}"
        )
    rotation = torch.eye(3, dtype=dtype, device=affine.device).repeat(*affine.shape[:-2], 1, 1)
    rotation[..., :2, :2] = turn
    K_img = affine @ K_net.to(dtype) @ rotation.mT
    return K_img, rigid_transform(rotation, torch.zeros_like(rotation[..., 0]))
