"""Heads that turn a decoder's tokens into a pointmap and its confidence."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

DepthMode = Literal["exp", "linear", "square"]
ConfidenceMode = Literal["exp", "sigmoid"]

NUM_OUTPUTS = 4  # x, y, z and confidence


def pointmap_of(xyz: Float[Tensor, "*b 3"], mode: DepthMode) -> Float[Tensor, "*b 3"]:
    """The network's raw coordinates with their distance d to the origin made exp(d) - 1, d or d^2, in float32."""
    xyz = xyz.float()
    if mode == "linear":
        return xyz
    distance = xyz.norm(dim=-1, keepdim=True)
    stretched = distance.expm1() if mode == "exp" else distance.square()
    return xyz / distance.clamp(min=1e-8) * stretched


def confidence_of(raw: Float[Tensor, "*b"], mode: ConfidenceMode, limits: tuple[float, float]) -> Float[Tensor, "*b"]:
    """Confidence within limits: the lower one plus exp(raw), or between both by a sigmoid, in float32."""
    lowest, highest = limits
    raw = raw.float()
    if mode == "exp":
        return (lowest + raw.exp()).clamp(max=highest)
    return lowest + (highest - lowest) * raw.sigmoid()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """The last layer is computed in float32: bfloat16 has 8 bits, too few for coordinates."""
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type):  # which breaks graphs
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class LinearHead(nn.Module):
    """One linear layer from a token to all pixels of its patch."""

    def __init__(self, dim: int, dec_depth: int, patch_size: int) -> None:
        super().__init__()
        self.layers = (dec_depth,)
        """The layers whose tokens the head takes; 0 is the encoder's output."""
        self.patch_size = patch_size
        self.proj = nn.Linear(dim, NUM_OUTPUTS * patch_size**2)

    def finest(self, features: Float[Tensor, "b n _"], grid: tuple[int, int]) -> None:
        """Nothing depends on the image alone."""

    def forward(
        self, tokens: list[Float[Tensor, "b n _"]], grid: tuple[int, int], finest: None = None
    ) -> Float[Tensor, "b h w 4"]:
        with without_autocast(tokens[-1].device):
            pixels = self.proj(tokens[-1].to(self.proj.weight.dtype))
        patches = pixels.unflatten(-1, (NUM_OUTPUTS, self.patch_size, self.patch_size)).unflatten(1, grid)
        return patches.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)  # b gh ph gw pw 4


class DptHead(nn.Module):
    """Dense prediction transformer head (Ranftl et al. 2021) over four layers; patches of 16 pixels only."""

    def __init__(
        self, enc_dim: int, dec_dim: int, dec_depth: int, layer_dims: tuple[int, int, int, int], feature_dim: int
    ) -> None:
        super().__init__()
        self.layers = (0, dec_depth // 2, dec_depth * 3 // 4, dec_depth)
        """The layers whose tokens the head takes; 0 is the encoder's output."""
        self.dpt = _Dpt((enc_dim, dec_dim, dec_dim, dec_dim), layer_dims, feature_dim)

    def finest(self, features: Float[Tensor, "b n _"], grid: tuple[int, int]) -> Float[Tensor, "b c h4 w4"]:
        """The finest level, before it is fused: it depends on the image's own encoding alone, whatever its partner."""
        return self.dpt.finest(_as_map(features, grid))

    def forward(
        self,
        tokens: list[Float[Tensor, "b n _"]],
        grid: tuple[int, int],
        finest: Float[Tensor, "b c h4 w4"] | None = None,
    ) -> Float[Tensor, "b h w 4"]:
        if finest is None:
            finest = self.finest(tokens[0], grid)
        return self.dpt(finest, [_as_map(x, grid) for x in tokens[1:]]).movedim(1, -1)


def _as_map(tokens: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b c gh gw"]:
    return tokens.transpose(1, 2).unflatten(2, grid)


class _Dpt(nn.Module):
    def __init__(self, token_dims: tuple[int, ...], layer_dims: tuple[int, ...], feature_dim: int) -> None:
        super().__init__()
        d0, d1, d2, d3 = layer_dims
        resample = [
            [nn.ConvTranspose2d(d0, d0, 4, stride=4)],
            [nn.ConvTranspose2d(d1, d1, 2, stride=2)],
            [],
            [nn.Conv2d(d3, d3, 3, stride=2, padding=1)],
        ]
        self.act_postprocess = nn.ModuleList(
            nn.Sequential(nn.Conv2d(token_dim, layer_dim, 1), *convolution)
            for token_dim, layer_dim, convolution in zip(token_dims, layer_dims, resample, strict=True)
        )
        self.scratch = _Scratch(layer_dims, feature_dim)
        hidden_dim = feature_dim // 2
        self.head = nn.Sequential(
            nn.Conv2d(feature_dim, hidden_dim, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, NUM_OUTPUTS, 1),
        )

    def finest(self, image: Float[Tensor, "b _ gh gw"]) -> Float[Tensor, "b c h4 w4"]:
        return self.scratch.finest(self.act_postprocess[0](image))

    def forward(
        self, finest: Float[Tensor, "b c h4 w4"], maps: list[Float[Tensor, "b _ gh gw"]]
    ) -> Float[Tensor, "b 4 h w"]:
        levels = [resample(x) for resample, x in zip(self.act_postprocess[1:], maps, strict=True)]
        features = self.head[:-1](self.scratch(finest, levels))
        with without_autocast(features.device):
            return _last_layer(features, self.head[-1])


def _last_layer(features: Float[Tensor, "b c h w"], layer: nn.Conv2d) -> Float[Tensor, "b o h w"]:
    """A 1x1 convolution in the layer's precision."""
    if not torch.compiler.is_compiling():
        return layer(features.to(layer.weight.dtype))
    weight = layer.weight[:, :, 0, 0]
    pixels = features.movedim(1, -1)  # as they lie in memory
    if features.is_cuda and features.dtype == torch.bfloat16 and not torch.is_grad_enabled():  # it has no derivative
        return (_times_split(pixels, weight) + layer.bias).movedim(-1, 1)
    # Sums of products are one kernel with what comes before and after: no copy is made in float32.
    return ((pixels.unsqueeze(-2).to(weight.dtype) * weight).sum(dim=-1) + layer.bias).movedim(-1, 1)


def _times_split(pixels: Float[Tensor, "*b c"], weight: Float[Tensor, "o c"]) -> Float[Tensor, "*b o"]:
    """Products of bfloat16 with float32 that lose nothing: the matrix units take a weight's first eight bits and its
    next eight apart, and add in float32."""
    first = weight.to(pixels.dtype)
    halves = torch.cat([first, (weight - first.to(weight.dtype)).to(pixels.dtype)])
    products = torch.mm(pixels.flatten(0, -2), halves.T, out_dtype=torch.float32)
    return (products[:, : len(weight)] + products[:, len(weight) :]).unflatten(0, pixels.shape[:-1])


class _Scratch(nn.Module):
    """Four levels fused from coarse to fine."""

    def __init__(self, layer_dims: tuple[int, ...], feature_dim: int) -> None:
        super().__init__()
        for level, layer_dim in enumerate(layer_dims, start=1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(layer_dim, feature_dim, 3, padding=1, bias=False))
        for level in range(1, 5):
            self.add_module(f"refinenet{level}", _Fusion(feature_dim))
        self.refinenet4.resConfUnit1.requires_grad_(False)  # the coarsest level has nothing to add: never used

    def finest(self, level: Float[Tensor, "b _ h4 w4"]) -> Float[Tensor, "b c h4 w4"]:
        return self.refinenet1.resConfUnit1(self.layer1_rn(level))

    def forward(
        self, finest: Float[Tensor, "b c h4 w4"], levels: list[Float[Tensor, "b _ _ _"]]
    ) -> Float[Tensor, "b c h w"]:
        fine2, fine3, coarse = (getattr(self, f"layer{i}_rn")(x) for i, x in enumerate(levels, start=2))
        h, w = fine3.shape[-2:]
        x = self.refinenet4(coarse)[..., :h, :w]  # an odd grid was rounded up at the coarsest level
        x = self.refinenet3(x, self.refinenet3.resConfUnit1(fine3))
        x = self.refinenet2(x, self.refinenet2.resConfUnit1(fine2))
        return self.refinenet1(x, finest)


class _Fusion(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resConfUnit1 = _ResidualUnit(dim)
        self.resConfUnit2 = _ResidualUnit(dim)
        self.out_conv = nn.Conv2d(dim, dim, 1)

    def forward(
        self, x: Float[Tensor, "b c h w"], skip: Float[Tensor, "b c h w"] | None = None
    ) -> Float[Tensor, "b c h2 w2"]:
        if skip is not None:
            x = x + skip
        x = self.out_conv(self.resConfUnit2(x))  # commutes with the interpolation, at a quarter of the cost
        return interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class _ResidualUnit(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.conv2(relu(self.conv1(relu(x))))
