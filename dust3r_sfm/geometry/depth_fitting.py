"""A depth map bent to points whose depth is known better."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

REACH = 0.12
"""Of the long side: how far a point speaks for its neighbours."""
REACH_LOG_DEPTH = 0.25
"""How much nearer or farther a surface may be that a point still speaks for."""
TOLERANCE = 0.1
"""In log depth: points that are farther from what their neighbours say have little weight."""
USUAL_WEIGHTS = (1e9, 32.0, 8.0, 2.0, 0.5)
"""The image's median change counts as so many points at every pixel: whichever foretells points best by the others."""
MAX_POINTS = 400
NUM_ROUNDS = 5


def depth_through_points(
    depth: Float[Tensor, "h w"], pixels: Int[Tensor, "k 2"], point_depth: Float[Tensor, " k"]
) -> Float[Tensor, "h w"]:
    """The depth map times a smooth field, through points of known depth at pixels (x, y) that have a depth.

    The field's logarithm is a mean of what the points ask for, by their distance in the image and in depth, so that a
    thing and its background are scaled apart; it is their median where none is near. Points that their neighbours
    contradict count little, and all of them where they say no more than that they are not exact. Pixels without
    depth (0) stay without.
    """
    chosen = torch.linspace(0, len(pixels) - 1, min(len(pixels), MAX_POINTS), device=pixels.device).round().long()
    x, y = pixels[chosen].unbind(-1)
    log_depth = depth.clamp(min=1e-30).log()
    asked = point_depth[chosen].log().to(depth) - log_depth[y, x]
    usual = asked.median()
    rest, places = asked - usual, _places(x, y, log_depth[y, x], max(depth.shape))
    nearness = _nearness(places, places).fill_diagonal_(0)  # none speaks for itself
    weights = torch.ones_like(rest)
    for _ in range(NUM_ROUNDS):
        weights = 1 / (1 + ((rest - _mean(nearness, weights, rest, USUAL_WEIGHTS[-1])) / TOLERANCE).square())
    gaps = [rest - _mean(nearness, weights, rest, usual_weight) for usual_weight in USUAL_WEIGHTS]
    best = int(torch.stack([gap.abs().clamp(max=TOLERANCE).mean() for gap in gaps]).argmin())
    field, columns = torch.empty_like(depth), torch.arange(depth.shape[1], device=depth.device)
    for row in range(len(depth)):
        everywhere = _places(columns, torch.full_like(columns, row), log_depth[row], max(depth.shape))
        field[row] = _mean(_nearness(everywhere, places), weights, rest, USUAL_WEIGHTS[best])
    return torch.where(depth > 0, depth * (usual + field).exp(), 0)


def _places(x: Tensor, y: Tensor, log_depth: Float[Tensor, " k"], side: int) -> Float[Tensor, "k 3"]:
    reach = REACH * side
    return torch.stack([x / reach, y / reach, log_depth / REACH_LOG_DEPTH], -1)


def _nearness(places: Float[Tensor, "p 3"], points: Float[Tensor, "k 3"]) -> Float[Tensor, "p k"]:
    return (-0.5 * torch.cdist(places, points).square()).exp()


def _mean(
    nearness: Float[Tensor, "p k"], weights: Float[Tensor, " k"], values: Float[Tensor, " k"], usual_weight: float
) -> Float[Tensor, " p"]:
    return nearness @ (weights * values) / (nearness @ weights + usual_weight)
