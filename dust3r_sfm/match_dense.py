"""Stage: pixels of two images that see the same point, from their pointmaps.

Pairs are matched shard by shard, here or by the engine's workers; how, says `anchor_matches`.

    python -m dust3r_sfm.match_dense --pointmaps out/pointmaps.h5 --output out/matches.h5
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dust3r_sfm.anchor_matches import MatchConfig, batched, match_batch, matches_of
from dust3r_sfm.engine import EngineConfig, is_local, map_shards, share_name, share_of
from dust3r_sfm.files import holding
from dust3r_sfm.formats.matches import MatchShards, match_folder
from dust3r_sfm.formats.pointmaps import PointmapFile, hash_of
from dust3r_sfm.pairs import Matches, Pair, PairPrediction, Predictions, ReducedPrediction, SomePredictions
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

SHARD_PAIRS = 32
"""What a killed run loses at most."""


def match_pair(
    prediction: PairPrediction,
    view0: View | None = None,
    view1: View | None = None,
    config: MatchConfig = MatchConfig(),  # noqa: B008  frozen
    reverse: PairPrediction | None = None,
) -> Matches:
    """Matches of one pair, in network pixels; `reverse` is the prediction of the reversed pair, if there is one.

    A keypoint at an anchor is exactly the same in every pair of its image. Scores are the
    geometric mean of both confidences, summed over the directions that agree. Views are asked
    for their masks only. Pairs that share nothing have no matches.
    """
    masks = [None if view is None or view.mask is None else view.mask[None] for view in (view0, view1)]
    directions = [batched(p) for p in (prediction, reverse) if p is not None]
    sides = match_batch(directions[0], directions[1] if len(directions) == 2 else None, masks, config)
    return matches_of(sides, 0)


def match_dense(
    views: Sequence[View],
    predictions: Predictions,
    config: MatchConfig = MatchConfig(),  # noqa: B008  frozen
    output: Path | None = None,
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> dict[Pair, Matches]:
    """Matches of every undirected pair, from one prediction or both; the key is the direction that comes first.

    Views are asked for their masks only. Matches of predictions in a file may go to the file `output`, continuing what
    is there; of an engine's share only they are returned, and wait beside it for the others.
    """
    masks = {view.name: view.mask for view in views if view.mask is not None}
    undirected = _undirected(predictions)
    shards = [undirected[start : start + SHARD_PAIRS] for start in range(0, len(undirected), SHARD_PAIRS)]
    make = partial(_Matcher, predictions, masks, config)
    with tqdm(total=len(undirected), desc="Matching", unit="pair", disable=None) as bar:
        if output is None:
            found = dict(_match_shards(make, shards, engine, bar))
            return {pair: matches for shard in range(len(shards)) for pair, matches in found[shard].items()}
        with holding(match_folder(output), share_name(engine)):
            store, keys = MatchShards(output), _keys(predictions, undirected, masks, config)
            own = share_of(shards, engine)
            todo = [shard for shard in own if any(keys[pair] not in store for pair in shard)]
            bar.update(sum(map(len, shards)) - sum(map(len, todo)))
            for _, matches in _match_shards(make, todo, engine, bar):
                store.add(matches, keys)
            if engine.shard is None:
                return store.finish(keys)
            return store.read({pair: keys[pair] for shard in own for pair in shard})


class _Matcher:
    """What matches shards of pairs, here or in a worker, which reads predictions of a file itself."""

    def __init__(self, predictions: Predictions, masks: Mapping[str, Tensor], config: MatchConfig) -> None:
        self.predictions, self.masks, self.config = predictions, masks, config

    def match(self, pair: Pair) -> Matches:
        prediction, back = self.predictions[pair], pair.reversed()
        if isinstance(prediction, ReducedPrediction):
            return _kept_matches(pair, prediction, self.predictions)
        masks = [self.masks[name][None] if name in self.masks else None for name in pair]
        reverse = batched(self.predictions[back]) if back in self.predictions else None
        return matches_of(match_batch(batched(prediction), reverse, masks, self.config), 0)


def _match_shards(
    make: Callable[[], _Matcher], shards: Sequence[Sequence[Pair]], engine: EngineConfig, bar: tqdm
) -> Iterator[tuple[int, dict[Pair, Matches]]]:
    match = partial(_match_shard, advance=bar.update) if is_local(engine) else _match_shard
    for index, found in map_shards(match, make, shards, engine):
        bar.update(0 if is_local(engine) else len(found))
        yield index, found


def _match_shard(matcher: _Matcher, shard: Sequence[Pair], advance: Callable[[], object] = bool) -> dict[Pair, Matches]:
    found = {}
    for pair in shard:
        found[pair] = matcher.match(pair)
        advance()
    return found


def _undirected(predictions: Predictions) -> list[Pair]:
    position = {pair: i for i, pair in enumerate(predictions)}
    return [pair for pair in position if position.get(pair.reversed(), len(position)) > position[pair]]


def _keys(
    predictions: Predictions, pairs: Sequence[Pair], masks: Mapping[str, Tensor], config: MatchConfig
) -> dict[Pair, str]:
    """What the matches of each pair depend on, as a hash."""
    there = predictions.all_of_them if isinstance(predictions, SomePredictions) else predictions
    if not isinstance(there, PointmapFile):
        raise TypeError("matches go to a file where predictions come from one")
    of = dict(zip(predictions, there.keys_of(predictions), strict=True))
    hashes = {name: hash_of(mask.cpu().numpy().tobytes()) for name, mask in masks.items()}
    return {
        pair: hash_of(repr(config), of[pair], of.get(pair.reversed(), ""), *(hashes.get(name, "") for name in pair))
        for pair in pairs
    }


def _kept_matches(pair: Pair, prediction: ReducedPrediction, predictions: Predictions) -> Matches:
    """Those that a reduced prediction brings, or else the reversed pair, also where that itself is not used."""
    if prediction.matches is not None:
        return prediction.matches
    there = predictions.all_of_them if isinstance(predictions, SomePredictions) else predictions
    reverse = there.get(pair.reversed())
    if isinstance(reverse, ReducedPrediction) and reverse.matches is not None:
        return Matches(reverse.matches.keypoints1, reverse.matches.keypoints0, reverse.matches.scores)
    return Matches(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))


def main(
    pointmaps: Path,
    output: Path,
    config: MatchConfig = MatchConfig(),  # noqa: B008  frozen
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> None:
    """Match the pixels of all pairs of a pointmap file.

    Args:
        pointmaps: What infer_pairs wrote, such as pointmaps.h5.
        output: The file to write, such as matches.h5; a second run continues an interrupted one.
        config: Which matches to keep.
        engine: Where to match.
    """
    with PointmapFile(pointmaps) as predictions:
        matches = match_dense([], predictions, config, output, engine)
    total = sum(len(m.scores) for m in matches.values())
    logger.info("%d matches of %d pairs are in %s.", total, len(matches), output)
    if engine.shard is not None:
        logger.info("Share %s is done; the same command without --shard puts all shares together.", engine.shard)


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["match-dense", *sys.argv[1:]]))
