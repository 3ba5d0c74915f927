"""Aligned scenes drawn to where their cameras were measured to stand, bent as far as their pairs allow.

Images move by similarities of their own; those that a pair joins have to agree on what both see, up to the error
that pairs have. Positions draw the cameras by their standard deviations: so they correct the drift of long chains,
and a wrong one does no harm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.alignment.anchoring import Positions, placed
from dust3r_sfm.alignment.chaining import register_robustly
from dust3r_sfm.alignment.observations import SparseGrid, usable_weights
from dust3r_sfm.geometry.averaging import CORNERS, split_similarity
from dust3r_sfm.geometry.bending import Anchors, Joints, bending_similarities
from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.transforms import inverse, rigid_transform, transform_points
from dust3r_sfm.pairs import Pair, PairPrediction, Predictions, stride_of
from dust3r_sfm.scene import Scene

MAX_GROUPS = 1000
"""Of more images neighbours move together."""
MAX_JUDGED = 200
"""Pairs that tell how far pairs are off."""
MIN_SAMPLES, MAX_SAMPLES = 12, 400
MIN_TOLERANCE = 0.002
"""Of their points' distance, which pairs are never taken to be more exact than."""


def drawn_to_positions(scene: Scene, predictions: Predictions, positions: Positions) -> Scene:
    """The scene in the frame of its cameras' positions and bent to them; as it is where they tell no frame."""
    in_frame, placement = placed(scene, positions)
    if placement is None:
        return scene
    names = set(scene.names)
    pairs = [pair for pair in predictions if set(pair) <= names and pair not in scene.doubts]
    return bent(in_frame, pairs, positions, pair_tolerance(in_frame, predictions, pairs))


def pair_tolerance(scene: Scene, predictions: Predictions, pairs: Sequence[Pair]) -> float:
    """How far single pairs are off about how their two images lie: the median share of their points' distance."""
    index = {name: i for i, name in enumerate(scene.names)}
    some = pairs[:: -(-len(pairs) // MAX_JUDGED) or 1]
    errors = [_relation_error(scene, predictions[pair], [index[name] for name in pair]) for pair in some]
    told = [error for error in errors if np.isfinite(error)]
    return max(float(np.median(told)), MIN_TOLERANCE) if told else MIN_TOLERANCE


def bent(scene: Scene, pairs: Collection[Pair], positions: Positions, tolerance: float) -> Scene:
    """The scene with least squares of what bending makes its pairs differ by, and of centres from their positions.

    In units of `tolerance`, as a share of depths, and of standard deviations.
    """
    index = {name: i for i, name in enumerate(scene.names)}
    joined = sorted({(min(index[a], index[b]), max(index[a], index[b])) for a, b in pairs})
    measured = torch.tensor([i for i, name in enumerate(scene.names) if name in positions])
    if not joined or len(measured) == 0:
        return scene
    images = torch.tensor(joined).T
    group = _groups(images, len(scene.names))
    world_from_cam, units = inverse(scene.cam_from_world.double().cpu()), _median_depths(scene)
    points = transform_points(world_from_cam, units[:, None, None] * torch.tensor(CORNERS, dtype=torch.float64))
    apart = group[images[0]] != group[images[1]]
    joints = Joints(
        groups=group[images[:, apart]],
        points=torch.cat([points[i] for i in images[:, apart]], dim=1),
        sigmas=tolerance * units[images[:, apart]].prod(dim=0).sqrt(),
    )
    known = [torch.stack([positions[scene.names[i]][k].double() for i in measured.tolist()]) for k in (0, 1)]
    anchors = Anchors(group[measured], world_from_cam[measured, :3, 3], *known)
    moved = bending_similarities(joints, anchors, int(group.max()) + 1)[group]
    return _moved(scene, world_from_cam, moved if apart.all() else _blended(moved, world_from_cam[:, :3, 3], images))


def _relation_error(scene: Scene, prediction: PairPrediction, images: Sequence[int]) -> float:
    """How far where a pair sees its first image is from where it should see it by its second, as a share of depths."""
    in_pair, points, weights = [], [], []
    sides = (
        (prediction.pointmap0_in_cam0, prediction.confidence0),
        (prediction.pointmap1_in_cam0, prediction.confidence1),
    )
    for side, (i, (pointmap, confidence)) in enumerate(zip(images, sides, strict=True)):
        depth = scene.depth[i]
        grid = SparseGrid.of(tuple(depth.shape), MAX_SAMPLES, stride_of(prediction, side))
        pixels = grid.sample(pixel_grid(*depth.shape, device=depth.device))
        rays = torch.nn.functional.pad(pixels, (0, 1), value=1.0) @ torch.linalg.inv(scene.K[i]).mT.to(pixels)
        seen = grid.sample_of_those_there(pointmap).to(depth.device).float()
        weight = usable_weights(seen, grid.sample_of_those_there(confidence).to(depth.device).float(), side)
        weights.append(weight * (grid.sample(depth) > 0))
        in_pair.append(torch.where(weights[-1][:, None] > 0, seen, 0))
        in_cam = rays * grid.sample(depth)[:, None]
        points.append(transform_points(inverse(scene.cam_from_world[i]).to(in_cam), in_cam))
    if min(int((weight > 0).sum()) for weight in weights) < MIN_SAMPLES:
        return float("nan")
    by_side = [register_robustly(p, q, w) for p, q, w in zip(points, in_pair, weights, strict=True)]
    difference = transform_points(by_side[0] - by_side[1], points[1].double())
    distance = transform_points(by_side[0], points[1].double()).norm(dim=-1)
    used = weights[1] > 0
    return float(difference.norm(dim=-1)[used].median() / distance[used].median())


def _median_depths(scene: Scene) -> Float[Tensor, " n"]:
    medians = [d[c > 0].median() if (c > 0).any() else 1.0 for d, c in zip(scene.depth, scene.confidence, strict=True)]
    return torch.tensor([float(x) for x in medians], dtype=torch.float64).clamp(min=1e-9)


def _groups(images: Int[Tensor, "2 e"], n: int) -> Int[Tensor, " n"]:
    """The number of each image's group: at most about `MAX_GROUPS`, of images that pairs join."""
    size = -(-n // MAX_GROUPS)
    if size == 1:
        return torch.arange(n)
    neighbors: list[list[int]] = [[] for _ in range(n)]
    for a, b in images.T.tolist():
        neighbors[a].append(b)
        neighbors[b].append(a)
    group, count = [-1] * n, 0
    for seed in range(n):
        if group[seed] >= 0:
            continue
        free = [seed, *(i for i in neighbors[seed] if group[i] < 0)][:size]
        if len(free) < size / 2 and (others := [group[i] for i in neighbors[seed] if group[i] >= 0]):
            group[seed] = max(set(others), key=others.count)  # no small groups between others
            continue
        for i in free:
            group[i] = count
        count += 1
    return torch.tensor(group)


def _blended(
    moved: Float[Tensor, "n 4 4"], centers: Float[Tensor, "n 3"], images: Int[Tensor, "2 e"]
) -> Float[Tensor, "n 4 4"]:
    """Each image's similarity, the mean of its own and its neighbours': no steps between groups."""
    total, count = moved.clone(), torch.ones(len(moved), dtype=moved.dtype)
    for a, b in (images, images.flip(0)):
        total.index_add_(0, a, moved[b])
        count.index_add_(0, a, count.new_ones(len(b)))
    mean = total / count[:, None, None]
    U, D, Vh = torch.linalg.svd(mean[:, :3, :3])
    linear = D.mean(dim=-1)[:, None, None] * (U @ Vh)
    shift = transform_points(mean, centers[:, None])[:, 0] - (linear @ centers[..., None])[..., 0]
    return rigid_transform(linear, shift)


def _moved(scene: Scene, world_from_cam: Float[Tensor, "n 4 4"], moved: Float[Tensor, "n 4 4"]) -> Scene:
    scales, rotations = split_similarity(moved)
    centers = transform_points(moved, world_from_cam[:, None, :3, 3])[:, 0]
    poses = inverse(rigid_transform(rotations @ world_from_cam[:, :3, :3], centers))
    depth = tuple((float(s) * d).to(d) for s, d in zip(scales, scene.depth, strict=True))
    return dataclasses.replace(scene, cam_from_world=poses.to(scene.cam_from_world), depth=depth)
