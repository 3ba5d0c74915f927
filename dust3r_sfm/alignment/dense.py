"""Depth and confidence of every pixel, once cameras and pairs are aligned."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.alignment.observations import usable_weights
from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.transforms import transform_points
from dust3r_sfm.pairs import PairPrediction

NUM_REWEIGHTINGS = 5


class DepthFusion:
    """Collects where the pairs of one image see its pixels; `fused` is the depth that agrees best."""

    def __init__(self, K: Float[Tensor, "3 3"], size: tuple[int, int]) -> None:
        pixels = torch.cat([pixel_grid(*size, device=K.device), torch.ones(*size, 1, device=K.device)], dim=-1)
        self.rays = pixels @ torch.linalg.inv(K.double()).float().T
        self._length = self.rays.square().sum(dim=-1)
        self._depths: list[Float[Tensor, "h w"]] = []
        self._aside: list[Float[Tensor, "h w"]] = []
        self._weights: list[Float[Tensor, "h w"]] = []
        self._confidence = torch.zeros(size, device=K.device)

    def add(self, prediction: PairPrediction, side: int, cam_from_pair: Float[Tensor, "4 4"], belief: float) -> None:
        """The image is one side of a pair; `cam_from_pair` takes its raw pointmap to the image's aligned camera.

        `belief` is the pair's weight in the depth.
        """
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

    def fused(self) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
        """Depth of least summed distance to all pairs' points along each ray, and the highest confidence (DUSt3R's).

        Where no pair sees a pixel in front of the camera both are 0.
        """
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
