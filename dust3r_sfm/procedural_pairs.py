"""Fresh procedural pairs in the form in which pairwise prediction is measured: the figure within the trained domain."""

from __future__ import annotations

from pathlib import Path

import torch

from dust3r_sfm.formats.dev_pairs import DevPairs, DevView
from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.training.augment import augment
from dust3r_sfm.training.render import load_kernel
from dust3r_sfm.training.synthetic import TrainingPairs, sample_pairs
from dust3r_sfm.training.textures import generated_textures, photo_textures, with_mipmaps
from dust3r_sfm.training.world import Dice
from dust3r_sfm.views import View

SEED = 20_000_003
"""No run of training throws these dice."""
NUM_TEXTURES = 60
SAMPLES = 2
BATCH = 8
PATCH = 16


def procedural_pairs(
    count: int,
    long_side: int,
    device: torch.device | str,
    textures: Path | None = None,
    num_generated: int = NUM_TEXTURES,
) -> DevPairs:
    """Pairs of photos 4:3 of worlds of their own, changed in tone and compressed as for training.

    The same at every call on one kind of device; as many pairs of photos of two worlds beside them.
    """
    images = generated_textures(num_generated, SEED)
    if textures is not None:
        images = torch.cat([images, photo_textures(textures)])
    atlas, dice, views = with_mipmaps(images.to(device)), Dice(device, SEED), []
    kernel = load_kernel("cpu") if torch.device(device).type == "cpu" else None
    height = round(0.75 * long_side / PATCH) * PATCH
    for start in range(0, count, BATCH):
        with torch.no_grad():
            pairs = sample_pairs(dice, min(BATCH, count - start), height, long_side, atlas, SAMPLES, kernel)
            views += _views(pairs, augment(dice, pairs.images))
    across = tuple((2 * i, (2 * i + 3) % (2 * count)) for i in range(count)) if count > 1 else ()
    return DevPairs(tuple(views), tuple((2 * i, 2 * i + 1) for i in range(count)), across)


def _views(pairs: TrainingPairs, images: torch.Tensor) -> list[DevView]:
    found, (h, w) = [], images.shape[-2:]
    stored = (images * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu()
    for k in range(len(stored)):
        for side in (0, 1):
            view = View(name=f"{k}-{side}.png", image=stored[k, side], original_size=(w, h), net_from_img=_SAME)
            camera = {"K": pairs.K[k, side].cpu(), "cam_from_world": pairs.cam_from_world[k, side].cpu().double()}
            depth = pairs.depth[k, side].cpu()
            found.append(DevView(scene="procedural", view=view, keypoints=pixel_grid(h, w), depth=depth, **camera))
    return found


_SAME = torch.eye(3, dtype=torch.float64)
