"""Pairs aligned without cameras: pointmaps chained along the best tree of pairs, then averaged over all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dust3r_sfm.alignment.consistency import best_tree_poses
from dust3r_sfm.alignment.objective import MIN_OUTLIER_DISTANCE, pair_points, pair_scales
from dust3r_sfm.alignment.observations import Observations
from dust3r_sfm.geometry.registration import register_similarity, similarity_matrix
from dust3r_sfm.geometry.transforms import determinant, inverse, transform_points

NUM_REWEIGHTINGS = 5
NUM_TURNS = 5
"""Of averaging the pairs' points and registering all pairs to them."""
MIN_RESIDUAL = 1e-3
MIN_SPREAD = 1e-5
"""Relative to their distance from the origin, below which points are one point."""


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

    def cpu(self) -> Start:
        return Start(*(x.cpu() for x in (self.world_from_pair, self.points, self.weights, self.distances)))


def start_pairs(observations: Observations) -> Start:
    """Images chained along a tree of pairs that the others confirm, then points averaged over all pairs in turns."""
    points, weights = image_frames(observations)
    relations = image_relations(observations, points, weights)
    images, scores = observations.images.cpu(), observations.scores.cpu()
    world_from_image = best_tree_poses(images, relations.cpu(), scores, len(points)).to(points.device)
    points = transform_points(world_from_image.float(), points)
    return _settled(observations, register_pairs(observations, points, weights), points)


def image_frames(observations: Observations) -> tuple[Float[Tensor, "n m 3"], Float[Tensor, "n m"]]:
    """Each image's sampled points in a frame of its own, and their weights.

    The robust mean of what the pairs say whose frame is the image's camera, all of the same unit; of an image that is
    never camera 0 the points of its most confident pair.
    """
    identity = torch.eye(4, dtype=torch.float64, device=observations.points.device).expand(
        len(observations.pairs), 4, 4
    )
    own = observations.weights.clone()
    own[1] = 0
    belief = torch.ones_like(observations.scores)
    points, weights = average_points(replace(observations, weights=own), identity, belief)
    for n in set(range(len(points))) - set(observations.images[0].tolist()):
        seen = (observations.images[1] == n).nonzero()[:, 0]
        e = seen[observations.scores[seen].argmax()]
        points[n], weights[n] = observations.points[1, e], observations.weights[1, e]
    return points, weights


def image_relations(
    observations: Observations, points: Float[Tensor, "n m 3"], weights: Float[Tensor, "n m"]
) -> Float[Tensor, "e 4 4"]:
    """image1_from_image0 of the images' own frames, as each pair says."""
    pair_from_image = [
        register_robustly(points[i], observations.points[side], (observations.weights[side] * weights[i]).sqrt())
        for side, i in enumerate(observations.images)
    ]
    return inverse(pair_from_image[1]) @ pair_from_image[0]


def _settled(
    observations: Observations, world_from_pair: Float[Tensor, "e 4 4"], points: Float[Tensor, "n m 3"]
) -> Start:
    """The start after some turns of averaging the pairs' points (first `points`) and registering all pairs to them."""
    distances = pair_distances(observations, world_from_pair, points)
    for turn in range(NUM_TURNS + 1):
        belief = 1 / (1 + distances / (3 * distances.median()).clamp(min=MIN_OUTLIER_DISTANCE)).square()
        world_from_pair = _with_unit_scale(world_from_pair)
        points, weights = average_points(observations, world_from_pair, belief)
        distances = pair_distances(observations, world_from_pair, points)
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
    identity = torch.eye(4, dtype=torch.float64, device=source.device)
    is_spread = _is_spread(source, weights)
    for _ in range(NUM_REWEIGHTINGS):
        similarity = similarity_matrix(*register_similarity(source, target, reweighted)).double()
        told = is_spread & similarity.isfinite().all(dim=-1).all(dim=-1) & (determinant(similarity[..., :3, :3]) > 1e-9)
        similarity = torch.where(told[..., None, None], similarity, identity)
        residuals = (transform_points(similarity.float(), source) - target).norm(dim=-1)
        reweighted = weights / residuals.clamp(min=MIN_RESIDUAL)
    return similarity


def _is_spread(points: Float[Tensor, "*b k 3"], weights: Float[Tensor, "*b k"]) -> Bool[Tensor, "*b"]:
    """Whether points differ by more than their rounding."""
    share = (weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20))[..., None]
    variance = (share * (points - (share * points).sum(dim=-2, keepdim=True)).square()).sum(dim=(-2, -1))
    return variance > MIN_SPREAD**2 * (share * points.square()).sum(dim=(-2, -1))


def average_points(
    observations: Observations, world_from_pair: Float[Tensor, "e 4 4"], belief: Float[Tensor, " e"]
) -> tuple[Float[Tensor, "n m 3"], Float[Tensor, "n m"]]:
    """Each pixel's point in the world, the robust mean of what its pairs say, and the sum of their weights."""
    in_world = pair_points(observations, world_from_pair)
    images, n = observations.images.flatten(), len(observations.names)
    believed = observations.weights * belief[:, None]
    weights = believed
    for _ in range(NUM_REWEIGHTINGS):
        weight_sum = weights.new_zeros(n, weights.shape[-1]).index_add_(0, images, weights.flatten(0, 1))
        point_sum = in_world.new_zeros(n, *in_world.shape[2:])
        point_sum.index_add_(0, images, (weights[..., None] * in_world).flatten(0, 1))
        points = point_sum / weight_sum.clamp(min=1e-20)[..., None]
        residuals = (points[observations.images] - in_world).norm(dim=-1)
        weights = believed / residuals.clamp(min=MIN_RESIDUAL)
    total = weights.new_zeros(n, weights.shape[-1]).index_add_(0, images, observations.weights.flatten(0, 1))
    return points, total


def _with_unit_scale(world_from_pair: Float[Tensor, "e 4 4"]) -> Float[Tensor, "e 4 4"]:
    scaled = world_from_pair.clone()
    scaled[:, :3] *= (-pair_scales(world_from_pair).log().mean()).exp()
    return scaled
