"""Laws of the alignment objective and of its descent."""

import math
from dataclasses import replace

import pytest
import torch
from procedural import make_scene

from dust3r_sfm.alignment.chaining import average_points, register_pairs
from dust3r_sfm.alignment.normal_equations import Step, normal_equations
from dust3r_sfm.alignment.objective import Problem, State, evaluate, image_points, refine_depth
from dust3r_sfm.alignment.observations import sample_pairs, stack_samples
from dust3r_sfm.alignment.optimization import minimize, moved, with_settled_depth
from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.transforms import inverse, rotation_from_rotvec

MAX_SAMPLES = 300


def true_problem(noise=0.0, num_views=3, max_samples=MAX_SAMPLES):
    """A problem and the state that is the truth."""
    truth = make_scene(num_views, (32, 48), noise=noise)
    observations = stack_samples(truth.views, sample_pairs(truth.views, truth.predictions, max_samples), max_samples)
    grid = observations.grids[0]
    pixels = torch.nn.functional.pad(grid.sample(pixel_grid(32, 48)), (0, 1), value=1.0)
    rays = torch.stack([pixels @ torch.linalg.inv(K).T for K in truth.K])
    free = torch.ones(num_views, 8, dtype=torch.bool)
    free[0, :7] = False
    limits = torch.tensor([[0.1, 10.0]], dtype=torch.float64).expand(num_views, 2)
    world_from_cam = inverse(truth.cam_from_world.double())
    world_from_pair = world_from_cam[observations.images[0]].clone()
    raw_scales = torch.tensor([truth.scales[pair] for pair in observations.pairs], dtype=torch.float64)
    world_from_pair[:, :3, :3] *= (observations.units / raw_scales)[:, None, None]
    depth = torch.stack([grid.sample(depth) for depth in truth.depth])
    state = State(world_from_cam, torch.ones(num_views, dtype=torch.float64), depth, world_from_pair)
    return Problem(observations, rays, free, limits), state


def random_step(problem, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    n, e = len(problem.rays), len(problem.observations.pairs)
    cameras = size * torch.randn(n, 8, generator=generator, dtype=torch.float64)
    pairs = size * torch.randn(e, 7, generator=generator, dtype=torch.float64)
    return Step(cameras * problem.is_free, pairs, size * torch.randn(problem.rays.shape[:2], generator=generator))


def test_the_truth_costs_nothing():
    problem, state = true_problem()
    assert evaluate(problem, state).cost < 1e-5


def test_the_cost_is_the_published_sum_in_each_pairs_own_unit():
    problem, state = true_problem(noise=0.05)
    observations = problem.observations
    chi = image_points(problem, state).double()
    total, weight = 0.0, 0.0
    for e in range(len(observations.pairs)):
        linear, translation = state.world_from_pair[e, :3, :3], state.world_from_pair[e, :3, 3]
        scale = torch.det(linear) ** (1 / 3)
        for side in (0, 1):
            target = observations.points[side, e].double() @ linear.T + translation
            distance = (chi[observations.images[side, e]] - target).norm(dim=-1) / scale
            total += float((observations.weights[side, e] * distance).sum())
            weight += float(observations.weights[side, e].sum())
    assert evaluate(problem, state).cost == pytest.approx(total / weight, rel=1e-5)


def test_weights_are_the_logarithms_of_confidences():
    problem, _ = true_problem()
    values = problem.observations.weights.unique()
    torch.testing.assert_close(values, torch.tensor([math.log(2), math.log(10)]))


@pytest.mark.parametrize("outlier_distance", [float("inf"), 0.05])
def test_the_gradient_is_the_derivative_of_the_cost(outlier_distance):
    problem, state = true_problem(noise=0.1)
    problem = replace(problem, outlier_distance=outlier_distance)
    evaluation = evaluate(problem, state)
    equations = normal_equations(problem, state, evaluation)
    for seed in range(5):
        step, h = random_step(problem, seed), 1e-3
        slope = sum((g * x).sum() for g, x in zip((equations.g_i, equations.g_e, equations.g_d), step, strict=True))
        ahead, behind = (evaluate(problem, moved(problem, state, Step(*(t * x for x in step)))).cost for t in (h, -h))
        assert float(slope) == pytest.approx((ahead - behind) / (2 * h), rel=0.05, abs=2e-3)


def test_a_focal_prior_costs_as_a_gaussian_and_the_gradient_has_it():
    problem, state = true_problem(noise=0.1)
    problem = replace(problem, outlier_distance=0.3, focal_precision=torch.tensor([0.0, 100.0, 2500.0]).double())
    state = replace(state, focal=torch.tensor([1.1, 0.9, 1.05], dtype=torch.float64))
    free = replace(problem, focal_precision=0.0)
    told, untold = (normal_equations(p, state, evaluate(p, state)) for p in (problem, free))
    unit = 0.1 / (4 * 6)  # of the six pairs' mean residual, each as good as four of a third of the outlier distance
    added = evaluate(problem, state).cost - evaluate(free, state).cost
    assert added == pytest.approx(unit * (100 * math.log(0.9) ** 2 + 2500 * math.log(1.05) ** 2) / 2, rel=1e-4)
    expected = unit * torch.tensor([0, 100 * math.log(0.9), 2500 * math.log(1.05)], dtype=torch.float64)
    torch.testing.assert_close((told.g_i - untold.g_i)[:, 7], expected, rtol=1e-4, atol=1e-9)


def test_the_step_solves_the_equations_in_all_unknowns():
    """Against the dense matrix of all cameras, pairs and depths."""
    problem, state = true_problem(noise=0.1, max_samples=40)
    equations = normal_equations(problem, state, evaluate(problem, state))
    n, e, m = len(problem.rays), len(problem.observations.pairs), problem.rays.shape[1]
    size = 8 * n + 7 * e + n * m
    A, g = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for i in range(n):
        at = slice(8 * i, 8 * i + 8)
        A[at, at], g[at] = equations.H_i[i], equations.g_i[i]
        depths = range(8 * n + 7 * e + i * m, 8 * n + 7 * e + (i + 1) * m)
        A[depths, depths], g[list(depths)] = equations.D[i].double(), equations.g_d[i].double()
    for k in range(e):
        at = slice(8 * n + 7 * k, 8 * n + 7 * k + 7)
        A[at, at], g[at] = equations.H_e[k], equations.g_e[k]
        for side in (0, 1):
            i = int(equations.images[side, k])
            camera, depths = slice(8 * i, 8 * i + 8), slice(8 * n + 7 * e + i * m, 8 * n + 7 * e + (i + 1) * m)
            A[camera, at] += equations.H_ie[side, k]
            A[camera, depths] += equations.C[side, k, :, :8].T
            A[at, depths] += equations.C[side, k, :, 8:].T
    diagonal_blocks = torch.block_diag(*equations.H_i, *equations.H_e, torch.diag(equations.D.flatten().double()))
    A = A + (A - diagonal_blocks).T
    damping = 1e-2
    A += torch.diag(damping * A.diagonal() + 1e-9)
    free = torch.cat([problem.is_free.flatten(), torch.ones(size - 8 * n, dtype=torch.bool)])
    expected = torch.zeros_like(g)
    expected[free] = -torch.linalg.solve(A[free][:, free], g[free])
    found = torch.cat([x.flatten().double() for x in equations.solve(damping)])

    def decrease(x):
        return float(g @ x + x @ A @ x / 2)

    assert decrease(found) == pytest.approx(decrease(expected), rel=1e-2)


def test_the_cost_does_not_depend_on_where_the_scene_lies_or_how_large_it_is():
    problem, state = true_problem(noise=0.05)
    similarity = torch.eye(4, dtype=torch.float64)
    rotation = rotation_from_rotvec(torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64))
    similarity[:3, :3], similarity[:3, 3] = 0.01 * rotation, torch.tensor([0.1, 0.2, -0.1])
    world_from_cam = similarity @ state.world_from_cam
    world_from_cam[:, :3, :3] /= 0.01
    shrunk = State(world_from_cam, state.focal, state.depth * 0.01, similarity @ state.world_from_pair)
    assert evaluate(problem, shrunk).cost == pytest.approx(evaluate(problem, state).cost, rel=1e-4)


def test_steps_lead_back_to_the_truth():
    problem, truth = true_problem()
    problem, state = with_settled_depth(problem, moved(problem, truth, random_step(problem, size=0.05)))
    state, evaluation = minimize(problem, state, max_iters=100, min_improvement=1e-5)
    assert evaluation.cost < 2e-4
    # The scale is free, about the centre of the image that is held.
    scale = (state.depth[0] / truth.depth[0]).median().double()
    to_center, true_to_center = (s.world_from_cam[:, :3, 3] - s.world_from_cam[0, :3, 3] for s in (state, truth))
    torch.testing.assert_close(to_center / scale, true_to_center, atol=5e-3, rtol=0)
    rotations = state.world_from_cam[:, :3, :3]
    torch.testing.assert_close(rotations, truth.world_from_cam[:, :3, :3], atol=1e-3, rtol=0)
    torch.testing.assert_close(state.focal, truth.focal, atol=2e-3, rtol=0)


def test_what_is_held_does_not_move():
    problem, state = true_problem(noise=0.1)
    problem.is_free[1, 7] = False
    cameras = normal_equations(problem, state, evaluate(problem, state)).solve(damping=1e-3).cameras
    assert (cameras[~problem.is_free] == 0).all()
    assert (cameras[problem.is_free] != 0).all()


def test_depth_along_the_ray_only_lowers_the_cost():
    problem, state = true_problem(noise=0.1)
    costs = []
    for _ in range(5):
        evaluation = evaluate(problem, state)
        costs.append(evaluation.cost)
        state = refine_depth(problem, state, evaluation)
    assert costs == sorted(costs, reverse=True)
    assert costs[1] < costs[0]


def test_a_pair_that_contradicts_the_rest_loses_its_say():
    problem, state = true_problem()
    wrong = state.world_from_pair.clone()
    wrong[2, :3, 3] += 5
    evaluation = evaluate(replace(problem, outlier_distance=0.02), replace(state, world_from_pair=wrong))
    assert evaluation.distances.argmax() == 2
    assert evaluation.cost < 0.02


def test_focals_stay_between_their_limits():
    problem, state = true_problem()
    step = random_step(problem)
    step.cameras[:, 7] = torch.tensor([5.0, -5.0, 0.0])
    focal = moved(problem, state, step).focal
    torch.testing.assert_close(focal, torch.tensor([10.0, 0.1, 1.0], dtype=torch.float64))


def on_no_device(value):
    """The tensors of a dataclass as shapes alone: reading one back, or mixing it with one on the CPU, raises."""
    return type(value)(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in vars(value).items()})


def test_what_a_step_computes_stays_on_the_device_and_does_not_wait_for_it():
    problem, state = true_problem(max_samples=40)
    evaluation = on_no_device(evaluate(problem, state))
    observations = on_no_device(problem.observations)
    problem, state = replace(on_no_device(problem), observations=observations), on_no_device(state)
    equations = normal_equations(problem, state, evaluation)
    step = Step(equations.g_i, equations.g_e, equations.g_d)
    trial = refine_depth(problem, moved(problem, state, step), evaluation)
    points, weights = average_points(observations, trial.world_from_pair, observations.scores)
    registered = register_pairs(observations, points, weights)
    assert all(x.is_meta for x in (trial.depth, trial.focal, trial.world_from_cam, equations.C, registered))
