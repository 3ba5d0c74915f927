"""Stage: DUSt3R on every pair of photos; predictions go to a file, shard by shard."""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from dust3r_sfm.engine import EngineConfig, is_local, map_shards, share_of
from dust3r_sfm.errors import InputError
from dust3r_sfm.files import holding
from dust3r_sfm.formats.known_cameras import read_known_cameras
from dust3r_sfm.formats.pairs import read_pairs
from dust3r_sfm.formats.pointmaps import PointmapShards, hash_of, shard_folder
from dust3r_sfm.graph import symmetrize
from dust3r_sfm.models.dust3r import Dust3r, Tokens
from dust3r_sfm.pairs import Pair, PairPrediction, Predictions
from dust3r_sfm.views import View, list_images, load_views

logger = logging.getLogger(__name__)

SHARD_PAIRS = 32  # what a killed run loses at most
ENCODE_IMAGES = 8  # images that are encoded at once
TILE_IMAGES = 64  # pairs are taken tile by tile of this many images squared, so that few encodings are needed at once
KEPT_ENCODINGS_BYTES = 2 * 1024**3


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    batch_size: int = 8
    """Directed pairs that the decoder takes at once."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where the network runs; auto takes the first there is."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the matrix products; auto takes bfloat16 where the device computes in it."""


def main(
    image_dir: Path,
    pairs: Path,
    output: Path,
    model: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    cameras: Path | None = None,
    config: InferConfig = InferConfig(),
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
    output.parent.mkdir(parents=True, exist_ok=True)
    if engine.shard is None:
        infer_pairs(network, views, directed, output, config, engine)
        logger.info("%d directed pairs of %d images are in %s.", len(directed), len(views), output)
        return
    with holding(shard_folder(output), engine.shard.replace("/", "-")):
        _infer_to_store(network, views, directed, PointmapShards(output), config, engine)
    logger.info("Share %s is done; the same command without --shard puts all shares together.", engine.shard)


def infer_pairs(
    model: Dust3r,
    views: Sequence[View],
    pairs: Sequence[Pair],
    output: Path | None = None,
    config: InferConfig = InferConfig(),
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> Predictions:
    """Predictions of directed pairs: in `output`, continuing what is there, or in memory where it is None.

    An image is encoded once; pairs are decoded in batches of equal sizes. What is found in `output`
    counts where the model's weights, the images' names and their contents are the same.
    """
    by_name = {view.name: view for view in views}
    unknown = sorted({name for pair in pairs for name in pair if name not in by_name})
    if unknown:
        raise InputError(f"{len(unknown)} names of pairs are not among the {len(views)} images, first {unknown[0]}")
    pairs = [Pair(*pair) for pair in dict.fromkeys(pairs)]
    if output is None:
        shards = _cut(_in_order(pairs, views), SHARD_PAIRS)
        return _infer_to_memory(_Network(model, views, config), pairs, shards)
    output = Path(output)
    with holding(shard_folder(output)):
        store = PointmapShards(output)
        keys = _infer_to_store(model, views, pairs, store, config, engine)
        return store.finish(pairs, [keys[pair] for pair in pairs])


def _infer_to_store(
    model: Dust3r,
    views: Sequence[View],
    pairs: Sequence[Pair],
    store: PointmapShards,
    config: InferConfig,
    engine: EngineConfig,
) -> dict[Pair, str]:
    """The keys by which the store has the predictions, or those of the engine's share of them."""
    keys = prediction_keys(model, views, pairs)
    shards = share_of(_cut(_in_order(pairs, views), SHARD_PAIRS), engine)
    todo = [[pair for pair in shard if keys[pair] not in store] for shard in shards]
    todo = [shard for shard in todo if shard]
    total = sum(map(len, todo))
    if total < sum(map(len, shards)):
        there = sum(map(len, shards)) - total
        logger.info("%d of %d pairs are in %s already.", there, there + total, store.path)
    if total:
        _check_space(itertools.chain(*todo), {view.name: view for view in views}, store.folder)
    with tqdm(total=total, desc="DUSt3R", unit="pair", disable=None if total else True) as bar:
        predict = partial(_predict_shard, bar=bar) if is_local(engine) else _predict_shard
        for _, found in map_shards(predict, partial(_Network, model, views, config), todo, engine):
            store.add([keys[pair] for pair in found], list(found.values()))
            bar.update(0 if is_local(engine) else len(found))
    return keys


class _Silent:
    """The bar of a worker, which has none."""

    def update(self, n: int) -> None:
        pass


def _predict_shard(network: _Network, shard: Sequence[Pair], bar: tqdm | None = None) -> dict[Pair, PairPrediction]:
    return dict(network.predict(shard, bar or _Silent()))


def prediction_keys(model: Dust3r, views: Sequence[View], pairs: Sequence[Pair]) -> dict[Pair, str]:
    """What each prediction depends on, as a hash: weights, and names and pixels of both images."""
    weights = hash_of(repr(model.config), *(_bytes_of(tensor) for tensor in model.state_dict().values()))
    images = {view.name: hash_of(view.name, repr(view.size), _bytes_of(view.image)) for view in views}
    return {pair: hash_of(weights, images[pair.name0], images[pair.name1]) for pair in pairs}


def pick_device(config: InferConfig = InferConfig()) -> torch.device:
    """The device that a config names; InputError where this machine has none of it."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if config.device == "auto":
        return torch.device(next(name for name, is_there in there.items() if is_there))
    if not there[config.device]:
        raise InputError(f"this machine has no {config.device} device: choose another or auto")
    return torch.device(config.device)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones: GPUs since 2020, CPUs that have instructions for it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # private names, and absent from some releases of torch: without them float32, which is slower and never wrong
    tests = (getattr(torch.cpu, name, bool) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and any(test() for test in tests)


class _Network:
    """The model on its device, with the encodings of the images used last."""

    def __init__(self, model: Dust3r, views: Sequence[View], config: InferConfig) -> None:
        self.device = pick_device(config)
        self.model = model.to(self.device).eval()
        self.batch_size = config.batch_size
        is_bfloat16 = config.precision == "bfloat16" or (
            config.precision == "auto" and computes_in_bfloat16(self.device)
        )
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=is_bfloat16)
        self.views = {view.name: view for view in views}
        # always the same images together, so that a run that continues gives what one run gives, bit by bit
        by_size = sorted(views, key=lambda view: view.size)
        groups = [_cut(list(group), ENCODE_IMAGES) for _, group in itertools.groupby(by_size, lambda view: view.size)]
        self.blocks = {view.name: block for blocks in groups for block in blocks for view in block}
        self.encodings: OrderedDict[str, Tokens] = OrderedDict()

    def predict(self, pairs: Sequence[Pair], bar: _Silent | tqdm) -> Iterator[tuple[Pair, PairPrediction]]:
        """Predictions on the CPU in float32; the bar moves with every batch."""
        for _, group in itertools.groupby(pairs, self._sizes):
            for batch in _cut(list(group), self.batch_size):
                with torch.inference_mode(), self.autocast:
                    tokens0, tokens1 = (self._tokens([pair[side] for pair in batch]) for side in (0, 1))
                    prediction = self.model.decode(tokens0, tokens1)
                yield from zip(batch, _unbatched(prediction), strict=True)
                bar.update(len(batch))

    def _sizes(self, pair: Pair) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.views[pair.name0].size, self.views[pair.name1].size

    def _tokens(self, names: Sequence[str]) -> Tokens:
        """Encodings of images of one size as a batch."""
        for name in dict.fromkeys(names):
            if name not in self.encodings:
                self._encode(self.blocks[name])
            self.encodings.move_to_end(name)
        tokens = [self.encodings[name] for name in names]
        self._forget(keep=len(set(names)))
        return Tokens(torch.cat([t.features for t in tokens]), tokens[0].grid)

    def _encode(self, views: Sequence[View]) -> None:
        images = torch.stack([view.normalized() for view in views]).to(self.device)
        tokens = self.model.encode(images)
        for view, features in zip(views, tokens.features.split(1), strict=True):
            self.encodings[view.name] = Tokens(features.clone(), tokens.grid)

    def _forget(self, keep: int) -> None:
        """Drop the encodings that were not used for longest until the rest fits."""
        size = sum(tokens.features.nbytes for tokens in self.encodings.values())
        while size > KEPT_ENCODINGS_BYTES and len(self.encodings) > keep:
            size -= self.encodings.popitem(last=False)[1].features.nbytes


def _infer_to_memory(network: _Network, pairs: Sequence[Pair], shards: list[list[Pair]]) -> Predictions:
    found = {}
    with tqdm(total=len(pairs), desc="DUSt3R", unit="pair", disable=None) as bar:
        for shard in shards:
            found.update(network.predict(shard, bar))
    return {pair: found[pair] for pair in pairs}


def _in_order(pairs: Sequence[Pair], views: Sequence[View]) -> list[Pair]:
    """Pairs of equal image sizes together, and within them tile by tile of the matrix of images."""
    place = {view.name: (i, view.size) for i, view in enumerate(views)}

    def key(pair: Pair) -> tuple:
        (i, size0), (j, size1) = place[pair.name0], place[pair.name1]
        return size0, size1, i // TILE_IMAGES, j // TILE_IMAGES, i, j

    return sorted(pairs, key=key)


def _check_space(pairs: Iterable[Pair], views: Mapping[str, View], folder: Path) -> None:
    """InputError where the predictions will not fit on the disk: three coordinates and a confidence in float16."""
    sizes = [views[name].size for pair in pairs for name in pair]
    need, free = sum(h * w * 8 for h, w in sizes), shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"the predictions of {len(sizes) // 2} pairs need {need / 1e6:,.1f} MB, {folder} has "
            f"{free / 1e6:,.1f} MB free: make room, or take fewer pairs"
        )


def _cut(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _unbatched(prediction: PairPrediction) -> Iterator[PairPrediction]:
    fields = (prediction.pointmap0_in_cam0, prediction.confidence0)
    fields += (prediction.pointmap1_in_cam0, prediction.confidence1)
    for values in zip(*(field.float().cpu().unbind() for field in fields), strict=True):
        yield PairPrediction(*(value.clone() for value in values))


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["infer-pairs", *sys.argv[1:]]))
