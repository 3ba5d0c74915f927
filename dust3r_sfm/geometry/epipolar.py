"""Two views and more: essential and fundamental matrices, relative pose from matches, triangulation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dust3r_sfm.colmap_versions import relative_pose
from dust3r_sfm.geometry.camera import project
from dust3r_sfm.geometry.colmap_types import colmap_camera, ransac_options, transform_from_rigid3d
from dust3r_sfm.geometry.transforms import camera_center, rigid_transform, transform_points

_MIN_MATCHES = 6
"""Five matches always have a pose; the sixth can contradict."""
_MIN_INLIER_SHARE = 0.1
"""About twice the share of random matches that some pose agrees with."""


@dataclass(frozen=True, eq=False)
class RelativePose:
    """Pose of camera 1 relative to camera 0, its translation of length one, and the matches that agree with it."""

    cam1_from_cam0: Float[Tensor, "4 4"]
    inliers: Bool[Tensor, " m"]


def relative_pose_from_matches(
    keypoints0: Float[Tensor, "m 2"],
    keypoints1: Float[Tensor, "m 2"],
    K0: Float[Tensor, "3 3"],
    K1: Float[Tensor, "3 3"],
    max_error_px: float = 2.0,
) -> RelativePose | None:
    """Relative pose that most matches agree with, by five-point RANSAC and refinement over the inliers.

    `max_error_px` bounds the Sampson error. None where fewer than six finite and distinct
    matches, or a tenth of all, agree. The direction of the translation is arbitrary where the
    camera only turned.
    """
    finite = (keypoints0.isfinite() & keypoints1.isfinite()).all(dim=-1)
    if any(len(keypoints[finite].unique(dim=0)) < _MIN_MATCHES for keypoints in (keypoints0, keypoints1)):
        return None
    pixels0, pixels1 = (k[finite].detach().cpu().double().numpy() for k in (keypoints0, keypoints1))
    found = relative_pose((colmap_camera(K0), colmap_camera(K1)), (pixels0, pixels1), ransac_options(max_error_px))
    if found is None or found["num_inliers"] < max(_MIN_MATCHES, _MIN_INLIER_SHARE * len(pixels0)):
        return None
    pose = transform_from_rigid3d(found["cam2_from_cam1"]).to(keypoints0)
    inliers = torch.zeros_like(finite)
    inliers[finite] = torch.as_tensor(found["inlier_mask"], device=finite.device)
    return RelativePose(pose, inliers) if pose.isfinite().all() else None


def essential_from_pose(cam1_from_cam0: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 3 3"]:
    """E = [t]x R, with ray1^T E ray0 = 0 for the rays (K^-1 @ pixel) of a match."""
    rotation, translation = cam1_from_cam0[..., :3, :3], cam1_from_cam0[..., :3, 3]
    return torch.linalg.cross(translation[..., None], rotation, dim=-2)


def fundamental_from_essential(
    essential: Float[Tensor, "*#b 3 3"], K0: Float[Tensor, "*#b 3 3"], K1: Float[Tensor, "*#b 3 3"]
) -> Float[Tensor, "*#b 3 3"]:
    """F = K1^-T E K0^-1, with pixel1^T F pixel0 = 0 for the homogeneous pixels of a match."""
    return torch.linalg.inv(K1).mT @ essential @ torch.linalg.inv(K0)


def sampson_errors_px(
    fundamental: Float[Tensor, "*#b 3 3"], keypoints0: Float[Tensor, "*#b m 2"], keypoints1: Float[Tensor, "*#b m 2"]
) -> Float[Tensor, "*#b m"]:
    """First-order distance in pixels of matches to the nearest pixels that satisfy the epipolar constraint."""
    homogeneous0, homogeneous1 = (torch.nn.functional.pad(k, (0, 1), value=1.0) for k in (keypoints0, keypoints1))
    line1, line0 = homogeneous0 @ fundamental.mT, homogeneous1 @ fundamental
    slope = (line0[..., :2].square().sum(dim=-1) + line1[..., :2].square().sum(dim=-1)).sqrt()
    return (homogeneous1 * line1).sum(dim=-1).abs() / slope


def triangulate(
    K: Float[Tensor, "*#b v 3 3"],
    cam_from_world: Float[Tensor, "*#b v 4 4"],
    keypoints: Float[Tensor, "*#b v 2"],
    weights: Float[Tensor, "*#b v"] | None = None,
) -> Float[Tensor, "*#b 3"]:
    """The point in the world that v views see at their keypoints (linear, DLT), one for each leading index.

    Weight zero leaves a view out: its keypoint may be NaN. NaN with fewer than two views;
    unbounded or behind the cameras where the rays do not meet, which `reprojection_errors` tells.
    """
    dtype = keypoints.dtype
    K, poses, keypoints = K.double(), cam_from_world.double(), keypoints.double()
    weights = torch.ones_like(keypoints[..., 0]) if weights is None else weights.double()
    used = (weights > 0)[..., None]
    # A frame in the midst of the cameras, of their extent, keeps the digits of small parallaxes.
    centers = camera_center(poses)
    origin = centers.mean(dim=-2)
    extent = torch.linalg.vector_norm(centers - origin[..., None, :], dim=-1).amax(dim=-1)
    extent = torch.where(extent > 0, extent, 1)[..., None]
    translation = transform_points(poses, origin[..., None, None, :])[..., 0, :] / extent[..., None]
    rows = rigid_transform(poses[..., :3, :3], translation)
    homogeneous = torch.nn.functional.pad(torch.where(used, keypoints, 0), (0, 1), value=1.0)
    rays = torch.linalg.solve(K, homogeneous[..., None])[..., 0]
    equations = rays[..., :2, None] * rows[..., 2:3, :] - rows[..., :2, :]  # x (P X)_3 = (P X)_1, y (P X)_3 = (P X)_2
    equations = (torch.where(used, weights[..., None], 0)[..., None] * equations).flatten(-3, -2)
    solution = torch.linalg.eigh(equations.mT @ equations).eigenvectors[..., 0]
    point = origin + extent * solution[..., :3] / solution[..., 3:]
    enough = used.expand(*point.shape[:-1], *used.shape[-2:]).sum(dim=-2) >= 2
    return torch.where(enough, point, torch.nan).to(dtype)


def reprojection_errors(
    K: Float[Tensor, "*#b 3 3"],
    cam_from_world: Float[Tensor, "*#b 4 4"],
    points_in_world: Float[Tensor, "*#b 3"],
    keypoints: Float[Tensor, "*#b 2"],
) -> Float[Tensor, "*#b"]:
    """Distance in pixels between keypoints and the projections of their points; infinite for points not in front.

    Every leading index is one observation; leading dimensions broadcast, so that one camera may serve many points.
    """
    points_in_cam = transform_points(cam_from_world, points_in_world[..., None, :])
    errors = torch.linalg.vector_norm(project(K, points_in_cam)[..., 0, :] - keypoints, dim=-1)
    return torch.where(points_in_cam[..., 0, 2] > 0, errors, torch.inf)
