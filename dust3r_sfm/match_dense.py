"""Stage: pixels of two images that see the same point, from their pointmaps.

Every image has a fixed grid of anchors, the same in all of its pairs. An anchor's match is the
point of the other image's surface that is nearest in 3-D, to a fraction of a pixel, and it is
kept when the way back ends at the anchor again (reciprocal nearest neighbours, DUSt3R Sec. 3.3,
up to a tolerance: images that see a surface at different scales have few exact ones).

So an anchor carries one track through all images that its own is paired with, and no position
is ever rounded to the other image's grid: rounding costs more precision than the longer tracks
give back. Anchors of both images are matched; where both directions of a pair were predicted
their answers are averaged if they agree, and count for more; if not, the surer one stands.

    python -m dust3r_sfm.match_dense --pointmaps out/pointmaps.h5 --output out/matches.h5
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from tqdm import tqdm

from dust3r_sfm.formats.matches import write_matches
from dust3r_sfm.formats.pointmaps import PointmapFile
from dust3r_sfm.pairs import Matches, Pair, PairPrediction, Predictions
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

RELATIVE_CONFIDENCE = 0.1
"""A usable pixel's confidence, less the 1 where confidences start, over that of the image's best tenth."""
GAP_RATIO = 3.0
"""Matched points lie at most this many times the pair's usual gap apart, or one pixel's width."""
AGREEMENT = 4.0
"""Two directions that put a match within so many `max_error_px` of each other agree: the mean is nearer the truth."""


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    max_anchors: int = 4096
    """Pixels of an image that look for a match in each other image: every 4th of both axes at 256x192."""
    min_confidence_quantile: float = 0.2
    """The least confident pixels of each image and pair, left out as a share of all."""
    max_error_px: float = 1.0
    """How far from an anchor the way there and back may end."""
    border_px: int = 3
    """Pixels along the image's border that are left out."""


@dataclass(frozen=True)
class _Surface:
    """One image's pointmap, its usable pixels, and a tree over their points."""

    points: np.ndarray
    confidence: np.ndarray
    usable: np.ndarray
    pixels: np.ndarray
    """(row, column) of the points in the tree."""
    tree: cKDTree


def match_pair(
    prediction: PairPrediction,
    view0: View | None = None,
    view1: View | None = None,
    config: MatchConfig = MatchConfig(),
    reverse: PairPrediction | None = None,
) -> Matches:
    """Matches of one pair, in network pixels; `reverse` is the prediction of the reversed pair, if there is one.

    A keypoint at an anchor is exactly the same in every pair of its image. Scores are the
    geometric mean of both confidences, summed over the directions that agree. Views are asked
    for their masks only. Pairs that share nothing have no matches.
    """
    masks = [None if view is None or view.mask is None else view.mask.cpu().numpy() for view in (view0, view1)]
    surfaces = [[_surface(prediction, k, masks[k], config) for k in (0, 1)]]
    if reverse is not None:
        surfaces.append([_surface(reverse, 1 - k, masks[k], config) for k in (0, 1)])
    halves = [_match_anchors([(s[k], s[1 - k]) for s in surfaces], config) for k in (0, 1)]
    (anchors0, found1, scores0), (anchors1, found0, scores1) = halves
    return Matches(
        torch.from_numpy(np.concatenate([anchors0, found0])).float(),
        torch.from_numpy(np.concatenate([found1, anchors1])).float(),
        torch.from_numpy(np.concatenate([scores0, scores1])).float(),
    )


def match_dense(
    views: Sequence[View], predictions: Predictions, config: MatchConfig = MatchConfig()
) -> dict[Pair, Matches]:
    """Matches of every undirected pair, from one prediction or both; the key is the direction that comes first."""
    view_of = {view.name: view for view in views}
    pairs = list(dict.fromkeys(predictions))
    position = {pair: i for i, pair in enumerate(pairs)}
    undirected = [pair for pair in pairs if position.get(pair.reversed(), len(pairs)) > position[pair]]
    matches = {}
    for pair in tqdm(undirected, desc="Matching", unit="pair", disable=None):
        reverse = predictions[pair.reversed()] if pair.reversed() in position else None
        view0, view1 = view_of.get(pair.name0), view_of.get(pair.name1)
        matches[pair] = match_pair(predictions[pair], view0, view1, config, reverse)
    return matches


def anchor_pixels(height: int, width: int, config: MatchConfig) -> np.ndarray:
    """(row, column) of an image's anchors, a regular grid of at most `max_anchors`."""
    spacing = max(1, math.ceil(math.sqrt(height * width / config.max_anchors)))
    rows, columns = (np.arange(spacing // 2, n, spacing) for n in (height, width))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


def _surface(prediction: PairPrediction, side: int, mask: np.ndarray | None, config: MatchConfig) -> _Surface:
    points = prediction.pointmap0_in_cam0 if side == 0 else prediction.pointmap1_in_cam0
    confidence = prediction.confidence0 if side == 0 else prediction.confidence1
    points, confidence = points.detach().cpu().float().numpy(), confidence.detach().cpu().float().numpy()
    least, best = np.quantile(confidence[::2, ::2], [config.min_confidence_quantile, 0.9])
    usable = (confidence >= max(least, 1 + RELATIVE_CONFIDENCE * (best - 1))) & np.isfinite(points).all(axis=-1)
    if mask is not None:
        usable &= mask
    border = config.border_px
    inside = np.zeros_like(usable)
    inside[border : usable.shape[0] - border, border : usable.shape[1] - border] = True
    usable &= inside
    pixels = np.argwhere(usable)
    # Sliding midpoint splits build several times faster than medians, and surfaces query as fast.
    tree = cKDTree(points[usable], balanced_tree=False, compact_nodes=False)
    return _Surface(points, confidence, usable, pixels, tree)


def _match_anchors(
    surfaces: list[tuple[_Surface, _Surface]], config: MatchConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anchors of the first image, their pixels in the second (m 2), and scores; a pair of surfaces a direction."""
    anchors = anchor_pixels(*surfaces[0][0].usable.shape, config)
    keypoints, scores = zip(*(_follow(anchors, *pair, config) for pair in surfaces), strict=True)
    keypoints, scores = np.stack(keypoints), np.stack(scores)
    best = scores.argmax(axis=0)[None]
    match = np.take_along_axis(keypoints, best[..., None], axis=0)[0]
    agreeing = scores * (np.linalg.norm(keypoints - match, axis=-1) <= AGREEMENT * config.max_error_px)
    found = scores.max(axis=0) > 0
    agreeing, keypoints = agreeing[:, found], keypoints[:, found]
    score = agreeing.sum(axis=0)
    match = (agreeing[..., None] * keypoints).sum(axis=0) / score[:, None]
    return anchors[found][:, ::-1] + 0.5, match, score


def _follow(
    anchors: np.ndarray, source: _Surface, target: _Surface, config: MatchConfig
) -> tuple[np.ndarray, np.ndarray]:
    """For each anchor of the source image its pixel (x, y) in the target image and a score; 0 where there is none."""
    keypoints, scores = np.zeros((len(anchors), 2)), np.zeros(len(anchors))
    start = np.flatnonzero(source.usable[anchors[:, 0], anchors[:, 1]])
    if len(start) == 0 or len(target.pixels) == 0:
        return keypoints, scores
    rows, columns = anchors[start].T
    points = source.points[rows, columns]
    there, nearest = _nearest_on_surface(points, target)
    back, _ = _nearest_on_surface(nearest, source)
    error = np.linalg.norm(back - (anchors[start][:, ::-1] + 0.5), axis=-1)
    pixel_width = np.linalg.norm(_pixel_steps(source.points, rows, columns), axis=-1).mean(axis=0)
    gap = np.linalg.norm(nearest - points, axis=-1) / np.maximum(pixel_width, np.finfo(np.float32).tiny)
    kept = error <= config.max_error_px
    if kept.any():
        kept &= gap <= max(1.0, GAP_RATIO * np.median(gap[kept]))
    there, start = there[kept], start[kept]
    confidence0 = source.confidence[rows[kept], columns[kept]]
    confidence1 = target.confidence[there[:, 1].astype(int), there[:, 0].astype(int)]
    keypoints[start], scores[start] = there, np.sqrt(confidence0 * confidence1)
    return keypoints, scores


def _nearest_on_surface(points: np.ndarray, surface: _Surface) -> tuple[np.ndarray, np.ndarray]:
    """Pixel (x, y) and point of a surface nearest to each of `points`: the nearest pixel's, moved within its plane."""
    _, index = surface.tree.query(points, workers=-1)
    rows, columns = surface.pixels[index].T
    base = surface.points[rows, columns]
    step_x, step_y = _pixel_steps(surface.points, rows, columns)
    a, b, c = (np.einsum("nk,nk->n", u, v) for u, v in ((step_x, step_x), (step_x, step_y), (step_y, step_y)))
    gap = points - base
    p, q = np.einsum("nk,nk->n", step_x, gap), np.einsum("nk,nk->n", step_y, gap)
    determinant = a * c - b * b
    regular = determinant > 1e-6 * a * c
    determinant = np.where(regular, determinant, 1)
    offset = np.stack([c * p - b * q, a * q - b * p], axis=-1) / determinant[:, None] * regular[:, None]
    offset = np.clip(offset, -0.5, 0.5)
    nearest = base + offset[:, :1] * step_x + offset[:, 1:] * step_y
    return np.stack([columns, rows], axis=-1) + 0.5 + offset, nearest


def _pixel_steps(points: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """How the surface moves for one pixel in x and in y (2 n 3); the smaller of both sides, so not over an edge."""
    height, width = points.shape[:2]
    base = points[rows, columns]
    steps = []
    for ahead, behind in (
        (points[rows, np.minimum(columns + 1, width - 1)], points[rows, np.maximum(columns - 1, 0)]),
        (points[np.minimum(rows + 1, height - 1), columns], points[np.maximum(rows - 1, 0), columns]),
    ):
        forward, backward = ahead - base, base - behind
        lengths = [np.einsum("nk,nk->n", s, s) for s in (forward, backward)]
        lengths = [np.where(np.isfinite(s) & (s > 0), s, np.inf) for s in lengths]
        step = np.where((lengths[0] <= lengths[1])[:, None], forward, backward)
        steps.append(np.where(np.isfinite(step), step, 0))
    return np.stack(steps)


def main(pointmaps: Path, output: Path, config: MatchConfig = MatchConfig()) -> None:
    """Match the pixels of all pairs of a pointmap file.

    Args:
        pointmaps: What infer_pairs wrote, such as pointmaps.h5.
        output: The file to write, such as matches.h5.
        config: Which matches to keep.
    """
    with PointmapFile(pointmaps) as predictions:
        matches = match_dense([], predictions, config)
    write_matches(output, matches)
    total = sum(len(m.scores) for m in matches.values())
    logger.info("%d matches of %d pairs are in %s.", total, len(matches), output)


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["match-dense", *sys.argv[1:]]))
