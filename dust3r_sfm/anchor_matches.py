"""What anchors of an image find in another, from the pointmaps of both.

Every image has a fixed grid of anchors, the same in all of its pairs. An anchor's match is the
point of the other image's surface that is nearest in 3-D, to a fraction of a pixel, and it is
kept when the way back ends at the anchor again (reciprocal nearest neighbours, DUSt3R Sec. 3.3,
up to a tolerance: images that see a surface at different scales have few exact ones).

So an anchor carries one track through all images that its own is paired with, and no position
is ever rounded to the other image's grid: rounding costs more precision than the longer tracks
give back. Anchors of both images are matched; where both directions of a pair were predicted
their answers are averaged if they agree, and count for more; if not, the surer one stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dust3r_sfm.geometry.surfaces import Surface, at_pixels, nearest_on_surface, pixel_steps
from dust3r_sfm.pairs import Matches, PairPrediction

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
