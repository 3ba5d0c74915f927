"""Global alignment: pairwise pointmaps of unknown scales become one scene of cameras and depths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.alignment import initialization
from dust3r_sfm.alignment.anchoring import positions_of
from dust3r_sfm.alignment.bending import drawn_to_positions
from dust3r_sfm.alignment.cameras import Cameras, cameras_of_views
from dust3r_sfm.alignment.chaining import start_pairs
from dust3r_sfm.alignment.clusters import AlignClusters, Cluster, align_in_clusters
from dust3r_sfm.alignment.dense import fused_depth
from dust3r_sfm.alignment.initialization import KnownFrame
from dust3r_sfm.alignment.known_focals import with_known_focals
from dust3r_sfm.alignment.objective import (
    CAMERA_DOF,
    FOCAL_INDEX,
    MIN_DEPTH,
    Evaluation,
    Problem,
    State,
    pair_beliefs,
    pair_scales,
    without_scale,
)
from dust3r_sfm.alignment.observations import Observations, sample_pairs, stack_samples
from dust3r_sfm.alignment.optimization import minimize_robustly, with_settled_depth
from dust3r_sfm.alignment.settling import finer_observations, settle
from dust3r_sfm.alignment.support import judge
from dust3r_sfm.errors import ReconstructionError
from dust3r_sfm.geometry.transforms import inverse, rigid_transform, transform_points
from dust3r_sfm.graph import connected_components
from dust3r_sfm.pairs import Predictions, SomePredictions
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View

MIN_SAMPLES_PER_IMAGE = 200
MAX_SAMPLES_IN_ALL = 6_000_000
"""Over both sides of all pairs; 100 bytes each."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """How the cameras, depths and pairwise similarities of a component are sought."""

    max_iters: int = 100
    """Gauss-Newton steps at most."""
    min_improvement: float = 1e-4
    """Stops after three steps in a row that lower the cost by less than this fraction."""
    max_cluster: int = 200
    """More images are aligned in clusters of so many that overlap, which are merged; not where poses are known."""
    max_samples: int = 1500
    """Pixels of an image that take part, on a regular grid; depths are computed for all in the end."""


def align(views: Sequence[View], predictions: Predictions, config: AlignConfig = AlignConfig()) -> Scene:
    """The scene of the largest connected component."""
    return next(iterate_components(views, predictions, config))


def align_components(
    views: Sequence[View], predictions: Predictions, config: AlignConfig = AlignConfig()
) -> list[Scene]:
    """A scene for every connected component of two views or more, largest first."""
    return list(iterate_components(views, predictions, config))


def iterate_components(
    views: Sequence[View],
    predictions: Predictions,
    config: AlignConfig = AlignConfig(),
    align_clusters: AlignClusters | None = None,
) -> Iterator[Scene]:
    """A scene for every connected component of two views or more, largest first, each when it is asked for.

    Pairs that contradict the rest have no say, and an image that only contradictions place is in no scene: both are
    named in `Scene.doubts`. Of many images clusters are aligned alone and merged, by `align_clusters` where given.
    Known intrinsics and poses of any of the views are held, and pointmaps get the focal lengths that are known. Several
    known places fix world and scale, one known pose fixes the world; else the world is the camera of the image with
    most pairs, and the median depth is 1, or where three positions or more are known their frame, to which the scene is
    bent by their standard deviations.
    ReconstructionError where no pair says anything.
    """
    is_any_posed = any(view.known_cam_from_world is not None for view in views)
    positions = {} if is_any_posed else positions_of(views)
    if len(views) <= config.max_cluster or is_any_posed:
        scenes = _iterate_whole(views, predictions, config)
    else:
        align_clusters = align_clusters or partial(_align_here, predictions, config)
        scenes = align_in_clusters(views, predictions, config.max_cluster, align_clusters)
    told = with_known_focals(views, predictions)  # as the scenes are aligned by
    for scene in scenes:
        yield drawn_to_positions(scene, told, positions) if positions else scene


def align_cluster(predictions: Predictions, config: AlignConfig, cluster: Cluster) -> list[Scene]:
    """The scenes of a cluster, in frames of their own; none where its pairs say nothing."""
    try:
        scenes = list(_iterate_whole(cluster.views, SomePredictions(predictions, cluster.pairs), config))
    except ReconstructionError:  # the other clusters may still stand
        return []
    return [replace(scene, views=()) for scene in scenes]


def _align_here(
    predictions: Predictions, config: AlignConfig, clusters: Sequence[Cluster]
) -> Iterator[tuple[int, list[Scene]]]:
    for index, cluster in enumerate(clusters):
        yield index, align_cluster(predictions, config, cluster)


def _iterate_whole(views: Sequence[View], predictions: Predictions, config: AlignConfig) -> Iterator[Scene]:
    """A scene for every component, each aligned as one problem."""
    # Of a great many pairs fewer pixels each say as much, and all fit in memory.
    max_samples = min(config.max_samples, max(MIN_SAMPLES_PER_IMAGE, MAX_SAMPLES_IN_ALL // (2 * len(predictions) + 1)))
    predictions = with_known_focals(views, predictions)
    samples = sample_pairs(views, predictions, max_samples)
    components = connected_components([view.name for view in views], samples)
    components = [names for names in components if len(names) > 1]
    if not components:
        raise ReconstructionError(
            f"none of {len(predictions)} pairs of {len(views)} images has usable pointmaps of both images "
            "(finite, in front of the camera): match more images or lower min_confidence"
        )
    by_name = {view.name: view for view in views}
    failures, num_aligned = [], 0
    for names in components:
        observations = stack_samples([by_name[name] for name in names], samples, max_samples)
        try:
            scenes = _align_component([by_name[name] for name in names], observations, predictions, config)
        except ReconstructionError as error:  # the other components may still stand
            failures.append(error)
        else:
            num_aligned += 1
            yield from scenes
    if not num_aligned:
        raise failures[0]


def _align_component(
    views: Sequence[View], observations: Observations, predictions: Predictions, config: AlignConfig
) -> list[Scene]:
    """The scene of a component; several where its pairs hold together by contradictions alone."""
    cameras = cameras_of_views(views)
    problem, state, frame = start_component(observations, cameras)
    problem, state, evaluation = optimize(views, predictions, problem, state, config)
    finite = all(x.isfinite().all() for x in (state.world_from_cam, state.focal, state.depth, state.world_from_pair))
    if not finite:
        raise ReconstructionError(
            f"the {len(observations.pairs)} pairs of {views[0].name} and {len(views) - 1} more images fit no scene: "
            "raise min_confidence or leave images out"
        )
    K = cameras.base_K.clone()
    K[:, :2, :2] *= state.focal.cpu()[:, None, None]
    belief = pair_beliefs(problem, evaluation) / pair_scales(state.world_from_pair)
    depth, confidence = fuse_depths(views, predictions, observations, state, belief, K)
    state = state.to("cpu")
    verdict = judge(observations, evaluation.distances, cameras.is_pose_known)
    scenes = []
    for group in verdict.groups:
        chosen = [observations.names.index(name) for name in group]
        seen = [depth[n] for n in chosen], [confidence[n] for n in chosen]
        cam_from_world, factor = _in_output_frame(cameras, state, frame, *seen)
        scenes.append(
            Scene(
                names=tuple(group),
                K=K[chosen].float(),
                cam_from_world=cam_from_world[chosen].float(),
                depth=tuple((d * factor).cpu() for d in seen[0]),
                confidence=tuple(c.cpu() for c in seen[1]),
                net_from_img=torch.stack([views[n].net_from_img for n in chosen]),
                lenses=tuple(views[n].lens for n in chosen),
                original_sizes=tuple(views[n].original_size for n in chosen),
                doubts=verdict.doubts if not scenes else {},
                views=tuple(views[n] for n in chosen),
            )
        )
    return scenes


def start_component(observations: Observations, cameras: Cameras) -> tuple[Problem, State, KnownFrame]:
    """The problem and its start, in a world of unit size whose origin is the reference camera."""
    rays = sampled_rays(observations, cameras)
    start, device = start_pairs(observations).cpu(), observations.points.device
    focal = initialization.start_focals(observations, cameras, rays, start)
    world_from_cam = initialization.start_poses(observations, cameras, rays, focal, start)
    is_known = cameras.is_pose_known
    reference = int(is_known.int().argmax()) if is_known.any() else _most_paired_image(observations)
    to_reference = inverse(world_from_cam[reference])
    world_from_cam = to_reference @ world_from_cam
    points = transform_points(to_reference.float(), start.points)

    is_free = torch.ones(len(observations.names), CAMERA_DOF, dtype=torch.bool)
    is_free[cameras.is_focal_known, FOCAL_INDEX] = False
    frame = initialization.align_to_known(world_from_cam, inverse(cameras.cam_from_world), is_known)
    is_free[is_known, :6] = False
    if not frame.is_scale_known:
        is_free[reference, :FOCAL_INDEX] = False
    known_in_world = without_scale(inverse(frame.known_from_world) @ inverse(cameras.cam_from_world))
    world_from_cam = torch.where(is_known[:, None, None], known_in_world, world_from_cam)
    depth = transform_points(inverse(world_from_cam).float(), points)[..., 2].clamp(min=MIN_DEPTH)
    limits = initialization.focal_limits(observations, cameras)
    precision = torch.where(cameras.is_focal_known, 0, cameras.focal_sigma**-2)
    tensors = (x.to(device) for x in (rays, is_free, limits))
    problem = Problem(observations, *tensors, focal_precision=precision.to(device))
    return problem, State(world_from_cam, focal, depth, to_reference @ start.world_from_pair).to(device), frame


def optimize(
    views: Sequence[View], predictions: Predictions, problem: Problem, state: State, config: AlignConfig
) -> tuple[Problem, State, Evaluation]:
    """Over a sparse grid of pixels, then settled over a finer one where there is one."""
    problem, state = with_settled_depth(problem, state)
    problem, state, evaluation = minimize_robustly(problem, state, config.max_iters, config.min_improvement)
    fine = finer_observations(views, predictions, problem.observations)
    if fine is not None:
        rays = sampled_rays(fine, cameras_of_views(views)).to(state.depth.device)
        settled = settle(replace(problem, observations=fine, rays=rays), state)
        state = replace(settled, depth=state.depth)
    return problem, state, evaluation


def sampled_rays(observations: Observations, cameras: Cameras) -> Float[Tensor, "n m 3"]:
    rays = torch.zeros(len(observations.names), observations.weights.shape[-1], 3)
    rays[..., 2] = 1
    for n, grid in enumerate(observations.grids):
        homogeneous = torch.nn.functional.pad(grid.pixels(torch.float64), (0, 1), value=1.0)
        rays[n, : len(homogeneous)] = (homogeneous @ torch.linalg.inv(cameras.base_K[n]).mT).float()
    return rays


def _most_paired_image(observations: Observations) -> int:
    """The image with most pairs; of several the first that is a camera 0."""
    images = observations.images.cpu()
    counts = torch.bincount(images.flatten(), minlength=len(observations.names)).double()
    counts[images[0]] += 0.5
    return int(counts.argmax())


def fuse_depths(
    views: Sequence[View],
    predictions: Predictions,
    observations: Observations,
    state: State,
    belief: Float[Tensor, " e"],
    K: Float[Tensor, "n 3 3"],
) -> tuple[list[Float[Tensor, "_h _w"]], list[Float[Tensor, "_h _w"]]]:
    """Depth in the aligned world's unit and confidence of every image, one image at a time to save memory.

    The depth of least summed distance, in the world's unit, from the pairs' points; `belief` is what each pair counts.
    """
    from_raw = state.world_from_pair.clone()
    from_raw[:, :3, :3] /= observations.units[:, None, None]
    # every appearance of an image in a pair, image by image: one copy to the device, not one an image
    images = observations.images.cpu()
    order = torch.argsort(images.flatten(), stable=True)
    edges, sides = order % len(from_raw), order // len(from_raw)
    rows, whose = torch.stack([edges, images.flatten()[order]]).to(from_raw.device)
    cam_from_pair, belief = inverse(state.world_from_cam)[whose] @ from_raw[rows], belief[rows]
    inv_K = torch.linalg.inv(K.double()).float().to(from_raw.device)
    depths, confidences, first = [], [], 0
    for n, view in enumerate(views):
        mine = slice(first, first := first + int((images == n).sum()))
        seen = [predictions[observations.pairs[e]] for e in edges[mine].tolist()]
        depth, confidence = fused_depth(seen, sides[mine], cam_from_pair[mine], belief[mine], inv_K[n], view.size)
        depths.append(depth)
        confidences.append(confidence if view.mask is None else confidence * view.mask.to(confidence.device))
    return depths, confidences


def _in_output_frame(
    cameras: Cameras,
    state: State,
    frame: KnownFrame,
    depth: Sequence[Float[Tensor, "_h _w"]],
    confidence: Sequence[Float[Tensor, "_h _w"]],
) -> tuple[Float[Tensor, "n 4 4"], float]:
    """cam_from_world in the world that is handed out, and the factor on depths there."""
    factor = float(pair_scales(frame.known_from_world))
    if not frame.is_scale_known:
        seen = torch.cat([d[c > 0] for d, c in zip(depth, confidence, strict=True)])
        factor = 1 / float(seen.median()) if len(seen) else 1.0
    rotation = without_scale(frame.known_from_world)[:3, :3]
    world_from_cam = rigid_transform(
        rotation @ state.world_from_cam[:, :3, :3],
        factor * state.world_from_cam[:, :3, 3] @ rotation.mT + frame.known_from_world[:3, 3],
    )
    cam_from_world = inverse(world_from_cam)
    return torch.where(cameras.is_pose_known[:, None, None], cameras.cam_from_world, cam_from_world), factor
