"""Images that stand for all others: farthest-point sampling of descriptors, and the links between them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.retrieval.exact import Rows, exact_top_k, unit_rows, without_self

BLOCK_ROWS = 16384


def farthest_points(rows: Rows, count: int) -> list[int]:
    """Indices of up to `count` rows, each the least similar to those before it.

    The first is the row nearest to the mean. Ends early where all rows equal one of the chosen. Equal rows go by the
    lower index.
    """
    if not len(rows) or count < 1:
        return []
    mean = sum(unit_rows(block).sum(dim=0) for block in _blocks(rows))
    chosen = [int(_cosines(rows, mean).argmax())]
    nearest = _cosines(rows, unit_rows(rows[chosen[0] : chosen[0] + 1])[0])
    while len(chosen) < min(count, len(rows)):
        farthest = int(nearest.argmin())
        if nearest[farthest] > 1 - 1e-6:
            break
        chosen.append(farthest)
        nearest = torch.maximum(nearest, _cosines(rows, unit_rows(rows[farthest : farthest + 1])[0]))
    return chosen


def key_links(rows: Rows, keys: list[int], num_links: int = 3) -> list[tuple[int, int]]:
    """Pairs of indices: each key image with its nearest key images, then each other image with its nearest key."""
    if not keys:
        return []
    index = torch.tensor(keys)
    key_rows = torch.cat([unit_rows(rows[key : key + 1]) for key in keys]).numpy()
    among = exact_top_k(key_rows, key_rows, num_links + 1, engine="torch")
    among = without_self(among, torch.arange(len(keys)), num_links).indices
    links = [(keys[i], keys[j]) for i, row in enumerate(among.tolist()) for j in row if j >= 0]
    nearest = index[exact_top_k(rows, key_rows, 1, engine="torch").indices[:, 0]]
    chosen = set(keys)
    return links + [(i, key) for i, key in enumerate(nearest.tolist()) if i not in chosen]


def _cosines(rows: Rows, direction: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
    return torch.cat([unit_rows(block) @ direction for block in _blocks(rows)])


def _blocks(rows: Rows) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), BLOCK_ROWS):
        yield rows[start : start + BLOCK_ROWS]
