"""Benchmark: global alignment of synthetic predictions, against descent on the published objective from the same start.

Cameras on an arc look into a room of six walls and a pillar; every directed pair has a scale of its own, noise of 1 cm
and confidences of 1 to 11. Printed are the times of the start and of the optimisation, the peak of memory, and the
final value of the published objective (DUSt3R, eq. 5: sums over pairs and sides of log(confidence) times the distance
between an image's pixel and a pair's, over their number; the geometric mean of the pairs' scales is 0.5) for the
cameras, with the depths and similarities that suit them best, and that of Adam from the same start. On 16 images of
512x384 the authors' code takes 11.7 s and 10.9 GB of one H200.

What bounds it there: the predictions of 240 pairs in half precision are 0.75 GB, 0.2 ms to read once, which happens
three times, for the sparse samples, for those that the alignment is settled over, and for the depths of all pixels.
Between them some steps work on 1,500 pixels an image, in cache, so that starting kernels is what costs: about 60 a step
and 30 an iteration of conjugate gradients, a few microseconds each; the host waits for the device twice a step and
every eighth iteration. NOTES.md beside the aligner has figures.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.align_scene import alignment_device
from dust3r_sfm.alignment.align import AlignConfig, fuse_depths, optimize, start_component
from dust3r_sfm.alignment.cameras import cameras_of_views
from dust3r_sfm.alignment.objective import State, pair_beliefs, pair_scales
from dust3r_sfm.alignment.observations import Observations, sample_pairs, stack_samples
from dust3r_sfm.benchmarks.profiling import profile_table
from dust3r_sfm.benchmarks.published import Published, intrinsics
from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.metrics import all_pairs_errors_deg
from dust3r_sfm.geometry.transforms import inverse, transform_points
from dust3r_sfm.pair_network import InferConfig
from dust3r_sfm.pairs import Pair, PairPrediction
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

ROOM = (4.0, 1.6, 4.0)
"""Half sizes in metres."""
PILLAR = (0.3, 0.8, 0.2, 0.7)
"""Radius and the x, y, z of the centre of a sphere in it."""
NOISE_M = 0.01


class AlignmentFigures(NamedTuple):
    device: str
    start_s: float
    optimize_s: float
    depth_s: float
    peak_gb: float
    """Of device memory, the predictions' included, or of this process where there is no device."""
    objective: float
    """The published one, in the end."""
    reference_objective: float | None
    reference_s: float | None
    rotation_deg: float
    """The largest error of a relative rotation."""


def main(
    num_images: int | None = None,
    height: int | None = None,
    width: int | None = None,
    reference_iters: int = 300,
    profile: bool = False,
    config: AlignConfig = AlignConfig(),  # noqa: B008  frozen
) -> AlignmentFigures:
    """Align synthetic predictions of all directed pairs and print times, memory and the final objective.

    Args:
        num_images: 16 on a CUDA device, 10 elsewhere, where not given.
        height: Of a prediction: 384 on a CUDA device, 224 elsewhere.
        width: 512 and 224.
        reference_iters: Steps of Adam on the published objective from the same start; 0 leaves it out.
        profile: Print the 15 operations that take the most time, once more on top.
        config: How the alignment is sought.
    """
    device = alignment_device(InferConfig())
    usual = (16, 384, 512) if device.type == "cuda" else (10, 224, 224)
    n, h, w = (given or default for given, default in zip((num_images, height, width), usual, strict=True))
    views, predictions, truth = synthetic_predictions(n, (h, w), device)
    aligned, peak = _measured(views, predictions, config, device)
    if profile:
        print(profile_table(lambda: align_timed(views, predictions, config)))
    objective = Published(views, predictions, aligned.observations)
    start, value = time.perf_counter(), None
    if reference_iters > 0:
        value = objective.descend(aligned.start, reference_iters)
    figures = AlignmentFigures(
        str(device),
        *aligned.seconds,
        peak,
        objective.value(aligned.state),
        value,
        None if value is None else time.perf_counter() - start,
        float(all_pairs_errors_deg(inverse(aligned.state.world_from_cam).cpu(), truth)[0].max()),
    )
    _report(figures, n, (h, w), reference_iters)
    return figures


def _measured(
    views: Sequence[View], predictions: dict[Pair, PairPrediction], config: AlignConfig, device: torch.device
) -> tuple[Aligned, float]:
    """The alignment, and the most memory that it took, in GB."""
    if device.type != "cuda":
        return align_timed(views, predictions, config), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-9
    align_timed(views, predictions, config)  # loads the kernels; the figures are of the second time
    torch.cuda.reset_peak_memory_stats()
    return align_timed(views, predictions, config), torch.cuda.max_memory_allocated() / 1e9


class Aligned(NamedTuple):
    observations: Observations
    start: State
    state: State
    seconds: tuple[float, float, float]
    """Of the start, with the sampling; of the optimisation; of the depths of all pixels."""


def align_timed(views: Sequence[View], predictions: dict[Pair, PairPrediction], config: AlignConfig) -> Aligned:
    times = [_now()]
    observations = stack_samples(views, sample_pairs(views, predictions, config.max_samples), config.max_samples)
    start_problem, start, _ = start_component(observations, cameras_of_views(views))
    times.append(_now())
    problem, state, evaluation = optimize(views, predictions, start_problem, start, config)
    times.append(_now())
    belief = pair_beliefs(problem, evaluation) / pair_scales(state.world_from_pair)
    fuse_depths(views, predictions, observations, state, belief, intrinsics(views, state))
    times.append(_now())
    seconds = tuple(after - before for before, after in zip(times[:-1], times[1:], strict=True))
    return Aligned(observations, start, state, seconds)


def synthetic_predictions(
    n: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float16, seed: int = 0
) -> tuple[list[View], dict[Pair, PairPrediction], Float[Tensor, "n 4 4"]]:
    """Views without content, what a network that errs by 1 cm says of all pairs, and the true cam_from_world."""
    generator = torch.Generator(device).manual_seed(seed)
    cam_from_world = _cameras(n).to(device)
    points = [_cast(pose, size) for pose in cam_from_world]
    scales = (torch.rand(n * (n - 1), generator=generator, device=device) * 2 - 1).exp()
    blank, identity = torch.zeros(*size, 3, dtype=torch.uint8), torch.eye(3, dtype=torch.float64)
    views = [View(name=f"{i:04d}.jpg", image=blank, original_size=size[::-1], net_from_img=identity) for i in range(n)]

    def seen(i: int, j: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        in_cam = transform_points(cam_from_world[i], points[j].flatten(0, 1)).view(*size, 3).float()
        noise = NOISE_M * torch.randn(*size, 3, generator=generator, device=device)
        confidence = 1 + 10 * torch.rand(size, generator=generator, device=device)
        return (scale * (in_cam + noise)).to(dtype), confidence.to(dtype)

    predictions = {
        Pair(views[i].name, views[j].name): PairPrediction(*seen(i, i, scale), *seen(i, j, scale))
        for (i, j), scale in zip(permutations(range(n), 2), scales, strict=True)
    }
    return views, predictions, cam_from_world.cpu()


def _cameras(n: int) -> Float[Tensor, "n 4 4"]:
    """On an arc of 120 degrees and 3 m radius, at varying heights, that look at the room's middle."""
    angles = torch.linspace(-1.05, 1.05, n, dtype=torch.float64)
    centers = torch.stack([3 * angles.sin(), 0.5 * (3 * angles).sin(), -3 * angles.cos()], dim=-1)
    forward = torch.nn.functional.normalize(-centers, dim=-1)
    down = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(n, 3)
    right = torch.nn.functional.normalize(torch.linalg.cross(down, forward), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=1)
    poses = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    poses[:, :3, :3], poses[:, :3, 3] = rotation, -(rotation @ centers[..., None])[..., 0]
    return poses


def _cast(cam_from_world: Float[Tensor, "4 4"], size: tuple[int, int]) -> Float[Tensor, "h w 3"]:
    """Points in the world that a camera of focal 0.9 sees at its pixels' centres."""
    device = cam_from_world.device
    grid = pixel_grid(*size, device=device, dtype=torch.float64) - torch.tensor(size[::-1], device=device) / 2
    rays = torch.cat([grid / (0.9 * max(size)), torch.ones(*size, 1, device=device)], dim=-1) @ cam_from_world[:3, :3]
    center = -cam_from_world[:3, :3].T @ cam_from_world[:3, 3]
    walls = torch.tensor(ROOM, device=device, dtype=torch.float64) * rays.sign()
    depth = ((walls - center) / rays).amin(dim=-1)
    radius, offset = PILLAR[0], center - torch.tensor(PILLAR[1:], device=device, dtype=torch.float64)
    a, b = rays.square().sum(dim=-1), rays @ offset
    root = b.square() - a * (offset.square().sum() - radius**2)
    hit = torch.where(root > 0, (-b - root.clamp(min=0).sqrt()) / a, torch.inf)
    return center + torch.minimum(depth, torch.where(hit > 0, hit, torch.inf))[..., None] * rays


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _report(f: AlignmentFigures, n: int, size: tuple[int, int], iters: int) -> None:
    logger.info(
        "%d images of %dx%d, %d directed pairs, %s: start %.2f s, optimisation %.2f s, all depths %.2f s; "
        "%.2f GB at most; rotations within %.3f degrees.",
        *(n, size[1], size[0], n * (n - 1), f.device, f.start_s, f.optimize_s, f.depth_s, f.peak_gb, f.rotation_deg),
    )
    if f.reference_objective is None:
        logger.info("Published objective: %.6f.", f.objective)
        return
    logger.info(
        "Published objective: %.6f; after %d steps of Adam from the same start, which take %.1f s: %.6f.",
        *(f.objective, iters, f.reference_s, f.reference_objective),
    )
