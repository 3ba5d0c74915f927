"""What cameras and files do to photos: exposure, white balance, contrast, vignetting, blur, noise, JPEG.

Nothing moves: the geometry of an image stays as it is. Sizes are multiples of 8, the side of JPEG's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.training.world import Dice, constant

_LUMINANCE = (0.299, 0.587, 0.114)
_QUANTIZATION = (  # of luminance, ITU T.81 annex K.1
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_DCT = tuple(
    tuple((math.sqrt(0.125) if k == 0 else 0.5) * math.cos((2 * n + 1) * k * math.pi / 16) for n in range(8))
    for k in range(8)
)
_DCT_OF_BLOCK = tuple(map(tuple, np.kron(_DCT, _DCT).tolist()))
"""Of the 64 pixels of a block, row by row, in one product."""
_TABLES = {"luminance": _LUMINANCE, "quantization": _QUANTIZATION, "dct": _DCT_OF_BLOCK, "coarseness": (1.0, 2.0, 2.0)}


def _table(dice: Dice | _Rolls | _Asked, name: str, device: torch.device) -> Tensor:
    return dice.tables[name] if isinstance(dice, _Rolls) else constant(_TABLES[name], device)


def _tone(dice: Dice | _Rolls | _Asked, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    n = len(x)
    gain = (0.16 * dice.normal(n, 1, 1, 1)).exp() * (0.04 * dice.normal(n, 3, 1, 1)).exp()
    x = (x * gain).clamp(1e-4, 1) ** (0.12 * dice.normal(n, 1, 1, 1)).exp()
    gray = (x * _table(dice, "luminance", x.device)[:, None, None]).sum(1, keepdim=True)
    saturation = dice.uniform(n, 1, 1, 1, low=0.6, high=1.4) * ~dice.chance(0.05, n, 1, 1, 1)
    x = gray + (x - gray) * saturation
    contrast = dice.uniform(n, 1, 1, 1, low=0.85, high=1.45)
    middle = gray.mean((2, 3), keepdim=True)
    return (x - middle) * contrast + middle


def _vignette(dice: Dice | _Rolls | _Asked, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    h, w = x.shape[-2:]
    y = torch.linspace(-1, 1, h, device=x.device)[:, None]
    r2 = y * y + torch.linspace(-1, 1, w, device=x.device) ** 2
    return x * (1 - dice.uniform(len(x), 1, 1, 1, high=0.25) * dice.chance(0.3, len(x), 1, 1, 1) * r2)


def _blur(dice: Dice | _Rolls | _Asked, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Gaussian over five pixels each way, of a width up to 1.3 pixels for two in five images."""
    sigma = dice.uniform(len(x), 1, 1, 1, high=1.3) * dice.chance(0.4, len(x), 1, 1, 1) + 0.05
    weights = [torch.exp(-0.5 * (k / sigma) ** 2) for k in range(3)]
    total = weights[0] + 2 * weights[1] + 2 * weights[2]
    for dim in (2, 3):
        pad = (0, 0, 2, 2) if dim == 2 else (2, 2, 0, 0)
        padded, size = torch.nn.functional.pad(x, pad, mode="replicate"), x.shape[dim]
        at = [padded.narrow(dim, k, size) for k in range(5)]
        x = (weights[0] * at[2] + weights[1] * (at[1] + at[3]) + weights[2] * (at[0] + at[4])) / total
    return x


def _jpeg(dice: Dice | _Rolls | _Asked, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Quantised 8 x 8 cosine transform of every channel, for two in five images."""
    n, _, h, w = x.shape
    dct = _table(dice, "dct", x.device)
    quality = dice.uniform(n, 1, 1, 1, 1, 1, low=20.0, high=95.0)
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    table = (_table(dice, "quantization", x.device) * scale / 255).clamp(min=1 / 255)
    gray = (x * _table(dice, "luminance", x.device)[:, None, None]).sum(1, keepdim=True)
    planes = torch.cat([gray, x[:, :1] - gray, x[:, 2:] - gray], 1)  # luminance, and colours coarser
    table = table * _table(dice, "coarseness", x.device)[:, None, None, None, None]
    blocks = planes.reshape(n, 3, h // 8, 8, w // 8, 8).transpose(3, 4)
    table = table.flatten(-2)
    coded = blocks.flatten(-2) @ dct.T
    coded = (coded / table).round() * table
    planes = (coded @ dct).unflatten(-1, (8, 8)).transpose(3, 4).reshape(n, 3, h, w)
    red, blue = planes[:, 0] + planes[:, 1], planes[:, 0] + planes[:, 2]
    green = (planes[:, 0] - _LUMINANCE[0] * red - _LUMINANCE[2] * blue) / _LUMINANCE[1]
    return torch.where(dice.chance(0.4, n, 1, 1, 1), torch.stack([red, green, blue], 1), x)


def _changed(dice: Dice | _Rolls | _Asked, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    x = _blur(dice, _vignette(dice, _tone(dice, x)))
    x = x + 0.03 * dice.uniform(len(x), 1, 1, 1) ** 2 * dice.normal(*x.shape)
    return _jpeg(dice, x.clamp(0, 1)).clamp(0, 1)


class _Rolls:
    """Dice that were thrown before, so that what follows is arithmetic alone, which compiles to a few kernels."""

    def __init__(self, rolls: tuple[Tensor, ...], tables: dict[str, Tensor]) -> None:
        self.rolls, self.tables, self.at = rolls, tables, 0

    def _next(self) -> Tensor:
        self.at += 1
        return self.rolls[self.at - 1]

    def uniform(self, *_: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * self._next()

    def normal(self, *_: int) -> Tensor:
        return self._next()

    def chance(self, probability: float, *_: int) -> Tensor:
        return self._next() < probability


class _Asked:
    """Dice that note what is asked of them."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    def _note(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        self.asked.append((kind, shape))
        return torch.zeros(shape, device="meta")

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self._note("uniform", shape)

    def normal(self, *shape: int) -> Tensor:
        return self._note("normal", shape)

    def chance(self, _: float, *shape: int) -> Tensor:
        return self._note("uniform", shape).bool()


@lru_cache
def _needed(shape: tuple[int, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The throws that images of a shape take, in order."""
    asked = _Asked()
    _changed(asked, torch.zeros(shape, device="meta"))
    return tuple(asked.asked)


def apply_changes(
    x: Float[Tensor, "n 3 h w"], rolls: tuple[Tensor, ...], tables: dict[str, Tensor]
) -> Float[Tensor, "n 3 h w"]:
    """The images after the changes that the throws say; `tables` are on their device."""
    return _changed(_Rolls(rolls, tables), x)


def augment(
    dice: Dice, images: Float[Tensor, "b v 3 h w"], apply: Callable[..., Tensor] = apply_changes
) -> Float[Tensor, "b v 3 h w"]:
    """Every image changed on its own, so that the views of a pair differ; values stay in [0, 1]."""
    x = images.flatten(0, 1)
    rolls = tuple(getattr(dice, kind)(*shape) for kind, shape in _needed(tuple(x.shape)))
    tables = {name: constant(values, x.device) for name, values in _TABLES.items()}
    return apply(x, rolls, tables).unflatten(0, images.shape[:2])
