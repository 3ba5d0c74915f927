"""Where the aligner's cameras start: focals from each image's own pairs, poses from its pairs' frames, known ones."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dust3r_sfm.alignment.cameras import Cameras
from dust3r_sfm.alignment.chaining import Start
from dust3r_sfm.alignment.objective import without_scale
from dust3r_sfm.alignment.observations import Observations, SparseGrid
from dust3r_sfm.geometry.camera import K_from_focal
from dust3r_sfm.geometry.focal import focal_from_pointmap
from dust3r_sfm.geometry.registration import similarity_matrix
from dust3r_sfm.geometry.resection import absolute_pose, absolute_pose_unknown_focal
from dust3r_sfm.geometry.transforms import inverse

FOCAL_RANGE = (0.4, 4.0)
"""Focal lengths in units of the image's longer side that are believed: 100 to 14 degrees of view."""
DEFAULT_FOCAL = 1.0
MAX_ERROR_PX = 5.0


def start_focals(
    observations: Observations,
    cameras: Cameras,
    rays: Float[Tensor, "n m 3"],
    start: Start,
) -> Float[Tensor, " n"]:
    """Focal factors: 1 where there is a prior, else from the pairs that have the image's own camera as their frame.

    The median over these pairs by their confidence; an image without such a pair is resected from its points.
    """
    factors = torch.ones(len(observations.names), dtype=torch.float64)
    focals_px = _focals_of_own_pairs(observations, cameras)
    for n, grid in enumerate(observations.grids):
        if cameras.focal_sigma[n].isfinite():
            continue
        focal_px = focals_px.get(n)
        if focal_px is None:
            base_focal_px = float(cameras.base_focal_px[n])
            focal_px = _focal_by_resection(rays[n], start.points[n], start.weights[n], base_focal_px, grid.size)
        if focal_px is None:
            focal_px = DEFAULT_FOCAL * max(grid.size)
        factors[n] = focal_px / cameras.base_focal_px[n]
    limits = focal_limits(observations, cameras)
    return factors.clamp(limits[:, 0], limits[:, 1])


def focal_limits(observations: Observations, cameras: Cameras) -> Float[Tensor, "n 2"]:
    """Least and largest focal factor of each image; both 1 where it is known."""
    longer_side = torch.tensor([[max(grid.size)] for grid in observations.grids])
    limits = torch.tensor(FOCAL_RANGE, dtype=torch.float64) * longer_side / cameras.base_focal_px[:, None]
    return torch.where(cameras.is_focal_known[:, None], 1.0, limits)


def _focals_of_own_pairs(observations: Observations, cameras: Cameras) -> dict[int, float]:
    """In pixels, of the images that any of their own pairs tells one of; all pairs of one size at once."""
    own = observations.images[0].tolist()
    groups: dict[SparseGrid, list[int]] = defaultdict(list)
    for e, n in enumerate(own):
        groups[observations.grids[n]].append(e)
    told: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for grid, edges in groups.items():
        length = grid.shape[0] * grid.shape[1]
        pointmaps = observations.points[0, edges, :length].unflatten(1, grid.shape)
        weights = observations.weights[0, edges, :length].unflatten(1, grid.shape)
        centers = grid.to_grid(cameras.base_K[[own[e] for e in edges], :2, 2].float()).to(pointmaps.device)
        focals = focal_from_pointmap(pointmaps, weights, centers).double() * grid.stride
        for e, focal, belief in zip(edges, *torch.stack([focals, weights.sum(dim=(1, 2))]).tolist(), strict=True):
            if focal > 0 and math.isfinite(focal):
                told[own[e]].append((focal, belief))
    return {n: _weighted_median(sorted(statements)) for n, statements in told.items()}


def _weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """The first of ascending values at which half of their weights, which stand second, is reached."""
    reached = list(accumulate(weight for _, weight in values))
    return values[min(bisect_left(reached, reached[-1] / 2), len(values) - 1)][0]


def _focal_by_resection(
    rays: Float[Tensor, "m 3"],
    points: Float[Tensor, "m 3"],
    weights: Float[Tensor, " m"],
    base_focal_px: float,
    size: tuple[int, int],
) -> float | None:
    center = torch.tensor([size[1] / 2, size[0] / 2])
    usable = weights > 0
    found = absolute_pose_unknown_focal(points[usable], rays[usable, :2] * base_focal_px + center, size, MAX_ERROR_PX)
    return None if found is None else found[1]


def start_poses(
    observations: Observations,
    cameras: Cameras,
    rays: Float[Tensor, "n m 3"],
    focals: Float[Tensor, " n"],
    start: Start,
) -> Float[Tensor, "n 4 4"]:
    """world_from_cam of all images.

    A pair's frame is its camera 0: an image takes the frame of its pair that agrees best with the others. Images
    without one are resected from their points, or else look from where the pair that sees them does.
    """
    frames, images = without_scale(start.world_from_pair), observations.images.cpu()
    poses = []
    for n in range(len(observations.names)):
        own, seen = images[0] == n, images[1] == n
        if own.any():
            poses.append(frames[torch.where(own, start.distances, torch.inf).argmin()])
            continue
        usable, focal_px = start.weights[n] > 0, cameras.base_focal_px[n] * focals[n]
        K = K_from_focal(focal_px, torch.zeros(2, dtype=torch.float64))
        keypoints = rays[n, usable, :2].double() * cameras.base_focal_px[n]
        found = absolute_pose(start.points[n, usable].double(), keypoints, K, MAX_ERROR_PX)
        best = frames[torch.where(seen, start.distances, torch.inf).argmin()]
        poses.append(best if found is None else inverse(found.cam_from_world.double()))
    return torch.stack(poses)


@dataclass(frozen=True, eq=False)
class KnownFrame:
    """How the estimate's world lies in that of known poses."""

    known_from_world: Float[Tensor, "4 4"]
    """A similarity; the identity without known poses."""
    is_scale_known: bool


def align_to_known(
    world_from_cam: Float[Tensor, "n 4 4"], known_from_cam: Float[Tensor, "n 4 4"], is_known: Bool[Tensor, " n"]
) -> KnownFrame:
    """The similarity that takes estimated poses to the known ones best; its scale is told by known places apart.

    Robust: medians over the known images, as some of the estimates may be far off.
    """
    scale = torch.tensor(1.0, dtype=torch.float64)
    if not is_known.any():
        return KnownFrame(torch.eye(4, dtype=torch.float64), is_scale_known=False)
    estimated, known = world_from_cam[is_known], known_from_cam[is_known]
    rotation = _median_rotation(known[:, :3, :3] @ estimated[:, :3, :3].mT)
    i, j = torch.triu_indices(len(known), len(known), offset=1)
    known_distances = (known[i, :3, 3] - known[j, :3, 3]).norm(dim=-1)
    distances = (estimated[i, :3, 3] - estimated[j, :3, 3]).norm(dim=-1)
    apart = known_distances > 1e-6 * known[:, :3, 3].abs().max()
    if apart.any():
        scale = (known_distances[apart] / distances[apart].clamp(min=1e-6)).median()
    offsets = known[:, :3, 3] - scale * estimated[:, :3, 3] @ rotation.mT
    known_from_world = similarity_matrix(scale, rotation, offsets.median(dim=0).values)
    return KnownFrame(known_from_world, is_scale_known=bool(apart.any()))


def _median_rotation(rotations: Float[Tensor, "k 3 3"]) -> Float[Tensor, "3 3"]:
    """The rotation of least summed (not squared) distance to all (chordal L1 mean)."""
    weights = torch.ones(len(rotations), dtype=rotations.dtype)
    for _ in range(10):
        U, _, Vh = torch.linalg.svd((weights[:, None, None] * rotations).sum(dim=0))
        sign = torch.tensor([1.0, 1.0, float(torch.det(U) * torch.det(Vh))], dtype=rotations.dtype).sign()
        mean = (U * sign) @ Vh
        weights = 1 / torch.linalg.matrix_norm(rotations - mean).clamp(min=1e-6)
    return mean
