"""What is kept of predictions where not all of it is: a grid of pixels, the matches, and depth of a few pairs an image.

Everything is computed where the predictions lie; one copy of fixed size goes to the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dust3r_sfm.match_dense import AnchorMatches, MatchConfig, match_batch, matches_of
from dust3r_sfm.pairs import Matches, Pair, PairPrediction, Predictions, ReducedPrediction
from dust3r_sfm.views import View

GRID_SAMPLES = 1500
"""Pixels of each image that are kept at most: as many as the alignment looks at."""
PAIRS_PER_DEPTH = 5
MAX_DEPTHS = 4
"""One in five of an image's pairs keeps its whole depth, four at most: details need no more."""


@dataclass(frozen=True)
class Reduction:
    """How the predictions of a set of pairs are reduced."""

    match: MatchConfig
    depth_pairs: frozenset[Pair]
    """Those that keep image 0's depth at every pixel."""


def reduction_of(pairs: Sequence[Pair], names: Sequence[str], match: MatchConfig) -> Reduction:
    """Depth is kept of each image's pairs with those next to it in `names`: photos are mostly taken in that order."""
    place = {name: i for i, name in enumerate(names)}
    partners: dict[str, list[str]] = {}
    for pair in pairs:
        partners.setdefault(pair.name0, []).append(pair.name1)
    chosen = []
    for name, others in partners.items():
        others.sort(key=lambda other, at=place[name]: (abs(place[other] - at), other))
        chosen += [Pair(name, other) for other in others[: _num_depths(len(others))]]
    return Reduction(match, frozenset(chosen))


def _num_depths(num_pairs: int) -> int:
    return min(MAX_DEPTHS, max(1, num_pairs // PAIRS_PER_DEPTH))


def grid_stride(size: tuple[int, int]) -> int:
    return min(math.ceil(math.sqrt(size[0] * size[1] / GRID_SAMPLES)), *size)


def reduced(found: Predictions, views: Mapping[str, View], reduction: Reduction) -> dict[Pair, ReducedPrediction]:
    """Reduced predictions on the CPU; matches stand with the direction of a pair that comes first."""
    place = {pair: i for i, pair in enumerate(found)}
    firsts = [pair for pair in found if place.get(pair.reversed(), len(place)) > place[pair]]
    waiting = _start_matching(firsts, found, views, reduction.match)
    grids = {pair: _start_grid(found[pair], pair in reduction.depth_pairs) for pair in found}
    if any(prediction.confidence0.is_cuda for prediction in found.values()):
        torch.cuda.synchronize()  # once a shard: all copies below are there
    return {
        pair: _finished(found[pair], grids[pair], matches_of(*waiting[pair]) if pair in waiting else None)
        for pair in found
    }


def _start_matching(
    pairs: Sequence[Pair], found: Predictions, views: Mapping[str, View], config: MatchConfig
) -> dict[Pair, tuple[tuple[AnchorMatches, AnchorMatches], int]]:
    """Of each pair the matches of those of equal sizes, and which of them are its own."""
    groups: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        shapes = found[pair].confidence0.shape, found[pair].confidence1.shape
        groups.setdefault((shapes, pair.reversed() in found), []).append(pair)
    started = {}
    for (_, has_reverse), group in groups.items():
        reverse = _stacked([found[pair.reversed()] for pair in group]) if has_reverse else None
        masks = [torch.stack([_mask(views[pair[side]]) for pair in group]) for side in (0, 1)]
        sides = match_batch(_stacked([found[pair] for pair in group]), reverse, masks, config)
        side0, side1 = (AnchorMatches(to_host(s.anchors), to_host(s.found), to_host(s.scores)) for s in sides)
        started |= {pair: ((side0, side1), i) for i, pair in enumerate(group)}
    return started


def _mask(view: View) -> Tensor:
    return torch.ones(view.size, dtype=torch.bool) if view.mask is None else view.mask


def _stacked(predictions: Sequence[PairPrediction]) -> PairPrediction:
    names = [field.name for field in fields(PairPrediction)]
    return PairPrediction(*(torch.stack([getattr(p, name) for p in predictions]) for name in names))


def _start_grid(prediction: PairPrediction, keeps_depth: bool) -> list[Tensor]:
    parts = [_gridded(prediction.pointmap0_in_cam0), _gridded(prediction.confidence0)]
    parts += [_gridded(prediction.pointmap1_in_cam0), _gridded(prediction.confidence1)]
    if keeps_depth:
        parts += [prediction.pointmap0_in_cam0[..., 2].contiguous(), prediction.confidence0]
    return [to_host(part.float()) for part in parts]


def _gridded(values: Tensor) -> Tensor:
    stride = grid_stride((values.shape[0], values.shape[1]))
    return values[stride // 2 :: stride, stride // 2 :: stride].contiguous()


def _finished(prediction: PairPrediction, parts: list[Tensor], matches: Matches | None) -> ReducedPrediction:
    (h0, w0), (h1, w1) = prediction.confidence0.shape, prediction.confidence1.shape
    sizes = (h0, w0), (h1, w1)
    strides = grid_stride(sizes[0]), grid_stride(sizes[1])
    points0, confidence0, points1, confidence1, *whole = parts
    depth0, full_confidence0 = whole or (None, None)
    return ReducedPrediction(
        points0, confidence0, points1, confidence1, sizes, strides, matches, depth0, full_confidence0
    )


def to_host(values: Tensor) -> Tensor:
    """A copy in memory that a GPU writes to while it goes on computing."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return host.copy_(values, non_blocking=True)


def together(pairs: Iterable[Pair], size: int) -> list[list[Pair]]:
    """Shards of about `size` pairs that hold both directions of a pair, or the only one."""
    shards: list[list[Pair]] = [[]]
    previous = None
    for pair in pairs:
        if len(shards[-1]) >= size and (previous is None or pair != previous.reversed()):
            shards.append([])
        shards[-1].append(pair)
        previous = pair
    return [shard for shard in shards if shard]
