"""Predictions made to agree with what is known of the cameras.

The network sees a photo alone and guesses how long its lens was. Where that is known, from EXIF or the user, a pair's
pointmaps are given the focal length of camera 0, in whose frame both are: see `with_focal`. Where it is known with a
standard deviation alone, one between both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.alignment.cameras import cameras_of_views
from dust3r_sfm.alignment.observations import SparseGrid, usable_weights
from dust3r_sfm.geometry.focal import focal_from_pointmap, with_focal
from dust3r_sfm.pairs import Pair, PairPrediction, Predictions, size_of, stride_of
from dust3r_sfm.views import View

NETWORK_SIGMA = 0.1
"""Standard deviation of the logarithm of the focal length that several pairs of an image tell."""
MAX_SAMPLES = 3000
"""Pixels of image 0 that tell the focal length of its pointmap."""


def with_known_focals(views: Sequence[View], predictions: Predictions) -> Predictions:
    """The predictions, those whose image 0 is a view of known K with its focal length."""
    known = [view for view in views if view.known_K is not None]
    return _Focused(predictions, known) if known else predictions


class _Focused(Mapping[Pair, PairPrediction]):
    """Each is read, and given its focal length, when it is asked for."""

    def __init__(self, predictions: Predictions, known: Sequence[View]) -> None:
        self._predictions = predictions
        cameras = cameras_of_views(known)
        self._K = dict(zip((view.name for view in known), cameras.base_K.float(), strict=True))
        trust = NETWORK_SIGMA**2 / (NETWORK_SIGMA**2 + cameras.focal_sigma**2)
        self._trust = dict(zip(self._K, trust.tolist(), strict=True))
        self._focals: dict[Pair, float] = {}

    def __getitem__(self, pair: Pair) -> PairPrediction:
        prediction = self._predictions[pair]
        K = self._K.get(pair.name0)
        if K is None:
            return prediction
        if pair not in self._focals:
            self._focals[pair] = own_focal(prediction, K[:2, 2])
        return focused(prediction, K, self._focals[pair], self._trust[pair.name0])

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._predictions)

    def __len__(self) -> int:
        return len(self._predictions)


def focused(prediction: PairPrediction, K: Float[Tensor, "3 3"], focal: float, trust: float = 1.0) -> PairPrediction:
    """Both pointmaps, of own focal length `focal`, with that of K; by a `trust` under 1 with one between both."""
    own, known = torch.tensor(focal), K.diagonal()[:2].mean()
    known = own * (known / own) ** trust

    def of(pointmap: Float[Tensor, "h w 3"]) -> Float[Tensor, "h w 3"]:
        return with_focal(pointmap.flatten(0, 1), own, known).view_as(pointmap)

    return replace(
        prediction,
        pointmap0_in_cam0=of(prediction.pointmap0_in_cam0),
        pointmap1_in_cam0=of(prediction.pointmap1_in_cam0),
    )


def own_focal(prediction: PairPrediction, principal_point: Float[Tensor, "2"]) -> float:
    """In pixels of image 0; NaN where its pointmap tells none."""
    grid = SparseGrid.of(size_of(prediction, 0), MAX_SAMPLES, stride_of(prediction, 0))
    there = (prediction.pointmap0_in_cam0, prediction.confidence0)
    pointmap, confidence = (grid.sample_of_those_there(x).unflatten(0, grid.shape).float().cpu() for x in there)
    focal = focal_from_pointmap(pointmap, usable_weights(pointmap, confidence, 0), grid.to_grid(principal_point))
    return float(focal) * grid.stride
