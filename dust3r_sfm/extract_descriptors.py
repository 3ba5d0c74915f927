"""Stage: a vector for each photo, close for photos of the same place, in hloc's file of global features."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dust3r_sfm.engine import EngineConfig, is_local, map_shards, share_name, share_of
from dust3r_sfm.errors import InputError
from dust3r_sfm.files import holding
from dust3r_sfm.formats.descriptors import DescriptorStore, ImageDescriptor, descriptor_folder
from dust3r_sfm.formats.pointmaps import hash_of
from dust3r_sfm.infer_pairs import InferConfig, computes_in_bfloat16, pick_device
from dust3r_sfm.models.apgem import MAX_SIDE, ApGem, load_apgem
from dust3r_sfm.models.descriptor import EncoderDescriptor, load_descriptor
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.pair_network import BATCH_SIZE
from dust3r_sfm.views import DECODE_ERRORS, PATCH, View, list_images, read_views

logger = logging.getLogger(__name__)

SHARD_IMAGES = 64  # what a killed run loses at most


class _Extractor(NamedTuple):
    network: EncoderDescriptor | ApGem
    scales: tuple[float, ...]
    key: str
    """Changes with anything that the descriptors depend on, beside the photo."""

    def describe(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        if isinstance(self.network, ApGem):
            return self.network(images, self.scales)
        return self.network(images)


def main(
    image_dir: Path,
    output: Path,
    model: str | None = None,
    apgem: Path | None = None,
    scales: tuple[float, ...] = (1.0,),
    on_bad_image: Literal["error", "skip"] = "error",
    config: InferConfig = InferConfig(),  # noqa: B008  frozen
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> None:
    """Describe each photo of a folder by a vector.

    Args:
        image_dir: Folder of photos, sub-folders included.
        output: The file to write, such as global-feats.h5; a second run continues an interrupted one.
        model: Network whose encoder describes: checkpoint file, folder or hub name; the shipped one if not given.
        apgem: AP-GeM weights to describe with instead, from convert_weights or as published.
        scales: Sizes, relative to the photo's, over which AP-GeM's descriptors are averaged.
        on_bad_image: Stop at photos that cannot be used, or leave them out.
        config: How to run the network.
        engine: Where to run it.
    """
    names = list_images(image_dir)
    extractor = _load(model, apgem, scales, config)
    keys = {name: _key(image_dir / name, extractor) for name in names}
    make = (lambda: extractor) if is_local(engine) else partial(_load, model, apgem, scales, config)
    share = share_name(engine)
    with holding(descriptor_folder(output), share):
        store = DescriptorStore(output)
        rejected = _describe_to_store(image_dir, keys, store, make, config, engine)
        _report_rejected(rejected, len(names), on_bad_image)
        if share is not None:
            logger.info("Share %s is done; the same command without --shard puts all shares together.", engine.shard)
            return
        there = {name: key for name, key in keys.items() if key in store}
        if not there:
            raise InputError(f"none of the {len(names)} images in {image_dir} can be used")
        store.finish(there)
    logger.info("%d images are described by %d numbers each in %s.", len(there), extractor.network.dim, output)


def _describe_to_store(
    image_dir: Path,
    keys: Mapping[str, str],
    store: DescriptorStore,
    make: Callable[[], _Extractor],
    config: InferConfig,
    engine: EngineConfig,
) -> dict[str, str]:
    """Why images cannot be used; the others of the engine's share are in the store, each content once."""
    first_of = {key: name for name, key in reversed(keys.items())}  # copies are described once
    names = sorted(first_of.values())
    shards = share_of([names[start : start + SHARD_IMAGES] for start in range(0, len(names), SHARD_IMAGES)], engine)
    todo = [[name for name in shard if keys[name] not in store] for shard in shards]
    todo = [shard for shard in todo if shard]
    rejected: dict[str, str] = {}
    with tqdm(total=sum(map(len, todo)), desc="Descriptors", unit="image", disable=None) as bar:
        describe = partial(_describe_shard, image_dir=image_dir, config=config)
        for _, (sizes, rows, bad) in map_shards(describe, make, todo, engine):
            rejected |= bad
            items = [ImageDescriptor(n, keys[n], size, d) for (n, size), d in zip(sizes.items(), rows, strict=True)]
            if items:
                store.add(items)
            bar.update(len(items) + len(bad))
    return rejected


def _describe_shard(
    extractor: _Extractor, names: Sequence[str], image_dir: Path, config: InferConfig
) -> tuple[dict[str, tuple[int, int]], Float[np.ndarray, "n d"], dict[str, str]]:
    """The stored sizes by name and the descriptors of images that can be used, and why others cannot."""
    views, bad = _read(image_dir, names, extractor)
    return {view.name: view.original_size for view in views}, _describe(extractor, views, config), bad


def describe_views(
    model: Dust3r,
    views: Sequence[View],
    config: InferConfig = InferConfig(),  # noqa: B008  frozen
) -> Float[np.ndarray, "n d"]:
    """Descriptors of views by the network's encoder; unit rows in the views' order."""
    network = load_descriptor(model).to(pick_device(config))
    return _describe(_Extractor(network, (1.0,), ""), views, config)


def _load(model: str | None, apgem: Path | None, scales: tuple[float, ...], config: InferConfig) -> _Extractor:
    device = pick_device(config)
    if not scales or min(scales) <= 0:
        raise InputError(f"scales must be positive, and at least one, got {scales}")
    if apgem is None:
        if scales != (1.0,):
            raise InputError("several scales are for AP-GeM: name its weights with --apgem")
        network: EncoderDescriptor | ApGem = load_descriptor(Dust3r.from_pretrained(model))
    else:
        network = load_apgem(apgem)
    tensors = (x.detach().contiguous().view(-1).view(torch.uint8) for x in network.state_dict().values())
    key = hash_of(type(network).__name__, repr(scales), *(x.numpy().tobytes() for x in tensors))
    return _Extractor(network.to(device).eval(), scales, key)


def _key(path: Path, extractor: _Extractor) -> str:
    try:
        return hash_of(extractor.key, sha256(path.read_bytes()).digest())
    except OSError as error:
        return hash_of(extractor.key, str(path), str(error))  # told by the reader of the photo


def _read(image_dir: Path, names: Sequence[str], extractor: _Extractor) -> tuple[list[View], dict[str, str]]:
    """The views at the size that the network takes, and why some cannot be used."""
    if isinstance(extractor.network, EncoderDescriptor):
        config = extractor.network.model.config
        return _split(read_views(image_dir, config.image_size, names, square_ok=config.square_ok))
    views, rejected = [], {}
    sizes = {name: _long_side(image_dir / name) for name in names}
    for size in sorted(set(sizes.values())):
        found, bad = _split(read_views(image_dir, size, [n for n in names if sizes[n] == size], square_ok=True))
        views += found
        rejected |= bad
    return views, rejected


def _split(loaded: tuple[list[View], Mapping[str, str]]) -> tuple[list[View], dict[str, str]]:
    return loaded[0], dict(loaded[1])


def _long_side(path: Path) -> int:
    """Of the photo, in whole patches, and at most what AP-GeM is given."""
    try:
        with Image.open(path) as image:
            return min(MAX_SIDE, max(max(image.size) // PATCH * PATCH, PATCH))
    except DECODE_ERRORS:  # told by the reader of the photo
        return MAX_SIDE


def _describe(extractor: _Extractor, views: Sequence[View], config: InferConfig) -> Float[np.ndarray, "n d"]:
    """Rows in the views' order; views of equal sizes go through the network together."""
    rows = np.empty((len(views), extractor.network.dim), np.float32)
    for batch in _batches(views, config.batch_size or BATCH_SIZE):
        rows[batch] = _forward(extractor, [views[i] for i in batch], config)
    return rows


def _forward(extractor: _Extractor, views: Sequence[View], config: InferConfig) -> Float[np.ndarray, "b d"]:
    device = next(extractor.network.parameters()).device
    is_bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and computes_in_bfloat16(device))
    images = torch.stack([view.normalized() for view in views]).to(device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
        return extractor.describe(images).float().cpu().numpy()


def _batches(views: Sequence[View], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(views)), key=lambda i: views[i].size)
    for _, group in groupby(order, key=lambda i: views[i].size):
        images = list(group)
        yield from (images[start : start + size] for start in range(0, len(images), size))


def _report_rejected(rejected: Mapping[str, str], total: int, on_bad_image: str) -> None:
    if rejected and on_bad_image == "error":
        lines = [f"  {name} {reason}" for name, reason in rejected.items()]
        heading = f"{len(rejected)} of {total} images cannot be used; the others are described:"
        raise InputError("\n".join([heading, *lines, "Remove them, or leave them out with --on_bad_image skip."]))
    for name, reason in rejected.items():
        logger.warning("Left out: %s %s.", name, reason)


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["extract-descriptors", *sys.argv[1:]]))
