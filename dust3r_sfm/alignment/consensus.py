"""What all pairs together say of how images lie, and which pairs contradict it.

Around a triangle of images rotations and scales must close, and places too. So a pair is as reliable as it is strong
itself, as its triangles close, and as strong as the ways around it are: pairs of look-alike places confirm each other,
but the ways around them lead over other such pairs, which are weak. Frames are chained along the most reliable tree
and averaged over all pairs.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dust3r_sfm.alignment.relations import Relations
from dust3r_sfm.geometry.averaging import Disagreement, average_similarities, disagreement, relative_to_frames
from dust3r_sfm.geometry.transforms import inverse
from dust3r_sfm.graph import maximum_spanning_tree

MAX_ROTATION_DEG = 20.0
MAX_SCALE = 1.5
MAX_OFFSET = 0.5
"""What a pair may be off: its rotation, its scale as a factor, and its camera's place as a share of what it sees."""
TOLERANCES = (math.radians(MAX_ROTATION_DEG), math.log(MAX_SCALE), MAX_OFFSET)
MIN_STRENGTH = 1e-3
BLOCK = 200_000
"""Triangles that are looked at at once."""


@dataclass(frozen=True, eq=False)
class Consensus:
    """What became of each relation, in their order."""

    parts: Disagreement
    """How far the pair is from what all say."""
    off: Float[Tensor, " e"]
    """The same as the largest share of what it may be off."""
    off_reverse: Float[Tensor, " e"]
    """How far it is from the reversed pair; NaN where there is none."""
    num_triangles: Int[Tensor, " e"]
    num_agreeing: Int[Tensor, " e"]
    """Triangles that close within what a pair may be off."""
    reliability: Float[Tensor, " e"]


def find_consensus(relations: Relations, strengths: Float[Tensor, " e"]) -> Consensus:
    """The consensus of relations whose strengths, such as their confidences, are known."""
    images, measured, n = relations.images, relations.image1_from_image0, len(relations.names)
    edges = _Edges(images, n)
    off_reverse = torch.full((images.shape[1],), torch.nan, dtype=torch.float64)
    has_reverse = edges.reverse >= 0
    reverse = edges.reverse[has_reverse]
    off_reverse[has_reverse] = _off(measured[has_reverse], inverse(measured[reverse]))
    strengths = strengths.double().clamp(min=MIN_STRENGTH)
    strengths[has_reverse] = torch.minimum(strengths[has_reverse], strengths[reverse])
    reliability, num_triangles, num_agreeing = _reliability(edges, measured, strengths)
    reliability[has_reverse] = torch.minimum(reliability[has_reverse], reliability[reverse])
    world_from_image = average_similarities(
        images, measured, reliability.square(), _chained(relations, reliability), TOLERANCES
    )
    parts = disagreement(measured, relative_to_frames(world_from_image, images))
    return Consensus(parts, parts.relative_to(*TOLERANCES), off_reverse, num_triangles, num_agreeing, reliability)


class _Edges:
    """Directed pairs of images, found by their images."""

    def __init__(self, images: Int[Tensor, "2 e"], n: int) -> None:
        self.images, self.n = images, n
        self._keys, self._order = (images[0] * n + images[1]).sort()
        self._by_target = torch.argsort(images[1], stable=True)
        self._counts = torch.bincount(images[1], minlength=n)
        self.reverse = self.find(images[1], images[0])

    def find(self, source: Int[Tensor, " k"], target: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
        """Which pair leads from one image to another; -1 where none does."""
        wanted = source * self.n + target
        if len(self._keys) == 0:
            return torch.full_like(wanted, -1)
        place = torch.searchsorted(self._keys, wanted).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[place] == wanted, self._order[place], -1)

    def triangles(self) -> Iterator[tuple[Int[Tensor, " t"], Int[Tensor, " t"], Int[Tensor, " t"]]]:
        """Blocks of (pair, first, second): from a pair's second image to a third one's by `second`, from it `first`.

        The pair leads from image a to b, `first` from a third image c to a, `second` from c to b.
        """
        source, target = self.images
        first_of = self._counts.cumsum(0) - self._counts
        sizes = self._counts[source]
        blocks = (sizes.cumsum(0) - sizes) // BLOCK
        for block in torch.unique(blocks).tolist():
            pair = (blocks == block).nonzero()[:, 0]
            size = sizes[pair]
            within = torch.arange(int(size.sum())) - torch.repeat_interleave(size.cumsum(0) - size, size)
            pair = torch.repeat_interleave(pair, size)
            first = self._by_target[first_of[source[pair]] + within]
            second = self.find(source[first], target[pair])
            closed = second >= 0
            yield pair[closed], first[closed], second[closed]


def _reliability(
    edges: _Edges, measured: Float[Tensor, "e 4 4"], strengths: Float[Tensor, " e"]
) -> tuple[Float[Tensor, " e"], Int[Tensor, " e"], Int[Tensor, " e"]]:
    """Reliabilities, and how many triangles each pair is in and how many of them close.

    The geometric mean of two: the strength times the share of triangles that close, and the mean strength of the
    ways around (their weaker pair's, none where they do not close) with the pair's own.
    """
    counts, agreeing = torch.zeros_like(edges.reverse), torch.zeros_like(edges.reverse)
    around = strengths.clone()
    for pair, first, second in edges.triangles():
        closes = _off(measured[pair], measured[second] @ inverse(measured[first])) < 1
        counts += torch.bincount(pair, minlength=len(counts))
        agreeing += torch.bincount(pair[closes], minlength=len(counts))
        around.index_add_(0, pair, torch.minimum(strengths[first], strengths[second]) * closes)
    own = strengths * (agreeing + 1) / (counts + 2)
    return (own * around / (counts + 1)).sqrt(), counts, agreeing


def _off(measured: Float[Tensor, "e 4 4"], expected: Float[Tensor, "e 4 4"]) -> Float[Tensor, " e"]:
    return disagreement(measured, expected).relative_to(*TOLERANCES)


def _chained(relations: Relations, reliability: Float[Tensor, " e"]) -> Float[Tensor, "n 4 4"]:
    """world_from_image along the most reliable tree; in each part the world is its first image."""
    scores = dict(zip(relations.pairs, reliability.tolist(), strict=True))
    index = {pair: e for e, pair in enumerate(relations.pairs)}
    neighbors: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for e in (index[pair] for pair in maximum_spanning_tree(relations.names, scores)):
        i, j = relations.images[:, e].tolist()
        image1_from_image0 = relations.image1_from_image0[e]
        neighbors[i].append((j, inverse(image1_from_image0)))
        neighbors[j].append((i, image1_from_image0))
    frames = torch.eye(4, dtype=torch.float64).repeat(len(relations.names), 1, 1)
    placed: Bool[Tensor, " n"] = torch.zeros(len(frames), dtype=torch.bool)
    for root in range(len(frames)):
        waiting = deque([] if placed[root] else [root])
        placed[root] = True
        while waiting:
            i = waiting.popleft()
            for j, i_from_j in neighbors[i]:
                if not placed[j]:
                    frames[j], placed[j] = frames[i] @ i_from_j, True
                    waiting.append(j)
    return frames
