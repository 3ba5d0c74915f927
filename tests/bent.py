"""Photos of a procedural room as lenses of any of COLMAP's camera models take them, ray by ray."""

import numpy as np
import torch
from PIL import Image
from procedural import _transform, _view, cast_rays

from dust3r_sfm.geometry.lens import Lens

LENSES = {
    "SIMPLE_RADIAL": Lens("SIMPLE_RADIAL", (-0.15,), was_known=True),
    "RADIAL": Lens("RADIAL", (0.1, -0.05), was_known=True),
    "OPENCV": Lens("OPENCV", (-0.2, 0.05, 0.004, -0.006), was_known=True),
    "OPENCV_FISHEYE": Lens("OPENCV_FISHEYE", (0.05, -0.02, 0.01, -0.003), was_known=True),
}


def shot(procedural, index, K, size, directions):
    """The photo (h w 3) and world points (h w 3) along directions (h*w 2) of rays, x and y at z = 1."""
    width, height = size
    pose = procedural.cam_from_world[index].double()
    rays = torch.nn.functional.pad(torch.from_numpy(np.ascontiguousarray(directions)), (0, 1), value=1.0)
    rays = (rays @ pose[:3, :3]).reshape(height, width, 3)
    origin = -pose[:3, :3].T @ pose[:3, 3]
    depth, normals = cast_rays(procedural.shapes, origin, rays)
    points = origin + depth[..., None] * rays
    return _view("", points, normals).image.numpy(), points


def intrinsics(procedural, index, scale):
    K = procedural.K[index].double().numpy().copy()
    K[:2] *= scale
    return K


def grid(size):
    width, height = size
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1).reshape(-1, 2)


def photo(procedural, index, camera):
    """What a pycolmap.Camera at the place of a view sees."""
    size = camera.width, camera.height
    return shot(procedural, index, None, size, camera.cam_from_img(grid(size)))


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def in_cam(procedural, index, points):
    return _transform(procedural.cam_from_world[index].double(), points)
