"""How likely each pair is true, by what is around it.

Photos of look-alike places make pairs that are sure and wrong, and that agree with one another. What tells them: they
are less sure than others of as much movement between their photos; and third photos that by one of them see what the
other photo sees are often no partners of that. Either is weak for one pair. But around triangles that close, no pair
is wrong alone: beliefs go around them, so that pairs that stand or fall together are judged together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dust3r_sfm.geometry.averaging import disagreement, relation_distances
from dust3r_sfm.geometry.transforms import inverse

BLOCK = 200_000
"""Ways over a third image that are looked at at once."""
NUM_BINS, MAX_MOVEMENT = 26, 2.5
"""Bins of movement between two photos, in images' units, over which the share of pairs is counted."""
RIDGE = 10.0
"""Pairs' worth of belief that movement does not matter to how sure a pair is."""
MIN_SPREAD = 0.05
OFFSET = 0.5
"""Pairs count as true down to so many standard deviations below the median."""
MAX_EVIDENCE = 2.5
MAX_FAVOUR = 1.5
"""Evidence against a pair, and for it, by one of the two: who is surer than usual is not truer."""
FEW, FEW_SAY = 50, 1.0
"""So few pairs do not tell what is usual: the evidence for each is near this, and numbers decide."""
CALIBRATIONS = 2
BELIEF_ITERS = 40
ONE_WRONG = 0.02
"""How often a triangle closes though one pair in it is wrong."""
MIN_OPEN = 0.05
"""How often a triangle of true pairs does not close, at least."""
MAX_BELIEF = 15.0


class Edges:
    """Directed pairs of images, found by their images."""

    def __init__(self, images: Int[Tensor, "2 e"], n: int) -> None:
        self.images, self.n = images, n
        self._keys, self._order = (images[0] * n + images[1]).sort()
        self._by_target = torch.argsort(images[1], stable=True)
        self._counts = torch.bincount(images[1], minlength=n)
        self.reverse = self.find(images[1], images[0])
        low, high = images.min(dim=0).values, images.max(dim=0).values
        self.links, self.link_of = torch.unique(low * n + high, return_inverse=True)
        """Pairs of either direction, and that of each directed one."""
        self.first_of = torch.empty_like(self.links)
        self.first_of[self.link_of] = torch.arange(images.shape[1])

    def find(self, source: Int[Tensor, " k"], target: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
        """Which pair leads from one image to another; -1 where none does."""
        wanted = source * self.n + target
        if len(self._keys) == 0:
            return torch.full_like(wanted, -1)
        place = torch.searchsorted(self._keys, wanted).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[place] == wanted, self._order[place], -1)

    def weaker(self, values: Float[Tensor, " e"]) -> Float[Tensor, " e"]:
        """The smaller of both directions, for each."""
        return torch.where(self.reverse < 0, values, torch.minimum(values, values[self.reverse]))

    def mean(self, values: Float[Tensor, " e"]) -> Float[Tensor, " l"]:
        """Of both directions of each link."""
        sums = torch.zeros(len(self.links), dtype=values.dtype).index_add_(0, self.link_of, values)
        return sums / torch.bincount(self.link_of)

    def ways(self) -> Iterator[tuple[Int[Tensor, " t"], Int[Tensor, " t"], Int[Tensor, " t"]]]:
        """Blocks of (pair, first, second): ways around pairs over third images.

        The pair leads from image a to b, `first` from a third image c to a, `second` from c to b; -1 where none does.
        """
        source, target = self.images
        first_of = self._counts.cumsum(0) - self._counts
        sizes = self._counts[source]
        blocks = (sizes.cumsum(0) - sizes) // BLOCK
        for block in torch.unique(blocks).tolist():
            pair = (blocks == block).nonzero()[:, 0]
            size = sizes[pair]
            within = torch.arange(int(size.sum())) - torch.repeat_interleave(size.cumsum(0) - size, size)
            pair = torch.repeat_interleave(pair, size)
            first = self._by_target[first_of[source[pair]] + within]
            is_third = source[first] != target[pair]
            pair, first = pair[is_third], first[is_third]
            yield pair, first, self.find(source[first], target[pair])


@dataclass(frozen=True, eq=False)
class Plausibility:
    num_triangles: Int[Tensor, " e"]
    num_agreeing: Int[Tensor, " e"]
    """Triangles that close within what a pair may be off."""
    evidence: Float[Tensor, " e"]
    """Logarithm of the odds that the pair is true, by itself and its neighbours; the same for both directions."""
    belief: Float[Tensor, " e"]
    """The same together with all others."""
    reliability: Float[Tensor, " e"]
    """By the pair's own strength, the triangles that close and the strength of the ways around."""


def find_plausibility(
    edges: Edges,
    measured: Float[Tensor, "e 4 4"],
    strengths: Float[Tensor, " e"],
    tolerances: tuple[float, float, float],
) -> Plausibility:
    """Of pairs that say `measured` = image1_from_image0; triangles close where they are off by less than tolerances."""
    ways = _Ways(edges, measured, strengths, tolerances)
    reliability = ways.reliability(strengths)
    known = reliability.log()[edges.first_of]
    alone = FEW_SAY + (known - known.median())
    sureness = edges.mean(_beyond_movement(strengths, _movement(measured)))
    company = edges.mean(ways.found_to_expected().log())
    evidence, around = _standardized(sureness) + _standardized(company), ways.triangles()
    belief = _propagated(evidence, *around)
    for _ in range(CALIBRATIONS):
        true = torch.sigmoid(belief.clamp(-MAX_BELIEF, MAX_BELIEF))
        told = _calibrated(sureness, true) + _calibrated(company, true)
        evidence = alone + (told - alone) * len(told) / (len(told) + FEW)
        belief = _propagated(evidence, *around)
    of_edge = evidence[edges.link_of], belief[edges.link_of]
    return Plausibility(ways.num_triangles, ways.num_agreeing, *of_edge, reliability)


class _Ways:
    """Ways over third images: how many there are for each pair, how many close, and which triangles they make."""

    def __init__(
        self,
        edges: Edges,
        measured: Float[Tensor, "e 4 4"],
        strengths: Float[Tensor, " e"],
        tolerances: tuple[float, float, float],
    ) -> None:
        e, strengths = len(measured), edges.weaker(strengths)
        self._around = strengths.clone()
        self.edges, self.num_triangles, self.num_agreeing = edges, *torch.zeros(2, e, dtype=torch.long)
        self._bins = torch.zeros(e, NUM_BINS + 1)  # of each pair's third images, by the movement to the pair's second
        self._closing = torch.zeros(NUM_BINS + 1, dtype=torch.float64)
        self._made: list[Int[Tensor, "t 4"]] = []
        for pair, first, second in edges.ways():
            composed = measured[pair] @ measured[first]
            is_there = second >= 0
            off = disagreement(measured[second[is_there]], composed[is_there]).relative_to(*tolerances)
            closes = torch.zeros_like(is_there)
            closes[is_there] = off < 1
            self.num_triangles += torch.bincount(pair[is_there], minlength=e)
            self.num_agreeing += torch.bincount(pair[closes], minlength=e)
            weaker = torch.minimum(strengths[first[closes]], strengths[second[closes]])
            self._around.index_add_(0, pair[closes], weaker)
            bins = torch.bucketize(_movement(composed), torch.linspace(0, MAX_MOVEMENT, NUM_BINS).double())
            self._bins.index_put_((pair, bins), torch.ones(len(pair)), accumulate=True)
            self._closing += torch.bincount(bins[closes], minlength=NUM_BINS + 1)
            sides = edges.link_of[torch.stack([pair, first, second])[:, is_there]].sort(dim=0).values
            self._made.append(torch.cat([sides, closes[is_there][None].long()]).T)

    def reliability(self, strengths: Float[Tensor, " e"]) -> Float[Tensor, " e"]:
        """The geometric mean of two: the strength times the share of triangles that close, and the mean strength of the
        ways around (their weaker pair's, none where they do not close) with the pair's own."""
        own = self.edges.weaker(strengths) * (self.num_agreeing + 1) / (self.num_triangles + 2)
        return self.edges.weaker((own * self._around / (self.num_triangles + 1)).sqrt())

    def found_to_expected(self) -> Float[Tensor, " e"]:
        """Third images that are partners of both, as a share of those that the movement to them lets expect."""
        share = self._closing / self._bins.sum(dim=0).double().clamp(min=1)
        return (self.num_agreeing + 1) / (self._bins.double() @ share + 1)

    def triangles(self) -> tuple[Int[Tensor, "t 3"], Bool[Tensor, " t"]]:
        """The three links of each triangle, and whether it closes in most of the directions that there are."""
        if not self._made:
            return torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
        made = torch.cat(self._made)
        triangles, which = torch.unique(made[:, :3], dim=0, return_inverse=True)
        shares = torch.zeros(len(triangles)).index_add_(0, which, made[:, 3].float()) / torch.bincount(which)
        return triangles, shares > 0.5


def _movement(target_from_source: Float[Tensor, "k 4 4"]) -> Float[Tensor, " k"]:
    """How far what one image sees moves to another, in images' units."""
    still = torch.eye(4, dtype=torch.float64).expand_as(target_from_source)
    both = relation_distances(target_from_source, still), relation_distances(inverse(target_from_source), still)
    return torch.minimum(*both)


def _beyond_movement(strengths: Float[Tensor, " e"], movement: Float[Tensor, " e"]) -> Float[Tensor, " e"]:
    """How much stronger pairs are than others of such movement: residuals of a robust parabola."""
    bounded = movement.clamp(max=MAX_MOVEMENT)
    columns = torch.stack([torch.ones_like(bounded), bounded, bounded.square()], dim=1)
    ridge = torch.diag(torch.tensor([1e-9, RIDGE, RIDGE], dtype=torch.float64))
    weights, residuals = torch.ones_like(strengths), strengths
    for _ in range(10):
        weighted = columns * weights[:, None]
        residuals = strengths - columns @ torch.linalg.solve(weighted.T @ columns + ridge, weighted.T @ strengths)
        spread = residuals.abs().median().clamp(min=1e-3) / 0.6745
        weights = 1 / (1 + (residuals / (2 * spread)).square())
    return residuals


def _standardized(values: Float[Tensor, " l"]) -> Float[Tensor, " l"]:
    """Evidence: standard deviations from what is usual, told by the upper half, which has fewer wrong pairs."""
    usual = values.median()
    above = values[values > usual] - usual
    spread = float(above.median()) / 0.6745 if len(above) else 0.0
    return ((values - usual) / max(spread, MIN_SPREAD)).clamp(-MAX_EVIDENCE, MAX_FAVOUR) + OFFSET


def _calibrated(values: Float[Tensor, " l"], true: Float[Tensor, " l"]) -> Float[Tensor, " l"]:
    """Evidence by the normal distributions of values of links that are taken for true and for wrong so far."""
    (mean, spread), (mean_wrong, spread_wrong) = _normal(values, true), _normal(values, 1 - true)
    mean_wrong = torch.minimum(mean_wrong, mean - spread)
    spread = torch.maximum(spread, spread_wrong).clamp(min=MIN_SPREAD)
    odds = ((values - mean_wrong).square() - (values - mean).square()) / (2 * spread.square())
    return odds.clamp(-MAX_EVIDENCE, MAX_FAVOUR)


def _normal(values: Float[Tensor, " l"], weights: Float[Tensor, " l"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    total = weights.sum().clamp(min=1e-9)
    mean = (weights * values).sum() / total
    return mean, ((weights * (values - mean).square()).sum() / total).sqrt()


def _propagated(
    evidence: Float[Tensor, " l"], triangles: Int[Tensor, "t 3"], closes: Bool[Tensor, " t"]
) -> Float[Tensor, " l"]:
    """Log odds of links after loopy belief propagation around triangles (sum-product, damped).

    A triangle that closes has no single wrong link; one that does not has one at least.
    """
    share_open = max(MIN_OPEN, 1 - float(closes.float().mean()) if len(closes) else 0.0)
    if_closed, if_open = torch.tensor([[1, ONE_WRONG, 1, 1], [share_open, 1, 1, 1]], dtype=torch.float64)
    factor = torch.where(closes[:, None], if_closed, if_open)  # by the number of wrong links
    messages = torch.zeros(len(triangles), 3, dtype=torch.float64)
    belief = evidence
    for _ in range(BELIEF_ITERS):
        true = torch.sigmoid((belief[triangles] - messages).clamp(-MAX_BELIEF, MAX_BELIEF))
        others = torch.stack([true.roll(-1, 1), true.roll(1, 1)])
        none_wrong, both_wrong = others.prod(dim=0), (1 - others).prod(dim=0)
        numbers = torch.stack([none_wrong, 1 - none_wrong - both_wrong, both_wrong], dim=-1)
        odds = (numbers @ factor[:, :3, None])[..., 0] / (numbers @ factor[:, 1:, None])[..., 0]
        messages = (messages + odds.log()) / 2
        belief = evidence.index_add(0, triangles.flatten(), messages.flatten())
    return belief
