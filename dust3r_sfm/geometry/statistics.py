"""Order statistics with weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def weighted_median(values: Float[Tensor, "*b n"], weights: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """The value at which half of the weight is reached; NaN where there is no weight."""
    order = values.argsort(dim=-1)
    cumulative = torch.take_along_dim(weights, order, dim=-1).cumsum(dim=-1)
    total = cumulative[..., -1:]
    middle = torch.searchsorted(cumulative, total / 2).clamp(max=values.shape[-1] - 1)
    median = torch.take_along_dim(values, torch.take_along_dim(order, middle, dim=-1), dim=-1)
    return torch.where(total > 0, median, torch.nan)[..., 0]
