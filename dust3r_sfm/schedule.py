"""In which order pairs are predicted, so that an image that is encoded meets its partners while it is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import reverse_cuthill_mckee

from dust3r_sfm.pairs import Pair


@dataclass(frozen=True)
class EncodingPass:
    """Every image is encoded at most once in a pass, when its turn comes."""

    names: tuple[str, ...]
    """Images in the order of their encoding."""
    pairs: tuple[Pair, ...]
    """Both directions of a pair stand beside each other."""


def encoding_passes(pairs: Sequence[Pair], capacity: int) -> list[EncodingPass]:
    """All pairs, once each, in passes of which each needs at most `capacity` encodings at any time.

    In a pass the image with most partners among those that are kept comes next, and the one that
    waits for fewest goes when there is no room; pairs whose images do not meet are left to the next
    pass. Neighbourhoods as narrow as the capacity need one pass; with some long links between them
    two: no image is encoded more than twice. Where each of n meets every other, about n / capacity times.
    """
    if capacity < 2:
        raise ValueError(f"a pair needs 2 encodings at once, the capacity is {capacity}")
    directions: dict[frozenset[str], list[Pair]] = {}
    for pair in dict.fromkeys(pairs):
        directions.setdefault(frozenset(pair), []).append(pair)
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    index = {name: i for i, name in enumerate(names)}
    left = np.array([[index[both[0].name0], index[both[0].name1]] for both in directions.values()]).reshape(-1, 2)
    by_edge = dict(zip(map(tuple, left.tolist()), directions.values(), strict=True))
    passes = []
    while len(left):
        order, met = _meet(left, _narrow_order(left, len(names)), capacity)
        met_pairs = tuple(pair for edge in met for pair in by_edge[edge])
        used = {i for edge in met for i in edge}
        passes.append(EncodingPass(tuple(names[i] for i in order if i in used), met_pairs))
        done = set(met)
        left = np.array([edge for edge in map(tuple, left.tolist()) if edge not in done]).reshape(-1, 2)
    return passes


def _narrow_order(edges: np.ndarray, num_images: int) -> list[int]:
    """Images of the edges, partners near each other; without edges far apart, the order that they came in."""
    both = np.concatenate([edges, edges[:, ::-1]])
    graph = coo_array((np.ones(len(both), dtype=np.int8), both.T), shape=(num_images, num_images)).tocsr()
    concerned = np.zeros(num_images, dtype=bool)
    concerned[edges] = True
    return [i for i in reverse_cuthill_mckee(graph, symmetric_mode=True).tolist() if concerned[i]]


def _meet(edges: np.ndarray, rank: Sequence[int], capacity: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The order in which images come, and the edges whose images are kept at the same time.

    The next is the one with most partners among the kept; of several, the first in `rank`.
    """
    partners: dict[int, dict[int, tuple[int, int]]] = {i: {} for i in rank}
    for i, j in edges.tolist():
        partners[i][j] = partners[j][i] = (i, j)
    place = {image: k for k, image in enumerate(rank)}
    waiting = {i: len(of) for i, of in partners.items()}  # partners still to come
    gain = dict.fromkeys(rank, 0)  # partners that are kept
    heap = [(0, place[i], i) for i in rank]
    kept: set[int] = set()
    come: set[int] = set()
    order, met = [], []

    def change(images: Iterable[int], by: int) -> None:
        for i in images:
            if i not in come:
                gain[i] += by
                heappush(heap, (-gain[i], place[i], i))

    while heap:
        found, _, image = heappop(heap)
        if image in come or -found != gain[image]:  # an entry of before its gain changed
            continue
        if len(kept) == capacity:
            given_up = min(kept, key=lambda i: (waiting[i], place[i]))
            kept.remove(given_up)
            change(partners[given_up], -1)
        come.add(image)
        order.append(image)
        met += [edge for partner, edge in partners[image].items() if partner in kept]
        for partner in partners[image]:
            waiting[partner] -= 1
        kept.add(image)
        change(partners[image], 1)
        kept -= {i for i in (image, *partners[image]) if waiting[i] == 0}
    return order, met
