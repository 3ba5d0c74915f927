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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from dust3r_sfm.engine import EngineConfig, is_local, map_shards, share_name, share_of
from dust3r_sfm.files import holding
from dust3r_sfm.formats.matches import MatchShards, match_folder
from dust3r_sfm.formats.pointmaps import PointmapFile, hash_of
from dust3r_sfm.geometry.surfaces import Surface, at_pixels, nearest_on_surface, pixel_steps
from dust3r_sfm.pairs import Matches, Pair, PairPrediction, Predictions, ReducedPrediction, SomePredictions
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

SHARD_PAIRS = 32
"""What a killed run loses at most."""
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


@dataclass(frozen=True, eq=False)
class AnchorMatches:
    """What all anchors of one image of each of several pairs find in the other image, whether they match or not."""

    anchors: Float[Tensor, "a 2"]
    """In pixels (x, y)."""
    found: Float[Tensor, "b a 2"]
    scores: Float[Tensor, "b a"]
    """0 for anchors without a match."""


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
    masks = [None if view is None or view.mask is None else view.mask[None] for view in (view0, view1)]
    directions = [batched(p) for p in (prediction, reverse) if p is not None]
    sides = match_batch(directions[0], directions[1] if len(directions) == 2 else None, masks, config)
    return matches_of(sides, 0)


def match_batch(
    prediction: PairPrediction,
    reverse: PairPrediction | None,
    masks: Sequence[Bool[Tensor, "b _h _w"] | None] = (None, None),
    config: MatchConfig = MatchConfig(),
) -> tuple[AnchorMatches, AnchorMatches]:
    """What the anchors of images 0 and of images 1 of pairs of equal sizes find; on a GPU without waiting for it."""
    surfaces = [[_surface(prediction, k, masks[k], config) for k in (0, 1)]]
    if reverse is not None:
        surfaces.append([_surface(reverse, 1 - k, masks[k], config) for k in (0, 1)])
    of0, of1 = (_joined([surface[k] for surface in surfaces]) for k in (0, 1))
    if of0.usable.shape == of1.usable.shape:
        # both ways at once: a GPU takes as long to start a small kernel as to run it
        both = _joined([of0, of1])
        found0, found1 = zip(*(x.chunk(2) for x in _follow(both, both, config, _swapped)), strict=True)
    else:
        found0, found1 = _follow(of0, of1, config), _follow(of1, of0, config)
    return _agreed(of0, *found0, len(surfaces), config), _agreed(of1, *found1, len(surfaces), config)


def matches_of(sides: tuple[AnchorMatches, AnchorMatches], index: int) -> Matches:
    """The matches of one of the pairs, on the CPU: those of image 0's anchors, then those of image 1's."""
    of0, of1 = sides
    kept0, kept1 = (side.scores[index] > 0 for side in sides)
    return Matches(
        torch.cat([of0.anchors[kept0], of1.found[index, kept1]]).float().cpu(),
        torch.cat([of0.found[index, kept0], of1.anchors[kept1]]).float().cpu(),
        torch.cat([of0.scores[index, kept0], of1.scores[index, kept1]]).float().cpu(),
    )


def batched(prediction: PairPrediction) -> PairPrediction:
    """One prediction as a batch of one."""
    return PairPrediction(
        prediction.pointmap0_in_cam0[None],
        prediction.confidence0[None],
        prediction.pointmap1_in_cam0[None],
        prediction.confidence1[None],
    )


def match_dense(
    views: Sequence[View],
    predictions: Predictions,
    config: MatchConfig = MatchConfig(),
    output: Path | None = None,
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> dict[Pair, Matches]:
    """Matches of every undirected pair, from one prediction or both; the key is the direction that comes first.

    Views are asked for their masks only. Matches of predictions in a file may go to the file `output`, continuing what
    is there; of an engine's share only they are returned, and wait beside it for the others.
    """
    masks = {view.name: view.mask for view in views if view.mask is not None}
    undirected = _undirected(predictions)
    shards = [undirected[start : start + SHARD_PAIRS] for start in range(0, len(undirected), SHARD_PAIRS)]
    make = partial(_Matcher, predictions, masks, config)
    with tqdm(total=len(undirected), desc="Matching", unit="pair", disable=None) as bar:
        if output is None:
            found = dict(_match_shards(make, shards, engine, bar))
            return {pair: matches for shard in range(len(shards)) for pair, matches in found[shard].items()}
        with holding(match_folder(output), share_name(engine)):
            store, keys = MatchShards(output), _keys(predictions, undirected, masks, config)
            own = share_of(shards, engine)
            todo = [shard for shard in own if any(keys[pair] not in store for pair in shard)]
            bar.update(sum(map(len, shards)) - sum(map(len, todo)))
            for _, matches in _match_shards(make, todo, engine, bar):
                store.add(matches, keys)
            if engine.shard is None:
                return store.finish(keys)
            return store.read({pair: keys[pair] for shard in own for pair in shard})


class _Matcher:
    """What matches shards of pairs, here or in a worker, which reads predictions of a file itself."""

    def __init__(self, predictions: Predictions, masks: Mapping[str, Tensor], config: MatchConfig) -> None:
        self.predictions, self.masks, self.config = predictions, masks, config

    def match(self, pair: Pair) -> Matches:
        prediction, back = self.predictions[pair], pair.reversed()
        if isinstance(prediction, ReducedPrediction):
            return _kept_matches(pair, prediction, self.predictions)
        masks = [self.masks[name][None] if name in self.masks else None for name in pair]
        reverse = batched(self.predictions[back]) if back in self.predictions else None
        return matches_of(match_batch(batched(prediction), reverse, masks, self.config), 0)


def _match_shards(
    make: Callable[[], _Matcher], shards: Sequence[Sequence[Pair]], engine: EngineConfig, bar: tqdm
) -> Iterator[tuple[int, dict[Pair, Matches]]]:
    match = partial(_match_shard, advance=bar.update) if is_local(engine) else _match_shard
    for index, found in map_shards(match, make, shards, engine):
        bar.update(0 if is_local(engine) else len(found))
        yield index, found


def _match_shard(matcher: _Matcher, shard: Sequence[Pair], advance: Callable[[], object] = bool) -> dict[Pair, Matches]:
    found = {}
    for pair in shard:
        found[pair] = matcher.match(pair)
        advance()
    return found


def _undirected(predictions: Predictions) -> list[Pair]:
    position = {pair: i for i, pair in enumerate(predictions)}
    return [pair for pair in position if position.get(pair.reversed(), len(position)) > position[pair]]


def _keys(
    predictions: Predictions, pairs: Sequence[Pair], masks: Mapping[str, Tensor], config: MatchConfig
) -> dict[Pair, str]:
    """What the matches of each pair depend on, as a hash."""
    there = predictions.all_of_them if isinstance(predictions, SomePredictions) else predictions
    if not isinstance(there, PointmapFile):
        raise TypeError("matches go to a file where predictions come from one")
    of = dict(zip(predictions, there.keys_of(predictions), strict=True))
    hashes = {name: hash_of(mask.cpu().numpy().tobytes()) for name, mask in masks.items()}
    return {
        pair: hash_of(repr(config), of[pair], of.get(pair.reversed(), ""), *(hashes.get(name, "") for name in pair))
        for pair in pairs
    }


def _kept_matches(pair: Pair, prediction: ReducedPrediction, predictions: Predictions) -> Matches:
    """Those that a reduced prediction brings, or else the reversed pair, also where that itself is not used."""
    if prediction.matches is not None:
        return prediction.matches
    there = predictions.all_of_them if isinstance(predictions, SomePredictions) else predictions
    reverse = there.get(pair.reversed())
    if isinstance(reverse, ReducedPrediction) and reverse.matches is not None:
        return Matches(reverse.matches.keypoints1, reverse.matches.keypoints0, reverse.matches.scores)
    return Matches(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))


def anchor_pixels(
    height: int, width: int, config: MatchConfig, device: torch.device | None = None
) -> Int[Tensor, "a 2"]:
    """(row, column) of an image's anchors, a regular grid of at most `max_anchors`."""
    spacing = max(1, math.ceil(math.sqrt(height * width / config.max_anchors)))
    rows, columns = (torch.arange(spacing // 2, n, spacing, device=device) for n in (height, width))
    return torch.cartesian_prod(rows, columns)


@dataclass(frozen=True, eq=False)
class _Side(Surface):
    """One image's pointmaps in several pairs."""

    confidence: Float[Tensor, "b h w"]


def _surface(prediction: PairPrediction, side: int, mask: Tensor | None, config: MatchConfig) -> _Side:
    points = (prediction.pointmap0_in_cam0, prediction.pointmap1_in_cam0)[side].detach().float()
    confidence = (prediction.confidence0, prediction.confidence1)[side].detach().float()
    # each filled where it lies: a list would be copied there, and the copy waited for
    levels = torch.stack([torch.full((), q, device=points.device) for q in (config.min_confidence_quantile, 0.9)])
    least, best = confidence[:, ::2, ::2].flatten(1).quantile(levels, dim=1)
    threshold = torch.maximum(least, 1 + RELATIVE_CONFIDENCE * (best - 1))
    usable = (confidence >= threshold[:, None, None]) & points.isfinite().all(dim=-1)
    if mask is not None:
        usable &= mask.to(points.device)
    border = config.border_px
    inside = torch.zeros_like(usable)
    inside[:, border : usable.shape[1] - border, border : usable.shape[2] - border] = True
    return _Side(points, usable & inside, confidence)


def _joined(sides: Sequence[_Side]) -> _Side:
    """Several batches as one."""
    return _Side(*(torch.cat([getattr(side, field.name) for side in sides]) for field in fields(_Side)))


def _swapped(values: Tensor) -> Tensor:
    """The first half of a batch in place of the second."""
    return values.roll(len(values) // 2, dims=0)


def _agreed(
    side: _Side, keypoints: Float[Tensor, "n a 2"], scores: Float[Tensor, "n a"], directions: int, config: MatchConfig
) -> AnchorMatches:
    """What the anchors of an image find, from what they find in each of the directions that were predicted."""
    keypoints, scores = (x.unflatten(0, (directions, -1)) for x in (keypoints, scores))
    best = scores.argmax(dim=0, keepdim=True)
    match = torch.take_along_dim(keypoints, best[..., None], dim=0)
    agreeing = scores * ((keypoints - match).norm(dim=-1) <= AGREEMENT * config.max_error_px)
    score = agreeing.sum(dim=0)
    match = (agreeing[..., None] * keypoints).sum(dim=0) / torch.where(score > 0, score, 1)[..., None]
    return AnchorMatches(_anchors_of(side, config).flip(-1) + 0.5, match, score)


def _anchors_of(side: _Side, config: MatchConfig) -> Int[Tensor, "a 2"]:
    return anchor_pixels(*side.usable.shape[1:], config, side.points.device)


def _follow(
    source: _Side, target: _Side, config: MatchConfig, across: Callable[[Tensor], Tensor] = lambda values: values
) -> tuple[Float[Tensor, "b a 2"], Float[Tensor, "b a"]]:
    """For each anchor of the source image its pixel (x, y) in the target image and a score; 0 where there is none.

    `across` puts values of a source in the place of its target, and back.
    """
    rows, columns = (x.expand(len(source.points), -1) for x in _anchors_of(source, config).unbind(dim=1))
    anchors = torch.stack([columns, rows], dim=-1) + 0.5
    points = at_pixels(source.points, rows, columns)
    asked = at_pixels(source.usable, rows, columns) & across(target.usable.flatten(1).any(dim=1))[:, None]
    found, surface_points = nearest_on_surface(across(points), across(asked), target)
    confidence1 = across(at_pixels(target.confidence, found[..., 1].long(), found[..., 0].long()))
    there, nearest = across(found), across(surface_points)
    back, _ = nearest_on_surface(nearest, asked, source)
    kept = asked & ((back - anchors).norm(dim=-1) <= config.max_error_px)
    pixel_width = torch.stack(pixel_steps(source.points, rows, columns)).norm(dim=-1).mean(dim=0)
    gap = (nearest - points).norm(dim=-1) / pixel_width.clamp(min=torch.finfo(torch.float32).tiny)
    usual = torch.where(kept, gap, torch.nan).nanmedian(dim=1, keepdim=True).values
    kept &= gap <= (GAP_RATIO * usual).clamp(min=1)
    confidence0 = at_pixels(source.confidence, rows, columns)
    scores = torch.where(kept, (confidence0 * confidence1).sqrt(), 0)
    return torch.where(kept[..., None], there, 0), scores


def main(
    pointmaps: Path,
    output: Path,
    config: MatchConfig = MatchConfig(),
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> None:
    """Match the pixels of all pairs of a pointmap file.

    Args:
        pointmaps: What infer_pairs wrote, such as pointmaps.h5.
        output: The file to write, such as matches.h5; a second run continues an interrupted one.
        config: Which matches to keep.
        engine: Where to match.
    """
    with PointmapFile(pointmaps) as predictions:
        matches = match_dense([], predictions, config, output, engine)
    total = sum(len(m.scores) for m in matches.values())
    logger.info("%d matches of %d pairs are in %s.", total, len(matches), output)
    if engine.shard is not None:
        logger.info("Share %s is done; the same command without --shard puts all shares together.", engine.shard)


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["match-dense", *sys.argv[1:]]))
