"""Average precision that can be descended: scores fall into soft bins (Revaud et al., ICCV 2019)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def average_precision_loss(
    descriptors: Float[Tensor, "n d"], places: Int[Tensor, " n"], num_bins: int = 25
) -> Float[Tensor, ""]:
    """1 - the mean average precision of finding, for each unit descriptor, the others of its place among all others.

    Descriptors that are alone in their place ask nothing; where all are, the loss is 0.
    """
    others = ~torch.eye(len(places), dtype=torch.bool, device=places.device)
    relevant = (places[:, None] == places[None]) & others
    precision = quantized_average_precision(descriptors @ descriptors.mT, relevant, others, num_bins)
    asks = relevant.any(dim=-1)
    return (torch.where(asks, 1 - precision, 0).sum() / asks.sum().clamp(min=1)).to(descriptors.dtype)


def quantized_average_precision(
    scores: Float[Tensor, "*q n"],
    relevant: Bool[Tensor, "*q n"],
    counted: Bool[Tensor, "*q n"] | None = None,
    num_bins: int = 25,
) -> Float[Tensor, "*q"]:
    """Average precision of each query's ranking by `scores`, which are clamped to [0, 1].

    Bins are centred at 1, ..., 0, each a triangle of half width 1 / (num_bins - 1): a score counts for the two
    next to it. Items that are not `counted` take no part. 0 for a query to which nothing is relevant.
    """
    if num_bins < 2:
        raise ValueError(f"num_bins must be at least 2, got {num_bins}")
    centers = torch.linspace(1, 0, num_bins, device=scores.device, dtype=scores.dtype)
    distances = (scores.clamp(0, 1)[..., None, :] - centers[:, None]).abs()
    weights = (1 - distances * (num_bins - 1)).clamp(min=0)  # *q bins n
    if counted is not None:
        weights = weights * counted[..., None, :]
        relevant = relevant & counted
    found = weights.sum(dim=-1)
    relevant_found = (weights * relevant[..., None, :]).sum(dim=-1)
    # nothing found so far means nothing relevant found: 0 of 0 counts as 0
    precision = relevant_found.cumsum(dim=-1) / found.cumsum(dim=-1).clamp(min=torch.finfo(scores.dtype).tiny)
    num_relevant = relevant.sum(dim=-1)
    return (precision * relevant_found).sum(dim=-1) / num_relevant.clamp(min=1)
