"""Pairs of images, what the network predicts for one, and the pixels that match in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

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


Predictions = Mapping[Pair, PairPrediction]
"""Unbatched predictions by directed pair; in memory, or read from a file one at a time."""


class SomePredictions(Mapping[Pair, PairPrediction]):
    """Some of the predictions, each read when it is asked for."""

    def __init__(self, predictions: Predictions, pairs: Iterable[Pair]) -> None:
        self._predictions, self._pairs = predictions, dict.fromkeys(pairs)

    def __getitem__(self, pair: Pair) -> PairPrediction:
        if pair not in self._pairs:
            raise KeyError(pair)
        return self._predictions[pair]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


@dataclass(frozen=True, eq=False)
class Matches:
    """Pixels of two images that see the same point, in network pixels (corner origin), with scores."""

    keypoints0: Float[Tensor, "m 2"]
    keypoints1: Float[Tensor, "m 2"]
    scores: Float[Tensor, " m"]
