"""Small pictures inside pages: photos and maps as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

STOPS = np.array([[35, 22, 74], [62, 63, 148], [38, 125, 158], [46, 181, 133], [174, 212, 71], [253, 238, 128]])
"""Colours of low to high values, of rising lightness."""


def photo_uri(image: UInt8[Tensor, "h w 3"], long_side: int) -> str:
    """A JPEG whose longer side is `long_side` at most."""
    picture = Image.fromarray(image.cpu().numpy())
    picture.thumbnail((long_side, long_side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return jpeg_uri(picture)


def map_uri(values: Float[Tensor, "h w"]) -> str:
    """A JPEG of values from 0 to 1 in colours; black where they are not finite."""
    return jpeg_uri(Image.fromarray(colorize(values).numpy()))


def colorize(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape 3"]:
    """Values from 0 to 1 in colours from dark to light; black where they are not finite."""
    values = values.detach().cpu().numpy()
    known = np.isfinite(values)
    places = np.where(known, values, 0).clip(0, 1) * (len(STOPS) - 1)
    channels = [np.interp(places, np.arange(len(STOPS)), STOPS[:, k]) for k in range(3)]
    return torch.from_numpy((np.stack(channels, -1) * known[..., None]).round().astype(np.uint8))


def nearness(depth: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """Inverse depth from the far (0) to the near (1) end of a map, outliers aside; NaN where there is no depth."""
    usable = depth.isfinite() & (depth > 0)
    inverse = torch.where(usable, 1 / depth.double(), torch.nan)
    if not usable.any():
        return inverse.to(depth.dtype)
    low, high = np.percentile(inverse[usable].numpy(), [2, 98]).tolist()
    return ((inverse - low) / max(high - low, 1e-12)).clamp(0, 1).to(depth.dtype)


def jpeg_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
