"""A walk twice around a square of houses on which parts of facades repeat: true pairs, and false ones that agree.

Frames are as a network would see them: each image's camera, its unit the distance of the facade. A look-alike place
gives false pairs between all photos of its two sides by chance, all with the poses that the photos would have if both
were one place, so that they confirm each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dust3r_sfm.alignment.relations import Relations
from dust3r_sfm.geometry.registration import similarity_matrix
from dust3r_sfm.geometry.transforms import inverse, rotation_from_rotvec
from dust3r_sfm.pairs import Pair

RADIUS, PLACE = 25.0, 8.0  # metres: of the square, and of a repeated part of a facade
LENGTH = 2 * math.pi * RADIUS
PARTNERS = 16  # of an image at most, by the overlap
MIN_OVERLAP = 0.2


@dataclass(frozen=True, eq=False)
class LookalikeGraph:
    """Both directions of each pair; a pair's confidence and matches follow from how much its photos have in common.

    Of a false pair only the repeated part does, and its details differ: a quarter of the matches, 0.85 of the
    confidence.
    """

    relations: Relations
    confidences: Tensor
    num_verified: Tensor
    is_true: Tensor


@dataclass(frozen=True, eq=False)
class _Walk:
    world_from_cam: Tensor
    aim: Tensor
    """Where on the facade, in metres around the square, each photo looks."""
    half: Tensor
    """Half of what it sees, in metres."""
    unit: Tensor


def make_lookalike_graph(n: int = 200, false_share: float = 0.2, chance: float = 0.5, seed: int = 0) -> LookalikeGraph:
    """`chance` is that of a pair of photos of two look-alike places to be taken for a true one."""
    generator = torch.Generator().manual_seed(seed)
    walk = _walk(n, generator)
    overlap = _overlaps(walk, 0.0).fill_diagonal_(0)
    best = torch.zeros(n, n, dtype=torch.bool).scatter_(1, overlap.topk(PARTNERS, 1).indices, True)
    taken = (best | best.T) & (overlap > MIN_OVERLAP)
    i, j = taken.triu(1).nonzero().T
    found = [(i, j, overlap[i, j], inverse(walk.world_from_cam[j]) @ walk.world_from_cam[i])]
    wanted = round(false_share / (1 - false_share) * len(i))
    while wanted > 0:
        place0, place1 = torch.rand(2, generator=generator, dtype=torch.float64) * LENGTH
        if _around(place0 - place1).abs() < 3 * PLACE:
            continue
        overlap = _overlaps(walk, float(place0 - place1), float(place0))
        candidates = (overlap > 0.25) & (torch.rand(n, n, generator=generator) < chance) & ~taken
        i, j = (candidates & ~(candidates.T & torch.ones(n, n).tril(-1).bool())).nonzero()[:wanted].T
        moved = _facade(place0) @ inverse(_facade(place1)) @ walk.world_from_cam[j]
        found.append((i, j, overlap[i, j], inverse(moved) @ walk.world_from_cam[i]))
        taken[i, j] = taken[j, i] = True
        wanted -= len(i)
    return _measured(walk, found, generator)


def _measured(walk: _Walk, found: list[tuple[Tensor, ...]], generator: torch.Generator) -> LookalikeGraph:
    """With noise: 3 degrees, and 5 percent of scale and distance, where two fifths of what is seen are in common."""
    i, j, overlap, pose = (torch.cat(column) for column in zip(*found, strict=True))
    is_true = (torch.arange(len(i)) < len(found[0][0])).repeat(2)
    images, overlap, pose = torch.stack([torch.cat([i, j]), torch.cat([j, i])]), overlap.repeat(2), _both(pose)
    unit0, unit1 = walk.unit[images]
    exact = similarity_matrix(unit0 / unit1, pose[:, :3, :3], pose[:, :3, 3] / unit1[:, None])
    e, amount = len(overlap), (0.4 / overlap).sqrt()
    turn = rotation_from_rotvec(math.radians(3) / 3**0.5 * amount[:, None] * _randn((e, 3), generator))
    scale, shift = (0.05 * amount * _randn((e,), generator)).exp(), 0.05 * amount[:, None] * _randn((e, 3), generator)
    confidences = 1 + 4 * overlap.sqrt() * (0.2 * _randn((e,), generator)).exp() * torch.where(is_true, 1, 0.85)
    rate = (
        300 * overlap[: e // 2] * (0.5 * _randn((e // 2,), generator)).exp() * torch.where(is_true[: e // 2], 1, 0.25)
    )
    matches = torch.poisson(rate, generator=generator).repeat(2)
    names = tuple(f"{k:03d}" for k in range(len(walk.aim)))
    pairs = tuple(Pair(names[a], names[b]) for a, b in images.T.tolist())
    relations = Relations(names, pairs, images, similarity_matrix(scale, turn, shift) @ exact)
    return LookalikeGraph(relations, confidences, torch.where(matches < 15, 0, matches), is_true)


def _both(pose: Tensor) -> Tensor:
    return torch.cat([pose, inverse(pose)])


def _walk(n: int, generator: torch.Generator) -> _Walk:
    at = (torch.arange(n, dtype=torch.float64) + 0.3 * _randn((n,), generator)) / n * 2 * LENGTH
    distance = 5 + 10 * torch.rand(n, generator=generator, dtype=torch.float64).square()
    pitch, yaw, roll = torch.tensor([[0.08], [0.2], [0.05]]) * _randn((3, n), generator)
    turn = rotation_from_rotvec(torch.stack([pitch, yaw, roll], dim=-1))
    place = torch.stack([torch.zeros(n, dtype=torch.float64), 0.3 * _randn((n,), generator), -distance], dim=-1)
    world_from_cam = _facade(at) @ similarity_matrix(torch.ones(n, dtype=torch.float64), turn, place)
    return _Walk(world_from_cam, at + distance * yaw.tan(), 0.6 * distance, distance)


def _facade(at: Tensor) -> Tensor:
    """The frame of the facade at so many metres around the square: x along it, z into it."""
    turn = rotation_from_rotvec(torch.stack([torch.zeros_like(at), at / RADIUS, torch.zeros_like(at)], dim=-1))
    return similarity_matrix(torch.ones_like(at), turn, RADIUS * turn[..., 2])


def _overlaps(walk: _Walk, shift: float, place: float | None = None) -> Tensor:
    """What two photos have in common of what both see, n n; the second ones moved, and only what is at a place."""
    apart = _around(walk.aim + shift - walk.aim[:, None])
    low, high = (
        torch.maximum(-walk.half[:, None], apart - walk.half),
        torch.minimum(walk.half[:, None], apart + walk.half),
    )
    union = 2 * walk.half[:, None] + 2 * walk.half - (high - low).clamp(min=0)
    if place is not None:
        center = _around(place - walk.aim)[:, None]
        low, high = torch.maximum(low, center - PLACE / 2), torch.minimum(high, center + PLACE / 2)
    return (high - low).clamp(min=0) / union


def _around(metres: Tensor) -> Tensor:
    return (metres + LENGTH / 2) % LENGTH - LENGTH / 2


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
