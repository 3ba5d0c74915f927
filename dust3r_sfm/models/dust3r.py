"""DUSt3R: two images to two pointmaps in the first camera's frame (Wang et al., CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dust3r_sfm.models.blocks import LAYER_NORM_EPS, DecoderBlock, EncoderBlock, Rope, rope_of_grid
from dust3r_sfm.models.heads import ConfidenceMode, DepthMode, DptHead, LinearHead, confidence_of, pointmap_of
from dust3r_sfm.models.stem import Stem
from dust3r_sfm.pairs import PairPrediction

Head = Literal["linear", "dpt"]
StemKind = Literal["none", "xfeat"]

_MODES = {
    "head": get_args(Head),
    "stem": get_args(StemKind),
    "depth_mode": get_args(DepthMode),
    "confidence_mode": get_args(ConfidenceMode),
}


@dataclass(frozen=True, kw_only=True)
class Dust3rConfig:
    """Shape of the network; the defaults are the released 224 model's."""

    image_size: int = 224
    """224: photos are cropped to a square of 224; any other: their long side, in multiples of `patch_size`."""
    square_ok: bool = False
    """Square photos stay square; the released models take them cropped to 4:3."""
    enc_embed_dim: int = 1024
    enc_depth: int = 24
    enc_num_heads: int = 16
    dec_embed_dim: int = 768
    dec_depth: int = 12
    dec_num_heads: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16
    stem: StemKind = "none"
    """Frozen features that are added to the patches: XFeat's, or none."""
    head: Head = "linear"
    dpt_layer_dims: tuple[int, int, int, int] = (96, 192, 384, 768)
    """Channels of the DPT head's four levels, fine to coarse."""
    dpt_feature_dim: int = 256
    """Channels in which the DPT head fuses its levels."""
    depth_mode: DepthMode = "exp"
    confidence_mode: ConfidenceMode = "exp"
    confidence_limits: tuple[float, float] = (1.0, float("inf"))

    def __post_init__(self) -> None:
        for name, known in _MODES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.image_size, int) or self.image_size < self.patch_size:
            raise ValueError(f"image_size must be a number of pixels from {self.patch_size}, got {self.image_size!r}")
        if not 0 <= self.confidence_limits[0] < self.confidence_limits[1]:
            raise ValueError(f"confidence_limits must rise from 0 or more, got {self.confidence_limits}")
        for part in ("enc", "dec"):
            dim, num_heads = getattr(self, f"{part}_embed_dim"), getattr(self, f"{part}_num_heads")
            if num_heads < 1 or dim < 1 or dim % (4 * num_heads):
                raise ValueError(
                    f"{part}_embed_dim must be a multiple of 4 {part}_num_heads, got {dim} for {num_heads} heads"
                )
        if self.head == "dpt" and (self.patch_size != 16 or self.dec_depth < 4):
            raise ValueError(
                f"the DPT head needs patches of 16 pixels and at least 4 decoder blocks, "
                f"got {self.patch_size} and {self.dec_depth}"
            )


@dataclass(frozen=True, eq=False)
class Tokens:
    """An encoded image: its patches row by row, and how many rows and columns there are."""

    features: Float[Tensor, "b n c"]
    grid: tuple[int, int]
    finest: tuple[Float[Tensor, "b d h4 w4"] | None, Float[Tensor, "b d h4 w4"] | None] = (None, None)
    """What the DPT heads of image 0 and image 1 make of the image alone, where it is kept (`Dust3r.with_finest`)."""


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
        return self.proj(image).flatten(2).transpose(1, 2)


class Dust3r(nn.Module):
    """The network; its parameters bear the names of the released checkpoints."""

    mask_token: Tensor

    def __init__(self, config: Dust3rConfig) -> None:
        super().__init__()
        self.config = config
        self.name = "untrained"
        """What the weights are, for reports."""
        self.licence = "Apache-2.0"
        """Licence of the weights."""
        self.residual_in_bfloat16 = False
        """Whether the residual stream is as autocast leaves it."""
        c = config
        self.patch_embed = _PatchEmbed(c.enc_embed_dim, c.patch_size)
        self.stem = Stem(c.enc_embed_dim, c.patch_size) if c.stem == "xfeat" else None
        self.register_buffer("mask_token", torch.zeros(1, 1, c.dec_embed_dim))  # of the pre-training, never used
        self.enc_blocks = nn.ModuleList(
            EncoderBlock(c.enc_embed_dim, c.enc_num_heads, c.mlp_ratio) for _ in range(c.enc_depth)
        )
        self.enc_norm = nn.LayerNorm(c.enc_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(c.enc_embed_dim, c.dec_embed_dim)
        self.dec_blocks = _decoder(c)
        self.dec_blocks2 = _decoder(c)
        self.dec_norm = nn.LayerNorm(c.dec_embed_dim, eps=LAYER_NORM_EPS)
        self.downstream_head1 = _head(c)
        self.downstream_head2 = _head(c)
        _initialize(self)

    def forward(self, image0: Float[Tensor, "b 3 h0 w0"], image1: Float[Tensor, "b 3 h1 w1"]) -> PairPrediction:
        """Pointmaps of a batch of pairs, images in [-1, 1]; the sizes of 0 and 1 may differ."""
        if image0.shape != image1.shape:
            return self.decode(self.encode(image0), self.encode(image1))
        tokens = self.encode(torch.cat([image0, image1]))
        features0, features1 = tokens.features.chunk(2)
        return self.decode(Tokens(features0, tokens.grid), Tokens(features1, tokens.grid))

    def encode(self, image: Float[Tensor, "b 3 h w"]) -> Tokens:
        """Tokens of images in [-1, 1] whose sides are multiples of the patch size."""
        patch = self.config.patch_size
        h, w = image.shape[-2:]
        if h % patch or w % patch:
            raise ValueError(f"image sides must be multiples of {patch}, got {h}x{w}")
        grid = h // patch, w // patch
        rope = rope_of_grid(*grid, self.config.enc_embed_dim // self.config.enc_num_heads, image.device)
        x = self.patch_embed(image)
        x = self._stream(x if self.stem is None else x + self.stem(image))
        for block in self.enc_blocks:
            x = block(x, rope)
        return Tokens(self.enc_norm(x), grid)

    def with_finest(self, tokens: Tokens) -> Tokens:
        """The same with the part of the heads that needs no partner: a tenth of the work of a pair, once an image."""
        heads = self.downstream_head1, self.downstream_head2
        finest0, finest1 = (head.finest(tokens.features, tokens.grid) for head in heads)
        return Tokens(tokens.features, tokens.grid, (finest0, finest1))

    def decode(self, tokens0: Tokens, tokens1: Tokens) -> PairPrediction:
        """Pointmaps of a batch of pairs from their encoded images."""
        layers0, layers1 = self._decode_layers(tokens0, tokens1)
        pointmap0, confidence0 = self._predict(self.downstream_head1, layers0, tokens0.grid, tokens0.finest[0])
        pointmap1, confidence1 = self._predict(self.downstream_head2, layers1, tokens1.grid, tokens1.finest[1])
        return PairPrediction(pointmap0, confidence0, pointmap1, confidence1)

    def _decode_layers(self, tokens0: Tokens, tokens1: Tokens) -> tuple[list[Tensor], list[Tensor]]:
        """Of both images, the layers that the heads take."""
        rope0, rope1 = self._decoder_rope(tokens0), self._decoder_rope(tokens1)
        wanted = self.downstream_head1.layers
        layers0, layers1 = ([tokens0.features], [tokens1.features]) if 0 in wanted else ([], [])
        x0 = self._stream(self.decoder_embed(tokens0.features))
        x1 = self._stream(self.decoder_embed(tokens1.features))
        for layer, (block0, block1) in enumerate(zip(self.dec_blocks, self.dec_blocks2, strict=True), start=1):
            x0, x1 = block0(x0, x1, rope0, rope1), block1(x1, x0, rope1, rope0)
            if layer in wanted:
                last = layer == self.config.dec_depth
                layers0.append(self.dec_norm(x0) if last else x0)
                layers1.append(self.dec_norm(x1) if last else x1)
        return layers0, layers1

    def _stream(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The residual stream keeps the parameters' precision under autocast, unless told otherwise."""
        return x if self.residual_in_bfloat16 else x.to(self.dec_norm.weight.dtype)

    def _decoder_rope(self, tokens: Tokens) -> Rope:
        return rope_of_grid(
            *tokens.grid, self.config.dec_embed_dim // self.config.dec_num_heads, tokens.features.device
        )

    def _predict(
        self, head: LinearHead | DptHead, layers: list[Tensor], grid: tuple[int, int], finest: Tensor | None
    ) -> tuple[Float[Tensor, "b h w 3"], Float[Tensor, "b h w"]]:
        raw = head(layers, grid, finest)
        pointmap = pointmap_of(raw[..., :3], self.config.depth_mode)
        return pointmap, confidence_of(raw[..., 3], self.config.confidence_mode, self.config.confidence_limits)

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None) -> Dust3r:
        """The shipped weights, or those of a checkpoint file, a folder or a Hugging Face name; see `checkpoint`."""
        from dust3r_sfm.models.checkpoint import load_model

        return load_model(source)


def _decoder(c: Dust3rConfig) -> nn.ModuleList:
    return nn.ModuleList(DecoderBlock(c.dec_embed_dim, c.dec_num_heads, c.mlp_ratio) for _ in range(c.dec_depth))


def _head(c: Dust3rConfig) -> LinearHead | DptHead:
    if c.head == "linear":
        return LinearHead(c.dec_embed_dim, c.dec_depth, c.patch_size)
    return DptHead(c.enc_embed_dim, c.dec_embed_dim, c.dec_depth, c.dpt_layer_dims, c.dpt_feature_dim)


def _initialize(model: Dust3r) -> None:
    """For training from scratch: Xavier-uniform matrices, no bias, first outputs of about unit size."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.view(model.config.enc_embed_dim, -1))
    nn.init.zeros_(model.patch_embed.proj.bias)
    if model.stem is not None:
        nn.init.zeros_(model.stem.proj.weight)
    for head in (model.downstream_head1, model.downstream_head2):
        if isinstance(head, LinearHead):
            nn.init.normal_(head.proj.weight, std=0.02)
