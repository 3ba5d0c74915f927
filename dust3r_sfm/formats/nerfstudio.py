"""Folders that train radiance fields: nerfstudio's `transforms.json`, and `images/ sparse/0/` for Gaussian splatting.

Both readers take an image's file name alone when they look for its smaller copies, so photos of
sub-folders get flat names. Photos keep their pixels where the reader knows their distortion; else
they are written as a pinhole would have taken them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import torch
from jaxtyping import Float64
from PIL import Image

from dust3r_sfm.files import write_bytes
from dust3r_sfm.formats.colmap import colmap_from_scene, write_model
from dust3r_sfm.formats.depths import depth_map, write_map
from dust3r_sfm.formats.images import copy_images, flat_names, shrink_images
from dust3r_sfm.formats.masks import stored_mask, write_mask
from dust3r_sfm.formats.pointclouds import dense_cloud, write_ply
from dust3r_sfm.formats.undistortion import pinhole_scene, place_pinhole_images
from dust3r_sfm.geometry.transforms import transform_points
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View

TURNED_FROM_WORLD = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""nerfstudio swaps y and z of COLMAP's world and changes the sign of the last, so that z is up."""
MILLI = 1000.0
"""nerfstudio's depth files count in thousandths."""
FISHEYE = "OPENCV_FISHEYE"
KEYS = {
    **dict.fromkeys(("SIMPLE_PINHOLE", "PINHOLE"), ()),
    **{"SIMPLE_RADIAL": ("k1",), "RADIAL": ("k1", "k2"), "OPENCV": ("k1", "k2", "p1", "p2")},
    FISHEYE: ("k1", "k2", "k3", "k4"),
}
"""nerfstudio's names of the coefficients of COLMAP's camera models; of others it has none."""
NUM_START_POINTS = 100_000
"""Points of the cloud that training starts from."""


def write_gsplat(scene: Scene, image_dir: Path, folder: Path, downscale: Sequence[int] = ()) -> None:
    """Writes `images/`, `images_<k>/` for each factor k, and `sparse/0/`, whose names are the files'."""
    flat = _place_images(scene, image_dir, folder, downscale)
    scene = pinhole_scene(scene)
    renamed = dataclasses.replace(scene, names=tuple(flat.values()))
    write_model(colmap_from_scene(renamed, equal_share=True), folder / "sparse" / "0")


def write_nerfstudio(
    scene: Scene, views: Sequence[View], image_dir: Path, folder: Path, downscale: Sequence[int] = ()
) -> None:
    """Writes `transforms.json` and what it names: images, masks where there are any, depths, a cloud to start from.

    World and cloud are turned as nerfstudio turns COLMAP's, which `applied_transform` says.
    Masks are for all frames or none, as nerfstudio wants them. Depths lie on the images' pixels.
    """
    if _camera_model(scene) is None:
        flat = _place_images(scene, image_dir, folder, downscale)
        scene = pinhole_scene(scene)
        views = _pinhole_views(views, scene)
    else:
        flat = flat_names(scene.names)
        copy_images(flat, image_dir, folder / "images")
        _shrink(flat, folder, downscale)
    view_of = {view.name: view for view in views}
    masks = {name: view.mask for name, view in view_of.items() if name in flat and view.mask is not None}
    for index, (name, new_name) in enumerate(flat.items()):
        write_map(folder / "depths" / f"{new_name}.npy", MILLI * depth_map(scene, index, mask=masks.get(name)).depth)
        for k in downscale:  # one size serves all: the reader resizes
            write_map(folder / f"depths_{k}" / f"{new_name}.npy", np.load(folder / "depths" / f"{new_name}.npy"))
        if masks:
            _write_masks(view_of[name], new_name, folder, downscale)
    points, colors = dense_cloud(scene, views, max_points=NUM_START_POINTS)
    write_ply(folder / "sparse_pc.ply", transform_points(torch.from_numpy(TURNED_FROM_WORLD).float(), points), colors)
    content = transforms(scene, flat, has_masks=bool(masks))
    write_bytes(folder / "transforms.json", json.dumps(content, indent=1).encode())


def transforms(scene: Scene, flat: dict[str, str], has_masks: bool = False) -> dict[str, Any]:
    """The content of transforms.json: OpenGL cameras (x right, y up, z back), pixels of the stored files."""
    model = colmap_from_scene(dataclasses.replace(scene, tracks=None))
    frames = []
    for image_id, image in sorted(model.images.items()):
        new_name = flat[image.name]
        frame = {"file_path": f"images/{new_name}", "depth_file_path": f"depths/{new_name}.npy"}
        frame |= {"mask_path": f"masks/{new_name}.png"} if has_masks else {}
        matrix = _turned_from_gl_cam(image.cam_from_world()).tolist()
        frames.append(frame | _intrinsics(image.camera) | {"transform_matrix": matrix, "colmap_im_id": image_id})
    return {
        "camera_model": _camera_model(scene),
        "applied_transform": TURNED_FROM_WORLD[:3].tolist(),
        "ply_file_path": "sparse_pc.ply",
        "frames": frames,
    }


def _turned_from_gl_cam(cam_from_world: pycolmap.Rigid3d) -> Float64[np.ndarray, "4 4"]:
    world_from_cam = np.vstack([cam_from_world.inverse().matrix(), [0, 0, 0, 1]])
    return TURNED_FROM_WORLD @ world_from_cam @ np.diag([1.0, -1, -1, 1])


def _intrinsics(camera: pycolmap.Camera) -> dict[str, int | float]:
    return {
        "w": camera.width,
        "h": camera.height,
        "fl_x": camera.focal_length_x,
        "fl_y": camera.focal_length_y,
        "cx": camera.principal_point_x,
        "cy": camera.principal_point_y,
        **dict.fromkeys(("k1", "k2", "p1", "p2"), 0.0),
        **dict(zip(KEYS[camera.model.name], map(float, camera.params[camera.extra_params_idxs()]), strict=True)),
    }


def _camera_model(scene: Scene) -> str | None:
    """nerfstudio's name of a model that holds all cameras of a scene; None where there is none."""
    models = {lens.model for lens in scene.lenses if lens is not None}
    if models == {FISHEYE} and None not in scene.lenses:
        return FISHEYE
    return "OPENCV" if models <= KEYS.keys() - {FISHEYE} else None


def _pinhole_views(views: Sequence[View], scene: Scene) -> list[View]:
    net_from_img = dict(zip(scene.names, scene.net_from_img, strict=True))
    return [
        dataclasses.replace(view, lens=None, net_from_img=net_from_img[view.name])
        if view.name in net_from_img
        else view
        for view in views
    ]


def _place_images(scene: Scene, image_dir: Path, folder: Path, downscale: Sequence[int]) -> dict[str, str]:
    """The photos as a pinhole takes them, under flat names."""
    flat = flat_names(scene.names)
    place_pinhole_images(scene, flat, image_dir, folder / "images")
    _shrink(flat, folder, downscale)
    return flat


def _shrink(flat: dict[str, str], folder: Path, downscale: Sequence[int]) -> None:
    for factor in downscale:
        shrink_images(list(flat.values()), folder / "images", folder / f"images_{factor}", factor)


def _write_masks(view: View, new_name: str, folder: Path, downscale: Sequence[int]) -> None:
    mask = stored_mask(view)
    write_mask(mask, folder / "masks" / f"{new_name}.png")
    height, width = mask.shape
    for factor in downscale:
        size = max(1, width // factor), max(1, height // factor)
        small = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        write_mask(small, folder / f"masks_{factor}" / f"{new_name}.png")
