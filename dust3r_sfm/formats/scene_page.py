"""scene.html: scenes to walk around in, in one file that any browser opens without a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dust3r_sfm.formats.pages import write_page
from dust3r_sfm.formats.pictures import map_uri, nearness, photo_uri
from dust3r_sfm.formats.viewing import Edge, ViewedCloud, certainty, outlook, viewed_cloud
from dust3r_sfm.geometry.transforms import inverse
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View

STEPS = 65_535
"""Steps of a point's coordinates over the longest side of the cloud's box."""
MAX_PICTURED = 300
"""Cameras with photos and depth; of larger scenes the others are drawn as wires alone."""
PHOTO_SIDE, SMALL_SIDE, MANY = 320, 160, 100
"""Photos are smaller where there are many."""


def write_scene_page(
    path: Path,
    scenes: Sequence[Scene],
    views: Sequence[View],
    edges: Sequence[Edge] = (),
    max_points: int = 500_000,
) -> None:
    """Writes the page; `max_points` is for all scenes together."""
    total = sum(len(scene.names) for scene in scenes)
    content = [_scene(s, views, edges, max(1, max_points * len(s.names) // total)) for s in scenes]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, "dust3r_sfm scene", {"scenes": content}, ["scene_gl.js", "scene.js"])


def _scene(scene: Scene, views: Sequence[View], edges: Sequence[Edge], limit: int) -> dict[str, Any]:
    cloud = viewed_cloud(scene, views, limit)
    look = outlook(scene, cloud)
    view_of = {view.name: view for view in views}
    number = {name: i for i, name in enumerate(scene.names)}
    inside = [[number[a], number[b], int(kept)] for a, b, kept in edges if a in number and b in number]
    return {
        "points": _points(cloud),
        "cameras": [_camera(scene, i, view_of[name], cloud) for i, name in enumerate(scene.names)],
        "edges": inside,
        "look": {name: getattr(look, name).tolist() for name in ("target", "eye", "up")} | {"camera": look.camera_size},
    }


def _points(cloud: ViewedCloud) -> dict[str, Any]:
    """Columns of little-endian numbers in base64; a position is origin + step * three 16-bit numbers.

    A point's distance from its neighbours is finest * 2 ** (8 * spacing / 255).
    """
    points = cloud.points.double().numpy()
    origin = points.min(0) if len(points) else np.zeros(3)
    step = float((points.max(0) - origin).max()) / STEPS if len(points) else 1.0
    levels = cloud.confidence[(torch.linspace(0, 1, 101) * (len(points) - 1)).round().long()] if len(points) else []
    finest = float(cloud.spacing.median()) / 16 if len(points) else 1.0
    return {
        "count": len(points),
        "origin": origin.tolist(),
        "step": step or 1.0,
        "positions": _base64(np.round((points - origin) / (step or 1.0)).astype("<u2")),
        "colors": _base64(cloud.colors.numpy()),
        "certainty": _base64((cloud.certainty() * 255).round().to(torch.uint8).numpy()),
        "images": _base64(cloud.image_indices.numpy().astype("<u2")),
        "finest": finest,
        "spacing": _base64((cloud.spacing / finest).log2().mul(255 / 8).round().clamp(0, 255).to(torch.uint8).numpy()),
        "levels": [round(float(level), 3) for level in levels],
    }


def _camera(scene: Scene, index: int, view: View, cloud: ViewedCloud) -> dict[str, Any]:
    """The camera of the network image, its intrinsics over the image's sides, and its pictures."""
    (height, width), K = view.size, scene.K[index].double()
    found = {
        "name": view.name,
        "aspect": width / height,
        "K": [float(K[0, 0]) / width, float(K[1, 1]) / height, float(K[0, 2]) / width, float(K[1, 2]) / height],
        "world_from_cam": inverse(scene.cam_from_world[index].double().cpu())[:3].flatten().tolist(),
    }
    if index >= MAX_PICTURED:
        return found
    side = SMALL_SIDE if len(scene.names) > MANY else PHOTO_SIDE
    stride = -(-max(view.size) // side)
    depth, confidence = (m[index][::stride, ::stride].detach().cpu().float() for m in (scene.depth, scene.confidence))
    return found | {
        "photo": photo_uri(view.image, side),
        "depth": map_uri(nearness(depth)),
        "confidence": map_uri(certainty(confidence.clamp(min=1), cloud.confidence)),
    }


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
