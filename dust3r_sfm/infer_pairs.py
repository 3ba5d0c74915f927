"""Stage: DUSt3R on every pair of photos; predictions go to a file, shard by shard."""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from tqdm import tqdm

from dust3r_sfm.engine import EngineConfig, is_local, map_shards, share_name, share_of
from dust3r_sfm.errors import InputError
from dust3r_sfm.files import holding
from dust3r_sfm.formats.known_cameras import read_known_cameras
from dust3r_sfm.formats.pairs import read_pairs
from dust3r_sfm.formats.pointmaps import PointmapShards, hash_of, shard_folder
from dust3r_sfm.graph import symmetrize
from dust3r_sfm.match_dense import MatchConfig
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.pair_network import InferConfig, PairNetwork, computes_in_bfloat16, encoding_capacity, pick_device
from dust3r_sfm.pairs import Pair, PairPrediction, Predictions
from dust3r_sfm.reduction import Reduction, evenly_together, reduction_of
from dust3r_sfm.schedule import EncodingPass, encoding_passes
from dust3r_sfm.views import View, list_images, load_views

logger = logging.getLogger(__name__)

__all__ = ["InferConfig", "computes_in_bfloat16", "infer_pairs", "main", "pick_device", "prediction_keys"]

SHARD_PAIRS = 32  # what a killed run loses at most
REDUCED_SHARE = 1 / 15
"""Of what whole predictions take."""


def main(
    image_dir: Path,
    pairs: Path,
    output: Path,
    model: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    cameras: Path | None = None,
    config: InferConfig = InferConfig(),  # noqa: B008  frozen
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> None:
    """Predict pointmaps of every pair of a pairs file, in both directions.

    Args:
        image_dir: Folder of photos, sub-folders included.
        pairs: Text file with two image names a line, as hloc writes it.
        output: The file to write, such as pointmaps.h5; a second run continues an interrupted one.
        model: Checkpoint file, folder or hub name; the shipped weights where not given.
        on_bad_image: Stop at photos that cannot be used, or leave them out.
        cameras: A cameras.json or a COLMAP model: the network sees photos without the lens distortion that it gives.
        config: How to run the network.
        engine: Where to run it.
    """
    network = Dust3r.from_pretrained(model)
    size, square_ok = network.config.image_size, network.config.square_ok
    known = read_known_cameras(cameras, list_images(image_dir)) if cameras is not None else None
    views = load_views(image_dir, size, on_bad_image=on_bad_image, square_ok=square_ok, cameras=known)
    directed = symmetrize(read_pairs(pairs, [view.name for view in views]))
    if engine.shard is None:
        infer_pairs(network, views, directed, output, config, engine)
        logger.info("%d directed pairs of %d images are in %s.", len(directed), len(views), output)
        return
    with holding(shard_folder(output), share_name(engine)):
        _infer_to_store(network, views, directed, PointmapShards(output), config, engine)
    logger.info("Share %s is done; the same command without --shard puts all shares together.", engine.shard)


def infer_pairs(
    model: Dust3r,
    views: Sequence[View],
    pairs: Sequence[Pair],
    output: Path | None = None,
    config: InferConfig = InferConfig(),  # noqa: B008  frozen
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
    match: MatchConfig = MatchConfig(),  # noqa: B008  frozen
) -> Predictions:
    """Predictions of directed pairs: in `output`, continuing what is there, or in memory where it is None.

    An image is encoded once, or twice where not all encodings fit; pairs are decoded in batches of equal sizes.
    What is found in `output` counts where the model's weights, the images' names and their contents are the same.
    Of more than `max_dense_pairs` reduced predictions are kept, with the matches that `match` asks for.
    """
    by_name = {view.name: view for view in views}
    unknown = sorted({name for pair in pairs for name in pair if name not in by_name})
    if unknown:
        raise InputError(f"{len(unknown)} names of pairs are not among the {len(views)} images, first {unknown[0]}")
    pairs = [Pair(*pair) for pair in dict.fromkeys(pairs)]
    if output is None:
        passes, shards, reduction = _planned(model, views, pairs, config, match)
        return _infer_to_memory(PairNetwork(model, views, passes, config, reduction), pairs, shards)
    output = Path(output)
    with holding(shard_folder(output)):
        store = PointmapShards(output)
        keys = _infer_to_store(model, views, pairs, store, config, engine, match)
        return store.finish(pairs, [keys[pair] for pair in pairs])


def _infer_to_store(
    model: Dust3r,
    views: Sequence[View],
    pairs: Sequence[Pair],
    store: PointmapShards,
    config: InferConfig,
    engine: EngineConfig,
    match: MatchConfig = MatchConfig(),  # noqa: B008  frozen
) -> dict[Pair, str]:
    """The keys by which the store has the predictions, or those of the engine's share of them."""
    passes, shards, reduction = _planned(model, views, pairs, config, match)
    keys = _keys_of_kept(prediction_keys(model, views, pairs), views, reduction)
    shards = share_of(shards, engine)
    todo = [[pair for pair in shard if keys[pair] not in store] for shard in shards]
    todo = [shard for shard in todo if shard]
    total = sum(map(len, todo))
    if total < sum(map(len, shards)):
        there = sum(map(len, shards)) - total
        logger.info("%d of %d pairs are in %s already.", there, there + total, store.path)
    if total:
        share = 1.0 if reduction is None else REDUCED_SHARE
        _check_space(itertools.chain(*todo), {view.name: view for view in views}, store.folder, share)
    make = partial(PairNetwork, model, views, passes, config, reduction)
    with (
        tqdm(total=total, desc="DUSt3R", unit="pair", disable=None if total else True) as bar,
        _Writer(store) as writer,
    ):
        for found in _predictions(make, todo, engine, bar.update):
            writer.add([keys[pair] for pair in found], list(found.values()))
    return keys


def _predictions(
    make: Callable[[], PairNetwork], shards: list[list[Pair]], engine: EngineConfig, advance: Callable[[int], object]
) -> Iterator[dict[Pair, PairPrediction]]:
    """Those of each shard, as they are done."""
    if is_local(engine):
        yield from make().predict_all(shards, advance) if shards else ()
        return
    for _, found in map_shards(_predict_shard, make, shards, engine):
        advance(len(found))
        yield found


class _Writer:
    """Writes a shard while the network is at the next."""

    def __init__(self, store: PointmapShards) -> None:
        self._store, self._thread, self._pending = store, ThreadPoolExecutor(1), None

    def add(self, keys: list[str], predictions: list[PairPrediction]) -> None:
        self._finish()
        self._pending = self._thread.submit(self._store.add, keys, predictions)

    def _finish(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._finish()
        finally:
            self._thread.shutdown()


def _predict_shard(network: PairNetwork, shard: Sequence[Pair]) -> dict[Pair, PairPrediction]:
    return dict(network.predict(shard, bool))


def _planned(
    model: Dust3r, views: Sequence[View], pairs: Sequence[Pair], config: InferConfig, match: MatchConfig
) -> tuple[list[EncodingPass], list[list[Pair]], Reduction | None]:
    """In which order pairs are predicted, by which shards, and how they are reduced, if they are."""
    passes = encoding_passes(pairs, encoding_capacity(model.config, views, config)) if pairs else []
    shards = [shard for one in passes for shard in evenly_together(one.pairs, SHARD_PAIRS)]
    if config.keep_dense or len(pairs) <= config.max_dense_pairs:
        return passes, shards, None
    logger.info("%d pairs: their matches and a grid of their pixels are kept (--keep_dense keeps all).", len(pairs))
    return passes, shards, reduction_of(pairs, [view.name for view in views], match)


def _keys_of_kept(keys: dict[Pair, str], views: Sequence[View], reduction: Reduction | None) -> dict[Pair, str]:
    """What is kept depends on the masks too, and on how it is reduced."""
    if reduction is None:
        return keys
    masks = {view.name: b"" if view.mask is None else _bytes_of(view.mask) for view in views}
    how = repr(reduction.match)
    return {
        pair: hash_of(key, how, repr(pair in reduction.depth_pairs), masks[pair.name0], masks[pair.name1])
        for pair, key in keys.items()
    }


def prediction_keys(model: Dust3r, views: Sequence[View], pairs: Sequence[Pair]) -> dict[Pair, str]:
    """What each prediction depends on, as a hash: weights, and names and pixels of both images."""
    weights = hash_of(repr(model.config), *(_bytes_of(tensor) for tensor in model.state_dict().values()))
    images = {view.name: hash_of(view.name, repr(view.size), _bytes_of(view.image)) for view in views}
    return {pair: hash_of(weights, images[pair.name0], images[pair.name1]) for pair in pairs}


def _infer_to_memory(network: PairNetwork, pairs: Sequence[Pair], shards: list[list[Pair]]) -> Predictions:
    found = {}
    with tqdm(total=len(pairs), desc="DUSt3R", unit="pair", disable=None) as bar:
        for some in network.predict_all(shards, bar.update):
            found.update(some)
    return {pair: found[pair] for pair in pairs}


def _check_space(pairs: Iterable[Pair], views: Mapping[str, View], folder: Path, share: float = 1.0) -> None:
    """InputError where the predictions will not fit on the disk: of three coordinates and a confidence in float16."""
    sizes = [views[name].size for pair in pairs for name in pair]
    need, free = share * sum(h * w * 8 for h, w in sizes), shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"the predictions of {len(sizes) // 2} pairs need {need / 1e6:,.1f} MB, {folder} has "
            f"{free / 1e6:,.1f} MB free: make room, or take fewer pairs"
        )


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["infer-pairs", *sys.argv[1:]]))
