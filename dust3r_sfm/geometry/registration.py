"""Weighted similarity registration of points (Umeyama, PAMI 1991), and the relative pose that follows from it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dust3r_sfm.geometry.statistics import weighted_median
from dust3r_sfm.geometry.transforms import rigid_transform, rotation_from_quaternion

NUM_SQUARINGS = 30
"""Rotations are told from those that explain less by one part in 2^27."""


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
    rotation = _nearest_rotation(torch.where(valid[..., None, None], covariance, 0)).to(source.dtype)
    rotation = torch.where(valid[..., None, None], rotation, torch.nan)
    explained = (rotation * covariance).sum(dim=(-2, -1))  # tr(D S), eq. 42
    scale = explained / source_variance if with_scale else torch.ones_like(source_variance)
    scale = torch.where(valid, scale, torch.nan)
    translation = target_mean - scale[..., None] * (rotation @ source_mean[..., None])[..., 0]  # eq. 41
    return scale, rotation, translation


def _nearest_rotation(covariance: Float[Tensor, "*b 3 3"]) -> Float64[Tensor, "*b 3 3"]:
    """The rotation R of largest tr(R^T covariance); one of them where there are several.

    Its quaternion is the eigenvector of the largest eigenvalue of Davenport's matrix (Horn, JOSA A 1987), which is all
    that is left of the matrix after it was squared often enough. Decompositions of many small matrices take a GPU long.
    """
    C = covariance.double()
    wx, wy, wz = C[..., 2, 1] - C[..., 1, 2], C[..., 0, 2] - C[..., 2, 0], C[..., 1, 0] - C[..., 0, 1]
    xx, yy, zz = C.diagonal(dim1=-2, dim2=-1).unbind(-1)
    xy, xz, yz = C[..., 0, 1] + C[..., 1, 0], C[..., 0, 2] + C[..., 2, 0], C[..., 1, 2] + C[..., 2, 1]
    rows = [
        [xx + yy + zz, wx, wy, wz],
        [wx, xx - yy - zz, xy, xz],
        [wy, xy, yy - xx - zz, yz],
        [wz, xz, yz, zz - xx - yy],
    ]
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    bound = math.sqrt(3) * torch.linalg.matrix_norm(C).clamp(min=torch.finfo(C.dtype).tiny)[..., None, None]
    matrix = matrix / bound + torch.eye(4, dtype=C.dtype, device=C.device)  # eigenvalues of 0 to 2
    for i in range(NUM_SQUARINGS):
        matrix = matrix @ matrix
        if i % 5 == 4:  # as rarely as numbers stay in range
            matrix = matrix / matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    column = matrix.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None]
    return rotation_from_quaternion(torch.take_along_dim(matrix, column, dim=-1)[..., 0])


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
