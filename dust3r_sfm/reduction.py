"""What is kept of predictions where not all of it is: a grid of pixels, the matches, and depth of a few pairs an image.

Everything is computed where the predictions lie; copies of fixed size go to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dust3r_sfm.anchor_matches import AnchorMatches, MatchConfig, match_batch, matches_of
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
    device = next(iter(found.values())).confidence0.device
    return start_reducing(found, views, reduction, HostCopies(device))()


def start_reducing(
    found: Predictions, views: Mapping[str, View], reduction: Reduction, copies: HostCopies
) -> Callable[[], dict[Pair, ReducedPrediction]]:
    """What gives the reduced predictions once a device has them; until it is called, nothing waits for the device."""
    place = {pair: i for i, pair in enumerate(found)}
    firsts = [pair for pair in found if place.get(pair.reversed(), len(place)) > place[pair]]
    matching = _start_matching(firsts, found, views, reduction.match, copies)
    grids = _start_grids(found, reduction, copies)

    def finish() -> dict[Pair, ReducedPrediction]:
        matches, parts = {}, {}
        for group, copying in matching:
            anchors0, found0, scores0, anchors1, found1, scores1 = copying.finish()
            sides = AnchorMatches(anchors0, found0, scores0), AnchorMatches(anchors1, found1, scores1)
            matches |= {pair: matches_of(sides, i) for i, pair in enumerate(group)}
        for group, copying in grids:
            for pair, *values in zip(group, *copying.finish(), strict=True):
                parts.setdefault(pair, []).extend(values)
        return {pair: _finished(found[pair], parts[pair], matches.get(pair)) for pair in found}

    return finish


def _start_matching(
    pairs: Sequence[Pair], found: Predictions, views: Mapping[str, View], config: MatchConfig, copies: HostCopies
) -> list[tuple[list[Pair], Copying]]:
    """Groups of pairs of equal sizes, and what the anchors of both sides find."""
    groups: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((_sizes_of(found[pair]), pair.reversed() in found), []).append(pair)
    started = []
    for (_, has_reverse), group in groups.items():
        reverse = _stacked([found[pair.reversed()] for pair in group]) if has_reverse else None
        masks = [_masks([views[pair[side]] for pair in group]) for side in (0, 1)]
        sides = match_batch(_stacked([found[pair] for pair in group]), reverse, masks, config)
        started.append((group, copies.start([value for s in sides for value in (s.anchors, s.found, s.scores)])))
    return started


def _sizes_of(prediction: PairPrediction) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(prediction.confidence0.shape), tuple(prediction.confidence1.shape)


def _masks(views: Sequence[View]) -> Tensor | None:
    if all(view.mask is None for view in views):
        return None
    return torch.stack([torch.ones(v.size, dtype=torch.bool) if v.mask is None else v.mask for v in views])


def _stacked(predictions: Sequence[PairPrediction]) -> PairPrediction:
    names = [field.name for field in fields(PairPrediction)]
    return PairPrediction(*(torch.stack([getattr(p, name) for p in predictions]) for name in names))


def _start_grids(found: Predictions, reduction: Reduction, copies: HostCopies) -> list[tuple[list[Pair], Copying]]:
    """Groups of pairs and their values at a grid of pixels; then those that keep their depth, and its confidence."""
    groups: dict[tuple, list[Pair]] = {}
    for pair, prediction in found.items():
        groups.setdefault(_sizes_of(prediction), []).append(pair)
    started = []
    for group in groups.values():
        whole = _stacked([found[pair] for pair in group])
        parts = [_gridded(getattr(whole, field.name)) for field in fields(PairPrediction)]
        started.append((group, copies.start(parts)))
        deep = [pair for pair in group if pair in reduction.depth_pairs]
        if deep:
            whole = _stacked([found[pair] for pair in deep])
            started.append((deep, copies.start([whole.pointmap0_in_cam0[..., 2].contiguous(), whole.confidence0])))
    return started


def _gridded(values: Tensor) -> Tensor:
    stride = grid_stride((values.shape[1], values.shape[2]))
    return values[:, stride // 2 :: stride, stride // 2 :: stride].contiguous()


def _finished(prediction: PairPrediction, parts: list[Tensor], matches: Matches | None) -> ReducedPrediction:
    (h0, w0), (h1, w1) = prediction.confidence0.shape, prediction.confidence1.shape
    sizes = (h0, w0), (h1, w1)
    strides = grid_stride(sizes[0]), grid_stride(sizes[1])
    points0, confidence0, points1, confidence1, *whole = parts
    depth0, full_confidence0 = whole or (None, None)
    return ReducedPrediction(
        points0, confidence0, points1, confidence1, sizes, strides, matches, depth0, full_confidence0
    )


class HostCopies:
    """Copies of a device's values in float32, beside what it goes on computing."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, values: Sequence[Tensor]) -> Copying:
        values = [value.float() for value in values]
        if self._stream is None:
            return Copying(values, [torch.empty(value.shape).copy_(value) for value in values], None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            hosts = [torch.empty(v.shape, pin_memory=True).copy_(v, non_blocking=True) for v in values]
            return Copying(values, hosts, self._stream.record_event())


@dataclass(frozen=True, eq=False)
class Copying:
    """Values on their way to the host."""

    sources: list[Tensor]
    """Kept until they are copied: their memory is taken by what is computed next."""
    hosts: list[Tensor]
    done: torch.cuda.Event | None

    def finish(self) -> list[Tensor]:
        if self.done is not None:
            self.done.synchronize()
        return self.hosts


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


def evenly_together(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """The same with shards of equal sizes, as far as possible, so that the last is not much smaller."""
    return together(pairs, -(-len(pairs) // max(1, -(-len(pairs) // size))))
