"""The graph of image pairs: which pairs to predict, its parts, and its strongest tree."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Literal

from dust3r_sfm.errors import InputError
from dust3r_sfm.pairs import Pair

PairKind = Literal["exhaustive", "sequential", "logarithmic", "one_reference"]


def make_pairs(
    names: Sequence[str], kind: PairKind = "exhaustive", window: int = 3, cyclic: bool = True, reference: int = 0
) -> list[Pair]:
    """Pairs of one kind, both directions of each; `window` and `cyclic` are for sequences, `reference` is an index."""
    if kind == "exhaustive":
        return pairs_exhaustive(names)
    if kind == "sequential":
        return pairs_sequential(names, window, cyclic)
    if kind == "logarithmic":
        return pairs_logarithmic(names, window, cyclic)
    if kind == "one_reference":
        return pairs_one_reference(names, reference)
    raise InputError(f"unknown kind of pairs {kind!r}: expected exhaustive, sequential, logarithmic or one_reference")


def pairs_exhaustive(names: Sequence[str]) -> list[Pair]:
    """Every image with every other."""
    _require_images(names)
    return symmetrize(Pair(*pair) for pair in combinations(names, 2))


def pairs_sequential(names: Sequence[str], window: int = 3, cyclic: bool = True) -> list[Pair]:
    """Every image with the `window` next ones; `cyclic` closes the sequence."""
    _require_window(window)
    return _pairs_at_offsets(names, range(1, window + 1), cyclic)


def pairs_logarithmic(names: Sequence[str], window: int = 3, cyclic: bool = True) -> list[Pair]:
    """Every image with those 1, 2, 4, ... 2^(window - 1) further; `cyclic` closes the sequence."""
    _require_window(window)
    return _pairs_at_offsets(names, (2**power for power in range(min(window, len(names).bit_length()))), cyclic)


def pairs_one_reference(names: Sequence[str], reference: int = 0) -> list[Pair]:
    """One image, by its index, with every other."""
    _require_images(names)
    if not 0 <= reference < len(names):
        raise InputError(f"the reference image must be an index from 0 to {len(names) - 1}, got {reference}")
    return symmetrize(Pair(names[reference], name) for name in names if name != names[reference])


def limit_sequence_distance(
    pairs: Iterable[Pair], names: Sequence[str], max_distance: int, cyclic: bool = False
) -> list[Pair]:
    """The pairs of images at most `max_distance` apart in `names`; `cyclic` closes the sequence."""
    position = {name: i for i, name in enumerate(names)}

    def distance(pair: Pair) -> int:
        apart = abs(position[pair.name0] - position[pair.name1])
        return min(apart, len(names) - apart) if cyclic else apart

    return [pair for pair in pairs if distance(pair) <= max_distance]


def symmetrize(pairs: Iterable[Pair]) -> list[Pair]:
    """Each pair followed by its reverse, once each; pairs of an image with itself are left out."""
    both = (direction for pair in pairs if pair.name0 != pair.name1 for direction in (pair, pair.reversed()))
    return list(dict.fromkeys(both))


def connected_components(names: Sequence[str], pairs: Iterable[Pair]) -> list[list[str]]:
    """Groups of images that pairs of either direction connect, largest first; lone images are groups of one.

    Images stay in the order of `names`, as do groups of equal size.
    """
    trees = DisjointSets(names)
    for pair in pairs:
        trees.join(pair.name0, pair.name1)
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(trees.root(name), []).append(name)
    return sorted(groups.values(), key=len, reverse=True)


def maximum_spanning_tree(names: Sequence[str], scores: Mapping[Pair, float]) -> list[Pair]:
    """The pairs that connect all images with the highest sum of scores, strongest first (Kruskal).

    Of two directions the stronger is taken; equal scores go in the order of `names`. A graph
    in several parts gives a tree for each; pairs whose score is NaN take no part.
    """
    position = {name: i for i, name in enumerate(names)}
    ranked = sorted(
        (pair for pair, score in scores.items() if not math.isnan(score)),
        key=lambda pair: (-scores[pair], position[pair.name0], position[pair.name1]),
    )
    trees = DisjointSets(names)
    return [pair for pair in ranked if trees.join(pair.name0, pair.name1)]


class DisjointSets:
    """Union-find over names, or numbers."""

    def __init__(self, names: Iterable[Hashable]) -> None:
        self._parent = {name: name for name in names}

    def root(self, name: Hashable) -> Hashable:
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def join(self, name0: Hashable, name1: Hashable) -> bool:
        """Puts both into one set; False where they are in one already."""
        root0, root1 = self.root(name0), self.root(name1)
        self._parent[root1] = root0
        return root0 != root1


def _pairs_at_offsets(names: Sequence[str], offsets: Iterable[int], cyclic: bool) -> list[Pair]:
    _require_images(names)
    n = len(names)
    steps = ((i, i + offset) for offset in offsets for i in range(n if cyclic else n - offset))
    return symmetrize(Pair(names[i], names[j % n]) for i, j in steps)


def _require_images(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise InputError(f"{len(names)} image{'' if len(names) == 1 else 's'} give no pairs: at least two are needed")


def _require_window(window: int) -> None:
    if window < 1:
        raise InputError(f"the window must be at least 1, got {window}: it counts the neighbours of an image")
