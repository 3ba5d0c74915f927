"""The textures of procedural scenes: generated ones, and a folder of photos where one is given; with mip-maps."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from dust3r_sfm.errors import InputError

SIDE, LEVELS = 256, 6
TEXELS = sum((SIDE >> level) ** 2 for level in range(LEVELS))


def _noise(g: torch.Generator, octaves: int, roughness: float) -> Float[Tensor, "256 256"]:
    """Tileable value noise in [0, 1]."""
    total = torch.zeros(SIDE, SIDE)
    for k in range(octaves):
        cells = 2 ** (k + 1 + int(torch.randint(0, 2, (), generator=g)))
        grid = torch.rand((1, 1, cells, cells), generator=g)
        grid = torch.nn.functional.pad(grid, (2, 2, 2, 2), mode="circular")
        scale = SIDE // cells
        fine = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)[0, 0]
        total += roughness**k * fine[2 * scale : 2 * scale + SIDE, 2 * scale : 2 * scale + SIDE]
    low, high = total.min(), total.max()
    return (total - low) / (high - low)


def _waves(g: torch.Generator) -> Float[Tensor, "256 256"]:
    """Stripes, checks, bricks or tiles, bent a little by noise."""
    y, x = torch.meshgrid(torch.arange(SIDE) / SIDE, torch.arange(SIDE) / SIDE, indexing="ij")
    bend = 0.1 * float(torch.rand((), generator=g)) ** 2 * _noise(g, 3, 0.5)
    fx, fy, kind = (int(torch.randint(1, 12, (), generator=g)) for _ in range(3))
    row = torch.floor((y + bend) * fy)
    u, v = (x + bend) * fx + (0.5 * row if kind % 4 == 0 else 0.0), (y + bend) * fy
    if kind % 4 == 1:
        return 0.5 + 0.5 * torch.sin(2 * math.pi * (u + v))
    if kind % 4 == 2:
        return ((torch.floor(u) + torch.floor(v)) % 2).float()
    gap = 0.03 + 0.1 * float(torch.rand((), generator=g))
    return (((u % 1) > gap) & ((v % 1) > gap)).float() * (
        0.7 + 0.3 * torch.sin(row * 12.9898 + torch.floor(u) * 78.233)
    )


def _spots(g: torch.Generator) -> Float[Tensor, "256 256"]:
    """Blots of varied size on a plain ground: speckle, terrazzo, leaves."""
    y, x = torch.meshgrid(torch.arange(SIDE) / SIDE, torch.arange(SIDE) / SIDE, indexing="ij")
    out = torch.full((SIDE, SIDE), 0.5)
    size = 0.01 + 0.08 * float(torch.rand((), generator=g)) ** 2
    for cx, cy, r, value, stretch in torch.rand((60, 5), generator=g).tolist():
        dx, dy = (x - cx + 0.5) % 1 - 0.5, (y - cy + 0.5) % 1 - 0.5
        out[(dx * (0.5 + stretch)) ** 2 + (dy * (1.5 - stretch)) ** 2 < (size * (0.3 + r)) ** 2] = value
    return out


def generated_textures(count: int, seed: int = 0) -> UInt8[Tensor, "count 256 256 3"]:
    """Noise, bricks, stripes, checks and spots in random colours; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    images = []
    for k in range(count):
        roughness = 0.4 + 0.5 * float(torch.rand((), generator=g))
        value = (_noise(g, 6, roughness), _waves(g), _spots(g), _waves(g) * _noise(g, 5, roughness))[k % 4]
        colors = torch.rand((3, 3), generator=g)
        mid = _noise(g, 6, roughness)[..., None]
        image = torch.lerp(colors[0], colors[1], value[..., None]) * (0.6 + 0.4 * mid) + 0.15 * (mid - 0.5) * colors[2]
        images.append((image.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.stack(images)


def photo_textures(folder: Path) -> UInt8[Tensor, "count 256 256 3"]:
    """All JPEG, PNG and WebP photos of a folder by name, scaled to 256 x 256; InputError where one cannot be read."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: expected one of photos for textures")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"})
    if not files:
        raise InputError(f"no photos in {folder}: expected JPEG, PNG or WebP files")
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(_read_photo, files)))


def _read_photo(file: Path) -> UInt8[Tensor, "256 256 3"]:
    try:
        with Image.open(file) as image:
            return torch.from_numpy(np.array(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    except OSError as error:
        raise InputError(f"{file} cannot be read as a photo ({error}): mend it or take it out of the folder") from error


def with_mipmaps(images: UInt8[Tensor, "count 256 256 3"]) -> UInt8[Tensor, "count 87360 4"]:
    """Every level of each texture, one after the other, four bytes a texel, as the renderer reads them."""
    out = torch.zeros((len(images), TEXELS, 4), dtype=torch.uint8, device=images.device)
    for start in range(0, len(images), 256):
        level, at = images[start : start + 256].permute(0, 3, 1, 2).float(), 0
        for _ in range(LEVELS):
            size = level.shape[-1] ** 2
            out[start : start + 256, at : at + size, :3] = (
                level.round().to(torch.uint8).permute(0, 2, 3, 1).flatten(1, 2)
            )
            level, at = torch.nn.functional.avg_pool2d(level, 2), at + size
    return out
