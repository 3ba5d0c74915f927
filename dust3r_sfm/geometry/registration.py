"""Weighted similarity registration of points (Umeyama, PAMI 1991), and the relative pose that follows from it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.geometry.statistics import weighted_median
from dust3r_sfm.geometry.transforms import determinant, rigid_transform


def register_similarity(
    source: Float[Tensor, "*b n 3"],
    target: Float[Tensor, "*b n 3"],
    weights: Float[Tensor, "*b n"] | None = None,
    with_scale: bool = True,
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b 3 3"], Float[Tensor, "*b 3"]]:
    """Scale, rotation and translation that minimise sum_i w_i |target_i - (s R source_i + t)|^2.

    The rotation is always proper, also for mirrored or flat points. Points of weight zero
    may be NaN. All NaN where no weight is left or a weighted point is not finite; the scale
    is NaN where all source points coincide, and 1 if not `with_scale`.
    """
    weights = torch.ones_like(source[..., 0]) if weights is None else weights.to(source.dtype)
    used = (weights > 0)[..., None]
    source, target = torch.where(used, source, 0), torch.where(used, target, 0)
    total = weights.sum(dim=-1)
    weights = (weights / total[..., None])[..., None]
    source_mean, target_mean = (weights * source).sum(dim=-2), (weights * target).sum(dim=-2)  # eq. 34, 35
    source, target = source - source_mean[..., None, :], target - target_mean[..., None, :]
    source_variance = (weights * source.square()).sum(dim=(-2, -1))  # eq. 36
    covariance = (weights * target).mT @ source  # eq. 38
    valid = covariance.isfinite().flatten(-2).all(dim=-1) & (total > 0)
    # The decomposition raises on NaN: those of the batch get an identity here and NaN in the end.
    eye = torch.eye(3, dtype=source.dtype, device=source.device)
    U, D, Vh = torch.linalg.svd(torch.where(valid[..., None, None], covariance, eye))
    mirrored = determinant(U) * determinant(Vh) < 0
    S = torch.ones_like(D)
    S[..., 2] = torch.where(mirrored, -1.0, 1.0)  # S matrix, eq. 43
    rotation = torch.where(valid[..., None, None], (U * S[..., None, :]) @ Vh, torch.nan)  # eq. 40
    scale = (D * S).sum(dim=-1) / source_variance if with_scale else torch.ones_like(source_variance)  # eq. 42
    scale = torch.where(valid, scale, torch.nan)
    translation = target_mean - scale[..., None] * (rotation @ source_mean[..., None])[..., 0]  # eq. 41
    return scale, rotation, translation


def similarity_matrix(
    scale: Float[Tensor, "*b"], rotation: Float[Tensor, "*b 3 3"], translation: Float[Tensor, "*b 3"]
) -> Float[Tensor, "*b 4 4"]:
    """The 4x4 matrix that takes x to scale * rotation @ x + translation."""
    return rigid_transform(scale[..., None, None] * rotation, translation)


def relative_pose_from_pointmaps(
    pointmap_in_cam0: Float[Tensor, "*b h w 3"],
    pointmap_in_cam1: Float[Tensor, "*b h w 3"],
    weights: Float[Tensor, "*b h w"],
    num_iters: int = 10,
) -> tuple[Float[Tensor, "*b 4 4"], Float[Tensor, "*b"]]:
    """Relative pose of two cameras that both have a pointmap of the same pixels, each at its own scale.

    Returns (cam1_from_cam0, scale) with point_in_cam1 = scale * cam1_from_cam0 @ point_in_cam0:
    a rigid transform in units of the first pointmap. Registration reweighted by the residuals
    (Geman-McClure, at the scale of their median), so that some two fifths of the points may be
    far off. NaN where no weight is left; points of weight zero may be NaN.
    """
    points0, points1, weights = pointmap_in_cam0.flatten(-3, -2), pointmap_in_cam1.flatten(-3, -2), weights.flatten(-2)
    used = (weights > 0)[..., None]
    points0, points1 = torch.where(used, points0, 0), torch.where(used, points1, 0)
    scale, rotation, translation = register_similarity(points0, points1, weights)
    for _ in range(num_iters):
        moved = scale[..., None, None] * points0 @ rotation.mT + translation[..., None, :]
        distance = torch.linalg.vector_norm(points1 - moved, dim=-1)
        # Exact points have residuals of rounding alone: those are all alike.
        rounding = 10 * torch.finfo(points1.dtype).eps * points1.abs().amax(dim=(-2, -1))
        usual = torch.maximum(weighted_median(distance, weights), rounding)[..., None]
        reweighted = weights / (1 + (distance / usual).square()).square()
        scale, rotation, translation = register_similarity(points0, points1, reweighted)
    return rigid_transform(rotation, translation / scale[..., None]), scale
