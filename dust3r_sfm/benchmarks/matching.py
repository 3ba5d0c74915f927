"""Benchmark: matching two pointmaps; how long it takes, and how many of an exact search's matches are found."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dust3r_sfm.anchor_matches import MatchConfig, anchor_pixels, batched, match_batch
from dust3r_sfm.geometry.surfaces import Surface, exact_pixels, nearest_pixels
from dust3r_sfm.infer_pairs import infer_pairs
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.pair_network import InferConfig, pick_device
from dust3r_sfm.pairs import Pair, PairPrediction
from dust3r_sfm.views import load_views

logger = logging.getLogger(__name__)

WAVES = 6


def main(
    image_dir: Path | None = None,
    height: int = 384,
    width: int = 512,
    batch: int = 16,
    config: InferConfig = InferConfig(),  # noqa: B008  frozen
) -> None:
    """Measure the matching of a pair's anchors on this machine, and how often it misses what is nearest.

    Args:
        image_dir: Photos whose pairs, as the shipped network sees them at this width, are measured too.
        height: Of the pointmaps, in pixels.
        width: Of the pointmaps, in pixels.
        batch: Pairs that are matched at once.
        config: The device, and how the network runs.
    """
    device = pick_device(config)
    for name, prediction in (("procedural", procedural_pair(height, width)), *_network_pairs(image_dir, width, config)):
        _measure(name, prediction, batch if device.type == "cuda" else 1, device)


def procedural_pair(height: int, width: int, noise: float = 0.002) -> PairPrediction:
    """A wavy ground seen by two cameras a tenth of its distance apart, each point off by some of its distance."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(WAVES, 2, generator=generator) * torch.logspace(0, 1, WAVES)[:, None]
    maps = []
    for shift in (0.0, 0.3):
        y, x = torch.meshgrid(torch.linspace(-0.4, 0.4, height), torch.linspace(-0.55, 0.55, width), indexing="ij")
        z = torch.full_like(x, 3.0)
        for _ in range(20):  # where the ray meets the surface, by fixed-point iteration
            place = torch.stack([x * z + shift, y * z], dim=-1)
            z = 3 + 0.02 * ((place @ directions.T).sin() / torch.logspace(0, 1, WAVES)).sum(dim=-1) * 5
        points = torch.stack([x * z + shift, y * z, z], dim=-1)
        points += noise * points.norm(dim=-1, keepdim=True) * torch.randn(points.shape, generator=generator)
        maps.append(points)
    confidence = torch.full((height, width), 5.0)
    return PairPrediction(maps[0], confidence, maps[1], confidence)


def _network_pairs(image_dir: Path | None, width: int, config: InferConfig) -> Iterator[tuple[str, PairPrediction]]:
    if image_dir is None:
        return
    model = Dust3r.from_pretrained()
    views = load_views(image_dir, width, square_ok=True)[:4]
    pairs = [Pair(a.name, b.name) for a, b in zip(views, views[1:], strict=False)]
    for pair, prediction in infer_pairs(model, views, pairs, config=config).items():
        yield f"network {' '.join(pair)}", prediction


def _measure(name: str, prediction: PairPrediction, batch: int, device: torch.device) -> None:
    one = batched(prediction)
    many = PairPrediction(
        *(
            values.to(device).expand(batch, *values.shape[1:]).contiguous()
            for values in (one.pointmap0_in_cam0, one.confidence0, one.pointmap1_in_cam0, one.confidence1)
        )
    )
    swapped = PairPrediction(many.pointmap1_in_cam0, many.confidence1, many.pointmap0_in_cam0, many.confidence0)
    for what, reverse in (("a directed pair", None), ("both directions of a pair", swapped)):
        times = [_seconds(device, many, reverse) for _ in range(5)]
        logger.info("%s: %.2f ms for %s on %s.", name, 1e3 * min(times) / batch, what, device)
    sides = match_batch(many, None)
    found = [int((side.scores[0] > 0).sum()) for side in sides]
    logger.info("%s: %d matches.", name, sum(found))
    shares = [
        _share(one.pointmap0_in_cam0, one.pointmap1_in_cam0, sides[0].scores[0].cpu() > 0, device),
        _share(one.pointmap1_in_cam0, one.pointmap0_in_cam0, sides[1].scores[0].cpu() > 0, device),
    ]
    logger.info("%s: of the matched anchors' nearest points the search finds %.2f %%.", name, 50 * sum(shares))


def _seconds(device: torch.device, prediction: PairPrediction, reverse: PairPrediction | None) -> float:
    start = time.perf_counter()
    match_batch(prediction, reverse)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _share(source: torch.Tensor, target: torch.Tensor, matched: torch.Tensor, device: torch.device) -> float:
    """Share of matched anchors for which the device's search finds a point as near as the nearest."""
    rows, columns = anchor_pixels(*source.shape[1:3], MatchConfig()).unbind(dim=1)
    queries = source[:, rows, columns][:, matched]
    asked = torch.ones(queries.shape[:2], dtype=torch.bool)
    surface = Surface(target, target.isfinite().all(dim=-1))
    there = Surface(target.to(device), surface.usable.to(device))
    found = nearest_pixels(queries.to(device), asked.to(device), there).cpu(), exact_pixels(queries, asked, surface)
    near, exact = ((target.flatten(1, 2)[0, pixels[0]] - queries[0]).double().norm(dim=-1) for pixels in found)
    return float((near <= exact * (1 + 1e-5)).float().mean())
