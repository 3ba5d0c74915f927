"""The focal length of the camera that sees a pointmap in its own frame."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.statistics import weighted_median

_OUTLIER_RATIO = 5.0
"""Residuals over this many times the median residual count as outliers: less, the farther out they are."""
_MIN_RESIDUAL_PX = 1e-6


def with_focal(
    points: Float[Tensor, "*batch n 3"], focal: Float[Tensor, "*#batch"], known_focal: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch n 3"]:
    """Points in the frame of a camera of focal length `focal`, as one of `known_focal` sees them in the same pixels.

    A network that takes a photo for one of a shorter lens sees everything too shallow by the ratio of the focal
    lengths: z grows by `known_focal / focal`, x and y stay. Unchanged where `focal` is not a positive number.
    """
    ratio = torch.where((focal > 0) & focal.isfinite(), known_focal / focal, 1.0).to(points)
    return torch.cat([points[..., :2], points[..., 2:] * ratio[..., None, None]], dim=-1)


def focal_from_pointmap(
    pointmap: Float[Tensor, "*batch h w 3"],
    confidence: Float[Tensor, "*batch h w"],
    principal_point: Float[Tensor, "*#batch 2"],
    num_iters: int = 10,
) -> Float[Tensor, "*batch"]:
    """Focal length in pixels of the camera that sees a pointmap in its own frame.

    Minimises sum_i c_i |p_i - f (x_i, y_i) / z_i| over f by Weiszfeld iterations (DUSt3R,
    Sec. 3.3), p_i being the pixel's centre less the principal point. Unlike there, they start
    from the weighted median of the pixels' own focals, and residuals far beyond the usual
    lose weight: a point of tiny or wrong depth has a huge (x, y) / z, and a few such would
    pull f to zero. NaN where no weighted point is in front.
    """
    height, width = pointmap.shape[-3:-1]
    grid = pixel_grid(height, width, device=pointmap.device, dtype=pointmap.dtype)
    pixels = (grid - principal_point.to(pointmap.dtype)[..., None, None, :]).flatten(-3, -2)
    pixels = pixels.expand(*pointmap.shape[:-3], height * width, 2)
    points, weights = pointmap.flatten(-3, -2), confidence.to(pointmap.dtype).flatten(-2)
    usable = (points[..., 2] > 0) & points.isfinite().all(dim=-1) & (weights > 0)
    slopes = torch.where(usable[..., None], points[..., :2] / points[..., 2:].where(usable[..., None], 1), 0)
    weights = torch.where(usable, weights, 0)
    pixel_dot_slope, slope_squared = (pixels * slopes).sum(dim=-1), slopes.square().sum(dim=-1)
    # A pixel's own focal is as exact as the pixel is far from the principal point.
    votes = pixel_dot_slope / slope_squared.clamp(min=torch.finfo(slopes.dtype).tiny)
    focal = weighted_median(votes, weights * torch.linalg.vector_norm(pixels, dim=-1) * (votes > 0))
    residual = torch.linalg.vector_norm(pixels - focal[..., None, None] * slopes, dim=-1).detach()
    far = (_OUTLIER_RATIO * weighted_median(residual, weights)[..., None]).clamp(min=_MIN_RESIDUAL_PX)
    for _ in range(num_iters):
        residual = torch.linalg.vector_norm(pixels - focal[..., None, None] * slopes, dim=-1).detach()
        step = weights / residual.clamp(min=_MIN_RESIDUAL_PX) * (far / residual).clamp(max=1)
        focal = (step * pixel_dot_slope).sum(dim=-1) / (step * slope_squared).sum(dim=-1)
    return focal
