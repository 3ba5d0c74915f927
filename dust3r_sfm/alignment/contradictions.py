"""Which pairs contradict the others, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.alignment.consensus import MAX_OFFSET, MAX_ROTATION_DEG, MAX_SCALE, Consensus, find_consensus
from dust3r_sfm.alignment.relations import PairSamples, relate_images
from dust3r_sfm.graph import maximum_spanning_tree
from dust3r_sfm.pairs import Pair

UNVERIFIED_MATCHES = 5
"""What a pair without verified matches counts for."""
MIN_LIMIT = 1.0
"""Pairs are dropped that are further off than this and than half of all: of an unsure network none is far off."""


@dataclass(frozen=True)
class PairVerdict:
    kept: bool
    reason: str
    """The evidence, to be added to other reasons: empty, or it begins with a semicolon."""


def judge_pairs(
    names: Sequence[str],
    samples: Mapping[Pair, PairSamples | None],
    scores: Mapping[Pair, float],
    num_verified: Mapping[Pair, int] | None = None,
) -> dict[Pair, PairVerdict]:
    """Verdicts on pairs of typical confidences `scores`; on those without samples there is none.

    Pairs that contradict the others are kept where parts of the graph hang together by them alone.
    """
    told = {pair: sampled for pair, sampled in samples.items() if sampled is not None}
    if not told:
        return {}
    relations = relate_images(names, told)
    strengths = torch.tensor([scores[pair] for pair in relations.pairs], dtype=torch.float64).log()
    verified = None if num_verified is None else _verified(relations.pairs, num_verified)
    if verified is not None:
        strengths = strengths * match_support(verified)
    consensus = find_consensus(relations, strengths)
    is_off = consensus.off > max(MIN_LIMIT, float(consensus.off.median()))
    worth = dict.fromkeys(samples, 1 + float(consensus.reliability.max()))
    worth |= dict(zip(relations.pairs, (consensus.reliability - 1e9 * is_off).tolist(), strict=True))
    needed = set(maximum_spanning_tree(names, worth))
    return {
        pair: _verdict(consensus, e, verified, bool(is_off[e]), pair in needed)
        for e, pair in enumerate(relations.pairs)
    }


def match_support(num_verified: Float[Tensor, " e"]) -> Float[Tensor, " e"]:
    """From near 0 for pairs without verified matches towards 1 for many; the same for all where no pair has any."""
    is_verified = num_verified > 0
    if not is_verified.any():
        return torch.ones_like(num_verified)
    few = num_verified + UNVERIFIED_MATCHES
    return few / (few + num_verified[is_verified].median())


def _verified(pairs: Sequence[Pair], num_verified: Mapping[Pair, int]) -> Float[Tensor, " e"]:
    counts = [max(num_verified.get(pair, 0), num_verified.get(pair.reversed(), 0)) for pair in pairs]
    return torch.tensor(counts, dtype=torch.float64)


def _verdict(
    consensus: Consensus, e: int, verified: Float[Tensor, " e"] | None, is_off: bool, is_needed: bool
) -> PairVerdict:
    words = [_contradiction(consensus, e)] if is_off else []
    if is_off and is_needed:
        words.append("nothing else connects these parts")
    if consensus.num_triangles[e]:
        words.append(f"{int(consensus.num_agreeing[e])} of {int(consensus.num_triangles[e])} triangles agree")
    if verified is not None:
        words.append(f"{int(verified[e])} verified matches")
    if consensus.off_reverse[e] > 1:
        words.append(f"its two directions differ by {float(consensus.off_reverse[e]):.1f} times what is allowed")
    return PairVerdict(is_needed or not is_off, "".join(f"; {word}" for word in words))


def _contradiction(consensus: Consensus, e: int) -> str:
    parts = consensus.parts
    degrees, scale = math.degrees(float(parts.rotation[e])), math.exp(min(float(parts.scale[e]), 9.0))
    return (
        f"it contradicts the other pairs: rotation {degrees:.0f} degrees off, scale by a factor of {scale:.1f}, "
        f"place by {float(parts.offset[e]):.1f} of the distance (allowed are {MAX_ROTATION_DEG:.0f}, {MAX_SCALE}, "
        f"{MAX_OFFSET})"
    )
