"""Photos and scenes without lens distortion, for readers that know pinhole cameras alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Num
from PIL import Image
from torch import Tensor

from dust3r_sfm.files import write_bytes
from dust3r_sfm.formats.images import copy_images, decoded, encoded
from dust3r_sfm.geometry.lens import bent, straightened, straightening_zoom, zoomed_from_straight
from dust3r_sfm.scene import Scene, Tracks
from dust3r_sfm.views import View

ROWS = 256
"""Rows of a photo that are sampled at once, to save memory."""


def pinhole_scene(scene: Scene) -> Scene:
    """The scene of photos that `place_pinhole_images` writes: of the same sizes, filled to their borders.

    Keypoints that lie outside of them are left out, and points that fewer than two images see then.
    """
    if not scene.lenses:
        return scene
    maps = [_pinhole_from_straight(scene, i) for i in range(len(scene.names))]
    net_from_pinhole = [scene.net_from_img[i] @ torch.from_numpy(np.linalg.inv(m)) for i, m in enumerate(maps)]
    tracks = None if scene.tracks is None else _pinhole_tracks(scene, scene.tracks, maps)
    ids = None if scene.ids is None else dataclasses.replace(scene.ids, points=())  # fewer tracks than there were
    return dataclasses.replace(scene, net_from_img=torch.stack(net_from_pinhole), lenses=(), tracks=tracks, ids=ids)


def place_pinhole_images(scene: Scene, names: Mapping[str, str], image_dir: Path, folder: Path) -> None:
    """Copies the photos of a scene to `folder` under new names, those of a lens as a pinhole would have taken them."""
    copy_images(names, image_dir, folder)
    for index, (name, new_name) in enumerate((name, names[name]) for name in scene.names):
        if scene.lens(index) is not None:
            path = folder / new_name
            status = path.stat()
            path.unlink()
            write_bytes(path, encoded(_pinhole_image(scene, index, decoded(image_dir / name)), path.suffix))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 1))  # no copy: the next run makes it again


def straight_views(views: Sequence[View], scenes: Sequence[Scene]) -> list[View]:
    """The views on the pixels of the scenes' network images: as they are but under a lens found since."""
    place_of = {name: (scene, i) for scene in scenes for i, name in enumerate(scene.names)}
    found = []
    for view in views:
        scene, index = place_of.get(view.name, (None, 0))
        lens = scene and scene.lens(index)
        is_straight = lens is None or lens.was_known
        found.append(view if is_straight else _straight_view(view, scene, index))
    return found


def _straight_view(view: View, scene: Scene, index: int) -> View:
    height, width = view.size
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1).reshape(-1, 2)
    source = np.nan_to_num(scene.seen_from_net(index, grid), nan=-1e4).reshape(height, width, 2)
    image = torch.from_numpy(sampled(view.image.numpy(), source))
    mask = view.mask
    if mask is not None:
        mask = torch.from_numpy(sampled(mask.numpy()[..., None].astype(np.uint8) * 255, source)[..., 0] > 127)
    lens = dataclasses.replace(scene.lens(index), was_known=True)
    return dataclasses.replace(view, image=image, mask=mask, known_K=torch.from_numpy(scene.K_img(index)), lens=lens)


def _pinhole_from_straight(scene: Scene, index: int) -> Float[np.ndarray, "3 3"]:
    lens, K, size = scene.lens(index), scene.K_img(index), scene.original_sizes[index]
    return np.eye(3) if lens is None else zoomed_from_straight(K, straightening_zoom(K, size, lens))


def _pinhole_tracks(scene: Scene, tracks: Tracks, maps: Sequence[Float[np.ndarray, "3 3"]]) -> Tracks:
    keypoints, images = tracks.keypoints.double().numpy().copy(), tracks.image_indices.numpy()
    for index, affine in enumerate(maps):
        if scene.lens(index) is not None:
            straight = straightened(keypoints[images == index], scene.K_img(index), scene.lens(index))
            keypoints[images == index] = straight @ affine[:2, :2].T + affine[:2, 2]
    sizes = np.array(scene.original_sizes)[images]
    seen = torch.from_numpy(((keypoints >= 0) & (keypoints <= sizes)).all(axis=1))
    lengths = torch.bincount(tracks.point_indices[seen], minlength=len(tracks.errors))
    kept = lengths >= 2
    seen &= kept[tracks.point_indices]
    return Tracks(
        points_in_world=tracks.points_in_world[kept],
        colors=tracks.colors[kept],
        errors=tracks.errors[kept],
        point_indices=(kept.long().cumsum(0) - 1)[tracks.point_indices[seen]],
        image_indices=tracks.image_indices[seen],
        keypoints=torch.from_numpy(keypoints).to(tracks.keypoints)[seen],
    )


def _pinhole_image(scene: Scene, index: int, image: Image.Image) -> Image.Image:
    lens, K = scene.lens(index), scene.K_img(index)
    straight_from_pinhole = np.linalg.inv(_pinhole_from_straight(scene, index))
    pixels, rows = np.asarray(image), []
    for top in range(0, image.height, ROWS):
        y = np.arange(top, min(top + ROWS, image.height)) + 0.5
        grid = np.stack(np.meshgrid(np.arange(image.width) + 0.5, y), axis=-1).reshape(-1, 2)
        straight = grid @ straight_from_pinhole[:2, :2].T + straight_from_pinhole[:2, 2]
        source = np.nan_to_num(bent(straight, K, lens), nan=-1e4)
        rows.append(sampled(pixels, source.reshape(len(y), image.width, 2)))
    return Image.fromarray(np.concatenate(rows))


def sampled(image: Num[np.ndarray, "h0 w0 c"], pixels: Float[np.ndarray, "h w 2"]) -> Num[np.ndarray, "h w c"]:
    """8-bit values at pixels, corner origin, between the nearest; those of the border outside."""
    height, width = image.shape[:2]
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    grid = torch.from_numpy(pixels / (width, height) * 2 - 1).float()[None]
    found: Tensor = torch.nn.functional.grid_sample(
        values, grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    return found[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
