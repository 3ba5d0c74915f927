"""Points of many tracks at once, from the depths and rays of their observations. All in float64, in network pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dust3r_sfm.geometry.transforms import inverse
from dust3r_sfm.scene import Scene

NUM_DEPTH_STARTS = 3
"""Observations a track, the best by score, whose depth is tried as its point."""
PRIOR_PX = 1.0
"""Error in pixels that moving a point by its whole depth costs: only rays that are all but parallel feel it."""


@dataclass(frozen=True, eq=False)
class Observations:
    """Pixels that see tracks, ordered by track; tracks are numbered from 0 without gaps."""

    track: Int[Tensor, " n"]
    image: Int[Tensor, " n"]
    keypoints: Float[Tensor, "n 2"]
    """Network pixels, float64."""
    scores: Float[Tensor, " n"]

    @property
    def num_tracks(self) -> int:
        return int(self.track[-1]) + 1 if len(self.track) else 0

    def sum(self, values: Float[Tensor, "n ..."]) -> Float[Tensor, "t ..."]:
        """The sum over each track's observations."""
        total = torch.zeros(self.num_tracks, *values.shape[1:], dtype=values.dtype)
        return total.index_add_(0, self.track, values)

    def mean(self, values: Float[Tensor, "n ..."]) -> Float[Tensor, "t ..."]:
        """The mean over each track's observations."""
        lengths = torch.bincount(self.track, minlength=self.num_tracks)
        return self.sum(values) / lengths.reshape(-1, *[1] * (values.ndim - 1))

    def select(self, kept: Bool[Tensor, " n"], min_length: int) -> tuple[Observations, Int[Tensor, " t"]]:
        """The kept observations of tracks that stay long enough, and the former numbers of these tracks."""
        lengths = torch.bincount(self.track[kept], minlength=self.num_tracks)
        kept = kept & (lengths[self.track] >= min_length)
        former, track = torch.unique(self.track[kept], return_inverse=True)
        return Observations(track, self.image[kept], self.keypoints[kept], self.scores[kept]), former


def triangulate_tracks(
    scene: Scene, observations: Observations, max_error_px: float, num_iters: int = 8
) -> Float[Tensor, "t 3"]:
    """A point in the world for each track.

    Starts from what explains most observations: the depth at one of the best of them, or the
    point nearest to all rays where that explains at least one more. Then Levenberg-Marquardt
    on the reprojection error under Geman and McClure's kernel of width `max_error_px`, so
    that a wrong observation hardly moves the point.
    """
    cameras = _projections(scene)[observations.image]
    points = _start(scene, cameras, observations, max_error_px**2)
    first = points
    depth = (cameras[:, 2, :3] * points[observations.track]).sum(dim=-1) + cameras[:, 2, 3]
    prior = (PRIOR_PX / observations.mean(depth.abs()).clamp(min=1e-12)).square()
    cost = _robust_cost(cameras, observations, points, first, prior, max_error_px**2)
    damping = torch.full_like(cost, 1e-3)
    eye = torch.eye(3, dtype=torch.float64)
    for _ in range(num_iters):
        hessian, gradient = _normal_equations(cameras, observations, points, max_error_px**2)
        hessian = hessian + prior[:, None, None] * eye
        gradient = gradient + prior[:, None] * (points - first)
        scale = hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp(min=1e-30)
        damped = hessian / scale[:, None, None] + damping[:, None, None] * eye
        candidate = points - torch.linalg.solve(damped, gradient / scale[:, None])
        new_cost = _robust_cost(cameras, observations, candidate, first, prior, max_error_px**2)
        better = new_cost < cost
        points = torch.where(better[:, None], candidate, points)
        cost = torch.where(better, new_cost, cost)
        damping = torch.where(better, damping * 0.1, damping * 10).clamp(1e-9, 1e6)
    return points


def reprojection_residuals(
    scene: Scene, observations: Observations, points: Float[Tensor, "t 3"]
) -> Float[Tensor, "n 2"]:
    """Projection less keypoint in network pixels; infinite where the point is not in front of the camera."""
    residuals, depth = _residuals(_projections(scene)[observations.image], observations, points)
    return torch.where((depth > 0)[:, None] & residuals.isfinite(), residuals, torch.inf)


def _projections(scene: Scene) -> Float[Tensor, "n 3 4"]:
    """K [R | t] of every image: the third row gives the depth."""
    return scene.K.detach().cpu().double() @ scene.cam_from_world.detach().cpu().double()[:, :3]


def _residuals(
    cameras: Float[Tensor, "n 3 4"], observations: Observations, points: Float[Tensor, "t 3"]
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, " n"]]:
    projected = (cameras[..., :3] @ points[observations.track][..., None])[..., 0] + cameras[..., 3]
    return projected[:, :2] / projected[:, 2:] - observations.keypoints, projected[:, 2]


def _robust_cost(
    cameras: Float[Tensor, "n 3 4"],
    observations: Observations,
    points: Float[Tensor, "t 3"],
    first: Float[Tensor, "t 3"],
    prior: Float[Tensor, " t"],
    width: float,
) -> Float[Tensor, " t"]:
    """Geman-McClure: sum of w e^2 / (w + e^2), w for points that are not in front; and the pull of the start."""
    residuals, depth = _residuals(cameras, observations, points)
    squared = residuals.square().sum(dim=-1)
    cost = torch.where((depth > 0) & squared.isfinite(), width * squared / (width + squared), width)
    return observations.sum(cost) + prior * (points - first).square().sum(dim=-1)


def _normal_equations(
    cameras: Float[Tensor, "n 3 4"], observations: Observations, points: Float[Tensor, "t 3"], width: float
) -> tuple[Float[Tensor, "t 3 3"], Float[Tensor, "t 3"]]:
    residuals, depth = _residuals(cameras, observations, points)
    usable = (depth > 0) & residuals.isfinite().all(dim=-1)
    residuals, depth = torch.where(usable[:, None], residuals, 0), torch.where(usable, depth, 1)
    weights = usable * (width / (width + residuals.square().sum(dim=-1))).square()
    pixels = residuals + observations.keypoints
    jacobian = (cameras[:, :2, :3] - pixels[..., None] * cameras[:, 2:, :3]) / depth[:, None, None]
    weighted = weights[:, None, None] * jacobian.mT
    return observations.sum(weighted @ jacobian), observations.sum((weighted @ residuals[..., None])[..., 0])


def _start(
    scene: Scene, cameras: Float[Tensor, "n 3 4"], observations: Observations, width: float
) -> Float[Tensor, "t 3"]:
    """The first guess of every track's point, by truncated squared error."""
    from_depth, from_rays = _depth_points(scene, observations), _ray_points(scene, observations)
    lengths = torch.bincount(observations.track, minlength=observations.num_tracks)
    ends = lengths.cumsum(dim=0)
    by_score = torch.argsort(observations.scores, descending=True, stable=True)
    by_score = by_score[torch.argsort(observations.track[by_score], stable=True)]
    best, lowest = from_rays, torch.full((observations.num_tracks,), torch.inf, dtype=torch.float64)
    for rank in range(NUM_DEPTH_STARTS):
        candidate = from_depth[by_score[torch.minimum(ends - lengths + rank, ends - 1)]]
        cost = _truncated_cost(cameras, observations, candidate, width)
        best = torch.where((cost < lowest)[:, None], candidate, best)
        lowest = torch.minimum(cost, lowest)
    explains_more = _truncated_cost(cameras, observations, from_rays, width) + width < lowest
    return torch.where((explains_more | best.isnan().any(dim=-1))[:, None], from_rays, best)


def _truncated_cost(
    cameras: Float[Tensor, "n 3 4"], observations: Observations, points: Float[Tensor, "t 3"], width: float
) -> Float[Tensor, " t"]:
    residuals, depth = _residuals(cameras, observations, points)
    squared = residuals.square().sum(dim=-1)
    return observations.sum(torch.where((depth > 0) & (squared < width), squared, width))


def _rays(scene: Scene, observations: Observations) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """Centres and directions in the world; the directions have depth 1."""
    world_from_cam = inverse(scene.cam_from_world.detach().cpu().double())[observations.image]
    rays = torch.linalg.inv(scene.K.detach().cpu().double())[observations.image]
    pixels = torch.nn.functional.pad(observations.keypoints, (0, 1), value=1.0)
    rays = world_from_cam[:, :3, :3] @ (rays @ pixels[..., None])
    return world_from_cam[:, :3, 3], rays[..., 0]


def _depth_points(scene: Scene, observations: Observations) -> Float[Tensor, "n 3"]:
    """Where each observation's own depth (of its pixel, as it is) puts the point; NaN where there is none."""
    depth = torch.full((len(observations.image),), torch.nan, dtype=torch.float64)
    for index, depth_map in enumerate(scene.depth):
        here = (observations.image == index).nonzero()[:, 0]
        x, y = observations.keypoints[here].long().unbind(-1)
        height, width = depth_map.shape
        depth[here] = depth_map.detach().cpu().double()[y.clamp(0, height - 1), x.clamp(0, width - 1)]
    depth = torch.where(depth > 0, depth, torch.nan)
    centers, rays = _rays(scene, observations)
    return centers + depth[:, None] * rays


def _ray_points(scene: Scene, observations: Observations) -> Float[Tensor, "t 3"]:
    """The point nearest to all rays of a track in the least-squares sense; far off where they are parallel."""
    centers, rays = _rays(scene, observations)
    rays = rays / torch.linalg.vector_norm(rays, dim=-1, keepdim=True)
    eye = torch.eye(3, dtype=torch.float64)
    across = eye - rays[..., :, None] * rays[..., None, :]
    total = observations.sum(across) + 1e-9 * eye
    return torch.linalg.solve(total, observations.sum((across @ centers[..., None])[..., 0]))
