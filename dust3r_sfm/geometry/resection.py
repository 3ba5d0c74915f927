"""Where a camera stood that sees known points: robust absolute pose with known and unknown focal length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pycolmap
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.colmap_types import colmap_camera, ransac_options, transform_from_rigid3d
from dust3r_sfm.geometry.epipolar import reprojection_errors

_MIN_POINTS = 4
"""Three points have up to four poses; the fourth tells which."""
_MIN_INLIER_SHARE = 0.05
"""Random points reach about a hundredth."""
_FOCAL_RATIOS = (0.1, 10.0)
"""Plausible focals over the longer side of the image, as COLMAP bounds them."""
_MAX_SAMPLES = 4096
"""Pixels of a pointmap that take part in RANSAC: more cost time and gain no accuracy."""


@dataclass(frozen=True, eq=False)
class AbsolutePose:
    """Pose of a camera, and which of the given points agree with it."""

    cam_from_world: Float[Tensor, "4 4"]
    inliers: Bool[Tensor, " m"]


def absolute_pose(
    points_in_world: Float[Tensor, "m 3"],
    keypoints: Float[Tensor, "m 2"],
    K: Float[Tensor, "3 3"],
    max_error_px: float = 5.0,
) -> AbsolutePose | None:
    """Pose of a camera of known intrinsics that sees most points at their keypoints (RANSAC and refinement).

    None where fewer than four finite points, or a twentieth of them, lie in front and within `max_error_px`.
    """
    found = _estimate(points_in_world, keypoints, colmap_camera(K), max_error_px, unknown_focal=False)
    return None if found is None else found.pose


def absolute_pose_unknown_focal(
    points_in_world: Float[Tensor, "m 3"],
    keypoints: Float[Tensor, "m 2"],
    size: tuple[int, int],
    max_error_px: float = 5.0,
) -> tuple[AbsolutePose, float] | None:
    """Pose and focal length in pixels of a camera with square pixels and its principal point in the centre.

    `size` is (height, width). The best of a four-point RANSAC, which fails on planes, and of
    three-point ones from focals of 1/2 to 4 times the longer side, each refined. None as
    `absolute_pose`, and where the focal is absurd. Points in a plane that faces the camera fit
    at any focal: the pose is then one of many.
    """
    height, width = size
    side = float(max(size))
    candidates = []
    for focal in (None, *np.geomspace(0.5 * side, 4 * side, 9)):
        camera = pycolmap.Camera(
            model="SIMPLE_PINHOLE", width=width, height=height, params=[focal or side, width / 2, height / 2]
        )
        found = _estimate(
            points_in_world, keypoints, camera, max_error_px, unknown_focal=True, start_known=focal is not None
        )
        if found is not None and _FOCAL_RATIOS[0] <= found.focal / side <= _FOCAL_RATIOS[1]:
            candidates.append(found)
    best = min(candidates, key=lambda found: found.cost, default=None)
    return None if best is None else (best.pose, best.focal)


def relative_pose_from_pointmap(
    pointmap1_in_cam0: Float[Tensor, "h w 3"],
    confidence1: Float[Tensor, "h w"],
    K1: Float[Tensor, "3 3"],
    max_error_px: float = 5.0,
    min_confidence_quantile: float = 0.5,
) -> Float[Tensor, "4 4"] | None:
    """cam1_from_cam0 from the pixels of image 1 and their points in camera 0's frame, at that pointmap's scale.

    Takes the pixels at or over the quantile of confidence, thinned evenly to a few thousand. None as `absolute_pose`.
    """
    usable = pointmap1_in_cam0.isfinite().all(dim=-1) & (confidence1 > 0)
    if not usable.any():
        return None
    # By rank, as `torch.quantile` takes no more than 16 million values.
    ranked = confidence1[usable].sort().values
    threshold = ranked[min(int(min_confidence_quantile * len(ranked)), len(ranked) - 1)]
    chosen = (usable & (confidence1 >= threshold)).flatten().nonzero()[:, 0]
    if len(chosen) > _MAX_SAMPLES:
        chosen = chosen[torch.linspace(0, len(chosen) - 1, _MAX_SAMPLES, device=chosen.device).long()]
    grid = pixel_grid(*confidence1.shape, device=pointmap1_in_cam0.device, dtype=pointmap1_in_cam0.dtype)
    points, keypoints = pointmap1_in_cam0.flatten(0, 1)[chosen], grid.flatten(0, 1)[chosen]
    pose = absolute_pose(points, keypoints, K1, max_error_px)
    return None if pose is None else pose.cam_from_world


@dataclass(frozen=True, eq=False)
class _Estimate:
    pose: AbsolutePose
    focal: float
    cost: float
    """Sum of squared errors, each at most that of the threshold."""


def _estimate(
    points: Float[Tensor, "m 3"],
    keypoints: Float[Tensor, "m 2"],
    camera: pycolmap.Camera,
    max_error_px: float,
    unknown_focal: bool,
    start_known: bool = False,
) -> _Estimate | None:
    """Pose, its inliers counted again after refinement; `start_known`: refine from the camera's focal."""
    finite = points.isfinite().all(dim=-1) & keypoints.isfinite().all(dim=-1)
    min_inliers = max(_MIN_POINTS + unknown_focal, _MIN_INLIER_SHARE * int(finite.sum()))
    if finite.sum() < min_inliers:
        return None
    points64, keypoints64 = points.detach().cpu().double(), keypoints.detach().cpu().double()
    found = pycolmap.estimate_and_refine_absolute_pose(
        keypoints64[finite.cpu()].numpy(),
        points64[finite.cpu()].numpy(),
        camera,
        {"estimate_focal_length": unknown_focal and not start_known, "ransac": ransac_options(max_error_px)},
        # COLMAP's tolerance of 1 stops early in scenes of large units.
        {"refine_focal_length": unknown_focal, "gradient_tolerance": 1e-3},
    )
    if found is None:
        return None
    cam_from_world, K = transform_from_rigid3d(found["cam_from_world"]), torch.tensor(camera.calibration_matrix())
    errors = reprojection_errors(K, cam_from_world, points64, keypoints64)
    inliers = (errors <= max_error_px).to(finite.device)
    if inliers.sum() < min_inliers:
        return None
    cost = errors[finite.cpu()].clamp(max=max_error_px).square().sum().item()
    return _Estimate(AbsolutePose(cam_from_world.to(points), inliers), K[0, 0].item(), cost)
