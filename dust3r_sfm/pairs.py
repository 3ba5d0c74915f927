"""Pairs of images, what the network predicts for one, and the pixels that match in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Pair(NamedTuple):
    """A directed pair of image names: predictions are in the frame of camera 0."""

    name0: str
    name1: str

    def reversed(self) -> Pair:
        return Pair(self.name1, self.name0)


@dataclass(frozen=True, eq=False)
class PairPrediction:
    """Pointmaps of both images of a pair in camera 0's frame (unknown scale), with confidences from 1 up."""

    pointmap0_in_cam0: Float[Tensor, "*batch h0 w0 3"]
    confidence0: Float[Tensor, "*batch h0 w0"]
    pointmap1_in_cam0: Float[Tensor, "*batch h1 w1 3"]
    confidence1: Float[Tensor, "*batch h1 w1"]


@dataclass(frozen=True, eq=False)
class Matches:
    """Pixels of two images that see the same point, in network pixels (corner origin), with scores."""

    keypoints0: Float[Tensor, "m 2"]
    keypoints1: Float[Tensor, "m 2"]
    scores: Float[Tensor, " m"]


@dataclass(frozen=True, eq=False)
class ReducedPrediction(PairPrediction):
    """What alignment and matching need of a prediction, in a twentieth of its room.

    The pointmaps and confidences are those of every `strides`-th pixel, from the middle of the first cell on.
    """

    sizes: tuple[tuple[int, int], tuple[int, int]]
    """(height, width) of both images."""
    strides: tuple[int, int]
    matches: Matches | None
    """Those of all pixels, both directions of the pair together; None where the reversed pair has them."""
    depth0: Float[Tensor, "h w"] | None = None
    """Image 0's depth at every pixel, in its own camera; of some pairs of each image alone."""
    full_confidence0: Float[Tensor, "h w"] | None = None
    """Its confidence at every pixel, with `depth0`."""


def size_of(prediction: PairPrediction, side: int) -> tuple[int, int]:
    """(height, width) of one of the two images."""
    if isinstance(prediction, ReducedPrediction):
        return prediction.sizes[side]
    height, width = (prediction.confidence0, prediction.confidence1)[side].shape
    return height, width


def stride_of(prediction: PairPrediction, side: int) -> int:
    """How many of an image's pixels lie from one of the prediction's to the next."""
    return prediction.strides[side] if isinstance(prediction, ReducedPrediction) else 1


Predictions = Mapping[Pair, PairPrediction]
"""Unbatched predictions by directed pair; in memory, or read from a file one at a time."""


class SomePredictions(Mapping[Pair, PairPrediction]):
    """Some of the predictions, each read when it is asked for."""

    def __init__(self, predictions: Predictions, pairs: Iterable[Pair]) -> None:
        self._predictions, self._pairs = predictions, dict.fromkeys(pairs)

    @property
    def all_of_them(self) -> Predictions:
        """Also those that are not among the some."""
        there = self._predictions
        return there.all_of_them if isinstance(there, SomePredictions) else there

    def __getitem__(self, pair: Pair) -> PairPrediction:
        if pair not in self._pairs:
            raise KeyError(pair)
        return self._predictions[pair]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


class PredictionsOn(Mapping[Pair, PairPrediction]):
    """Predictions whose pointmaps and confidences are brought to a device as they are asked for; not their matches."""

    def __init__(self, predictions: Predictions, device: torch.device) -> None:
        self._predictions, self._device = predictions, device

    def __getitem__(self, pair: Pair) -> PairPrediction:
        prediction = self._predictions[pair]
        values = {field.name: getattr(prediction, field.name) for field in fields(prediction)}
        there = {name: v.to(self._device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(prediction, **there)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._predictions)

    def __len__(self) -> int:
        return len(self._predictions)
