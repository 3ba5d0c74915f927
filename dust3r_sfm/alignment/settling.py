"""The last digits of an alignment, over many more pixels than it was sought with.

What few pixels leave to lower is first of all what single pairs and cameras have to gain: the depth of each pixel, the
similarity of each pair and the pose of each camera are closed forms of the other two, which lower the objective of
`alignment.objective` each. Two Gauss-Newton steps then do what they have to gain together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.alignment.objective import FOCAL_INDEX, Evaluation, Problem, State, evaluate, focused_rays, refine_depth
from dust3r_sfm.alignment.observations import Observations, SparseGrid, sample_pairs, stack_samples
from dust3r_sfm.alignment.optimization import minimize
from dust3r_sfm.geometry.registration import register_similarity, similarity_matrix
from dust3r_sfm.geometry.transforms import inverse
from dust3r_sfm.pairs import Predictions, SomePredictions
from dust3r_sfm.views import View

MAX_SAMPLES_PER_IMAGE = {"cuda": 16_000}
MAX_SAMPLES_PER_IMAGE_ELSEWHERE = 6_000
MAX_SAMPLES_IN_ALL = {"cuda": 8_000_000}
MAX_SAMPLES_IN_ALL_ELSEWHERE = 6_000_000
"""Over both sides of all pairs; 140 bytes each."""
MIN_GAIN = 2
"""How many times more pixels make it worthwhile."""
NUM_DEPTH_TURNS = 4
NUM_STEPS = 2
TINY = 1e-20


def finer_observations(
    views: Sequence[View], predictions: Predictions, observations: Observations
) -> Observations | None:
    """The same pairs on a finer grid, in the same units; None where the predictions have none that is much finer."""
    device = observations.points.device.type
    in_all = MAX_SAMPLES_IN_ALL.get(device, MAX_SAMPLES_IN_ALL_ELSEWHERE)
    most = MAX_SAMPLES_PER_IMAGE.get(device, MAX_SAMPLES_PER_IMAGE_ELSEWHERE)
    most = max(1, min(most, in_all // (2 * len(observations.pairs))))
    grids = [SparseGrid.of(grid.size, most, grid.base) for grid in observations.grids]
    if _num_samples(grids) < MIN_GAIN * _num_samples(observations.grids):
        return None
    samples = sample_pairs(views, SomePredictions(predictions, observations.pairs), most)
    if tuple(samples) != observations.pairs:
        return None
    fine = stack_samples(views, samples, most)
    fine.points.mul_((fine.units / observations.units)[:, None, None])
    return replace(fine, units=observations.units)


def _num_samples(grids: Sequence[SparseGrid]) -> int:
    return sum(rows * columns for rows, columns in (grid.shape for grid in grids))


def settle(problem: Problem, state: State) -> State:
    """A state of lower cost near one that was sought over fewer pixels; depths are found anew."""
    state = replace(state, depth=torch.ones_like(problem.rays[..., 0]))
    for _ in range(NUM_DEPTH_TURNS):
        state = refine_depth(problem, state, evaluate(problem, state))
    for refine in (refine_pairs, refine_poses, refine_depth):
        state = refine(problem, state, evaluate(problem, state))
    return minimize(problem, state, max_iters=NUM_STEPS, min_improvement=0.0)[0]


def refine_pairs(problem: Problem, state: State, evaluation: Evaluation) -> State:
    """The similarity of each pair that takes the images' points to its pointmaps best, by the evaluation's weights.

    In that direction, as residuals are in the pair's unit: the other way round small scales were cheaper.
    """
    images = problem.observations.images
    pair_from_world = similarity_matrix(
        *register_similarity(
            _of_pairs(evaluation.points_in_world[images]),
            _of_pairs(problem.observations.points),
            _of_pairs(evaluation.irls_weights),
        )
    )
    world_from_pair = inverse(pair_from_world.double())
    is_told = world_from_pair.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    return replace(state, world_from_pair=torch.where(is_told, world_from_pair, state.world_from_pair))


def refine_poses(problem: Problem, state: State, evaluation: Evaluation) -> State:
    """The pose of each camera that may move at which its points are nearest to where the pairs see them."""
    images = problem.observations.images.flatten()
    weights = evaluation.irls_weights.flatten(0, 1)
    weight_sum = torch.zeros_like(state.depth).index_add_(0, images, weights)
    seen = weights[..., None] * evaluation.pair_points_in_world.flatten(0, 1)
    mean = torch.zeros_like(problem.rays).index_add_(0, images, seen) / weight_sum.clamp(min=TINY)[..., None]
    in_cam = focused_rays(problem, state) * state.depth[..., None]
    world_from_cam = similarity_matrix(*register_similarity(in_cam, mean, weight_sum, with_scale=False)).double()
    may_move = problem.is_free[:, :FOCAL_INDEX].all(dim=-1) & world_from_cam.isfinite().flatten(1).all(dim=-1)
    return replace(state, world_from_cam=torch.where(may_move[:, None, None], world_from_cam, state.world_from_cam))


def _of_pairs(values: Float[Tensor, "2 e m *rest"]) -> Float[Tensor, "e k *rest"]:
    """Both sides one after the other."""
    return values.transpose(0, 1).flatten(1, 2)
