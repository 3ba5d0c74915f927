"""The exact search of `surfaces` on a CUDA device as one kernel, by Triton: see `can_build_kernels`.

A program takes some queries that lie beside one another. Of the tiles it searches only those whose boxes are nearer
than what it has found, nearest first within each block of boxes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

QUERIES, BOXES, WARPS = 8, 64, 1
"""Of a program; the fastest on an H200 of 8, 16 and 32 queries by 1, 2 and 4 warps."""


def nearest_in_tiles(
    queries: Float[Tensor, "b q 3"],
    asked: Bool[Tensor, "b q"],
    points: Float[Tensor, "b 3 t p"],
    boxes: Float[Tensor, "b 6 t"],
) -> Int[Tensor, "b q"]:
    """Index into t * p of the point nearest to each query that is asked for; some index where there is none.

    `boxes` has the lower and the upper corner of each tile, `points` is infinite where there is none.
    """
    batch, num_queries = asked.shape
    found = torch.empty(batch, num_queries, dtype=torch.int32, device=queries.device)
    _nearest[(triton.cdiv(num_queries, QUERIES), batch)](
        *(queries.contiguous(), asked.contiguous(), points, boxes, found, num_queries, points.shape[2]),
        Q=QUERIES,
        P=points.shape[3],
        C=BOXES,
        num_warps=WARPS,
    )
    return found.long()


@triton.jit
def _gap(low, high, lower, upper):
    """How far an interval lies from each of others."""
    return tl.maximum(tl.maximum(lower - high, low - upper), 0.0)


@triton.jit
def _bounds(boxes, tile, mask, num_tiles, low_x, high_x, low_y, high_y, low_z, high_z):
    """Squared distance of a box from those of some tiles; infinite where `mask` is not."""
    box = boxes + tile
    inf = float("inf")
    x = _gap(low_x, high_x, tl.load(box, mask, inf), tl.load(box + 3 * num_tiles, mask, -inf))
    y = _gap(low_y, high_y, tl.load(box + num_tiles, mask, inf), tl.load(box + 4 * num_tiles, mask, -inf))
    z = _gap(low_z, high_z, tl.load(box + 2 * num_tiles, mask, inf), tl.load(box + 5 * num_tiles, mask, -inf))
    return x * x + y * y + z * z


@triton.jit
def _nearest(
    queries, asked, points, boxes, found, num_queries, num_tiles, Q: tl.constexpr, P: tl.constexpr, C: tl.constexpr
):
    batch = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * Q + tl.arange(0, Q)
    is_there = query < num_queries
    wanted = tl.load(asked + batch * num_queries + query, mask=is_there, other=0) != 0
    place = queries + (batch * num_queries + query) * 3
    x = tl.load(place, mask=wanted, other=0.0)
    y = tl.load(place + 1, mask=wanted, other=0.0)
    z = tl.load(place + 2, mask=wanted, other=0.0)
    xs, ys, zs = x[:, None], y[:, None], z[:, None]
    inf = float("inf")
    low_x, high_x = tl.min(tl.where(wanted, x, inf), 0), tl.max(tl.where(wanted, x, -inf), 0)
    low_y, high_y = tl.min(tl.where(wanted, y, inf), 0), tl.max(tl.where(wanted, y, -inf), 0)
    low_z, high_z = tl.min(tl.where(wanted, z, inf), 0), tl.max(tl.where(wanted, z, -inf), 0)
    points += batch * 3 * num_tiles * P
    boxes += batch * 6 * num_tiles
    pixel, lane = tl.arange(0, P), tl.arange(0, C)
    # The block that has the box nearest to all queries comes first, so that most others are passed over at once.
    nearest_bound = tl.full((), inf, tl.float32)
    first = tl.full((), 0, tl.int32)
    for start in range(0, num_tiles, C):
        tile = start + lane
        bounds = _bounds(boxes, tile, tile < num_tiles, num_tiles, low_x, high_x, low_y, high_y, low_z, high_z)
        bound = tl.min(bounds, 0)
        first = tl.where(bound < nearest_bound, start, first)
        nearest_bound = tl.minimum(bound, nearest_bound)
    distance = tl.full((Q, P), inf, tl.float32)  # of each place in a tile the nearest so far
    tile_of = tl.zeros((Q, P), tl.int32)
    best = tl.where(wanted, inf, -inf)
    for block in range(-C, num_tiles, C):
        start = tl.where(block < 0, first, block)
        tile = start + lane
        mask = (tile < num_tiles) & ((block < 0) | (start != first))
        bounds = _bounds(boxes, tile, mask, num_tiles, low_x, high_x, low_y, high_y, low_z, high_z)
        if tl.min(bounds, 0) < tl.max(best, 0):
            # queries that lie apart have a wide box, which is near many tiles that none of them needs
            own = _bounds(boxes, tile[None, :], mask[None, :], num_tiles, xs, xs, ys, ys, zs, zs)
            needed = tl.min(tl.where(own < best[:, None], own, inf), 0)
            while tl.min(needed, 0) < tl.max(best, 0):
                chosen = tl.argmin(needed, 0)
                needed = tl.where(lane == chosen, inf, needed)
                one = start + chosen
                if tl.max(best - _bounds(boxes, one, True, num_tiles, x, x, y, y, z, z), 0) > 0:
                    of_tile = points + one * P + pixel
                    dx = xs - tl.load(of_tile)[None, :]
                    dy = ys - tl.load(of_tile + num_tiles * P)[None, :]
                    dz = zs - tl.load(of_tile + 2 * num_tiles * P)[None, :]
                    candidate = dx * dx + dy * dy + dz * dz
                    is_nearer = candidate < distance
                    distance = tl.where(is_nearer, candidate, distance)
                    tile_of = tl.where(is_nearer, one, tile_of)
                    best = tl.where(wanted, tl.min(distance, 1), -inf)
    winner = tl.argmin(distance, 1)
    tile = tl.sum(tl.where(pixel[None, :] == winner[:, None], tile_of, 0), 1)
    tl.store(found + batch * num_queries + query, tile * P + winner, mask=is_there)
