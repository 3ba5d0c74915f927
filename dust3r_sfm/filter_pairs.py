"""Stage: pairs that the network is not sure of are dropped, and those that contradict the others.

Photos of look-alike places make confident pairs that are wrong. They are told by what all pairs say together
(`alignment.consensus`), in which pairs that verified matches of keypoints support count for more. Pairs that alone
hold the graph together are kept.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dust3r_sfm.alignment.contradictions import PairVerdict, judge_pairs
from dust3r_sfm.alignment.relations import PairSamples, sample_pair
from dust3r_sfm.errors import InputError, ReconstructionError
from dust3r_sfm.files import writing
from dust3r_sfm.formats.pairs import write_pairs
from dust3r_sfm.graph import connected_components, maximum_spanning_tree, symmetrize
from dust3r_sfm.pairs import Pair, PairPrediction, Predictions, SomePredictions
from dust3r_sfm.scene import Scene

logger = logging.getLogger(__name__)

KEEP_POWER = 0.25
BRIDGE_POWER = 0.1
"""Thresholds that are not given are this power of the level that the images' best pairs reach."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """A pair's score is the typical (geometric mean) confidence of its weaker image; 1 says that it knows nothing."""

    min_confidence: float | None = None
    """Pairs of lower score are dropped. Where not given, level ** 0.25 (1.8 for a level of 10, 1.1 for 1.5): the
    level is the median over images of the best pair's score, as models differ in it."""
    min_bridge_confidence: float | None = None
    """Pairs that alone connect two parts of the graph are kept down to this score. Where not given, level ** 0.1."""
    contradictions: Literal["drop", "keep"] = "drop"
    """What becomes of pairs that contradict what all pairs together say of rotations, scales and places."""


@dataclass(frozen=True)
class PairDecision:
    """What became of a directed pair and why; a score of 0 stands for confidences that cannot be used."""

    pair: Pair
    kept: bool
    reason: str
    score: float


def main(pointmaps: Path, output: Path, config: FilterConfig = FilterConfig()) -> None:
    """Drop the pairs that the network is not sure of.

    Args:
        pointmaps: The file of infer_pairs, such as pointmaps.h5.
        output: The pairs file to write, with the directed pairs that are kept, as hloc writes it.
        config: Which pairs to keep.
    """
    from dust3r_sfm.formats.pointmaps import PointmapFile

    with writing(output):
        with PointmapFile(pointmaps) as predictions:
            kept = list(filter_pairs(predictions, config))
        write_pairs(output, kept)


def filter_pairs(predictions: Predictions, config: FilterConfig = FilterConfig()) -> Predictions:
    """The predictions worth aligning, read from `predictions` when asked for."""
    names = sorted({name for pair in predictions for name in pair})
    return keep_pairs(predictions, decide_pairs(predictions, names, config))


def keep_pairs(predictions: Predictions, decisions: Sequence[PairDecision]) -> Predictions:
    """The predictions that were decided to be kept; ReconstructionError where there are none."""
    kept = [decision.pair for decision in decisions if decision.kept]
    names = {name for decision in decisions for name in decision.pair}
    if not kept:
        best = max((decision.score for decision in decisions), default=0.0)
        raise ReconstructionError(
            f"none of {len(decisions)} pairs is worth aligning, the best has confidence {best:.2f}: "
            "take photos that overlap more, or lower min_confidence"
        )
    connected = len(connected_components(sorted(names), kept)[0])
    logger.info(
        "Kept %d of %d pairs; %d of %d images stay connected.", len(kept), len(decisions), connected, len(names)
    )
    return SomePredictions(predictions, kept)


def decide_pairs(
    predictions: Predictions,
    names: Sequence[str],
    config: FilterConfig = FilterConfig(),
    num_verified: Mapping[Pair, int] | None = None,
) -> list[PairDecision]:
    """What becomes of each pair, in the order of `predictions`: kept for its score, kept as a bridge, or dropped.

    Bridges are edges of the maximum spanning tree over the scores, so that no part of the graph is cut off by a pair
    that is weak but real. Of the pairs that are left, those are dropped that contradict the others, as long as no part
    is cut off. `num_verified` are verified matches of pairs in either direction, where they are known.
    """
    unknown = sorted({name for pair in predictions for name in pair} - set(names))
    if unknown:
        raise InputError(f"predictions name images that are not there: {', '.join(unknown)}")
    faults, scores, samples = _look_through(predictions)
    min_score, min_bridge = _thresholds(scores, config)
    tree = maximum_spanning_tree(names, scores)
    bridges = set(symmetrize(pair for pair in tree if scores[pair] < min_score))
    decisions = [
        PairDecision(pair, False, faults[pair], 0.0)
        if pair in faults
        else _decide(pair, scores[pair], min_score, min_bridge, pair in bridges)
        for pair in predictions
    ]
    if config.contradictions == "keep":
        return decisions
    kept = {d.pair: samples[d.pair] for d in decisions if d.kept}
    verdicts = judge_pairs(names, kept, scores, num_verified)
    return [_with_verdict(decision, verdicts.get(decision.pair)) for decision in decisions]


def _look_through(
    predictions: Predictions,
) -> tuple[dict[Pair, str], dict[Pair, float], dict[Pair, PairSamples | None]]:
    """Why predictions cannot be used, and of the others the scores and what is needed to compare them."""
    faults, scores, samples = {}, {}, {}
    for pair in tqdm(predictions, desc="Filter", unit="pair", disable=None):
        prediction = predictions[pair]
        fault = _fault(pair, prediction)
        if fault:
            faults[pair] = fault
        else:
            scores[pair], samples[pair] = pair_score(prediction), sample_pair(prediction)
    return faults, scores, samples


def _with_verdict(decision: PairDecision, verdict: PairVerdict | None) -> PairDecision:
    if verdict is None:
        return decision
    return replace(decision, kept=verdict.kept, reason=f"{decision.reason}{verdict.reason}")


def with_doubts(decisions: Sequence[PairDecision], scenes: Sequence[Scene]) -> list[PairDecision]:
    """The decisions once more, where the alignment found that pairs contradict the others."""
    doubts = {pair: reason for scene in scenes for pair, reason in scene.doubts.items()}
    if doubts:
        logger.info("%d pairs contradict the aligned scenes, first %s: not used.", len(doubts), " ".join(min(doubts)))
    return [replace(d, kept=False, reason=doubts[d.pair]) if d.pair in doubts else d for d in decisions]


def pair_score(prediction: PairPrediction) -> float:
    """Typical confidence of the weaker image: the smaller of exp(mean(log c)) over either image's pixels.

    The alignment weighs pixels by log c, so this is the pair's mean weight there. A confident
    pointmap of image 0 says nothing on where image 1 is, hence the smaller instead of the product.
    """
    return min(_typical(prediction.confidence0), _typical(prediction.confidence1))


def _typical(confidence: Float[Tensor, "h w"]) -> float:
    return float(confidence.double().clamp(min=1).log().mean().exp())


def _fault(pair: Pair, prediction: PairPrediction) -> str:
    """Why a prediction cannot be used at all; empty where it can."""
    parts = (
        (pair.name0, prediction.confidence0, prediction.pointmap0_in_cam0),
        (pair.name1, prediction.confidence1, prediction.pointmap1_in_cam0),
    )
    for name, confidence, pointmap in parts:
        if not torch.isfinite(confidence).all():
            return f"confidences of {name} are not finite"
        if not torch.isfinite(pointmap).all():
            return f"points of {name} are not finite"
        if not (confidence > 0).any():
            return f"confidences of {name} are all zero"
    return ""


def _thresholds(scores: Mapping[Pair, float], config: FilterConfig) -> tuple[float, float]:
    """The score to keep a pair and the lower one to keep a bridge.

    What is not given follows the level that the scores reach: the median over images of the best pair's.
    """
    best: dict[str, float] = {}
    for pair, score in scores.items():
        for name in pair:
            best[name] = max(best.get(name, 0.0), score)
    level = median(best.values()) if best else 1.0
    min_score = level**KEEP_POWER if config.min_confidence is None else config.min_confidence
    min_bridge = level**BRIDGE_POWER if config.min_bridge_confidence is None else config.min_bridge_confidence
    return min_score, min(min_score, min_bridge)


def _decide(pair: Pair, score: float, min_score: float, min_bridge: float, is_bridge: bool) -> PairDecision:
    if score >= min_score:
        return PairDecision(pair, True, f"confidence {score:.3f} reaches {min_score:.3f}", score)
    if is_bridge and score >= min_bridge:
        reason = f"confidence {score:.3f} is below {min_score:.3f}, but no better pairs connect these parts"
        return PairDecision(pair, True, reason, score)
    limit = min_bridge if is_bridge else min_score
    return PairDecision(pair, False, f"confidence {score:.3f} is below {limit:.3f}", score)


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["filter-pairs", *sys.argv[1:]]))
