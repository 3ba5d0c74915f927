"""Depth and confidence of every pixel, once cameras and pairs are aligned.

Of reduced predictions there are points on a grid from all pairs, and depth at every pixel from a few in which the
image is camera 0. The grid says where the surface is, the few say what it looks like in between.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from dust3r_sfm.alignment.observations import usable_weights
from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.transforms import transform_points
from dust3r_sfm.pairs import PairPrediction, ReducedPrediction

NUM_REWEIGHTINGS = 5


class DepthFusion:
    """Collects where the pairs of one image see its pixels; `fused` is the depth that agrees best."""

    def __init__(self, K: Float[Tensor, "3 3"], size: tuple[int, int], stride: int = 1) -> None:
        """Of every `stride`-th pixel, from the middle of the first cell on."""
        pixels = torch.cat([pixel_grid(*size, device=K.device), torch.ones(*size, 1, device=K.device)], dim=-1)
        pixels = pixels[stride // 2 :: stride, stride // 2 :: stride]
        self.K, self.size, self.stride = K, size, stride
        self.rays = pixels @ torch.linalg.inv(K.double()).float().T
        self._length = self.rays.square().sum(dim=-1)
        self._depths: list[Float[Tensor, "h w"]] = []
        self._aside: list[Float[Tensor, "h w"]] = []
        self._weights: list[Float[Tensor, "h w"]] = []
        self._confidence = torch.zeros(pixels.shape[:2], device=K.device)
        self._on_grid: DepthFusion | None = None

    def add(self, prediction: PairPrediction, side: int, cam_from_pair: Float[Tensor, "4 4"], belief: float) -> None:
        """The image is one side of a pair; `cam_from_pair` takes its raw pointmap to the image's aligned camera.

        `belief` is the pair's weight in the depth.
        """
        if isinstance(prediction, ReducedPrediction) and self.stride == 1:
            if self._on_grid is None:
                self._on_grid = DepthFusion(self.K, self.size, prediction.strides[side])
            self._on_grid.add(prediction, side, cam_from_pair, belief)
            if side == 0 and prediction.depth0 is not None and prediction.full_confidence0 is not None:
                self._add_depth(prediction.depth0, prediction.full_confidence0, cam_from_pair, belief)
            return
        pointmap = (prediction.pointmap0_in_cam0, prediction.pointmap1_in_cam0)[side].float()
        confidence = (prediction.confidence0, prediction.confidence1)[side].float()
        weights = usable_weights(pointmap, confidence, side)
        points = torch.where((weights > 0)[..., None], pointmap, 0)
        points = transform_points(cam_from_pair.float(), points.flatten(0, 1)).unflatten(0, confidence.shape)
        depth = (points * self.rays).sum(dim=-1) / self._length
        weights = torch.where(depth > 0, weights * belief, 0)
        self._depths.append(torch.where(weights > 0, depth, 0))
        self._aside.append((points - depth[..., None] * self.rays).square().sum(dim=-1) / self._length)
        self._weights.append(weights)
        self._confidence = torch.where(weights > 0, self._confidence.maximum(confidence), self._confidence)

    def _add_depth(
        self,
        depth: Float[Tensor, "h w"],
        confidence: Float[Tensor, "h w"],
        cam_from_pair: Float[Tensor, "4 4"],
        belief: float,
    ) -> None:
        """Depth along the image's own rays; of the similarity the scale alone, the grid says the rest."""
        weights = usable_weights((depth[..., None] * self.rays).float(), confidence, 0) * belief
        scale = torch.linalg.det(cam_from_pair[:3, :3]).abs().pow(1 / 3).float()
        self._depths.append(torch.where(weights > 0, scale * depth, 0))
        self._aside.append(torch.zeros_like(depth))
        self._weights.append(weights)
        self._confidence = torch.where(weights > 0, self._confidence.maximum(confidence), self._confidence)

    def fused(self) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
        """Depth of least summed distance to all pairs' points along each ray, and the highest confidence (DUSt3R's).

        Where no pair sees a pixel in front of the camera both are 0.
        """
        if self._on_grid is not None:
            grid, stride = self._on_grid.fused(), self._on_grid.stride
            return _filled_in(*grid, *self._fused(), stride) if self._depths else _enlarged(*grid, self.size, stride)
        return self._fused()

    def _fused(self) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
        depths, aside, weights = (torch.stack(x) for x in (self._depths, self._aside, self._weights))
        depth = _weighted_median(depths, weights)
        for _ in range(NUM_REWEIGHTINGS):
            distance = ((depths - depth).square() + aside).sqrt()
            reweighted = weights / distance.clamp(min=1e-4 * depth + 1e-20)
            depth = (reweighted * depths).sum(dim=0) / reweighted.sum(dim=0).clamp(min=1e-20)
        return torch.where((weights > 0).any(dim=0), depth, 0), self._confidence


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
