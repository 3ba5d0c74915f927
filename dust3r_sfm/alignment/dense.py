"""Depth and confidence of every pixel, once cameras and pairs are aligned.

Of reduced predictions there are points on a grid from all pairs, and depth at every pixel from a few in which the
image is camera 0. The grid says where the surface is, the few say what it looks like in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from dust3r_sfm.alignment.observations import usable_weights
from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.transforms import determinant, transform_points
from dust3r_sfm.pairs import PairPrediction, ReducedPrediction

NUM_REWEIGHTINGS = 5
PIXELS_AT_ONCE = 4_000_000
"""Of all pairs of an image, that are brought into its camera in one go: 12 bytes each, a few times over."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """Where pairs see the pixels of one image."""

    depths: Float[Tensor, "k h w"]
    """Along the pixels' rays, 0 where the pair has no say."""
    aside: Float[Tensor, "k h w"]
    """Squared distances from the rays, in units of a ray at depth 1."""
    weights: Float[Tensor, "k h w"]
    confidence: Float[Tensor, "k h w"]

    @staticmethod
    def joined(parts: Sequence[_Seen]) -> _Seen:
        return _Seen(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(_Seen)))

    def agreed(self) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
        """Depth of least summed distance to all pairs' points along each ray, and the highest confidence."""
        depth = _weighted_median(self.depths, self.weights)
        for _ in range(NUM_REWEIGHTINGS):
            distance = ((self.depths - depth).square() + self.aside).sqrt()
            reweighted = self.weights / distance.clamp(min=1e-4 * depth + 1e-20)
            depth = (reweighted * self.depths).sum(dim=0) / reweighted.sum(dim=0).clamp(min=1e-20)
        is_seen = self.weights > 0
        return torch.where(is_seen.any(dim=0), depth, 0), torch.where(is_seen, self.confidence, 0).amax(dim=0)


def fused_depth(
    seen: Sequence[PairPrediction],
    sides: Int[Tensor, " k"],
    cam_from_pair: Float[Tensor, "k 4 4"],
    belief: Float[Tensor, " k"],
    inv_K: Float[Tensor, "3 3"],  # noqa: N803
    size: tuple[int, int],
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """Depth that agrees best with all pairs of an image, and the highest confidence (DUSt3R's).

    `sides` (in the host's memory) says which of their images it is, `cam_from_pair` takes their raw pointmaps to its
    aligned camera, `belief` is their weight in the depth. Where no pair sees a pixel in front of the camera both are 0.
    """
    views = [_View(*x) for x in zip(seen, sides.tolist(), cam_from_pair.float(), belief.float(), strict=True)]
    on_grid = [view for view in views if isinstance(view.prediction, ReducedPrediction)]
    on_pixels = [view for view in views if not isinstance(view.prediction, ReducedPrediction)]
    whole = _of_pointmaps(on_pixels, _rays(inv_K, size, 1)) if on_pixels else []
    if not on_grid:
        return _Seen.joined(whole).agreed()
    stride = on_grid[0].prediction.strides[on_grid[0].side]  # by the image's size alone
    grid = _Seen.joined(_of_pointmaps(on_grid, _rays(inv_K, size, stride))).agreed()
    whole += _of_depths(on_grid, _rays(inv_K, size, 1))
    return _filled_in(*grid, *_Seen.joined(whole).agreed(), stride) if whole else _enlarged(*grid, size, stride)


class _View(NamedTuple):
    """An image in one of its pairs."""

    prediction: PairPrediction
    side: int
    cam_from_pair: Float[Tensor, "4 4"]
    belief: Float[Tensor, ""]

    @property
    def pointmap(self) -> Float[Tensor, "h w 3"]:
        return self.prediction.pointmap1_in_cam0 if self.side else self.prediction.pointmap0_in_cam0

    @property
    def confidence(self) -> Float[Tensor, "h w"]:
        return self.prediction.confidence1 if self.side else self.prediction.confidence0


def _rays(inv_K: Float[Tensor, "3 3"], size: tuple[int, int], stride: int) -> Float[Tensor, "h w 3"]:  # noqa: N803
    """Of every `stride`-th pixel, from the middle of the first cell on."""
    pixels = pixel_grid(*size, device=inv_K.device)[stride // 2 :: stride, stride // 2 :: stride]
    return torch.nn.functional.pad(pixels, (0, 1), value=1.0) @ inv_K.T


def _of_pointmaps(views: Sequence[_View], rays: Float[Tensor, "h w 3"]) -> list[_Seen]:
    """What pairs' points say, those of many pairs of one side at once."""
    length = rays.square().sum(dim=-1)
    at_once = max(1, PIXELS_AT_ONCE // length.numel())
    parts = []
    for side in (0, 1):
        of_side = [view for view in views if view.side == side]
        for some in (of_side[i : i + at_once] for i in range(0, len(of_side), at_once)):
            points = torch.stack([view.pointmap for view in some]).float()
            confidence = torch.stack([view.confidence for view in some]).float()
            cam_from_pair, belief = (torch.stack([view[i] for view in some]) for i in (2, 3))
            weights = usable_weights(points, confidence, side)
            points = torch.where((weights > 0)[..., None], points, 0).flatten(1, 2)
            points = transform_points(cam_from_pair, points).unflatten(1, length.shape)
            depth = (points * rays).sum(dim=-1) / length
            weights = torch.where(depth > 0, weights * belief[:, None, None], 0)
            aside = (points - depth[..., None] * rays).square().sum(dim=-1) / length
            parts.append(_Seen(torch.where(weights > 0, depth, 0), aside, weights, confidence))
    return parts


def _of_depths(views: Sequence[_View], rays: Float[Tensor, "h w 3"]) -> list[_Seen]:
    """Depth along the image's own rays; of the similarity the scale alone, the grid says the rest."""
    views = [view for view in views if view.side == 0 and view.prediction.depth0 is not None]
    views = [view for view in views if view.prediction.full_confidence0 is not None]
    if not views:
        return []
    depths = torch.stack([view.prediction.depth0 for view in views]).float()
    confidence = torch.stack([view.prediction.full_confidence0 for view in views]).float()
    belief = torch.stack([view.belief for view in views])
    weights = usable_weights(depths[..., None] * rays, confidence, 0) * belief[:, None, None]
    scales = determinant(torch.stack([view.cam_from_pair[:3, :3] for view in views])).abs().pow(1 / 3)
    depths = torch.where(weights > 0, scales[:, None, None] * depths, 0)
    return [_Seen(depths, torch.zeros_like(depths), weights, confidence)]


def _weighted_median(values: Float[Tensor, "k h w"], weights: Float[Tensor, "k h w"]) -> Float[Tensor, "h w"]:
    """Over the first axis; some value where there is no weight."""
    values, order = values.sort(dim=0)
    cumulative = weights.gather(0, order).cumsum(dim=0)
    middle = (cumulative < cumulative[-1:] / 2).sum(dim=0, keepdim=True).clamp(max=len(values) - 1)
    return values.gather(0, middle)[0]


def _filled_in(
    grid_depth: Float[Tensor, "k l"],
    grid_confidence: Float[Tensor, "k l"],
    depth: Float[Tensor, "h w"],
    confidence: Float[Tensor, "h w"],
    stride: int,
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """Depth that is the grid's on the grid, up to noise, and the image's own in its details."""
    there = depth[stride // 2 :: stride, stride // 2 :: stride]
    both = (grid_depth > 0) & (there > 0)
    ratio = torch.where(both, (grid_depth / torch.where(both, there, 1)).clamp(min=1e-6).log(), 0)
    ratio, weight = (_smoothed(x) for x in (ratio, both.float()))
    near = _at_pixels(weight, depth.shape, stride)
    ratio = _at_pixels(ratio, depth.shape, stride) / near.clamp(min=1e-6)
    depth = torch.where((depth > 0) & (near > 1e-3), depth * ratio.exp(), 0)
    confidence = torch.maximum(confidence, _at_pixels(grid_confidence, depth.shape, stride))
    return depth, torch.where(depth > 0, confidence, 0)


def _enlarged(
    depth: Float[Tensor, "k l"], confidence: Float[Tensor, "k l"], size: tuple[int, int], stride: int
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """Depth between the pixels of a grid, where they know any."""
    known = _at_pixels((depth > 0).float(), size, stride)
    between = _at_pixels(depth, size, stride) / known.clamp(min=1e-6)
    return torch.where(known > 0.5, between, 0), torch.where(known > 0.5, _at_pixels(confidence, size, stride), 0)


def _smoothed(values: Float[Tensor, "k l"]) -> Float[Tensor, "k l"]:
    return avg_pool2d(values[None], 3, stride=1, padding=1, count_include_pad=False)[0]


def _at_pixels(values: Float[Tensor, "k l"], size: tuple[int, int], stride: int) -> Float[Tensor, "h w"]:
    """The grid's values at all pixels, linear in between and constant beyond its margin."""
    place = [
        ((torch.arange(n, device=values.device) - stride // 2) / stride).clamp(0, k - 1)
        for n, k in zip(size, values.shape, strict=True)
    ]
    y, x = (2 * p / max(k - 1, 1) - 1 for p, k in zip(place, values.shape, strict=True))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
    return grid_sample(values[None, None], grid[None], align_corners=True, padding_mode="border")[0, 0]
