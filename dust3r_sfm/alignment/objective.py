"""The alignment objective (DUSt3R, eq. 5), its normal equations, and its closed-form part, the depths.

    sum_e sum_sides sum_px  w |chi - S_e X_e| / s_e,   w = log(confidence)

chi is an image's pixel at its depth in the world, S_e the similarity of scale s_e that takes pair e's pointmaps X_e
there. Residuals are in the pair's own unit, in which the network errs: so the cost does not depend on the scene's
scale and cannot be lowered by shrinking it, which DUSt3R rules out by a constraint on the s_e. Each pair's mean
residual f_e counts as f_e / (1 + f_e / outlier_distance), so that pairs that contradict the rest lose their say.

Minimised by iteratively reweighted least squares: Gauss-Newton steps in all unknowns, in turn with the depth of each
pixel along its ray in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dust3r_sfm.alignment.observations import Observations
from dust3r_sfm.geometry.transforms import rigid_transform, transform_points

MIN_RESIDUAL = 1e-3
"""Residuals below count as squares: the precision at which an absolute value is not followed any more."""
MIN_DEPTH = 1e-3
OUTLIER_FACTOR = 3.0
"""Pairs count half where their mean residual is so many times the median pair's."""
STATEMENTS = 4.0
"""Independent statements that a pair is worth against what is known beforehand: pixels err together."""
MIN_OUTLIER_DISTANCE = 0.02
"""Pairs are never suspected for a mean residual of this fraction of their points' distance."""
CAMERA_DOF = 8
"""Of an image: rotation about its centre, translation, log of the factor on its depths, log focal."""
DEPTH_INDEX, FOCAL_INDEX = 6, 7
PAIR_DOF = 7
"""Of a pair: rotation about its origin, translation, log scale."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What stays as it is."""

    observations: Observations
    rays: Float[Tensor, "n m 3"]
    """K^-1 (u, v, 1) of the sampled pixels for focal factor 1."""
    is_free: Bool[Tensor, "n 8"]
    """Which of CAMERA_DOF may move."""
    focal_limits: Float[Tensor, "n 2"]
    """Least and largest focal factor."""
    outlier_distance: float = float("inf")
    """Mean residual at which a pair counts half, in pairs' units."""
    focal_precision: Float[Tensor, " n"] | float = 0.0
    """1 / variance of the logarithm of focal factors about 0; zero where nothing is known beforehand."""


@dataclass(frozen=True, eq=False)
class State:
    """What is sought."""

    world_from_cam: Float[Tensor, "n 4 4"]
    focal: Float[Tensor, " n"]
    """Factor on the focal lengths of `Problem.rays`."""
    depth: Float[Tensor, "n m"]
    world_from_pair: Float[Tensor, "e 4 4"]

    def to(self, device: torch.device | str) -> State:
        return State(*(x.to(device) for x in (self.world_from_cam, self.focal, self.depth, self.world_from_pair)))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Residuals at a state, and the least-squares weights that stand for the robust cost there."""

    cost_there: Float[Tensor, ""]
    """Where it was computed: what is not looked at is not waited for."""
    points_in_world: Float[Tensor, "n m 3"]
    pair_points_in_world: Float[Tensor, "2 e m 3"]
    irls_weights: Float[Tensor, "2 e m"]
    distances: Float[Tensor, " e"]
    """Mean residual of each pair."""

    @property
    def cost(self) -> float:
        return float(self.cost_there)


def focused_rays(problem: Problem, state: State) -> Float[Tensor, "n m 3"]:
    """Rays in the cameras' frames with z = 1 at the state's focals."""
    factor = problem.rays.new_ones(len(state.focal), 1, 3)
    factor[..., :2] = (1 / state.focal.float())[:, None, None]
    return problem.rays * factor


def image_points(problem: Problem, state: State) -> Float[Tensor, "n m 3"]:
    """Every sampled pixel at its depth, in the world."""
    return transform_points(state.world_from_cam.float(), focused_rays(problem, state) * state.depth[..., None])


def pair_points(observations: Observations, world_from_pair: Float[Tensor, "e 4 4"]) -> Float[Tensor, "2 e m 3"]:
    """The pairs' pointmaps in the world."""
    return transform_points(world_from_pair.float()[None], observations.points)


def evaluate(problem: Problem, state: State) -> Evaluation:
    """The cost, the weighted mean of what residuals count as, and its least-squares weights."""
    observations = problem.observations
    points = image_points(problem, state)
    in_world = pair_points(observations, state.world_from_pair)
    scales = pair_scales(state.world_from_pair).float()[:, None]
    residuals = (points[observations.images] - in_world).norm(dim=-1) / scales
    total = observations.weights.sum(dim=(0, 2))
    distances = (observations.weights * residuals).sum(dim=(0, 2)) / total
    belief = 1 / (1 + distances / problem.outlier_distance)
    cost = (total * distances * belief).sum().double() / total.sum()
    cost = cost + 0.5 * (focal_weights(problem) * state.focal.log().square()).sum()
    # The derivative of f / (1 + f / c) is belief squared.
    weights = observations.weights * (belief.square() / total.sum())[:, None] / residuals.clamp(min=MIN_RESIDUAL)
    weights = weights / scales.square()  # for residuals in the world's unit
    return Evaluation(cost, points, in_world, weights, distances)


def focal_weights(problem: Problem) -> Float[Tensor, " n"] | float:
    """What a squared logarithm of a focal factor costs, in units in which the pairs' mean residual is the cost.

    As negative log-likelihoods: of the prior a Gaussian's, of a pair that of `STATEMENTS` residuals of usual size.
    """
    num_pairs, usual = problem.observations.images.shape[1], problem.outlier_distance / OUTLIER_FACTOR
    return problem.focal_precision * (usual / (STATEMENTS * num_pairs) if math.isfinite(usual) else 0.0)


def refine_depth(problem: Problem, state: State, evaluation: Evaluation) -> State:
    """Depth of each pixel along its ray: the weighted mean of where the pairs see it."""
    observations = problem.observations
    rays = focused_rays(problem, state)
    in_world = rays @ state.world_from_cam[:, :3, :3].mT.float()
    centers = state.world_from_cam[:, None, :3, 3].float()
    from_center = evaluation.pair_points_in_world - centers[observations.images]
    along = (from_center * in_world[observations.images]).sum(dim=-1)
    depth_sum, weight_sum = torch.zeros_like(state.depth), torch.zeros_like(state.depth)
    depth_sum.index_add_(0, observations.images.flatten(), (evaluation.irls_weights * along).flatten(0, 1))
    weight_sum.index_add_(0, observations.images.flatten(), evaluation.irls_weights.flatten(0, 1))
    depth = depth_sum / (weight_sum * rays.square().sum(dim=-1))
    return replace(state, depth=torch.where(weight_sum > 0, depth.clamp(min=MIN_DEPTH), state.depth))


def pair_scales(similarities: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b"]:
    return (similarities[..., :3, :3].square().sum(dim=(-2, -1)) / 3).sqrt()


def without_scale(similarities: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 4 4"]:
    """The rotation and the translation of similarities."""
    return rigid_transform(
        similarities[..., :3, :3] / pair_scales(similarities)[..., None, None], similarities[..., :3, 3]
    )


def pair_beliefs(problem: Problem, evaluation: Evaluation) -> Float[Tensor, " e"]:
    """How much each pair still counts, 0 to 1: the derivative of what its mean residual counts as."""
    return 1 / (1 + evaluation.distances / problem.outlier_distance).square()
