"""Nearest points of pointmaps: surfaces whose pixels lie beside one another, so that a search need not see all of them.

A map is cut into tiles of pixels; the boxes around their points bound how near they can be. On a CUDA device a kernel
searches all tiles that may hold the nearest point; where it cannot be built, and on other devices, a fixed sequence
of tensor operations searches the tiles of least bound. Nothing waits for the host. On the CPU there is a tree over all
points.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn.functional import pad

TILE = 8
"""Pixels along a tile's sides."""
NUM_TILES = 32
"""Tiles that are searched for a point: over 99 % of the nearest points of two pointmaps of a scene lie in them."""
MAX_ENTRIES = 2**26
"""Numbers that are held at once."""


@dataclass(frozen=True, eq=False)
class Surface:
    """A batch of pointmaps and which of their pixels may be found."""

    points: Float[Tensor, "b h w 3"]
    usable: Bool[Tensor, "b h w"]

    @cached_property
    def trees(self) -> list[tuple[Int[Tensor, " _n"], cKDTree]]:
        """Of each map the indices of the usable pixels and a tree over their points."""
        trees = []
        for points, usable in zip(self.points.cpu(), self.usable.cpu(), strict=True):
            # Sliding midpoint splits build several times faster than medians, and surfaces query as fast.
            tree = cKDTree(points.numpy()[usable.numpy()], balanced_tree=False, compact_nodes=False)
            trees.append((usable.flatten().nonzero()[:, 0], tree))
        return trees

    @cached_property
    def tiles(self) -> tuple[Float[Tensor, "b 3 t p"], Float[Tensor, "b 6 t"]]:
        """The usable points by tiles, infinite where there is none, and the corners of the boxes around them."""
        least = _tiles(self.points.masked_fill(~self.usable[..., None], torch.inf), torch.inf)
        empty = least.isinf()
        points = least.permute(0, 3, 1, 2).contiguous()
        highest = least.masked_fill_(empty, -torch.inf).amax(dim=2)
        return points, torch.cat([points.amin(dim=3), highest.mT], dim=1)


def nearest_pixels(
    queries: Float[Tensor, "b q 3"], asked: Bool[Tensor, "b q"], surface: Surface, num_tiles: int = NUM_TILES
) -> Int[Tensor, "b q"]:
    """Index into h * w of the usable point nearest to each query; some index where none is usable or asked for."""
    if surface.points.device.type == "cpu":
        return exact_pixels(queries, asked, surface)
    if surface.points.is_cuda and can_build_kernels():
        return exact_pixels_by_kernel(queries, asked, surface)
    return near_pixels(queries, surface, num_tiles)


@cache
def can_build_kernels() -> bool:
    """Whether Triton is there, and what it builds its kernels' launchers with: a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does for Debian's Python
    headers = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    return find_spec("triton") is not None and compiler is not None and headers.is_file()


def exact_pixels(queries: Float[Tensor, "b q 3"], asked: Bool[Tensor, "b q"], surface: Surface) -> Int[Tensor, "b q"]:
    """The same by a tree over the usable points of each map, on the CPU."""
    found = torch.zeros(asked.shape, dtype=torch.int64)
    for b, (indices, tree) in enumerate(surface.trees):
        wanted = asked[b].cpu()
        if len(indices) and wanted.any():
            _, nearest = tree.query(queries[b].cpu()[wanted].numpy(), workers=-1)
            found[b, wanted] = indices[torch.from_numpy(nearest)]
    return found.to(queries.device)


def exact_pixels_by_kernel(
    queries: Float[Tensor, "b q 3"], asked: Bool[Tensor, "b q"], surface: Surface
) -> Int[Tensor, "b q"]:
    """The same on a CUDA device, by boxes around tiles of the map."""
    from dust3r_sfm.geometry.nearest_kernel import nearest_in_tiles

    return _pixel_of(nearest_in_tiles(queries, asked, *surface.tiles), surface)


def near_pixels(queries: Float[Tensor, "b q 3"], surface: Surface, num_tiles: int = NUM_TILES) -> Int[Tensor, "b q"]:
    """The same among the points of the tiles whose boxes are nearest, on any device."""
    lower, upper = (
        _tiles(torch.where(surface.usable[..., None], surface.points, filler), filler)
        for filler in (torch.inf, -torch.inf)
    )
    boxes = lower.amin(dim=2), upper.amax(dim=2)
    per_query = len(queries) * max(lower.shape[1], num_tiles * TILE**2)
    parts = queries.split(max(1, MAX_ENTRIES // per_query), dim=1)
    found = torch.cat([_nearest_of_tiles(part, lower, boxes, num_tiles) for part in parts], dim=1)
    return _pixel_of(found, surface)


def _pixel_of(found: Int[Tensor, "b q"], surface: Surface) -> Int[Tensor, "b q"]:
    """Index into h * w for an index into t * p."""
    tile, place = found // TILE**2, found % TILE**2
    width = surface.usable.shape[2]
    tiles_in_a_row = -(-width // TILE)
    row = (tile // tiles_in_a_row) * TILE + place // TILE
    column = (tile % tiles_in_a_row) * TILE + place % TILE
    # Without any usable point a pixel of the margin may come out.
    return row.clamp(max=surface.usable.shape[1] - 1) * width + column.clamp(max=width - 1)


def _tiles(values: Float[Tensor, "b h w 3"], filler: float) -> Float[Tensor, "b t p 3"]:
    margin = (0, 0, 0, -values.shape[2] % TILE, 0, -values.shape[1] % TILE)
    cut = pad(values, margin, value=filler).unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _nearest_of_tiles(
    queries: Float[Tensor, "b q 3"],
    points: Float[Tensor, "b t p 3"],
    boxes: tuple[Float[Tensor, "b t 3"], Float[Tensor, "b t 3"]],
    num_tiles: int,
) -> Int[Tensor, "b q"]:
    """Index into t * p."""
    bound = _bounds(queries, *boxes)
    chosen = bound.topk(min(num_tiles, points.shape[1]), largest=False, sorted=False).indices
    distance = torch.zeros(*chosen.shape, TILE**2, device=queries.device)
    batch = torch.arange(len(queries), device=queries.device)[:, None, None]
    for axis in range(3):
        distance += (points[..., axis][batch, chosen] - queries[..., axis, None, None]).square_()
    place = distance.flatten(2).argmin(dim=2)
    tile = chosen.gather(2, (place // TILE**2)[..., None])[..., 0]
    return tile * TILE**2 + place % TILE**2


def _bounds(
    queries: Float[Tensor, "b q 3"], lower: Float[Tensor, "b t 3"], upper: Float[Tensor, "b t 3"]
) -> Float[Tensor, "b q t"]:
    """Squared distance of each query from each box; infinite from an empty one."""
    bound = torch.zeros(*queries.shape[:2], lower.shape[1], device=queries.device)
    for axis in range(3):
        value = queries[..., axis, None]
        outside = torch.maximum(lower[:, None, :, axis] - value, value - upper[:, None, :, axis])
        bound = bound + outside.clamp(min=0).square()
    return bound


def nearest_on_surface(
    queries: Float[Tensor, "b q 3"], asked: Bool[Tensor, "b q"], surface: Surface, num_tiles: int = NUM_TILES
) -> tuple[Float[Tensor, "b q 2"], Float[Tensor, "b q 3"]]:
    """Pixel (x, y) and point of a surface nearest to each query: the nearest pixel's, moved within its plane."""
    index = nearest_pixels(queries, asked, surface, num_tiles)
    width = surface.usable.shape[2]
    rows, columns = index // width, index % width
    base = at_pixels(surface.points, rows, columns)
    step_x, step_y = pixel_steps(surface.points, rows, columns)
    a, b, c = ((u * v).sum(dim=-1) for u, v in ((step_x, step_x), (step_x, step_y), (step_y, step_y)))
    p, q = ((step * (queries - base)).sum(dim=-1) for step in (step_x, step_y))
    determinant = a * c - b * b
    regular = determinant > 1e-6 * a * c
    determinant = torch.where(regular, determinant, 1)
    offset = torch.stack([c * p - b * q, a * q - b * p], dim=-1) / determinant[..., None]
    offset = torch.where(regular[..., None] & offset.isfinite(), offset, 0).clamp(-0.5, 0.5)
    nearest = base + offset[..., :1] * step_x + offset[..., 1:] * step_y
    return torch.stack([columns, rows], dim=-1) + 0.5 + offset, nearest


def pixel_steps(
    points: Float[Tensor, "b h w 3"], rows: Int[Tensor, "b q"], columns: Int[Tensor, "b q"]
) -> tuple[Float[Tensor, "b q 3"], Float[Tensor, "b q 3"]]:
    """How the surface moves for one pixel in x and in y; the smaller of both sides, so not over an edge."""
    height, width = points.shape[1:3]
    base = at_pixels(points, rows, columns)
    return (
        _smaller(
            at_pixels(points, rows, (columns + 1).clamp(max=width - 1)) - base,
            base - at_pixels(points, rows, (columns - 1).clamp(min=0)),
        ),
        _smaller(
            at_pixels(points, (rows + 1).clamp(max=height - 1), columns) - base,
            base - at_pixels(points, (rows - 1).clamp(min=0), columns),
        ),
    )


def _smaller(forward: Float[Tensor, "b q 3"], backward: Float[Tensor, "b q 3"]) -> Float[Tensor, "b q 3"]:
    lengths = [step.square().sum(dim=-1) for step in (forward, backward)]
    lengths = [torch.where(length.isfinite() & (length > 0), length, torch.inf) for length in lengths]
    step = torch.where((lengths[0] <= lengths[1])[..., None], forward, backward)
    return torch.where(step.isfinite(), step, 0)


def at_pixels(values: Tensor, rows: Int[Tensor, "b q"], columns: Int[Tensor, "b q"]) -> Tensor:
    """The values (b h w ...) at some pixels of each map, (b q ...)."""
    return values[torch.arange(len(values), device=values.device)[:, None], rows, columns]
