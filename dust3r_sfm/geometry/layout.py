"""Places for the nodes of a drawn graph."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

GRAVITY = 0.8
"""Pull towards the middle, so that parts that nothing connects stay in the picture."""


def spring_layout(
    num_nodes: int, edges: Int[Tensor, "e 2"], weights: Float[Tensor, " e"], num_iters: int = 150
) -> Float[Tensor, "{num_nodes} 2"]:
    """Nodes in the square [-1, 1], near each other where an edge of large weight (0 to 1) joins them.

    Springs pull along edges and all nodes repel each other (Fruchterman and Reingold), from a
    circle in the nodes' order: the same graph always gives the same picture.
    """
    angle = torch.arange(num_nodes, dtype=torch.float64) * (2 * math.pi / max(num_nodes, 1))
    places = torch.stack([-angle.cos(), -angle.sin()], -1)
    if num_nodes < 3:
        return places
    strength = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    strength[edges[:, 0], edges[:, 1]] = weights.double()
    strength = torch.maximum(strength, strength.T)
    spacing = 1.6 / math.sqrt(num_nodes)
    for step in torch.linspace(0.2, 0.004, num_iters).tolist():
        offsets = places[:, None] - places
        distances = offsets.norm(dim=-1).clamp(min=1e-3)
        force = spacing**2 / distances.square() - strength * distances / spacing
        push = (force[..., None] * offsets).sum(1) - GRAVITY * places
        places = places + push * (step / push.norm(dim=-1, keepdim=True).clamp(min=step))
    places = places - (places.amax(0) + places.amin(0)) / 2
    return places / places.abs().amax(0).clamp(min=1e-9)
