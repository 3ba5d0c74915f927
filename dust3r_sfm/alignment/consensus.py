"""What all pairs together say of how images lie, and which pairs contradict it.

How likely each pair is true is told by its neighbours (`plausibility`). Frames are put together by the pairs that are
believed first (`assembly`), and beside it chained along the most reliable ones; both are averaged over all pairs, and
those are taken that more speaks for: the evidence for the pairs that agree with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.alignment.assembly import assembled, spanned
from dust3r_sfm.alignment.plausibility import Edges, find_plausibility
from dust3r_sfm.alignment.relations import Relations
from dust3r_sfm.geometry.averaging import Disagreement, average_similarities, disagreement, relative_to_frames
from dust3r_sfm.geometry.transforms import inverse

MAX_ROTATION_DEG = 20.0
MAX_SCALE = 1.5
MAX_OFFSET = 0.5
"""What a pair may be off: its rotation, its scale as a factor, and its camera's place as a share of what it sees."""
TOLERANCES = (math.radians(MAX_ROTATION_DEG), math.log(MAX_SCALE), MAX_OFFSET)
MIN_STRENGTH = 1e-3
FAVOUR = 1.0
"""What speaks for any pair, whatever the evidence: who explains more pairs is more often right."""


@dataclass(frozen=True, eq=False)
class Consensus:
    """What became of each relation, in their order."""

    parts: Disagreement
    """How far the pair is from what all say."""
    off: Float[Tensor, " e"]
    """The same as the largest share of what it may be off."""
    off_reverse: Float[Tensor, " e"]
    """How far it is from the reversed pair; NaN where there is none."""
    num_triangles: Int[Tensor, " e"]
    num_agreeing: Int[Tensor, " e"]
    """Triangles that close within what a pair may be off."""
    reliability: Float[Tensor, " e"]


def find_consensus(relations: Relations, strengths: Float[Tensor, " e"]) -> Consensus:
    """The consensus of relations whose strengths, such as their confidences, are known."""
    images, measured, n = relations.images, relations.image1_from_image0, len(relations.names)
    edges = Edges(images, n)
    off_reverse = torch.full((images.shape[1],), torch.nan, dtype=torch.float64)
    has_reverse = edges.reverse >= 0
    reverse = edges.reverse[has_reverse]
    off_reverse[has_reverse] = _off(measured[has_reverse], inverse(measured[reverse]))
    strengths = strengths.double().clamp(min=MIN_STRENGTH)
    found = find_plausibility(edges, measured, strengths, TOLERANCES)
    starts = [assembled(images, measured, found.evidence, found.belief, n, TOLERANCES)]
    starts.append(spanned(images, measured, found.reliability, n)[0])
    reliability = found.reliability * torch.sigmoid(found.evidence)
    averages = [average_similarities(images, measured, reliability.square(), start, TOLERANCES) for start in starts]
    ends = [disagreement(measured, relative_to_frames(average, images)) for average in averages]
    favour = found.evidence + FAVOUR
    parts = max(ends, key=lambda end: float(favour[end.relative_to(*TOLERANCES) < 1].sum()))
    off = parts.relative_to(*TOLERANCES)
    return Consensus(parts, off, off_reverse, found.num_triangles, found.num_agreeing, reliability)


def _off(measured: Float[Tensor, "e 4 4"], expected: Float[Tensor, "e 4 4"]) -> Float[Tensor, " e"]:
    return disagreement(measured, expected).relative_to(*TOLERANCES)
