"""COLMAP's dense workspace: what its undistorter lays out, with depth and normal maps as its stereo writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pycolmap
import torch
from jaxtyping import Float, Float32

from dust3r_sfm.files import write_bytes
from dust3r_sfm.formats.colmap import colmap_from_scene, write_model
from dust3r_sfm.formats.depths import EDGE_RATIO, DepthMap, Masks, depth_map
from dust3r_sfm.formats.undistortion import pinhole_scene, place_pinhole_images
from dust3r_sfm.geometry.camera import unproject
from dust3r_sfm.scene import Scene

SMOOTHING_RADIUS_PX = 2
NUM_SOURCES = 20
"""Images that patch-match stereo would compare each image with, as the undistorter asks for."""


def write_dense(scene: Scene, image_dir: Path, folder: Path, masks: Masks | None = None) -> None:
    """Writes `images/`, `sparse/` and `stereo/` with geometric depth and normal maps, ready for stereo_fusion.

    The images are the stored files or, under a lens, what a pinhole would have taken. Depth
    maps are as fine as the network saw the images: COLMAP scales its cameras to them.
    """
    place_pinhole_images(scene, {name: name for name in scene.names}, image_dir, folder / "images")
    scene = pinhole_scene(scene)
    write_model(_pinhole(colmap_from_scene(scene)), folder / "sparse")
    stereo = folder / "stereo"
    for kind in ("depth_maps", "normal_maps", "consistency_graphs"):
        (stereo / kind).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(scene.names):
        found = depth_map(scene, index, "network", (masks or {}).get(name))
        normals = normals_in_cam(found)
        has_normal = (normals != 0).any(axis=-1)
        write_array(stereo / "depth_maps" / f"{name}.geometric.bin", found.depth * has_normal)
        write_array(stereo / "normal_maps" / f"{name}.geometric.bin", normals)
    write_bytes(stereo / "fusion.cfg", "".join(f"{name}\n" for name in scene.names).encode())
    patch_match = "".join(f"{name}\n__auto__, {NUM_SOURCES}\n" for name in scene.names)
    write_bytes(stereo / "patch-match.cfg", patch_match.encode())


def write_array(path: Path, values: Float32[np.ndarray, "h w *c"]) -> None:
    """COLMAP's `.bin`: `width&height&channels&`, then float32, one channel after the other."""
    planes = np.ascontiguousarray(values.reshape(*values.shape[:2], -1).transpose(2, 0, 1), dtype="<f4")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, f"{planes.shape[2]}&{planes.shape[1]}&{planes.shape[0]}&".encode() + planes.tobytes())


def read_array(path: Path) -> Float32[np.ndarray, "h w *c"]:
    """What `write_array` or COLMAP wrote."""
    width, height, channels, data = Path(path).read_bytes().split(b"&", 3)
    planes = np.frombuffer(data, dtype="<f4").reshape(int(channels), int(height), int(width))
    return planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)


def normals_in_cam(found: DepthMap) -> Float32[np.ndarray, "h w 3"]:
    """Unit normals that face the camera, 0 where there are none.

    The mean of what the nearer neighbours in x and in y give, over the pixels around that lie
    on the same surface: those of single pixels are too noisy for fusion to find them alike.
    """
    points = unproject(torch.from_numpy(found.K), torch.from_numpy(found.depth).double()).numpy()
    points[found.depth <= 0] = np.nan
    step_x, step_y = _steps(points), _steps(points.swapaxes(0, 1)).swapaxes(0, 1)
    normals = np.cross(step_x, step_y)
    with np.errstate(invalid="ignore", divide="ignore"):
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        normals *= -np.sign((normals * points).sum(axis=-1, keepdims=True))
        normals = _mean_on_surface(np.nan_to_num(normals), found.depth)
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.nan_to_num(normals).astype(np.float32)


def _mean_on_surface(values: Float[np.ndarray, "h w 3"], depth: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 3"]:
    """The sum over each pixel's neighbourhood of values at similar depth; 0 without depth."""
    r = SMOOTHING_RADIUS_PX
    height, width = depth.shape
    padded, padded_depth = np.pad(values, ((r, r), (r, r), (0, 0))), np.pad(depth, r)
    total = np.zeros_like(values)
    for row in range(2 * r + 1):
        for column in range(2 * r + 1):
            here = np.s_[row : row + height, column : column + width]
            near, far = np.minimum(depth, padded_depth[here]), np.maximum(depth, padded_depth[here])
            total += padded[here] * ((near > 0) & (far <= EDGE_RATIO * near))[..., None]
    return total


def _steps(points: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    """From each point to its neighbour along a row; the nearer of both, so not over an edge."""
    ahead, behind = np.full_like(points, np.nan), np.full_like(points, np.nan)
    ahead[:, :-1] = behind[:, 1:] = points[:, 1:] - points[:, :-1]
    lengths = [np.nan_to_num(np.linalg.norm(step, axis=-1, keepdims=True), nan=np.inf) for step in (ahead, behind)]
    return np.where(lengths[0] <= lengths[1], ahead, behind)


def _pinhole(model: pycolmap.Reconstruction) -> pycolmap.Reconstruction:
    """Every camera as PINHOLE, as the undistorter writes them."""
    for camera in model.cameras.values():
        params = [camera.focal_length_x, camera.focal_length_y, camera.principal_point_x, camera.principal_point_y]
        camera.model = pycolmap.CameraModelId.PINHOLE
        camera.params = params
    return model
