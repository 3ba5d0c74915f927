"""Depth and confidence of every pixel, once cameras and pairs are aligned.

Of reduced predictions there are points on a grid from all pairs, and depth at every pixel from a few in which the
image is camera 0. The grid says where the surface is, the few say what it looks like in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
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
    seen: Sequence[tuple[PairPrediction, int]],
    cam_from_pair: Float[Tensor, "k 4 4"],
    belief: Float[Tensor, " k"],
    K: Float[Tensor, "3 3"],
    size: tuple[int, int],
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """Depth that agrees best with all pairs of an image, and the highest confidence (DUSt3R's).

    `seen` are the pairs and which of their sides the image is, `cam_from_pair` takes their raw pointmaps to its
    aligned camera, `belief` is their weight in the depth. Where no pair sees a pixel in front of the camera both are 0.
    """
    inv_K = torch.linalg.inv(K.double()).float()
    on_grid = [i for i, (prediction, _) in enumerate(seen) if isinstance(prediction, ReducedPrediction)]
    on_pixels = [i for i in range(len(seen)) if i not in set(on_grid)]
    whole = _of_pointmaps(seen, on_pixels, cam_from_pair, belief, _rays(inv_K, size, 1)) if on_pixels else []
    if not on_grid:
        return _Seen.joined(whole).agreed()
    prediction, side = seen[on_grid[0]]
    stride = prediction.strides[side]  # by the image's size alone
    grid = _Seen.joined(_of_pointmaps(seen, on_grid, cam_from_pair, belief, _rays(inv_K, size, stride))).agreed()
    whole += _of_depths(seen, on_grid, cam_from_pair, belief, _rays(inv_K, size, 1))
    return _filled_in(*grid, *_Seen.joined(whole).agreed(), stride) if whole else _enlarged(*grid, size, stride)


def _rays(inv_K: Float[Tensor, "3 3"], size: tuple[int, int], stride: int) -> Float[Tensor, "h w 3"]:  # noqa: N803
    """Of every `stride`-th pixel, from the middle of the first cell on."""
    pixels = pixel_grid(*size, device=inv_K.device)[stride // 2 :: stride, stride // 2 :: stride]
    return torch.nn.functional.pad(pixels, (0, 1), value=1.0) @ inv_K.T


def _of_pointmaps(
    seen: Sequence[tuple[PairPrediction, int]],
    chosen: Sequence[int],
    cam_from_pair: Float[Tensor, "k 4 4"],
    belief: Float[Tensor, " k"],
    rays: Float[Tensor, "h w 3"],
) -> list[_Seen]:
    """What the chosen pairs' points say, many pairs at once."""
    length = rays.square().sum(dim=-1)
    at_once = max(1, PIXELS_AT_ONCE // length.numel())
    parts = []
    for rows in (chosen[i : i + at_once] for i in range(0, len(chosen), at_once)):
        sides = torch.tensor([seen[i][1] for i in rows], device=rays.device)[:, None, None]
        pointmaps = [_side(*seen[i]) for i in rows]
        points = torch.stack([pointmap for pointmap, _ in pointmaps]).float()
        confidence = torch.stack([c for _, c in pointmaps]).float()
        weights = usable_weights(points, confidence, 1) * ((sides == 1) | (points[..., 2] > 0))
        points = torch.where((weights > 0)[..., None], points, 0).flatten(1, 2)
        points = transform_points(cam_from_pair[rows].float(), points).unflatten(1, length.shape)
        depth = (points * rays).sum(dim=-1) / length
        weights = torch.where(depth > 0, weights * belief[rows, None, None].float(), 0)
        aside = (points - depth[..., None] * rays).square().sum(dim=-1) / length
        parts.append(_Seen(torch.where(weights > 0, depth, 0), aside, weights, confidence))
    return parts


def _side(prediction: PairPrediction, side: int) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w"]]:
    if side == 0:
        return prediction.pointmap0_in_cam0, prediction.confidence0
    return prediction.pointmap1_in_cam0, prediction.confidence1


def _of_depths(
    seen: Sequence[tuple[PairPrediction, int]],
    chosen: Sequence[int],
    cam_from_pair: Float[Tensor, "k 4 4"],
    belief: Float[Tensor, " k"],
    rays: Float[Tensor, "h w 3"],
) -> list[_Seen]:
    """Depth along the image's own rays; of the similarity the scale alone, the grid says the rest."""
    rows = [i for i in chosen if seen[i][1] == 0 and seen[i][0].depth0 is not None]
    rows = [i for i in rows if seen[i][0].full_confidence0 is not None]
    if not rows:
        return []
    depths = torch.stack([seen[i][0].depth0 for i in rows]).float()
    confidence = torch.stack([seen[i][0].full_confidence0 for i in rows]).float()
    weights = usable_weights(depths[..., None] * rays, confidence, 0) * belief[rows, None, None].float()
    scales = determinant(cam_from_pair[rows, :3, :3]).abs().pow(1 / 3).float()
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
