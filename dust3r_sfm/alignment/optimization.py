"""Second-order descent on the alignment objective."""

from __future__ import annotations

from dataclasses import replace

from dust3r_sfm.alignment.normal_equations import Step, normal_equations
from dust3r_sfm.alignment.objective import (
    DEPTH_INDEX,
    FOCAL_INDEX,
    MIN_OUTLIER_DISTANCE,
    OUTLIER_FACTOR,
    Evaluation,
    Problem,
    State,
    evaluate,
    refine_depth,
)
from dust3r_sfm.geometry.transforms import rigid_transform, rotation_from_rotvec

MIN_DEPTH_FACTOR = 0.1
"""A step brings no depth nearer than to this fraction of it."""
NUM_DEPTH_TURNS = 3
MAX_RETUNES = 3
MAX_DAMPING = 1e6
ROUNDING = 1e-7
"""Changes of the cost that float32 does not resolve."""
NOTHING_LEFT = 0.1
"""Of the least improvement: a step that lowers the cost by less than this share of it is the last one."""


def with_settled_depth(problem: Problem, state: State) -> tuple[Problem, State]:
    """The state with the depths that fit it best, and the problem with the outlier distance that suits it."""
    for _ in range(NUM_DEPTH_TURNS):
        state = refine_depth(problem, state, evaluate(problem, state))
    return with_outlier_distance(problem, evaluate(problem, state)), state


def with_outlier_distance(problem: Problem, evaluation: Evaluation) -> Problem:
    return replace(
        problem, outlier_distance=max(OUTLIER_FACTOR * float(evaluation.distances.median()), MIN_OUTLIER_DISTANCE)
    )


def minimize_robustly(
    problem: Problem, state: State, max_iters: int, min_improvement: float
) -> tuple[Problem, State, Evaluation]:
    """`minimize`, and again with a lower outlier distance where the pairs fit far better than at the start."""
    for _ in range(MAX_RETUNES):
        state, evaluation = minimize(problem, state, max_iters, min_improvement)
        tuned = with_outlier_distance(problem, evaluation)
        if tuned.outlier_distance > problem.outlier_distance / 2:
            break
        problem = tuned
    return problem, state, evaluate(problem, state)


def minimize(problem: Problem, state: State, max_iters: int, min_improvement: float) -> tuple[State, Evaluation]:
    """The state of least cost near a start, by damped Gauss-Newton steps and depths in turn, until it settles."""
    evaluation = evaluate(problem, state)
    cost = evaluation.cost
    equations, damping, num_stalled = normal_equations(problem, state, evaluation), 1e-3, 0
    for _ in range(max_iters):
        trial = moved(problem, state, equations.solve(damping))
        trial = refine_depth(problem, trial, evaluate(problem, trial))
        trial_evaluation = evaluate(problem, trial)
        trial_cost = trial_evaluation.cost
        if not trial_cost < cost:
            damping *= 10
            if damping > MAX_DAMPING:
                break
            continue
        gain = cost - trial_cost
        num_stalled = num_stalled + 1 if gain < min_improvement * cost + ROUNDING else 0
        is_settled = gain < NOTHING_LEFT * min_improvement * cost
        state, evaluation, cost, damping = trial, trial_evaluation, trial_cost, max(damping / 5, 1e-9)
        if is_settled or num_stalled == 3:
            break
        equations = normal_equations(problem, state, evaluation)
    return state, evaluation


def moved(problem: Problem, state: State, step: Step) -> State:
    """The state after a step."""
    cameras, pairs = step.cameras, step.pairs
    cam_rotation = rotation_from_rotvec(cameras[:, :3]) @ state.world_from_cam[:, :3, :3]
    pair_linear = rotation_from_rotvec(pairs[:, :3]) @ state.world_from_pair[:, :3, :3]
    depth = state.depth * cameras[:, DEPTH_INDEX, None].exp().float() + step.depth
    return State(
        world_from_cam=rigid_transform(cam_rotation, state.world_from_cam[:, :3, 3] + cameras[:, 3:6]),
        focal=(state.focal * cameras[:, FOCAL_INDEX].exp()).clamp(*problem.focal_limits.unbind(dim=-1)),
        depth=depth.maximum(MIN_DEPTH_FACTOR * state.depth),
        world_from_pair=rigid_transform(
            pair_linear * pairs[:, 6, None, None].exp(), state.world_from_pair[:, :3, 3] + pairs[:, 3:6]
        ),
    )
