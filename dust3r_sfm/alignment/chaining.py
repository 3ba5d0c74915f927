"""Pairs aligned without cameras: pointmaps chained along the best tree of pairs, then averaged over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.alignment.objective import MIN_OUTLIER_DISTANCE, pair_points, pair_scales
from dust3r_sfm.alignment.observations import Observations
from dust3r_sfm.geometry.registration import register_similarity, similarity_matrix
from dust3r_sfm.geometry.transforms import transform_points
from dust3r_sfm.graph import maximum_spanning_tree

NUM_REWEIGHTINGS = 5
NUM_TURNS = 5
"""Of averaging the pairs' points and registering all pairs to them."""
MAX_TREES = 4
MIN_RESIDUAL = 1e-3
DOUBTED_DISTANCE = 0.1
"""Mean residual in a pair's unit from which a pair should rather not be part of the tree."""


@dataclass(frozen=True, eq=False)
class Start:
    """Aligned pairs before cameras come in, in a world where the pairs' mean log scale is 0."""

    world_from_pair: Float[Tensor, "e 4 4"]
    points: Float[Tensor, "n m 3"]
    """Each image's sampled pixels in the world: the robust mean of what the pairs say."""
    weights: Float[Tensor, "n m"]
    """The sum of the pairs' weights."""
    distances: Float[Tensor, " e"]
    """Each pair's weighted mean distance from `points`, in its own unit."""


def start_pairs(observations: Observations) -> Start:
    """Points chained along the maximum spanning tree of the pairs' scores, then averaged over all pairs in turns.

    A pair of the tree that the others contradict is left out of another tree, and the better start is taken.
    """
    scores, best, best_cost = observations.scores.clone(), None, float("inf")
    for _ in range(MAX_TREES):
        tree = _spanning_tree(observations, scores)
        start = _settled(observations, chain_pairs(observations, tree))
        cost = float((start.distances / (1 + start.distances / DOUBTED_DISTANCE)).mean())
        if cost < best_cost:
            best, best_cost = start, cost
        doubted = tree[start.distances[tree] > max(3 * float(start.distances.median()), DOUBTED_DISTANCE)]
        if len(doubted) == 0:
            break
        scores[doubted] *= 1e-6
    return best


def _spanning_tree(observations: Observations, scores: Float[Tensor, " e"]) -> Int[Tensor, " t"]:
    """Indices of the tree's pairs, strongest first."""
    index = {pair: e for e, pair in enumerate(observations.pairs)}
    tree = maximum_spanning_tree(observations.names, dict(zip(observations.pairs, scores.tolist(), strict=True)))
    return torch.tensor([index[pair] for pair in tree])


def _settled(observations: Observations, world_from_pair: Float[Tensor, "e 4 4"]) -> Start:
    """The start after some turns of averaging the pairs' points and registering all pairs to them."""
    belief = torch.ones(len(world_from_pair))
    for turn in range(NUM_TURNS + 1):
        world_from_pair = _with_unit_scale(world_from_pair)
        points, weights = average_points(observations, world_from_pair, belief)
        distances = pair_distances(observations, world_from_pair, points)
        belief = 1 / (1 + distances / max(3 * float(distances.median()), MIN_OUTLIER_DISTANCE)).square()
        if turn < NUM_TURNS:
            world_from_pair = register_pairs(observations, points, weights)
    return Start(world_from_pair, points, weights, distances)


def pair_distances(
    observations: Observations, world_from_pair: Float[Tensor, "e 4 4"], points: Float[Tensor, "n m 3"]
) -> Float[Tensor, " e"]:
    """Weighted mean distance of each pair's points from the images', in the pair's own unit."""
    residuals = (points[observations.images] - pair_points(observations, world_from_pair)).norm(dim=-1)
    mean = (residuals * observations.weights).sum(dim=(0, 2)) / observations.weights.sum(dim=(0, 2))
    return mean / pair_scales(world_from_pair).float()


def chain_pairs(observations: Observations, tree: Int[Tensor, " t"]) -> Float[Tensor, "e 4 4"]:
    """world_from_pair of all pairs, from points chained along a tree; the world is its first pair's camera 0."""
    names, images = observations.names, observations.images
    root, e = int(images[0, tree[0]]), int(tree[0])
    points, weights = (
        torch.zeros(len(names), *observations.points.shape[2:]),
        torch.zeros(len(names), observations.points.shape[2]),
    )
    points[root], weights[root] = observations.points[0, e], observations.weights[0, e]
    placed, waiting = {root}, tree.tolist()
    while waiting:
        # A tree's pairs touch what is placed one after the other: each turn places at least one image.
        e = next(e for e in waiting if placed & set(images[:, e].tolist()))
        waiting.remove(e)
        side = 0 if int(images[0, e]) in placed else 1
        old, new = int(images[side, e]), int(images[1 - side, e])
        world_from_pair = register_robustly(
            observations.points[side, e], points[old], (observations.weights[side, e] * weights[old]).sqrt()
        )
        points[new] = transform_points(world_from_pair.float(), observations.points[1 - side, e])
        weights[new] = observations.weights[1 - side, e]
        placed.add(new)
    return register_pairs(observations, points, weights)


def register_pairs(
    observations: Observations, points: Float[Tensor, "n m 3"], weights: Float[Tensor, "n m"]
) -> Float[Tensor, "e 4 4"]:
    """Similarities that take both pointmaps of each pair to the images' points in the world."""
    seen = (weights > 0)[observations.images]
    return register_robustly(
        observations.points.transpose(0, 1).flatten(1, 2),
        points[observations.images].transpose(0, 1).flatten(1, 2),
        (observations.weights * seen).transpose(0, 1).flatten(1, 2),
    )


def register_robustly(
    source: Float[Tensor, "*b k 3"], target: Float[Tensor, "*b k 3"], weights: Float[Tensor, "*b k"]
) -> Float[Tensor, "*b 4 4"]:
    """The similarity of least weighted mean distance (not squared); the identity where points do not tell one."""
    # Far points are the least exact: at first they count less.
    reweighted = weights / (source.square().sum(dim=-1) + 1)
    for _ in range(NUM_REWEIGHTINGS):
        similarity = similarity_matrix(*register_similarity(source, target, reweighted)).double()
        told = similarity.isfinite().all(dim=-1).all(dim=-1) & (torch.det(similarity) > 1e-9)
        similarity = torch.where(told[..., None, None], similarity, torch.eye(4, dtype=torch.float64))
        residuals = (transform_points(similarity.float(), source) - target).norm(dim=-1)
        reweighted = weights / residuals.clamp(min=MIN_RESIDUAL)
    return similarity


def average_points(
    observations: Observations, world_from_pair: Float[Tensor, "e 4 4"], belief: Float[Tensor, " e"]
) -> tuple[Float[Tensor, "n m 3"], Float[Tensor, "n m"]]:
    """Each pixel's point in the world, the robust mean of what its pairs say, and the sum of their weights."""
    in_world = pair_points(observations, world_from_pair)
    images, n = observations.images.flatten(), len(observations.names)
    believed = observations.weights * belief[:, None]
    weights = believed
    for _ in range(NUM_REWEIGHTINGS):
        weight_sum = torch.zeros(n, weights.shape[-1]).index_add_(0, images, weights.flatten(0, 1))
        point_sum = torch.zeros(n, *in_world.shape[2:])
        point_sum.index_add_(0, images, (weights[..., None] * in_world).flatten(0, 1))
        points = point_sum / weight_sum.clamp(min=1e-20)[..., None]
        residuals = (points[observations.images] - in_world).norm(dim=-1)
        weights = believed / residuals.clamp(min=MIN_RESIDUAL)
    total = torch.zeros(n, weights.shape[-1]).index_add_(0, images, observations.weights.flatten(0, 1))
    return points, total


def _with_unit_scale(world_from_pair: Float[Tensor, "e 4 4"]) -> Float[Tensor, "e 4 4"]:
    scaled = world_from_pair.clone()
    scaled[:, :3] *= (-pair_scales(world_from_pair).log().mean()).exp()
    return scaled
