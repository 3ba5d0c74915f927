"""Frames of images from pairs of which some are wrong: clusters of pairs that are believed, put together by the others.

Between two clusters the pairs that agree on how these lie speak together. The two with most in favour are joined
first, so that clusters are large, and their evidence with them, before doubtful ones have their turn.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.geometry.averaging import average_similarities, disagreement
from dust3r_sfm.geometry.transforms import inverse
from dust3r_sfm.graph import DisjointSets

MIN_BELIEF = 3.0
"""More than there is evidence for any pair by itself: others confirm it."""
MAX_CANDIDATES = 12
"""Pairs between two clusters that are asked how these lie."""


def assembled(
    images: Int[Tensor, "2 e"],
    measured: Float[Tensor, "e 4 4"],
    evidence: Float[Tensor, " e"],
    belief: Float[Tensor, " e"],
    n: int,
    tolerances: tuple[float, float, float],
) -> Float[Tensor, "n 4 4"]:
    """world_from_image of n images, a world for each part; `evidence` are log odds of image1_from_image0 `measured`."""
    believed = belief > MIN_BELIEF
    frames, groups = spanned(images[:, believed], measured[believed], belief[believed], n)
    if bool(believed.any()):
        ones = torch.ones(int(believed.sum()), dtype=torch.float64)
        frames = average_similarities(images[:, believed], measured[believed], ones, frames, tolerances)
    clusters = _Clusters(images, measured, evidence, frames, groups, tolerances)
    while clusters.join_best():
        pass
    return clusters.frames


def spanned(
    images: Int[Tensor, "2 e"], measured: Float[Tensor, "e 4 4"], scores: Float[Tensor, " e"], n: int
) -> tuple[Float[Tensor, "n 4 4"], list[list[int]]]:
    """world_from_image along the tree of the highest scores, and the images of each part, whose first is its world."""
    sets = DisjointSets(range(n))
    ends = images.T.tolist()
    neighbors: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for e in torch.argsort(scores, descending=True, stable=True).tolist():
        i, j = ends[e]
        if sets.join(i, j):
            neighbors[i].append((j, inverse(measured[e])))
            neighbors[j].append((i, measured[e]))
    frames = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    placed, groups = [False] * n, []
    for root in range(n):
        if placed[root]:
            continue
        placed[root], group, waiting = True, [], deque([root])
        while waiting:
            group.append(i := waiting.popleft())
            for j, i_from_j in neighbors[i]:
                if not placed[j]:
                    frames[j], placed[j] = frames[i] @ i_from_j, True
                    waiting.append(j)
        groups.append(group)
    return frames, groups


class _Clusters:
    """Images of a cluster are in its frame; clusters are joined two at a time."""

    def __init__(
        self,
        images: Int[Tensor, "2 e"],
        measured: Float[Tensor, "e 4 4"],
        evidence: Float[Tensor, " e"],
        frames: Float[Tensor, "n 4 4"],
        groups: Sequence[list[int]],
        tolerances: tuple[float, float, float],
    ) -> None:
        self.images, self.measured, self.evidence, self.frames = images, measured, evidence, frames.clone()
        self.tolerances = tolerances
        self.members = dict(enumerate(groups))
        self.cluster_of = torch.empty(len(frames), dtype=torch.long)
        for cluster, group in self.members.items():
            self.cluster_of[group] = cluster
        self.between: dict[int, dict[int, list[int]]] = {cluster: {} for cluster in self.members}
        for e, (a, b) in enumerate(self.cluster_of[images].T.tolist()):
            if a != b:
                self.between[a].setdefault(b, []).append(e)
                self.between[b].setdefault(a, []).append(e)
        self._queue: list[tuple[float, int, int, int]] = []
        self._current: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self._count = 0
        for a, others in self.between.items():
            self._ask(a, (b for b in others if a < b))
        heapify(self._queue)

    def join_best(self) -> bool:
        """Join the two clusters that most speaks for; False where none are left that any pair connects."""
        while self._queue:
            _, count, a, b = heappop(self._queue)
            if (a, b) in self._current and self._current[a, b][0] == count:
                self._join(a, b, self._current[a, b][1])
                return True
        return False

    def _join(self, a: int, b: int, b_from_a: Float[Tensor, "4 4"]) -> None:
        into, gone, into_from_gone = b, a, b_from_a
        if len(self.between[a]) > len(self.between[b]):
            into, gone, into_from_gone = a, b, inverse(b_from_a)
        moved = self.members.pop(gone)
        self.frames[moved] = into_from_gone @ self.frames[moved]
        self.cluster_of[moved] = into
        self.members[into] += moved
        changed = self.between.pop(gone)
        for other, edges in changed.items():
            self._current.pop((min(gone, other), max(gone, other)), None)
            del self.between[other][gone]
            if other != into:
                edges = self.between[into].get(other, []) + edges  # noqa: PLW2901
                self.between[into][other] = self.between[other][into] = edges
        self._ask(into, (other for other in changed if other != into))

    def _ask(self, a: int, others: Iterable[int]) -> None:
        for other in others:
            low, high = min(a, other), max(a, other)
            worth, high_from_low = self._speaking(low, high)
            self._count += 1
            self._current[low, high] = self._count, high_from_low
            heappush(self._queue, (-worth, self._count, low, high))

    def _speaking(self, a: int, b: int) -> tuple[float, Float[Tensor, "4 4"]]:
        """What speaks for joining two clusters, and b_from_a.

        That is the evidence for the pairs that agree on it, less that for those that do not; on average where it is
        against, as many doubtful pairs are no worse than a few.
        """
        edges = torch.tensor(self.between[a][b])
        source, target = self.images[:, edges]
        is_forward = self.cluster_of[source] == a
        measured = torch.where(is_forward[:, None, None], self.measured[edges], inverse(self.measured[edges]))
        in_a, in_b = torch.where(is_forward, source, target), torch.where(is_forward, target, source)
        a_from_image, image_from_b = self.frames[in_a], inverse(self.frames[in_b])
        b_from_a = self.frames[in_b] @ measured @ inverse(a_from_image)
        evidence = self.evidence[edges]
        chosen = evidence.topk(min(MAX_CANDIDATES, len(edges))).indices
        expected = image_from_b @ b_from_a[chosen, None] @ a_from_image
        off = disagreement(measured.expand_as(expected).flatten(0, 1), expected.flatten(0, 1))
        agrees = (off.relative_to(*self.tolerances) < 1).view(len(chosen), -1)
        worth = torch.where(agrees, evidence, -evidence.clamp(min=0)).sum(dim=1)
        best = int(worth.argmax())
        value = float(worth[best])
        return value if value > 0 else value / max(1, int(agrees[best].sum())), b_from_a[chosen[best]]
