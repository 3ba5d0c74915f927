"""Where images start: relations that single pairs tell between images, those of them that others confirm, and trees.

Each image has a frame of its own, its camera at unit scale. A pair relates two of them by a similarity. Around a
triangle of images three of these must agree: pairs that no triangle confirms are the last that images are put together
by, group by group and along several trees, of which that start is taken that most pairs agree with. So wrong pairs do
no harm, however confident, while others outvote them.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor

from dust3r_sfm.alignment.agglomeration import joined_poses
from dust3r_sfm.geometry.averaging import relation_distances
from dust3r_sfm.geometry.transforms import inverse

MAX_TRIANGLES = 20
"""Third images by which a pair is judged."""
MIN_TOLERANCE = 0.02
"""Differences of two relations, in images' units, below which they always agree."""
SURE = 0.95
"""Share of all say that agrees where no other start is tried."""
NUM_TREES = 16
TREE_NOISE = 0.7
"""Spread of the logarithms of factors by which pairs are weighted anew for another tree."""
PRIOR = 0.25
"""Votes for a pair before any triangle is asked, and as many against it."""


def confirmed_shares(
    images: Int[Tensor, "2 e"], relations: Float[Tensor, "e 4 4"]
) -> tuple[Float[Tensor, " e"], float]:
    """How far triangles of images confirm each pair's image1_from_image0, 0 to 1, and the difference that is usual.

    One half where a pair is in no triangle.
    """
    low, high = images.min(dim=0).values, images.max(dim=0).values
    ordered = torch.where((images[0] == low)[:, None, None], relations, inverse(relations))
    pair, third = _triangles(low.tolist(), high.tolist())
    if len(pair) == 0:
        return torch.full((len(relations),), 0.5, dtype=torch.float64), MIN_TOLERANCE
    of_triangle = torch.full((len(pair),), torch.inf, dtype=torch.float64)
    for towards in third[:, 0].T:  # the direct and the reverse pair of each of the other two sides
        for back in third[:, 1].T:
            around = _oriented(ordered, back) @ _oriented(ordered, towards)
            of_triangle = of_triangle.minimum(relation_distances(ordered[pair], around))
    tolerance = max(3 * _typical(pair, of_triangle, len(relations)), MIN_TOLERANCE)
    votes = torch.full((len(relations),), PRIOR, dtype=torch.float64)
    votes.index_add_(0, pair, 1 / (1 + (of_triangle / tolerance).square()).square())
    return votes / (torch.bincount(pair, minlength=len(relations)) + 2 * PRIOR), tolerance


def best_tree_poses(
    images: Int[Tensor, "2 e"], relations: Float[Tensor, "e 4 4"], scores: Float[Tensor, " e"], n: int
) -> Float[Tensor, "n 4 4"]:
    """world_from_image of connected images, by the best of some starts; the world is one of the images.

    `scores` are the pairs' confidences; the first tree is of those that are highest where triangles confirm them.
    """
    shares, tolerance = confirmed_shares(images, relations)
    strength = shares.square() * scores.double().clamp(min=1e-12).sqrt()
    generator = torch.Generator().manual_seed(0)
    best, most = torch.zeros(0, 4, 4, dtype=torch.float64), -1.0
    for i in range(NUM_TREES + 1):
        if i == 0:
            poses = joined_poses(images, relations, shares, strength, tolerance, n)
        else:
            noise = torch.randn(len(strength), generator=generator, dtype=torch.float64) * (TREE_NOISE if i > 1 else 0)
            poses = _chained(images, relations, strength * noise.exp(), n)
        expected = inverse(poses[images[1]]) @ poses[images[0]]
        differences = relation_distances(relations, expected)
        agreement = float((strength.sqrt() / (1 + (differences / tolerance).square())).sum())
        if agreement > most:
            best, most = poses, agreement
        if agreement > SURE * float(strength.sqrt().sum()):
            break
    return best


def _triangles(low: list[int], high: list[int]) -> tuple[Int[Tensor, " t"], Int[Tensor, "t 2 2"]]:
    """For each triangle and pair in it: the pair, and the pairs from its lower image to the third and on to its higher.

    Of each of these two sides there are two entries, the same one twice where images have one pair; -1 - e stands for
    the pair e in the other direction.
    """
    pairs_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    neighbors: dict[int, set[int]] = defaultdict(set)
    for e, (a, b) in enumerate(zip(low, high, strict=True)):
        pairs_of[a, b].append(e)
        neighbors[a].add(b)
        neighbors[b].add(a)

    def side(a: int, b: int) -> list[int]:
        found = pairs_of[min(a, b), max(a, b)]
        ends = [found[0], found[-1]]
        return ends if a < b else [-1 - e for e in ends]

    pair, third = [], []
    for (a, b), same in pairs_of.items():
        common = sorted(neighbors[a] & neighbors[b])
        for c in common[:: -(-len(common) // MAX_TRIANGLES) or 1]:
            pair += same
            third += [[side(a, c), side(c, b)]] * len(same)
    return torch.tensor(pair, dtype=torch.long), torch.tensor(third, dtype=torch.long).view(-1, 2, 2)


def _oriented(relations: Float[Tensor, "e 4 4"], signed: Int[Tensor, " t"]) -> Float[Tensor, "t 4 4"]:
    chosen = relations[torch.where(signed < 0, -1 - signed, signed)]
    return torch.where((signed < 0)[:, None, None], inverse(chosen), chosen)


def _typical(pair: Int[Tensor, " t"], values: Float[Tensor, " t"], num_pairs: int) -> float:
    """What the triangles of right pairs differ by that are right: there may be few of either."""
    order = np.lexsort((values.numpy(), pair.numpy()))
    counts = torch.bincount(pair, minlength=num_pairs)
    first = counts.cumsum(0) - counts
    has_any = counts > 0
    return float(values[torch.from_numpy(order)][(first + counts // 8)[has_any]].quantile(0.3))


def _chained(
    images: Int[Tensor, "2 e"], relations: Float[Tensor, "e 4 4"], strength: Float[Tensor, " e"], n: int
) -> Float[Tensor, "n 4 4"]:
    """world_from_image along the tree of the strongest pairs, from its most connected image."""
    rank = np.empty(len(strength))
    rank[np.argsort(-strength.numpy(), kind="stable")] = np.arange(1, len(strength) + 1)
    low, high = np.sort(images.numpy(), axis=0)
    order = np.lexsort((rank, high, low))
    first = order[np.diff(low[order] * n + high[order], prepend=-1) != 0]  # the stronger of both directions
    tree = minimum_spanning_tree(coo_array((rank[first], (low[first], high[first])), shape=(n, n)).tocsr()).tocoo()
    edge_of = dict(zip(zip(low[first].tolist(), high[first].tolist(), strict=True), first.tolist(), strict=True))
    root = int(np.bincount(np.concatenate([tree.row, tree.col]), minlength=n).argmax())
    walk, previous = breadth_first_order(tree.tocsr(), root, directed=False)
    poses = np.tile(np.eye(4), (n, 1, 1))
    forward, backward = relations.numpy(), inverse(relations).numpy()
    for node in walk[1:].tolist():
        parent = int(previous[node])
        e = edge_of[min(node, parent), max(node, parent)]
        poses[node] = poses[parent] @ (forward[e] if int(images[0, e]) == node else backward[e])
    return torch.from_numpy(poses)
