"""A photo with its depth, as training takes the user's own scenes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class DepthView:
    """A photo with its camera and depth, all on one grid; corner origin."""

    name: str
    image: UInt8[Tensor, "h w 3"]
    depth: Float[Tensor, "h w"]
    """z along the optical axis at the pixels' centres; 0 where it is not known."""
    K: Float[Tensor, "3 3"]
    cam_from_world: Float[Tensor, "4 4"]
