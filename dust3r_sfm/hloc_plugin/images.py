"""Images as hloc hands them over, at the size that the network takes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.models.dust3r import Dust3rConfig
from dust3r_sfm.views import network_crop


def network_input(
    image: Float[Tensor, "b 3 h w"], config: Dust3rConfig
) -> tuple[Float[Tensor, "b 3 h1 w1"], Float[Tensor, "3 3"]]:
    """Images, given in 0 to 1, as the network takes them, and the map of their pixels (net_from_img, corner origin)."""
    height, width = image.shape[-2:]
    (new_width, new_height), (left, top, right, bottom) = network_crop(
        width, height, config.image_size, square_ok=config.square_ok
    )
    if left >= right or top >= bottom:
        raise ValueError(f"an image of {width} x {height} pixels is too narrow for a long side of {config.image_size}")
    resized = torch.nn.functional.interpolate(
        image, (new_height, new_width), mode="bicubic", antialias=True, align_corners=False
    )
    scale_x, scale_y = new_width / width, new_height / height
    net_from_img = torch.tensor([[scale_x, 0, -left], [0, scale_y, -top], [0, 0, 1]], dtype=torch.float64)
    return resized[..., top:bottom, left:right].clamp(0, 1) * 2 - 1, net_from_img
