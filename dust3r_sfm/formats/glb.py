"""GLB: a scene's cloud and cameras in one file that any 3-D viewer opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.geometry.transforms import camera_center, inverse, transform_points
from dust3r_sfm.scene import Scene

FRUSTUM_SHARE = 0.1
"""Depth of a drawn camera over the median distance of neighbouring cameras from one another."""
GL_FROM_WORLD = np.diag([1.0, -1, -1, 1])
"""glTF has y up and looks along -z."""


def write_glb(path: Path, scene: Scene, points: Float[Tensor, "n 3"], colors: UInt8[Tensor, "n 3"]) -> None:
    """Writes points in the world and the scene's cameras as wire pyramids, turned so that y is up."""
    try:
        import trimesh
    except ImportError as error:
        raise InputError('GLB files need trimesh: pip install "dust3r_sfm[view]"') from error
    content = trimesh.Scene()
    cloud = trimesh.PointCloud(points.detach().cpu().numpy(), colors=colors.cpu().numpy())
    content.add_geometry(cloud, geom_name="points")
    lines = frustum_lines(scene)
    content.add_geometry(trimesh.load_path(lines.numpy()), geom_name="cameras")
    content.apply_transform(GL_FROM_WORLD)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content.export(file_type="glb"))


def frustum_lines(scene: Scene) -> Float[Tensor, "s 2 3"]:
    """Eight segments for each camera: from its centre to the network image's corners, and around them."""
    cam_from_world, K = scene.cam_from_world.detach().cpu().double(), scene.K.detach().cpu().double()
    centers = camera_center(cam_from_world)
    gaps = torch.cdist(centers, centers)
    depth = FRUSTUM_SHARE * float(gaps[gaps > 0].median()) if (gaps > 0).any() else FRUSTUM_SHARE
    segments = []
    for i, (h, w) in enumerate(tuple(d.shape) for d in scene.depth):
        corners = torch.tensor([[0, 0, 1], [w, 0, 1], [w, h, 1], [0, h, 1]], dtype=torch.float64)
        in_world = transform_points(inverse(cam_from_world[i]), depth * corners @ torch.linalg.inv(K[i]).T)
        segments += [torch.stack([centers[i], corner]) for corner in in_world]
        segments += [torch.stack([a, b]) for a, b in zip(in_world, in_world.roll(-1, dims=0), strict=True)]
    return torch.stack(segments)
