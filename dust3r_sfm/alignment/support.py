"""Which pairs contradict the aligned scene, and which images no pairs agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dust3r_sfm.alignment.observations import Observations
from dust3r_sfm.graph import connected_components
from dust3r_sfm.pairs import Pair

DOUBTED_FACTOR = 4.0
"""Pairs contradict the scene where they are off by more than so many times the median pair,"""
MIN_DOUBTED_DISTANCE = 0.1
"""and by more than this share of their points' distance."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """What of a component is a scene."""

    groups: list[list[str]]
    """Images that pairs in agreement connect, largest group first; images that none support are in no group."""
    doubts: Mapping[Pair, str]
    """The pairs that have no part in the groups, and why."""


def judge(
    observations: Observations, distances: Float[Tensor, " e"], is_held: Bool[Tensor, " n"] | None = None
) -> Verdict:
    """What a component's mean residuals, in the pairs' units, say of its pairs and images.

    An image has no support where two or more others contradict its place and one at most agrees: its pairs lead to
    different places, and it can be at one of them alone. Images that are held stay.
    """
    names, distances = observations.names, distances.cpu()
    usual = float(distances.median())
    is_doubted = distances > max(DOUBTED_FACTOR * usual, MIN_DOUBTED_DISTANCE)
    doubts = {
        observations.pairs[e]: f"contradicts the aligned scene: off by {float(distances[e]):.2f} of the points' "
        f"distance, where {usual:.2f} is usual"
        for e in is_doubted.nonzero()[:, 0].tolist()
    }
    agreeing, contradicting = (
        _partners(observations.images.cpu(), rows, len(names)) for rows in (~is_doubted, is_doubted)
    )
    for n, name in enumerate(names):
        others = agreeing[n] | contradicting[n]
        if len(others - agreeing[n]) >= 2 and len(agreeing[n]) <= 1 and not (is_held is not None and is_held[n]):
            reason = f"leads to a place of {name} that {len(agreeing[n])} of its {len(others)} partners agree on"
            doubts |= {pair: reason for pair in observations.pairs if name in pair and pair not in doubts}
    groups = connected_components(names, [pair for pair in observations.pairs if pair not in doubts])
    groups = [group for group in groups if len(group) > 1]
    return Verdict(groups, doubts) if groups else Verdict([list(names)], {})


def _partners(images: Int[Tensor, "2 e"], rows: Bool[Tensor, " e"], n: int) -> list[set[int]]:
    partners: list[set[int]] = [set() for _ in range(n)]
    for a, b in images[:, rows].T.tolist():
        partners[a].add(b)
        partners[b].add(a)
    return partners
