"""What a component's pairs say about its images, on a sparse grid of pixels, as a few dense tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.pairs import Pair, PairPrediction, Predictions, size_of, stride_of
from dust3r_sfm.views import View

MIN_SAMPLES = 12
"""A pair says something only if this many sampled pixels of each of its images are usable."""
MIN_WEIGHT = 1e-4
"""Weight of a usable pixel of the lowest confidence, so that a network that is never sure still counts."""
MAX_DISTANCE = 100.0
"""Points this many times farther than the pair's median distance are not believed."""


@dataclass(frozen=True)
class SparseGrid:
    """Every `stride`-th pixel of a (height, width) image in both directions."""

    size: tuple[int, int]
    stride: int
    base: int = 1
    """Of this many pixels in both directions only the middle one is there; divides the stride."""

    @staticmethod
    def of(size: tuple[int, int], max_samples: int, base: int = 1) -> SparseGrid:
        """The finest grid of at most about `max_samples` of the pixels that are there."""
        stride = min(math.ceil(math.sqrt(size[0] * size[1] / max_samples)), *size)
        return SparseGrid(size, base * math.ceil(stride / base), base)

    @property
    def start(self) -> int:
        """The first row and column."""
        return self.base // 2 + self.base * self._start_of_those_there

    @property
    def _start_of_those_there(self) -> int:
        steps = self.stride // self.base
        return min(steps // 2, (min(self.size) - self.base // 2 - 1) // self.base)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = (len(range(self.start, s, self.stride)) for s in self.size)
        return rows, columns

    def to_grid(self, pixel: Float[Tensor, "2"]) -> Float[Tensor, "2"]:
        """A position in the image as one in the image that the samples make when seen as pixels."""
        return (pixel - (self.start + 0.5)) / self.stride + 0.5

    def sample(self, image: Tensor) -> Tensor:
        """The grid's pixels of an (h, w, ...) image, as (rows * columns, ...)."""
        return image[self.start :: self.stride, self.start :: self.stride].flatten(0, 1)

    def sample_of_those_there(self, values: Tensor) -> Tensor:
        """The same where the image holds only the pixels that are there."""
        start, step = self._start_of_those_there, self.stride // self.base
        return values[start::step, start::step].flatten(0, 1)


@dataclass(frozen=True, eq=False)
class PairSamples:
    """One pair's usable points; axis lists are its two sides: 0 is the image whose camera's frame is used."""

    points: list[Float[Tensor, "_m 3"]]
    weights: list[Float[Tensor, " _m"]]
    unit: float
    """The pair's median distance from camera 0: `points` are divided by it."""
    score: float
    """The product of both images' mean confidences."""
    grids: tuple[SparseGrid, SparseGrid]


@dataclass(frozen=True, eq=False)
class Observations:
    """All pairs of a component, padded to one number of samples an image by weights of zero."""

    names: tuple[str, ...]
    pairs: tuple[Pair, ...]
    grids: tuple[SparseGrid, ...]
    images: Int[Tensor, "2 e"]
    """Indices into `names` of both sides of each pair."""
    points: Float[Tensor, "2 e m 3"]
    """In camera 0 of each pair, in the pair's `units`."""
    weights: Float[Tensor, "2 e m"]
    """log(confidence), DUSt3R's; zero for what is not usable."""
    units: Float[Tensor, " e"]
    scores: Float[Tensor, " e"]


def sample_pairs(views: Sequence[View], predictions: Predictions, max_samples: int) -> dict[Pair, PairSamples]:
    """Samples of all pairs of given views that say something; read one at a time. Pairs of other images are left."""
    by_name = {view.name: view for view in views}
    samples = {}
    for pair in predictions:
        if pair.name0 not in by_name or pair.name1 not in by_name or pair.name0 == pair.name1:
            continue
        sampled = _sample_pair(predictions[pair], [by_name[name] for name in pair], max_samples, pair)
        if sampled is not None:
            samples[pair] = sampled
    return samples


def stack_samples(views: Sequence[View], samples: dict[Pair, PairSamples], max_samples: int) -> Observations:
    """The observations of a component: its views, and at least one pair, all of them of these views."""
    index = {view.name: i for i, view in enumerate(views)}
    pairs = tuple(pair for pair in samples if pair.name0 in index and pair.name1 in index)
    used = [samples[pair] for pair in pairs]
    grid_of = {name: grid for pair in pairs for name, grid in zip(pair, samples[pair].grids, strict=True)}
    m = max(len(w) for s in used for w in s.weights)
    device = used[0].points[0].device
    points, weights = torch.zeros(2, len(pairs), m, 3, device=device), torch.zeros(2, len(pairs), m, device=device)
    for e, pair_samples in enumerate(used):
        for side in (0, 1):
            length = len(pair_samples.weights[side])
            points[side, e, :length] = pair_samples.points[side]
            weights[side, e, :length] = pair_samples.weights[side]
    return Observations(
        names=tuple(view.name for view in views),
        pairs=pairs,
        grids=tuple(grid_of[view.name] for view in views),
        images=torch.tensor([[index[pair[side]] for pair in pairs] for side in (0, 1)], device=device),
        points=points,
        weights=weights,
        units=torch.tensor([s.unit for s in used], device=device),
        scores=torch.tensor([s.score for s in used], device=device),
    )


def usable_weights(
    pointmap: Float[Tensor, "*shape 3"], confidence: Float[Tensor, "*shape"], side: int
) -> Float[Tensor, "*shape"]:
    """log(confidence) of points that can be true: finite, and those of side 0 in front of their own camera."""
    usable = (pointmap.sum(dim=-1) + confidence).isfinite()
    if side == 0:
        usable = usable & (pointmap[..., 2] > 0)
    return torch.where(usable, confidence.clamp(min=1).log().clamp(min=MIN_WEIGHT), 0)


def _sides(prediction: PairPrediction) -> Iterator[tuple[Tensor, Tensor]]:
    yield prediction.pointmap0_in_cam0, prediction.confidence0
    yield prediction.pointmap1_in_cam0, prediction.confidence1


def _sample_pair(prediction: PairPrediction, views: Sequence[View], max_samples: int, pair: Pair) -> PairSamples | None:
    points, weights, confidences, grids = [], [], [], []
    for side, (view, (pointmap, confidence)) in enumerate(zip(views, _sides(prediction), strict=True)):
        if size_of(prediction, side) != view.size:
            raise InputError(
                f"the pair {pair.name0} {pair.name1} has {size_of(prediction, side)} pixels for {view.name}, "
                f"whose view has {view.size}: load the views at the size of inference, or infer again"
            )
        grid = SparseGrid.of(view.size, max_samples, stride_of(prediction, side))
        grids.append(grid)
        points.append(grid.sample_of_those_there(pointmap).float())
        confidences.append(grid.sample_of_those_there(confidence).float())
        weight = usable_weights(points[-1], confidences[-1], side)
        weights.append(weight if view.mask is None else weight * grid.sample(view.mask).to(weight.device))
    if min(int((w > 0).sum()) for w in weights) < MIN_SAMPLES:
        return None
    unit = float(points[0][weights[0] > 0].norm(dim=-1).median())
    points = [torch.where((w > 0)[:, None], p / unit, 0) for p, w in zip(points, weights, strict=True)]
    weights = [w * (p.norm(dim=-1) < MAX_DISTANCE) for p, w in zip(points, weights, strict=True)]
    score = math.prod(float(c[w > 0].mean()) for c, w in zip(confidences, weights, strict=True))
    enough = min(int((w > 0).sum()) for w in weights) >= MIN_SAMPLES and unit > 0 and math.isfinite(unit)
    return PairSamples(points, weights, unit, score, (grids[0], grids[1])) if enough else None
