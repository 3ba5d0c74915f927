"""Depth and confidence of a scene's images on grids over the stored files, as 16-bit PNG or NPY."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64
from PIL import Image
from torch import Tensor

from dust3r_sfm.files import write_bytes
from dust3r_sfm.scene import Scene

EDGE_RATIO = 1.05
"""Depths of neighbours that differ by more belong to two surfaces: the nearest pixel's is taken, not a mean."""
PNG_LEVELS = 65_535
CONFIDENCE_UNIT = 0.01

Masks = Mapping[str, Bool[Tensor, "_h _w"]]
"""By image name, where the network pixels may be used."""


@dataclass(frozen=True, eq=False)
class DepthMap:
    """Depth on a grid that covers a whole stored file; 0 where there is none, outside the network's crop say."""

    depth: Float32[np.ndarray, "h w"]
    """z along the optical axis at the cells' centres."""
    confidence: Float32[np.ndarray, "h w"]
    K: Float64[np.ndarray, "3 3"]
    """Intrinsics in the grid's cells, corner origin; those of the pinhole behind a lens."""


def depth_map(
    scene: Scene, index: int, size: Literal["network", "original"] = "network", mask: Bool[Tensor, "h w"] | None = None
) -> DepthMap:
    """The depth of one image as its stored file lies (EXIF orientation ignored), as fine as the network or the file.

    Between pixels inverse depth is interpolated, which is exact on planes, but not over edges.
    """
    width, height = scene.original_sizes[index]
    net_from_img = scene.net_from_img[index].detach().cpu().double()
    fineness = float(torch.linalg.det(net_from_img[:2, :2]).abs().sqrt()) if size == "network" else 1.0
    w, h = (max(1, round(side * fineness)) for side in (width, height))
    grid_from_img = torch.diag(torch.tensor([w / width, h / height, 1.0], dtype=torch.float64))
    grid = np.stack(np.meshgrid((np.arange(w) + 0.5) * width / w, (np.arange(h) + 0.5) * height / h), axis=-1)
    x, y = scene.net_from_stored(index, grid.reshape(-1, 2)).reshape(grid.shape).transpose(2, 0, 1)

    depth = scene.depth[index].detach().cpu().float().numpy()
    usable = np.isfinite(depth) & (depth > 0)
    if mask is not None:
        usable &= mask.cpu().numpy()
    sampled, nearest = sample_depth(np.where(usable, depth, 0), x, y)
    confidence = scene.confidence[index].detach().cpu().float().numpy()[nearest] * (sampled > 0)
    return DepthMap(sampled, confidence.astype(np.float32), grid_from_img.numpy() @ scene.K_img(index))


def remapped(
    maps: tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]],
    source_from_target: Callable[[Float[np.ndarray, "n 2"]], Float[np.ndarray, "n 2"]],
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """Depth and confidence on pixels that lie elsewhere in the maps that are given; 0 where they lie outside."""
    depth, confidence = (m.detach().cpu().float().numpy() for m in maps)
    height, width = depth.shape
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1).reshape(-1, 2)
    x, y = source_from_target(grid).reshape(height, width, 2).transpose(2, 0, 1)
    sampled, nearest = sample_depth(np.where(np.isfinite(depth), depth, 0), x, y)
    return torch.from_numpy(sampled), torch.from_numpy(confidence[nearest] * (sampled > 0))


def write_depths(
    scene: Scene,
    folder: Path,
    kind: Literal["png", "npy"] = "npy",
    size: Literal["network", "original"] = "network",
    masks: Masks | None = None,
) -> None:
    """Writes `depth/<name>.<kind>`, `confidence/<name>.<kind>`, and `units.json`: a value times its unit is the depth.

    NPY files are float32 in units of the scene; PNG files have 16 bits, of which the scene's farthest point takes all.
    """
    maps = (depth_map(scene, i, size, (masks or {}).get(name)) for i, name in enumerate(scene.names))
    farthest = max(float(d[d.isfinite()].max()) if d.isfinite().any() else 0.0 for d in scene.depth)
    unit = 1.0 if kind == "npy" else max(farthest, 1e-6) / PNG_LEVELS
    confidence_unit = 1.0 if kind == "npy" else CONFIDENCE_UNIT
    for name, found in zip(scene.names, maps, strict=True):
        write_map(folder / "depth" / f"{name}.{kind}", found.depth / unit)
        write_map(folder / "confidence" / f"{name}.{kind}", found.confidence / confidence_unit)
    units = {"depth_unit": unit, "confidence_unit": confidence_unit, "size": size, "no_depth": 0}
    write_bytes(folder / "units.json", json.dumps(units, indent=1).encode())


def write_map(path: Path, values: Float[np.ndarray, "h w"]) -> None:
    """One channel as float32 NPY or as 16-bit PNG, rounded and clipped, by the path's suffix."""
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, values.astype(np.float32))
    else:
        Image.fromarray(np.clip(np.round(values), 0, PNG_LEVELS).astype(np.uint16)).save(buffer, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def sample_depth(
    depth: Float32[np.ndarray, "h0 w0"], x: Float64[np.ndarray, "h w"], y: Float64[np.ndarray, "h w"]
) -> tuple[Float32[np.ndarray, "h w"], tuple[np.ndarray, np.ndarray]]:
    """Depth at pixels (x, y), 0 outside and where they are NaN; and the (row, column) of the pixels that hold them."""
    height, width = depth.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = np.where(inside, x, 0), np.where(inside, y, 0)
    nearest = np.clip(y, 0, height - 1).astype(int), np.clip(x, 0, width - 1).astype(int)
    left, top = np.floor(x - 0.5).astype(int), np.floor(y - 0.5).astype(int)
    right_share, bottom_share = x - 0.5 - left, y - 0.5 - top
    columns, rows = (np.clip([a, a + 1], 0, n - 1) for a, n in ((left, width), (top, height)))
    corners = np.stack([depth[r, c] for r in rows for c in columns])
    shares = np.stack([a * b for a in (1 - bottom_share, bottom_share) for b in (1 - right_share, right_share)])
    smooth = corners.max(axis=0) <= EDGE_RATIO * corners.min(axis=0)  # also: no corner without depth, unless all are
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = 1 / (shares / corners).sum(axis=0)
    return np.where(smooth & inside & (corners[0] > 0), mean, depth[nearest] * inside).astype(np.float32), nearest
