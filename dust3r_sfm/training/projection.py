"""The linear map after pooling, learned so that the images of a place find each other: descent of the AP loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dust3r_sfm.training.average_precision import average_precision_loss


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    dim: int = 768
    """Numbers of a descriptor."""
    steps: int = 150
    """Updates, each on the images of some places."""
    batch_places: int = 64
    """Places of an update."""
    learning_rate: float = 1e-3
    """Of Adam, in units of the whitened features; falls to zero by a cosine."""
    held_out: float = 0.2
    """Share of the places that only judge: the map that serves them best is kept."""


def whitening(features: Float[Tensor, "n d"], dim: int, power: float = 0.5) -> nn.Linear:
    """The map to principal components, each divided by its standard deviation to a power."""
    mean = features.mean(dim=0)
    _, deviations, components = torch.linalg.svd((features - mean) / len(features) ** 0.5, full_matrices=False)
    dim = min(dim, len(deviations))
    weight = components[:dim] / deviations[:dim, None].clamp(min=1e-3 * deviations[0]) ** power
    projection = nn.Linear(features.shape[1], dim).to(features.device)
    with torch.no_grad():
        projection.weight.copy_(weight)
        projection.bias.copy_(-weight @ mean)
    return projection


def learn_projection(
    features: Float[Tensor, "n d"], places: Int[Tensor, " n"], config: ProjectionConfig, generator: torch.Generator
) -> tuple[nn.Linear, list[float]]:
    """The map of pooled features to descriptors, and the held-out AP loss along the way, the whitening's first.

    It starts as the whitening of the features, and learns a square matrix that follows it.
    """
    start = whitening(features, config.dim)
    ids = places.unique()[torch.randperm(len(places.unique()), generator=generator).to(places.device)]
    num_held_out = max(1, round(config.held_out * len(ids)))
    judges, learns = torch.isin(places, ids[:num_held_out]), ids[num_held_out:]
    with torch.no_grad():
        whitened = nn.functional.normalize(start(features), dim=-1)
    matrix = torch.eye(whitened.shape[1], device=features.device).requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    best, losses = matrix.detach().clone(), [_held_out_loss(whitened, matrix, places, judges)]
    for step, chosen in enumerate(_batches(learns, config, generator), start=1):
        batch = torch.isin(places, chosen)
        loss = average_precision_loss(_described(whitened[batch], matrix), places[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == config.steps:
            losses.append(_held_out_loss(whitened, matrix, places, judges))
            best = matrix.detach().clone() if losses[-1] == min(losses) else best
    with torch.no_grad():
        start.weight.copy_(best @ start.weight)
        start.bias.copy_(best @ start.bias)
    return start, losses


def _described(whitened: Float[Tensor, "n d"], matrix: Float[Tensor, "d d"]) -> Float[Tensor, "n d"]:
    return nn.functional.normalize(whitened @ matrix.mT, dim=-1)


def _held_out_loss(whitened: Tensor, matrix: Tensor, places: Tensor, judges: Tensor) -> float:
    with torch.no_grad():
        return float(average_precision_loss(_described(whitened[judges], matrix), places[judges]))


def _batches(
    places: Int[Tensor, " p"], config: ProjectionConfig, generator: torch.Generator
) -> Iterator[Int[Tensor, " b"]]:
    for _ in range(config.steps):
        yield places[torch.randperm(len(places), generator=generator)[: config.batch_places].to(places.device)]
