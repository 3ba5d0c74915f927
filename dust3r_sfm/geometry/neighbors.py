"""Reciprocal nearest neighbours between two sets of points."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor


def reciprocal_neighbors(
    points0: Float[Tensor, "n d"], points1: Float[Tensor, "m d"]
) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"]]:
    """Indices of the points that are each other's nearest (DUSt3R, Sec. 3.3), in ascending order of the first.

    Every point has at most one partner. Equally near points count as nearest; among several
    that could pair with one point the first is taken. Points that are not finite have no partner.
    """
    kept0, kept1 = (p.isfinite().all(dim=-1).nonzero()[:, 0] for p in (points0, points1))
    if len(kept0) == 0 or len(kept1) == 0:
        return kept0[:0], kept1[:0]
    array0, array1 = (p[k].detach().cpu().numpy() for p, k in ((points0, kept0), (points1, kept1)))
    distance0, nearest1 = _nearest(array0, array1)
    candidates, candidate_of_0 = np.unique(nearest1, return_inverse=True)
    distance1, _ = _nearest(array1[candidates], array0)
    # Distances are symmetric to the last bit: equal means that no other point is nearer.
    mutual0 = np.flatnonzero(distance0 == distance1[candidate_of_0])
    _, first = np.unique(nearest1[mutual0], return_index=True)
    indices0 = np.sort(mutual0[first])
    indices1 = nearest1[indices0]
    return kept0[torch.from_numpy(indices0).to(kept0.device)], kept1[torch.from_numpy(indices1).to(kept1.device)]


def _nearest(queries: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Sliding midpoint splits build several times faster than medians, and surfaces query as fast.
    tree = cKDTree(points, balanced_tree=False, compact_nodes=False)
    return tree.query(queries, workers=-1)
