"""A model put where its cameras were measured to stand, by GPS say; robustly, as some positions may be far off."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dust3r_sfm.geometry.registration import register_similarity

MAX_SIGMAS = 3.0
"""Positions that are off by more standard deviations do not count."""
MIN_SPREAD_SIGMAS = 2.0
"""Positions that lie within so many standard deviations of their middle tell no scale."""
MAX_TRIPLES = 1000
NUM_ROUNDS = 20
FLAT_SHARE = 0.02
"""Centres whose second extent is a smaller share of the first stand on a line, about which they could turn."""


@dataclass(frozen=True, eq=False)
class Placement:
    """target = scale * rotation @ source + translation."""

    scale: float
    rotation: Float[Tensor, "3 3"]
    translation: Float[Tensor, "3"]
    agreeing: Bool[Tensor, " n"]
    """Positions within `MAX_SIGMAS` of where the cameras come to stand."""

    def move(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:
        return self.scale * points @ self.rotation.T + self.translation


def place_cameras(
    centers: Float[Tensor, "n 3"],
    positions: Float[Tensor, "n 3"],
    sigmas: Float[Tensor, "n 3"],
    mean_up: Float[Tensor, "3"],
) -> Placement | None:
    """The similarity that takes camera centres to positions of given standard deviations, z up.

    The best of those through triples of cameras, then adjusted with weights that fade beyond
    `MAX_SIGMAS`. Where the centres stand on a line, `mean_up` (the cameras' mean up direction)
    says what is up. None where the positions are too few, or too close to tell a scale, or
    where not even half of them agree.
    """
    centers, positions, sigmas = (t.double() for t in (centers, positions, sigmas))
    spread = ((positions - positions.median(dim=0).values) / sigmas).norm(dim=1)
    if len(centers) < 3 or float(spread.quantile(0.75)) < MIN_SPREAD_SIGMAS:
        return None
    triples = _triples(len(centers))
    scale, rotation, translation = register_similarity(centers[triples], positions[triples])
    moved = scale[:, None, None] * (centers @ rotation.mT) + translation[:, None]
    off = ((moved - positions) / sigmas).square().sum(dim=-1)
    cost = torch.where(scale > 0, off.clamp(max=MAX_SIGMAS**2).sum(dim=-1), math.inf).nan_to_num(math.inf)
    off = off[int(cost.argmin())]
    placement = None
    for _ in range(NUM_ROUNDS):
        weights = 1 / sigmas.square().mean(dim=1) / (1 + off / MAX_SIGMAS**2).square()
        scale, rotation, translation = register_similarity(centers, positions, weights)
        rotation = _upright(rotation, centers, weights, mean_up.double())
        middle = (weights[:, None] * centers).sum(dim=0) / weights.sum()
        translation = (weights[:, None] * positions).sum(dim=0) / weights.sum() - scale * rotation @ middle
        moved = scale * centers @ rotation.T + translation
        off = ((moved - positions) / sigmas).square().sum(dim=-1)
        placement = Placement(float(scale), rotation, translation, off <= MAX_SIGMAS**2 + 1e-9)
    agreeing = int(placement.agreeing.sum())
    is_sound = math.isfinite(placement.scale) and placement.scale > 0 and agreeing >= max(3, len(centers) / 2)
    return placement if is_sound else None


def _triples(n: int) -> Tensor:
    """All triples of n cameras, or some of them, always the same ones."""
    if math.comb(n, 3) <= MAX_TRIPLES:
        return torch.tensor(list(itertools.combinations(range(n), 3)))
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(n, generator=generator)[:3] for _ in range(MAX_TRIPLES)])


def _upright(
    rotation: Float[Tensor, "3 3"],
    centers: Float[Tensor, "n 3"],
    weights: Float[Tensor, " n"],
    mean_up: Float[Tensor, "3"],
) -> Float[Tensor, "3 3"]:
    """The rotation, turned about the line that the centres stand on so that up is up; as it is where they do not."""
    offsets = centers - (weights[:, None] * centers).sum(dim=0) / weights.sum()
    _, extents, axes = torch.linalg.svd((weights / weights.sum()).sqrt()[:, None] * offsets, full_matrices=False)
    if extents[1] >= FLAT_SHARE * extents[0]:
        return rotation
    axis, up = rotation @ axes[0], rotation @ mean_up
    vertical = torch.tensor([0.0, 0.0, 1.0], dtype=rotation.dtype)
    up, vertical = (v - (v @ axis) * axis for v in (up, vertical))
    if up.norm() < 1e-6 or vertical.norm() < 1e-6:
        return rotation
    up, vertical = up / up.norm(), vertical / vertical.norm()
    source = torch.stack([axis, up, torch.linalg.cross(axis, up)], dim=1)
    target = torch.stack([axis, vertical, torch.linalg.cross(axis, vertical)], dim=1)
    return target @ source.T @ rotation
