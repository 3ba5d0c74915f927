"""From the nearest neighbours of each image to the pairs worth predicting: connected, of bounded degree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.graph import DisjointSets
from dust3r_sfm.pairs import Pair

Reason = Literal["tree", "sequence", "position", "key", "mutual", "neighbor"]
"""Why a pair is in the graph; of several reasons the first of these."""

_Edge = tuple[int, int]


def pairs_from_neighbors(
    names: Sequence[str],
    neighbors: Int[Tensor, "n k"],
    scores: Float[Tensor, "n k"],
    max_degree: int,
    links: Iterable[tuple[int, int]] = (),
    sequence_window: int = 0,
    near: Iterable[tuple[int, int]] = (),
) -> dict[Pair, Reason]:
    """The pairs of a graph over the images, one direction each, with the reason for each; strongest reason first.

    `neighbors` are the indices of each image's nearest others, nearest first, with their `scores`; -1 stands for none.
    Taken are, in this order, and an image has at most `max_degree` pairs: a spanning tree of each part that the
    neighbours form, of the best ranks; neighbours in the sequences of names, up to `sequence_window` apart; images
    taken `near` each other; `links` of distant images; neighbours of each other, by rank; neighbours of one side. Only
    where the tree cannot do without them are there more than `max_degree`, so that no image that has a neighbour is
    left alone.
    """
    if max_degree < 1:
        raise InputError(f"an image must be allowed at least one pair, got a limit of {max_degree}")
    if len(names) != len(neighbors) or neighbors.shape != scores.shape:
        raise ValueError(f"{len(names)} names do not go with {tuple(neighbors.shape)} and {tuple(scores.shape)}")
    ranked, mutual = rank_edges(neighbors, scores)
    sequences = [_edge(i, j) for i, j in _sequence_pairs(names, sequence_window)]
    reasons: dict[_Edge, Reason] = dict.fromkeys(_tree(names, ranked, max_degree), "tree")
    degrees = Counter(i for edge in reasons for i in edge)

    def take(edges: Iterable[_Edge], reason: Reason) -> None:
        for edge in edges:
            if edge not in reasons and edge[0] != edge[1] and all(degrees[i] < max_degree for i in edge):
                reasons[edge] = reason
                degrees.update(edge)

    take(sequences, "sequence")
    take((_edge(i, j) for i, j in near), "position")
    take((_edge(i, j) for i, j in links), "key")
    take((edge for edge in ranked if edge in mutual), "mutual")
    take(ranked, "neighbor")
    return {Pair(names[i], names[j]): reason for (i, j), reason in reasons.items()}


def rank_edges(neighbors: Int[Tensor, "n k"], scores: Float[Tensor, "n k"]) -> tuple[list[_Edge], set[_Edge]]:
    """The edges between neighbours, best first, and those of them that are neighbours of each other.

    Mutual ones come first, then those of the smallest sum of ranks (the missing rank of the others is the number of
    columns), then of the highest score, then of the lowest indices.
    """
    num_ranks = neighbors.shape[1]
    ranks: dict[_Edge, list[int]] = {}
    best: dict[_Edge, float] = {}
    for i, (row, row_scores) in enumerate(zip(neighbors.tolist(), scores.tolist(), strict=True)):
        for rank, (j, score) in enumerate(zip(row, row_scores, strict=True)):
            if j >= 0 and j != i:
                edge = _edge(i, j)
                ranks.setdefault(edge, []).append(rank)
                best[edge] = max(score, best.get(edge, score))
    mutual = {edge for edge, found in ranks.items() if len(found) > 1}

    def order(edge: _Edge) -> tuple[bool, int, float, _Edge]:
        found = ranks[edge]
        return edge not in mutual, sum(found) + num_ranks * (2 - len(found)), -best[edge], edge

    return sorted(ranks, key=order), mutual


def nearest_positions(positions: Float[np.ndarray, "n d"], count: int) -> list[_Edge]:
    """Each image with the `count` that were taken nearest to it, nearest pairs first; NaN where that is unknown."""
    known = np.flatnonzero(np.isfinite(positions).all(axis=1))
    if len(known) < 2:
        return []
    distances, others = cKDTree(positions[known]).query(positions[known], min(count + 1, len(known)))
    found = {
        _edge(int(known[i]), int(known[j])): float(distance)
        for i, (row, js) in enumerate(zip(distances, others, strict=True))
        for distance, j in zip(row, js, strict=True)
        if i != j
    }
    return sorted(found, key=lambda edge: (found[edge], edge))


def sequences_of(names: Sequence[str]) -> list[list[int]]:
    """The images of each folder in the order that their names count in: `2.jpg` before `10.jpg`."""
    folders: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        folders.setdefault(name.rpartition("/")[0], []).append(i)
    return [sorted(images, key=lambda i: _natural_order(names[i])) for _, images in sorted(folders.items())]


def _sequence_pairs(names: Sequence[str], window: int) -> list[_Edge]:
    """Close ones first, so that a limit on the degree takes the far ones away."""
    if window < 1:
        return []
    sequences = sequences_of(names)
    return [
        edge
        for step in range(1, window + 1)
        for images in sequences
        for edge in zip(images, images[step:], strict=False)
    ]


def _tree(names: Sequence[str], ranked: Sequence[_Edge], max_degree: int) -> list[_Edge]:
    """A spanning tree of each part, best edges first; beyond `max_degree` only what connects what nothing else does."""
    trees, degrees = DisjointSets(names), Counter()
    edges = []
    for limit in (max_degree, float("inf")):
        for edge in ranked:
            if all(degrees[i] < limit for i in edge) and trees.join(names[edge[0]], names[edge[1]]):
                edges.append(edge)
                degrees.update(edge)
    return edges


def _natural_order(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Text and numbers in turn, numbers by their value."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), part) if i % 2 else part for i, part in enumerate(parts)], name


def _edge(i: int, j: int) -> _Edge:
    return (i, j) if i < j else (j, i)
