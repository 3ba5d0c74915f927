"""Point clouds: of a scene's depth maps, and as PLY files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dust3r_sfm.files import write_bytes
from dust3r_sfm.geometry.camera import unproject
from dust3r_sfm.geometry.transforms import inverse, transform_points
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View

PLY_VERTEX = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])


def write_ply(path: Path, points: Float[Tensor, "n 3"], colors: UInt8[Tensor, "n 3"]) -> None:
    """Writes a binary PLY of float x y z and uchar red green blue, as COLMAP's own; whole or not at all."""
    vertices = np.empty(len(points), dtype=PLY_VERTEX)
    vertices["xyz"] = points.detach().cpu().numpy()
    vertices["rgb"] = colors.cpu().numpy()
    properties = [f"property float {axis}" for axis in "xyz"]
    properties += [f"property uchar {color}" for color in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header", ""]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, "\n".join(header).encode() + vertices.tobytes())


def dense_cloud(
    scene: Scene, views: Sequence[View], min_confidence: float | None = None, max_points: int = 1_000_000
) -> tuple[Float[Tensor, "n 3"], UInt8[Tensor, "n 3"]]:
    """Points in the world and RGB of all pixels of sufficient confidence.

    Without `min_confidence` it is each image's median, as the confidences of networks differ.
    Pixels without depth or under a view's mask are left out. More than `max_points` are
    thinned evenly over images and pixels: the same scene always gives the same cloud.
    """
    view_of = {view.name: view for view in views}
    points, colors = [], []
    for index, name in enumerate(scene.names):
        depth, confidence, view = scene.depth[index].cpu(), scene.confidence[index].cpu(), view_of[name]
        least = float(confidence.median()) if min_confidence is None else min_confidence
        usable = (confidence >= least) & (depth > 0) & depth.isfinite()
        if view.mask is not None:
            usable &= view.mask.cpu()
        in_cam = unproject(scene.K[index].cpu(), depth.to(scene.K.dtype))[usable]
        points.append(transform_points(inverse(scene.cam_from_world[index].cpu()), in_cam).float())
        colors.append(view.image.cpu()[usable])
    all_points, all_colors = torch.cat(points), torch.cat(colors)
    if len(all_points) > max_points:
        kept = torch.arange(max_points) * len(all_points) // max_points
        all_points, all_colors = all_points[kept], all_colors[kept]
    return all_points, all_colors
