"""Images put together group by group: groups join where most of the pairs between them agree on how they lie.

Pairs that triangles confirm make the first groups. A pair between two groups that no triangle confirms may still be
confirmed by other pairs between them, as each group is rigid: so cycles of any length have a vote.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.geometry.averaging import relation_distances
from dust3r_sfm.geometry.transforms import inverse

CONFIRMED = 0.2
"""Share of triangles from which on a pair is believed at once."""
MAX_HYPOTHESES = 30
"""Pairs between two groups that are tried as what joins them."""


def joined_poses(
    images: Int[Tensor, "2 e"],
    relations: Float[Tensor, "e 4 4"],
    shares: Float[Tensor, " e"],
    strength: Float[Tensor, " e"],
    tolerance: float,
    n: int,
) -> Float[Tensor, "n 4 4"]:
    """world_from_image of connected images; `shares` are those of triangles that confirm a pair, `strength` its say."""
    groups = _Groups(images, relations, strength, tolerance, n)
    for e in strength.argsort(descending=True, stable=True).tolist():
        a, b = sorted(int(groups.of_image[i]) for i in images[:, e])
        if a != b and shares[e] >= CONFIRMED:
            groups.join(a, b, groups.placements(torch.tensor([e]))[0])
    found = {pair: groups.best_placement(rows) for pair, rows in groups.rows_between().items()}
    while found:
        a, b = max(found, key=lambda pair: (found[pair][0], pair))
        groups.join(a, b, found[a, b][1])
        kept = {pair: best for pair, best in found.items() if not {a, b} & set(pair)}
        between = groups.rows_between(touching=a)
        found = kept | {pair: groups.best_placement(rows) for pair, rows in between.items()}
    return groups.poses


class _Groups:
    """Images in groups, each with a world of its own; a group is called by its first image's number."""

    def __init__(
        self,
        images: Int[Tensor, "2 e"],
        relations: Float[Tensor, "e 4 4"],
        strength: Float[Tensor, " e"],
        tolerance: float,
        n: int,
    ) -> None:
        self._images, self._relations, self._strength, self._tolerance = images, relations, strength, tolerance
        self.poses = torch.eye(4, dtype=relations.dtype).repeat(n, 1, 1)
        self.of_image = torch.arange(n)

    def join(self, a: int, b: int, a_from_b: Float[Tensor, "4 4"]) -> None:
        """Put group b into the world of group a."""
        moved = self.of_image == b
        self.poses[moved] = a_from_b @ self.poses[moved]
        self.of_image[moved] = a

    def placements(self, rows: Int[Tensor, " r"]) -> Float[Tensor, "r 4 4"]:
        """low_from_high as each of some pairs between the same two groups has it, the low one of lower number."""
        low, high, high_from_low = self._oriented(rows)
        return self.poses[low] @ inverse(high_from_low) @ inverse(self.poses[high])

    def rows_between(self, touching: int | None = None) -> dict[tuple[int, int], Tensor]:
        """The pairs between each two groups."""
        of = self.of_image[self._images]
        across = of[0] != of[1]
        if touching is not None:
            across &= (of == touching).any(dim=0)
        rows: dict[tuple[int, int], list[int]] = defaultdict(list)
        for e in across.nonzero()[:, 0].tolist():
            a, b = int(of[0, e]), int(of[1, e])
            rows[min(a, b), max(a, b)].append(e)
        return {pair: torch.tensor(found) for pair, found in rows.items()}

    def best_placement(self, rows: Int[Tensor, " r"]) -> tuple[float, Float[Tensor, "4 4"]]:
        """The low_from_high that the pairs between two groups agree with most, and how much say these have."""
        tried = self.placements(rows[self._strength[rows].argsort(descending=True, stable=True)[:MAX_HYPOTHESES]])
        low, high, high_from_low = self._oriented(rows)
        expected = inverse(self.poses[high]) @ inverse(tried)[:, None] @ self.poses[low]
        differences = relation_distances(high_from_low.repeat(len(tried), 1, 1), expected.flatten(0, 1))
        agreement = 1 / (1 + (differences.view(len(tried), -1) / self._tolerance).square())
        say = (self._strength[rows].sqrt() * agreement).sum(dim=1)
        best = int(say.argmax())
        return float(say[best]), tried[best]

    def _oriented(self, rows: Int[Tensor, " r"]) -> tuple[Int[Tensor, " r"], Int[Tensor, " r"], Float[Tensor, "r 4 4"]]:
        """Images of the groups of lower and of higher number, and the second of these from the first."""
        first, second = self._images[:, rows]
        turned = self.of_image[first] > self.of_image[second]
        relations = self._relations[rows]
        relations = torch.where(turned[:, None, None], inverse(relations), relations)
        return torch.where(turned, second, first), torch.where(turned, first, second), relations
