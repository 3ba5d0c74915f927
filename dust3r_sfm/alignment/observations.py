"""What a component's pairs say about its images, on a sparse grid of pixels, as a few dense tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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
PAIRS_AT_ONCE = 512
"""Pairs that are sampled in one go: so many starts of small kernels become one."""


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

    def pixels(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "m 2"]:
        """(x, y) of the samples' centres."""
        y, x = (torch.arange(self.start, size, self.stride, dtype=dtype) + 0.5 for size in self.size)
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)

    def to_grid(self, pixel: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b 2"]:
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
    """Samples of all pairs of given views that say something, read some at a time. Pairs of other images are left."""
    by_name = {view.name: view for view in views}
    wanted = [pair for pair in predictions if set(pair) <= by_name.keys() and pair.name0 != pair.name1]
    samples: dict[Pair, PairSamples] = {}
    for first in range(0, len(wanted), PAIRS_AT_ONCE):
        groups: dict[tuple[SparseGrid, SparseGrid], dict[Pair, list[Tensor]]] = defaultdict(dict)
        for pair in wanted[first : first + PAIRS_AT_ONCE]:
            prediction = predictions[pair]
            grids = _grids(prediction, [by_name[name] for name in pair], max_samples, pair)
            sides = zip(grids, _sides(prediction), strict=True)
            groups[grids][pair] = [grid.sample_of_those_there(values) for grid, side in sides for values in side]
        for grids, sampled in groups.items():
            samples |= _usable_samples(sampled, grids, by_name)
    return {pair: samples[pair] for pair in wanted if pair in samples}


def stack_samples(views: Sequence[View], samples: dict[Pair, PairSamples], max_samples: int) -> Observations:
    """The observations of a component: its views, and at least one pair, all of them of these views."""
    index = {view.name: i for i, view in enumerate(views)}
    pairs = tuple(pair for pair in samples if pair.name0 in index and pair.name1 in index)
    used = [samples[pair] for pair in pairs]
    grid_of = {name: grid for pair in pairs for name, grid in zip(pair, samples[pair].grids, strict=True)}
    m = max(len(w) for s in used for w in s.weights)
    device = used[0].points[0].device
    points = torch.stack([torch.stack([_padded(s.points[side], m) for s in used]) for side in (0, 1)])
    weights = torch.stack([torch.stack([_padded(s.weights[side], m) for s in used]) for side in (0, 1)])
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


def _padded(values: Tensor, length: int) -> Tensor:
    """With zeros at the end of the first axis."""
    if len(values) == length:
        return values
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])


def _grids(
    prediction: PairPrediction, views: Sequence[View], max_samples: int, pair: Pair
) -> tuple[SparseGrid, SparseGrid]:
    for side, view in enumerate(views):
        if size_of(prediction, side) != view.size:
            raise InputError(
                f"the pair {pair.name0} {pair.name1} has {size_of(prediction, side)} pixels for {view.name}, "
                f"whose view has {view.size}: load the views at the size of inference, or infer again"
            )
    grid0, grid1 = (SparseGrid.of(v.size, max_samples, stride_of(prediction, side)) for side, v in enumerate(views))
    return grid0, grid1


def _usable_samples(
    sampled: Mapping[Pair, Sequence[Tensor]], grids: tuple[SparseGrid, SparseGrid], by_name: Mapping[str, View]
) -> dict[Pair, PairSamples]:
    """Of pairs of one size, of which points and confidences of side 0, then of side 1 are given."""
    parts = [torch.stack(values).float() for values in zip(*sampled.values(), strict=True)]
    points, confidences = parts[0::2], parts[1::2]
    weights = [
        usable_weights(points[side], confidences[side], side)
        * _masks([by_name[pair[side]] for pair in sampled], grids[side]).to(points[side].device)
        for side in (0, 1)
    ]
    distances = points[0].norm(dim=-1)
    units = torch.where(weights[0] > 0, distances, torch.nan).nanmedian(dim=-1).values
    points = [
        torch.where((w > 0)[..., None], p / units[:, None, None], 0) for p, w in zip(points, weights, strict=True)
    ]
    weights = [w * (p.norm(dim=-1) < MAX_DISTANCE) for p, w in zip(points, weights, strict=True)]
    counts = [(w > 0).sum(dim=-1) for w in weights]
    means = [torch.where(w > 0, c, 0).sum(dim=-1) / k for c, w, k in zip(confidences, weights, counts, strict=True)]
    told = torch.stack([units, means[0], means[1], torch.minimum(*counts)], dim=-1).double().tolist()
    return {
        pair: PairSamples([p[i] for p in points], [w[i] for w in weights], unit, mean0 * mean1, grids)
        for i, (pair, (unit, mean0, mean1, count)) in enumerate(zip(sampled, told, strict=True))
        if count >= MIN_SAMPLES and unit > 0 and math.isfinite(unit)
    }


def _masks(views: Sequence[View], grid: SparseGrid) -> Bool[Tensor, "k m"]:
    """Which samples of each view may be used."""
    usable = torch.ones(len(views), grid.shape[0] * grid.shape[1], dtype=torch.bool)
    for row, view in zip(usable, views, strict=True):
        if view.mask is not None:
            row.copy_(grid.sample(view.mask))
    return usable
