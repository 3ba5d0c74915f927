"""How images lie to each other as single pairs tell it: a similarity between two images' own frames for each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.alignment.chaining import image_frames, image_relations
from dust3r_sfm.alignment.observations import MAX_DISTANCE, MIN_SAMPLES, Observations, SparseGrid, usable_weights
from dust3r_sfm.pairs import Pair, PairPrediction

MAX_SAMPLES = 200
"""Pixels of an image that tell a similarity."""


@dataclass(frozen=True, eq=False)
class Relations:
    """An image's frame is its camera, its unit what its pairs mostly take for the distance of what it sees."""

    names: tuple[str, ...]
    pairs: tuple[Pair, ...]
    images: Int[Tensor, "2 e"]
    """Indices into `names` of both images of each pair."""
    image1_from_image0: Float[Tensor, "e 4 4"]


@dataclass(frozen=True, eq=False)
class PairSamples:
    """Some points of both images in camera 0, whose median distance from it is the unit, and their weights."""

    grids: tuple[SparseGrid, SparseGrid]
    points: tuple[Float[Tensor, "m 3"], Float[Tensor, "k 3"]]
    weights: tuple[Float[Tensor, " m"], Float[Tensor, " k"]]


def sample_pair(prediction: PairPrediction) -> PairSamples | None:
    """What is kept of a prediction; None where too few of its points can be used."""
    sides = (
        (prediction.pointmap0_in_cam0, prediction.confidence0),
        (prediction.pointmap1_in_cam0, prediction.confidence1),
    )
    grids, points, weights = [], [], []
    for side, (pointmap, confidence) in enumerate(sides):
        grids.append(grid := SparseGrid.of((confidence.shape[0], confidence.shape[1]), MAX_SAMPLES))
        points.append(grid.sample(pointmap).float())
        weights.append(usable_weights(points[-1], grid.sample(confidence).float(), side))
    if min(int((w > 0).sum()) for w in weights) < MIN_SAMPLES:
        return None
    unit = float(points[0][weights[0] > 0].norm(dim=-1).median())
    if not unit > 0:
        return None
    points = [torch.where((w > 0)[:, None], p / unit, 0) for p, w in zip(points, weights, strict=True)]
    weights = [w * (p.norm(dim=-1) < MAX_DISTANCE) for p, w in zip(points, weights, strict=True)]
    return PairSamples((grids[0], grids[1]), (points[0], points[1]), (weights[0], weights[1]))


def relate_images(names: Sequence[str], samples: Mapping[Pair, PairSamples]) -> Relations:
    """The relations that pairs of some of the named images tell, at least one."""
    index, pairs = {name: i for i, name in enumerate(names)}, tuple(samples)
    images = torch.tensor([[index[pair[side]] for pair in pairs] for side in (0, 1)])
    m = max(len(w) for s in samples.values() for w in s.weights)
    points, weights = torch.zeros(2, len(pairs), m, 3), torch.zeros(2, len(pairs), m)
    for e, sampled in enumerate(samples.values()):
        for side in (0, 1):
            length = len(sampled.weights[side])
            points[side, e, :length], weights[side, e, :length] = sampled.points[side], sampled.weights[side]
    of_name = {name: grid for pair, s in samples.items() for name, grid in zip(pair, s.grids, strict=True)}
    grids = tuple(of_name.get(name, SparseGrid((1, 1), 1)) for name in names)
    ones = torch.ones(len(pairs))
    observations = Observations(tuple(names), pairs, grids, images, points, weights, ones, ones)
    seen = torch.unique(images)
    frames, frame_weights = image_frames(_restricted(observations, seen))
    own, own_weights = torch.zeros(len(names), m, 3), torch.zeros(len(names), m)
    own[seen], own_weights[seen] = frames, frame_weights
    return Relations(tuple(names), pairs, images, image_relations(observations, own, own_weights))


def _restricted(observations: Observations, seen: Int[Tensor, " k"]) -> Observations:
    """Over the images alone that have pairs."""
    names = tuple(observations.names[i] for i in seen.tolist())
    grids = tuple(observations.grids[i] for i in seen.tolist())
    images = torch.searchsorted(seen, observations.images.contiguous())
    o = observations
    return Observations(names, o.pairs, grids, images, o.points, o.weights, o.units, o.scores)
