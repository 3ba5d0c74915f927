"""Fixed pairs of photos with reference cameras, on which pairwise prediction is measured.

A folder of scenes (each with `images/` and a `cameras.json`) and `pairs_within_60deg.json`: for each scene
a list of directed pairs of image names that are known to overlap.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.cameras_json import IMAGE_FOLDER, ReferenceFrame, read_cameras_json, read_depth, undistort
from dust3r_sfm.geometry.camera import pixel_grid, split_rotation
from dust3r_sfm.views import View, load_views

PAIRS_FILE = "pairs_within_60deg.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class DevView:
    """A photo and its true camera, all for the network image (upright, corner origin)."""

    scene: str
    view: View
    K: Float[Tensor, "3 3"]
    cam_from_world: Float[Tensor, "4 4"]
    keypoints: Float[Tensor, "h w 2"]
    """Where a pinhole camera of this K sees what each pixel sees: the pixels' centres, less the lens distortion; NaN
    where that cannot be said."""
    depth: Float[Tensor, "h w"] | None = None
    """z of every pixel, 0 where it is not known."""


@dataclass(frozen=True, eq=False)
class DevPairs:
    """Views of all scenes, and directed pairs of them by index."""

    views: tuple[DevView, ...]
    pairs: tuple[tuple[int, int], ...]
    """Photos that overlap."""
    pairs_across: tuple[tuple[int, int], ...]
    """As many pairs of photos of two different scenes; none where there is one scene."""


def load_dev_pairs(scenes_dir: Path | str, size: int, square_ok: bool = True) -> DevPairs:
    """The pairs of a folder of scenes, with images at the network's `size`; see `load_views`."""
    scenes_dir = Path(scenes_dir)
    try:
        names_of_pairs = json.loads((scenes_dir / PAIRS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no {PAIRS_FILE} in {scenes_dir}: expected a folder of scenes with it") from None
    except ValueError as error:
        raise InputError(f"{scenes_dir / PAIRS_FILE} is not JSON: {error}") from error
    views, pairs = [], []
    for scene, scene_pairs in names_of_pairs.items():
        names = sorted({name for pair in scene_pairs for name in pair})
        index = {name: len(views) + i for i, name in enumerate(names)}
        pairs += [(index[name0], index[name1]) for name0, name1 in scene_pairs]
        views += _load_scene(scenes_dir / scene, names, size, square_ok)
    return make_dev_pairs(views, pairs)


def make_dev_pairs(views: Sequence[DevView], pairs: Sequence[tuple[int, int]]) -> DevPairs:
    """Adds the pairs across scenes: photo 0 of each pair with one of another scene, always the same ones."""
    chooser = random.Random(0)
    across = []
    for i, _ in pairs:
        others = [j for j, other in enumerate(views) if other.scene != views[i].scene]
        across += [(i, chooser.choice(others))] if others else []
    return DevPairs(tuple(views), tuple(pairs), tuple(across))


def make_dev_view(view: View, frame: ReferenceFrame, scene: str) -> DevView:
    """The frame's camera and depth, which are of the stored file, carried over to the network image."""
    if frame.K is None or frame.cam_from_world is None or frame.size != view.original_size:
        raise InputError(f"{scene}/{view.name} is {view.original_size}: expected K, a pose and this size, got {frame}")
    K, netcam_from_imgcam = split_rotation(view.net_from_img, frame.K)
    img_from_net = torch.linalg.inv(view.net_from_img)
    grid = pixel_grid(*view.size, dtype=torch.float64)
    pixels = _map_pixels(img_from_net, grid)
    return DevView(
        scene=scene,
        view=view,
        K=K.float(),
        cam_from_world=netcam_from_imgcam @ frame.cam_from_world,
        keypoints=_map_pixels(view.net_from_img, undistort(frame, pixels)).float(),
        depth=_depth_at(read_depth(frame), pixels),
    )


def _load_scene(folder: Path, names: Sequence[str], size: int, square_ok: bool) -> list[DevView]:
    frames = {frame.name: frame for frame in read_cameras_json(folder)}
    unknown = sorted(set(names) - set(frames))
    if unknown:
        raise InputError(f"{folder / 'cameras.json'} lacks {len(unknown)} images of {PAIRS_FILE}, first {unknown[0]}")
    views = load_views(folder / IMAGE_FOLDER, size, names, square_ok=square_ok)
    return [make_dev_view(view, frames[view.name], folder.name) for view in views]


def _map_pixels(affine: Float[Tensor, "3 3"], pixels: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b 2"]:
    return pixels @ affine[:2, :2].mT + affine[:2, 2]


def _depth_at(depth: Float[Tensor, "h w"] | None, pixels: Float[Tensor, "h1 w1 2"]) -> Float[Tensor, "h1 w1"] | None:
    """Depth of the stored pixel that each point falls into: no blending across depth edges."""
    if depth is None:
        return None
    x, y = pixels.floor().long().unbind(-1)
    return depth[y.clamp(0, depth.shape[0] - 1), x.clamp(0, depth.shape[1] - 1)]
