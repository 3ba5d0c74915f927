"""The last turns of an alignment: laws of closed forms."""

from dataclasses import replace

import pytest
import torch

from dust3r_sfm.alignment.align import AlignConfig, sampled_rays, start_component
from dust3r_sfm.alignment.cameras import cameras_of_views
from dust3r_sfm.alignment.objective import evaluate, refine_depth
from dust3r_sfm.alignment.observations import sample_pairs, stack_samples
from dust3r_sfm.alignment.optimization import with_settled_depth
from dust3r_sfm.alignment.settling import finer_observations, refine_pairs, refine_poses, settle
from dust3r_sfm.benchmarks import alignment
from dust3r_sfm.benchmarks.alignment import synthetic_predictions
from dust3r_sfm.geometry.transforms import inverse


@pytest.fixture(scope="module")
def started():
    """Predictions, and a problem over few of their pixels with its start."""
    views, predictions, _ = synthetic_predictions(4, (24, 32), torch.device("cpu"))
    observations = stack_samples(views, sample_pairs(views, predictions, 60), 60)
    problem, state, _ = start_component(observations, cameras_of_views(views))
    return views, predictions, *with_settled_depth(problem, state)


def finer(started):
    views, predictions, problem, state = started
    fine = finer_observations(views, predictions, problem.observations)
    return replace(problem, observations=fine, rays=sampled_rays(fine, cameras_of_views(views))), state


@pytest.mark.parametrize("refine", [refine_pairs, refine_poses, refine_depth])
def test_each_closed_form_lowers_the_cost_until_it_settles(started, refine):
    _, _, problem, state = started
    costs = [evaluate(problem, state).cost]
    for _ in range(6):
        state = refine(problem, state, evaluate(problem, state))
        costs.append(evaluate(problem, state).cost)
    assert all(after <= before * (1 + 1e-5) for before, after in zip(costs[:-1], costs[1:], strict=True))
    assert costs[-2] - costs[-1] <= 0.2 * (costs[0] - costs[-1])


def test_a_finer_grid_says_the_same_in_the_same_units(started):
    problem, state = finer(started)
    coarse = started[2].observations
    assert problem.observations.weights.shape[-1] > 2 * coarse.weights.shape[-1]
    torch.testing.assert_close(problem.observations.units, coarse.units)
    distances = (o.points.norm(dim=-1)[o.weights > 0].median() for o in (problem.observations, coarse))
    assert float(next(distances)) == pytest.approx(float(next(distances)), rel=0.1)


def test_settling_moves_the_reference_camera_by_nothing_and_the_others_by_little(started):
    problem, state = finer(started)
    settled = settle(problem, state)
    held = ~problem.is_free[:, :6].any(dim=-1)
    assert held.sum() == 1
    assert torch.equal(settled.world_from_cam[held], state.world_from_cam[held])
    off = (inverse(state.world_from_cam) @ settled.world_from_cam - torch.eye(4)).abs().amax()
    assert 0 < float(off) < 0.02


def test_few_pixels_and_settling_end_where_all_pixels_do():
    views, predictions, _ = synthetic_predictions(4, (24, 32), torch.device("cpu"))
    aligned = [alignment.align_timed(views, predictions, AlignConfig(max_samples=m)) for m in (60, 1000)]
    of_few, of_all = (alignment.Published(views, predictions, a.observations).value(a.state) for a in aligned)
    assert of_all <= of_few < of_all * (1 + 4e-3)


def test_the_published_objective_ends_as_low_as_by_descent_on_it():
    figures = alignment.main(num_images=3, height=16, width=16, reference_iters=60)
    assert figures.objective < figures.reference_objective * (1 + 1e-4)
