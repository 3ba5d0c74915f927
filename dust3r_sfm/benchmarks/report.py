"""Benchmark: the pages of a run over many photos; how long they take and how large they are."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from dust3r_sfm.filter_pairs import PairDecision
from dust3r_sfm.formats.scene_page import write_scene_page
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.report import write_reports
from dust3r_sfm.scene import Scene, Tracks
from dust3r_sfm.summary import Summary
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

HEIGHT, WIDTH = 384, 512
POINTS_PER_IMAGE, TRACK_LENGTH, MATCHES_PER_PAIR = 300, 3, 500
NUM_PICTURES = 16
"""Different photos and depth maps; the images take turns."""
LOST_SHARE = 0.02


class PageFigures(NamedTuple):
    """Of report.html with pair_graph.html, and of scene.html."""

    count: int
    num_pairs: int
    report_cpu_s: float
    report_mb: float
    scene_cpu_s: float
    scene_mb: float


def main(count: int = 100, num_matched: int = 20, scene: bool = True) -> PageFigures:
    """Write the pages of an invented run: smooth photos, random depth, points and matches; every third pair dropped.

    Args:
        count: Photos of the run, 2 % of them in no model.
        num_matched: Pairs a photo.
        scene: Write scene.html too.
    """
    summary = _invented_run(count, num_matched)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        write_reports(Path(folder), summary)
        report_s, report_mb = time.process_time() - start, _megabytes(Path(folder))
        start = time.process_time()
        if scene:
            write_scene_page(Path(folder) / "scene.html", summary.scenes, summary.views)
        scene_s, scene_mb = time.process_time() - start, _megabytes(Path(folder)) - report_mb
    figures = PageFigures(count, len(summary.decisions), report_s, report_mb, scene_s, scene_mb)
    logger.info(
        "%d photos, %d directed pairs: report and graph %.1f s of one core, %.1f MB; scene.html %.1f s, %.1f MB.",
        *figures,
    )
    return figures


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def _invented_run(count: int, num_matched: int) -> Summary:
    generator = torch.Generator().manual_seed(0)
    names = [f"photos/{i:05d}.jpg" for i in range(count)]
    half = torch.diag(torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64))
    pictures = [_smooth(3, generator).mul(255).to(torch.uint8) for _ in range(NUM_PICTURES)]
    views = [
        View(name=name, image=pictures[i % NUM_PICTURES], original_size=(2 * WIDTH, 2 * HEIGHT), net_from_img=half)
        for i, name in enumerate(names)
    ]
    pairs = [Pair(names[i], names[(i + k) % count]) for i in range(count) for k in range(1, num_matched // 2 + 1)]
    decisions = [
        PairDecision(p, i % 3 > 0, f"confidence {1 + i % 97 / 50:.3f} against 1.050", 1 + i % 97 / 50)
        for i, pair in enumerate(pairs)
        for p in (pair, pair.reversed())
    ]
    ends = torch.rand(2, MATCHES_PER_PAIR, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    some = Matches(ends[0], ends[1], torch.ones(MATCHES_PER_PAIR))
    matches = {decision.pair: some for decision in decisions[::2] if decision.kept}
    found = names[: max(1, round(count * (1 - LOST_SHARE)))]
    scene = _invented_scene(tuple(found), generator)
    return Summary(names=names, views=views, decisions=decisions, matches=matches, scenes=[scene])


def _invented_scene(names: tuple[str, ...], generator: torch.Generator) -> Scene:
    n = len(names)
    depth = [1 + _smooth(1, generator)[..., 0] for _ in range(NUM_PICTURES)]
    confidence = [1 + 9 * _smooth(1, generator)[..., 0] for _ in range(NUM_PICTURES)]
    poses = torch.eye(4).repeat(n, 1, 1)
    poses[:, 0, 3] = torch.arange(n)
    num_points = POINTS_PER_IMAGE * n
    num_observations = num_points * TRACK_LENGTH
    tracks = Tracks(
        points_in_world=torch.rand(num_points, 3, generator=generator),
        colors=torch.zeros(num_points, 3, dtype=torch.uint8),
        errors=torch.rand(num_points, generator=generator),
        point_indices=torch.arange(num_points).repeat_interleave(TRACK_LENGTH),
        image_indices=torch.randint(n, (num_observations,), generator=generator),
        keypoints=torch.rand(num_observations, 2, generator=generator) * torch.tensor([2.0 * WIDTH, 2.0 * HEIGHT]),
    )
    return Scene(
        names=names,
        K=torch.tensor([[500.0, 0, WIDTH / 2], [0, 500, HEIGHT / 2], [0, 0, 1]]).expand(n, 3, 3),
        cam_from_world=poses,
        depth=tuple(depth[i % NUM_PICTURES] for i in range(n)),
        confidence=tuple(confidence[i % NUM_PICTURES] for i in range(n)),
        net_from_img=torch.diag(torch.tensor([0.5, 0.5, 1.0])).expand(n, 3, 3),
        original_sizes=((2 * WIDTH, 2 * HEIGHT),) * n,
        tracks=tracks,
    )


def _smooth(channels: int, generator: torch.Generator) -> torch.Tensor:
    """Values from 0 to 1 (h w c) with detail of all sizes, as photos have."""
    values = torch.zeros(1, channels, HEIGHT, WIDTH)
    for cells in (4, 16, 64, 256):
        coarse = torch.rand(1, channels, cells, cells, generator=generator) / cells**0.5
        values += torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")
    values = values - values.amin()
    return (values / values.amax())[0].permute(1, 2, 0)
