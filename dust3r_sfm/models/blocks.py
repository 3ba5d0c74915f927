"""Transformer blocks of DUSt3R's encoder and decoders, with rotary positions of a 2-D grid."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

ROPE_BASE = 100.0
LAYER_NORM_EPS = 1e-6

Rope = tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]
"""cos and signed sin of every token and channel of a head."""
OtherRope = tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]]
"""The same of the other image, whose grid may differ."""


@lru_cache(maxsize=256)
def rope_of_grid(height: int, width: int, head_dim: int, device: torch.device) -> Rope:
    """Rotary tables of a row-major grid: the first half of a head's channels turns with y, the second with x.

    Within each half channel k is paired with channel k + head_dim / 4 and turns by position * 100^(-4k / head_dim).
    """
    quarter = head_dim // 4
    with torch.inference_mode(False):  # the tables are shared, also with training
        frequency = ROPE_BASE ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
        y, x = torch.meshgrid(
            torch.arange(height, device=device, dtype=torch.float32),
            torch.arange(width, device=device, dtype=torch.float32),
            indexing="ij",
        )
        angle_y, angle_x = y.reshape(-1, 1) * frequency, x.reshape(-1, 1) * frequency
        cos = torch.cat([angle_y, angle_y, angle_x, angle_x], dim=-1).cos()
        sin = torch.cat([-angle_y, angle_y, -angle_x, angle_x], dim=-1).sin()
    return cos, sin


def rotate(x: Float[Tensor, "*batch n d"], rope: Rope) -> Float[Tensor, "*batch n d"]:
    """Queries or keys turned by their token's position."""
    cos, sin = rope
    partner = x.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        # rounding the tables as x is rounded changes nothing that shows, and spares five copies in float32
        return torch.addcmul(x * cos.to(x.dtype), partner, sin.to(x.dtype))
    return (x * cos + partner * sin).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], rope: Rope) -> Float[Tensor, "b n c"]:
        qk, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).split((2, 1))
        q, k = rotate(qk, rope)
        attended = scaled_dot_product_attention(q, k, v[0])
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from one image's tokens to another's, each with its own positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projq = nn.Linear(dim, dim)
        self.projk = nn.Linear(dim, dim)
        self.projv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n c"], y: Float[Tensor, "b m c"], rope_x: Rope, rope_y: OtherRope
    ) -> Float[Tensor, "b n c"]:
        q = rotate(self._split_heads(self.projq(x)), rope_x)
        k = rotate(self._split_heads(self.projk(y)), rope_y)
        attended = scaled_dot_product_attention(q, k, self._split_heads(self.projv(y)))
        return self.proj(attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads n d"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.fc2(gelu(self.fc1(x)))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Float[Tensor, "b n c"], rope: Rope) -> Float[Tensor, "b n c"]:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """Pre-norm block that also attends to the other image's tokens."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm_y = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Float[Tensor, "b n c"], y: Float[Tensor, "b m c"], rope_x: Rope, rope_y: OtherRope
    ) -> Float[Tensor, "b n c"]:
        x = x + self.attn(self.norm1(x), rope_x)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), rope_x, rope_y)
        return x + self.mlp(self.norm3(x))
