"""XFeat's backbone as a frozen second pair of eyes: local features learned on real photos (Potje et al., CVPR 2024).

What the network itself learns from is rendered; these features were trained on photos of the world, to be alike where
photos see the same thing. Its weights are Apache-2.0. Batch normalisation is folded into the convolutions.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dust3r_sfm.errors import InputError

CHANNELS = 64
STRIDE = 8
BATCH_NORM_EPS = 1e-5

# of each convolution: channels in and out, kernel, stride
_BLOCKS = {
    "block1": ((1, 4, 3, 1), (4, 8, 3, 2), (8, 8, 3, 1), (8, 24, 3, 2)),
    "block2": ((24, 24, 3, 1), (24, 24, 3, 1)),
    "block3": ((24, 64, 3, 2), (64, 64, 3, 1), (64, 64, 1, 1)),
    "block4": ((64, 64, 3, 2), (64, 64, 3, 1), (64, 64, 3, 1)),
    "block5": ((64, 128, 3, 2), (128, 128, 3, 1), (128, 128, 3, 1), (128, 64, 1, 1)),
    "block_fusion": ((64, 64, 3, 1), (64, 64, 3, 1)),
}


class XFeat(nn.Module):
    """The backbone alone, without gradients of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name, shapes in _BLOCKS.items():
            layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2) for i, o, kernel, stride in shapes]
            self.add_module(name, nn.ModuleList(layers))
        self.skip = nn.Conv2d(1, 24, 1)
        self.last = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 64 h8 w8"]:
        """Features, one in 8 pixels, of images of any range whose sides are multiples of 8."""
        grey = image.float().mean(dim=1, keepdim=True)
        variance, mean = torch.var_mean(grey, dim=(2, 3), correction=0, keepdim=True)
        grey = (grey - mean) * (variance + BATCH_NORM_EPS).rsqrt()
        x = self._run("block1", grey) + self.skip(functional.avg_pool2d(grey, 4))
        # enlarging in the other layout takes CUDA more time than all the rest
        x = x.contiguous(memory_format=torch.channels_last)
        eighth = self._run("block3", self._run("block2", x))
        sixteenth = self._run("block4", eighth)
        levels = [sixteenth, self._run("block5", sixteenth)]
        size = eighth.shape[-2:]
        for level in levels:
            eighth = eighth + functional.interpolate(level, size, mode="bilinear", align_corners=False)
        return self.last(self._run("block_fusion", eighth))

    def _run(self, block: str, x: Tensor) -> Tensor:
        for layer in getattr(self, block):
            x = functional.relu(layer(x))
        return x


class Stem(nn.Module):
    """A token of XFeat's features for each patch, to be added to the patch's own; of no effect before it is trained."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        if patch_size % STRIDE:
            raise ValueError(f"patches must be multiples of {STRIDE} pixels for XFeat's features, got {patch_size}")
        self.cells = patch_size // STRIDE
        self.xfeat = XFeat()
        self.proj = nn.Linear(CHANNELS * self.cells**2, dim, bias=False)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
        features = functional.normalize(self.xfeat(image).float(), dim=1) * CHANNELS**0.5
        return self.proj(functional.pixel_unshuffle(features, self.cells).flatten(2).transpose(1, 2))


def read_xfeat(path: Path) -> dict[str, Tensor]:
    """The state of `XFeat` from the published checkpoint, its batch normalisation folded in; tensors only are read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return _folded(state)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"cannot read XFeat's weights from {path}: expected its published xfeat.pt ({type(error).__name__})"
        ) from error


def _folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {
        "skip.weight": state["skip1.1.weight"],
        "skip.bias": state["skip1.1.bias"],
        "last.weight": state["block_fusion.2.weight"],
        "last.bias": state["block_fusion.2.bias"],
    }
    for block, shapes in _BLOCKS.items():
        for k in range(len(shapes)):
            theirs = f"{block}.{k}.layer"
            scale = (state[f"{theirs}.1.running_var"] + BATCH_NORM_EPS).rsqrt()
            found[f"{block}.{k}.weight"] = state[f"{theirs}.0.weight"] * scale[:, None, None, None]
            found[f"{block}.{k}.bias"] = -state[f"{theirs}.1.running_mean"] * scale
    return found
