"""Masks as COLMAP names them: `<image name>.png` in a folder of their own, black where a photo may not be used."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.views import View

SAMPLES = 4
"""A network pixel is used where a grid of so many by so many of its points all lie on white."""


def read_masks(folder: Path, views: Sequence[View]) -> list[View]:
    """The views with the masks that a folder has for them; views without one keep all pixels.

    Masks have the sizes of the stored files. InputError where a mask has another, or no view has one.
    """
    found = {view.name: path for view in views if (path := Path(folder) / f"{view.name}.png").is_file()}
    if not found:
        example = f"{views[0].name}.png" if views else "name.jpg.png"
        raise InputError(f"no masks in {folder}: expected files such as {example}, the image's name with .png added")
    return [replace(view, mask=_read(found[view.name], view)) if view.name in found else view for view in views]


def write_masks(views: Sequence[View], folder: Path) -> None:
    """Writes the masks of the views that have one, in the stored files' pixels; white where the network saw nothing."""
    for view in views:
        if view.mask is not None:
            write_mask(stored_mask(view), Path(folder) / f"{view.name}.png")


def write_mask(mask: Bool[np.ndarray, "h w"], path: Path) -> None:
    """Writes an 8-bit PNG: white where the mask is true."""
    buffer = io.BytesIO()
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(buffer, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def stored_mask(view: View) -> Bool[np.ndarray, "h w"]:
    """Where the pixels of a stored file may be used, as far as its view's mask says."""
    width, height = view.original_size
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = view.net_from_stored(np.stack([x, y], axis=-1).reshape(-1, 2)).reshape(height, width, 2).transpose(2, 0, 1)
    if view.mask is None:
        return np.ones((height, width), dtype=bool)
    h, w = view.mask.shape
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)  # NaN, where a lens cannot say, is not
    x, y = np.where(inside, x, 0), np.where(inside, y, 0)
    mask = view.mask.cpu().numpy()
    return ~inside | mask[np.clip(y, 0, h - 1).astype(int), np.clip(x, 0, w - 1).astype(int)]


def _read(path: Path, view: View) -> Bool[Tensor, "h w"]:
    try:
        with Image.open(path) as image:
            stored = np.asarray(image.convert("L")) > 0
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise InputError(f"the mask {path} cannot be read: {error}") from error
    if stored.shape[::-1] != view.original_size:
        sizes = [f"{w} x {h}" for w, h in (stored.shape[::-1], view.original_size)]
        raise InputError(f"the mask {path} is {sizes[0]} pixels, {view.name} {sizes[1]}: they must be the same")
    h, w = view.size
    steps = [(np.arange(n * SAMPLES) + 0.5) / SAMPLES for n in (w, h)]
    grid = np.stack(np.meshgrid(*steps), axis=-1)
    x, y = view.stored_from_net(grid.reshape(-1, 2)).reshape(grid.shape).transpose(2, 0, 1)
    height, width = stored.shape
    sampled = stored[np.clip(y, 0, height - 1).astype(int), np.clip(x, 0, width - 1).astype(int)]
    return torch.from_numpy(sampled.reshape(h, SAMPLES, w, SAMPLES).all(axis=(1, 3)))
