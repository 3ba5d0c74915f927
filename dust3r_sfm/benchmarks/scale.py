"""Benchmark: alignment of many images, error and time against their number.

Cameras over an uneven ground look down from the places of a grid, each paired with its 20 nearest in both directions:
20,000 directed pairs of 1,000 images. Of each pair there is what alignment needs of a prediction, its points at a grid
of anchors in the frame of one camera, at a scale of its own, off by 1 % of their distance, and confidences of 1 to 11.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.align_scene import align_views, alignment_device
from dust3r_sfm.alignment.align import AlignConfig, align
from dust3r_sfm.engine import EngineConfig
from dust3r_sfm.errors import InputError
from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.registration import register_similarity
from dust3r_sfm.geometry.transforms import (
    camera_center,
    inverse,
    rigid_transform,
    rotation_angle_deg,
    rotation_from_rotvec,
    transform_points,
)
from dust3r_sfm.pair_network import InferConfig
from dust3r_sfm.pairs import Pair, PairPrediction
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

ANCHORS = (8, 10)
SPACING_M, HEIGHT_M = 0.4, 1.5
NOISE = 0.01


class ScaleFigures(NamedTuple):
    num_images: int
    num_aligned: int
    num_pairs: int
    seconds: float
    peak_gb: float
    """Of the device, or of this process where there is none."""
    rotation_deg: float
    """Median error of cameras' rotations after the best similarity."""
    center_m: float
    """Median error of their centres after it, where neighbours are 0.4 m apart."""
    worst_center_m: float


def main(
    sizes: tuple[int, ...] = (100, 300, 1000),
    num_neighbors: int = 20,
    plot: Path | None = None,
    config: AlignConfig = AlignConfig(),  # noqa: B008  frozen
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> list[ScaleFigures]:
    """Align more and more images and print a line for each number.

    Args:
        sizes: Numbers of images.
        num_neighbors: Partners of an image.
        plot: A picture (.png, .svg) of error and time against the number of images; needs matplotlib.
        config: How the alignment is sought; max_cluster says how many images are aligned at once.
        engine: Where clusters are aligned; memory is that of the process that merges them.
    """
    if plot is not None:
        _matplotlib()
    figures = []
    for n in sizes:
        figures.append(measure(n, num_neighbors, config, engine))
        logger.info(
            "%d of %d images, %d directed pairs: %.1f s, %.2f GB; median errors %.3f degrees, %.4f m; worst %.4f m.",
            *(figures[-1].num_aligned, n, *figures[-1][2:]),
        )
    if plot is not None:
        _draw(figures, plot)
    return figures


def measure(n: int, num_neighbors: int, config: AlignConfig, engine: EngineConfig) -> ScaleFigures:
    device = alignment_device(InferConfig())
    survey = Survey(n, num_neighbors, device)
    if device.type == "cuda":
        align(survey.views[:2], survey, config)  # loads the kernels
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    scene = align_views(survey.views, survey, config, engine)[0]
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else memory
    order = [int(name.split(".")[0]) for name in scene.names]
    truth = survey.cam_from_world[order].cpu()
    centers, expected = camera_center(scene.cam_from_world.double()), camera_center(truth)
    scale, rotation, shift = register_similarity(centers, expected)
    off = (scale * centers @ rotation.mT + shift - expected).norm(dim=-1)
    turned = rotation_angle_deg(scene.cam_from_world.double()[:, :3, :3] @ rotation.mT, truth[:, :3, :3])
    errors = float(turned.median()), float(off.median()), float(off.max())
    return ScaleFigures(n, len(order), len(survey), seconds, peak / 1e9, *errors)


class Survey(Mapping[Pair, PairPrediction]):
    """The reduced predictions of all pairs, in the device's memory."""

    def __init__(self, n: int, num_neighbors: int, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        columns = int(n**0.5)
        places = torch.stack([torch.arange(n) % columns, torch.arange(n) // columns], dim=-1).double() * SPACING_M
        places = places + 0.1 * SPACING_M * torch.randn(n, 2, generator=generator, dtype=torch.float64)
        self.cam_from_world = _looking_down(places, generator).to(device)
        points = self._seen(generator).to(device)
        blank, identity = torch.zeros(*ANCHORS, 3, dtype=torch.uint8), torch.eye(3, dtype=torch.float64)
        self.views = [
            View(name=f"{i:06d}.jpg", image=blank, original_size=ANCHORS[::-1], net_from_img=identity) for i in range(n)
        ]
        edges = _edges(places, num_neighbors)
        self._rows = {Pair(*(self.views[k].name for k in edge)): row for row, edge in enumerate(edges)}
        generator = torch.Generator(device).manual_seed(seed)
        parts = [self._told(torch.tensor(some).T, points, generator) for some in _blocks(edges)]
        self._pointmaps, self._confidences = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    def _seen(self, generator: torch.Generator) -> Float[Tensor, "n h w 3"]:
        """Points in the world: depths that wave by a third, another wave for each image."""
        n, (h, w) = len(self.cam_from_world), ANCHORS
        grid = (pixel_grid(h, w, dtype=torch.float64) - torch.tensor([w / 2, h / 2])) / (0.9 * w)
        rays = torch.cat([grid, torch.ones(h, w, 1)], dim=-1).double()
        phase = 6.3 * torch.rand(n, 2, 1, 1, generator=generator, dtype=torch.float64)
        waves = (6 * grid[..., 0] + phase[:, 0]).sin() * (5 * grid[..., 1] + phase[:, 1]).sin()
        in_cam = (HEIGHT_M * (1 + 0.3 * waves))[..., None] * rays
        return transform_points(inverse(self.cam_from_world.cpu()), in_cam.flatten(1, 2)).view(n, h, w, 3)

    def _told(
        self, images: Int[Tensor, "2 k"], points: Float[Tensor, "n h w 3"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "2 k h w 3"], Float[Tensor, "2 k h w"]]:
        """Pointmaps and confidences of both sides of some pairs."""
        images = images.to(points.device)
        in_cam = transform_points(self.cam_from_world[images[0]], points[images].flatten(2, 3)).float()
        draw = {"generator": generator, "device": points.device}
        noisy = in_cam + NOISE * in_cam.norm(dim=-1, keepdim=True) * torch.randn(in_cam.shape, **draw)
        scales = (torch.rand(in_cam.shape[1], 1, 1, **draw) * 2 - 1).exp()
        confidences = 1 + 10 * torch.rand(in_cam.shape[:-1], **draw)
        return (scales * noisy).unflatten(2, ANCHORS), confidences.unflatten(2, ANCHORS)

    def __getitem__(self, pair: Pair) -> PairPrediction:
        row = self._rows[pair]
        sides = ((self._pointmaps[side, row], self._confidences[side, row]) for side in (0, 1))
        return PairPrediction(*next(sides), *next(sides))

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _blocks(edges: list[tuple[int, int]], size: int = 10_000) -> Iterator[list[tuple[int, int]]]:
    for first in range(0, len(edges), size):
        yield edges[first : first + size]


def _looking_down(places: Float[Tensor, "n 2"], generator: torch.Generator) -> Float[Tensor, "n 4 4"]:
    """cam_from_world of cameras above the ground z = 0, each tilted by some degrees and turned about the vertical."""
    n = len(places)
    turns = torch.randn(n, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 0.1, 0.3])
    down = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    rotation = rotation_from_rotvec(turns) @ down
    heights = HEIGHT_M + 0.1 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    centers = torch.cat([places, heights], dim=-1)
    return rigid_transform(rotation, -(rotation @ centers[..., None])[..., 0])


def _edges(places: Float[Tensor, "n 2"], num_neighbors: int) -> list[tuple[int, int]]:
    """Each image with its nearest ones, both directions."""
    nearest: list[Int[Tensor, "b k"]] = []
    for block in places.split(1000):
        count = min(num_neighbors + 1, len(places))
        nearest.append(torch.cdist(block, places).topk(count, largest=False).indices[:, 1:])
    edges = {(i, j) for i, row in enumerate(torch.cat(nearest).tolist()) for j in row}
    return sorted(edges | {(j, i) for i, j in edges})


def _matplotlib():  # noqa: ANN202  of a package that need not be there
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("a plot needs matplotlib: pip install matplotlib") from error
    return Figure


def _draw(figures: list[ScaleFigures], path: Path) -> None:
    picture = _matplotlib()(figsize=(8, 3.5), layout="constrained")
    counts = [f.num_images for f in figures]
    left, right = picture.subplots(1, 2)
    left.loglog(counts, [f.seconds for f in figures], "o-", label="time (s)")
    left.loglog(counts, [f.peak_gb for f in figures], "s--", label="memory (GB)")
    right.loglog(counts, [f.center_m for f in figures], "o-", label="centre, median (m)")
    right.loglog(counts, [f.worst_center_m for f in figures], "^:", label="centre, worst (m)")
    right.loglog(counts, [f.rotation_deg for f in figures], "s--", label="rotation, median (degrees)")
    for axes in (left, right):
        axes.set_xlabel("images")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path)
    logger.info("Drawn: %s", path)
