"""Stage: global alignment; pairwise pointmaps become scenes of cameras and depths."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from dust3r_sfm.alignment.align import AlignConfig, align_cluster, iterate_components
from dust3r_sfm.alignment.clusters import AlignClusters, Cluster
from dust3r_sfm.engine import EngineConfig, is_local, map_shards
from dust3r_sfm.errors import InputError
from dust3r_sfm.files import writing
from dust3r_sfm.formats.known_cameras import read_known_cameras
from dust3r_sfm.formats.pairs import read_pairs
from dust3r_sfm.formats.pointmaps import PointmapFile
from dust3r_sfm.formats.scenes import write_scenes
from dust3r_sfm.pair_network import InferConfig, pick_device
from dust3r_sfm.pairs import Predictions, PredictionsOn, SomePredictions, size_of
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import SQUARE_CROP_SIZE, View, load_views

logger = logging.getLogger(__name__)

MAX_NAMED = 20
"""Pairs that are named in the log."""


def main(
    image_dir: Path,
    pointmaps: Path,
    output: Path,
    pairs: Path | None = None,
    cameras: Path | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    config: AlignConfig = AlignConfig(),  # noqa: B008  frozen
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> list[Scene]:
    """Put the pointmaps of all pairs into one frame for each connected group of images.

    Args:
        image_dir: The folder of photos that the pointmaps were made of.
        pointmaps: What infer_pairs wrote, such as pointmaps.h5.
        output: The file to write, such as scene.h5.
        pairs: Pairs file of the directed pairs to use, as filter_pairs writes it; all where not given.
        cameras: A cameras.json or a COLMAP model whose intrinsics and poses are kept, of any of the photos.
        device: Where the alignment is sought; auto takes cuda where there is one.
        config: How the alignment is sought.
        engine: Where the clusters of more than max_cluster images are aligned.
    """
    if engine.shard is not None:
        raise InputError("alignment is not done by shares, as clusters are merged: give --engine or --workers instead")
    where = alignment_device(InferConfig(device=device))
    with writing(output):
        with PointmapFile(pointmaps) as predictions:
            used = _chosen(predictions, pairs)
            views = _load_views(image_dir, used, cameras)
            scenes = align_views(views, PredictionsOn(used, where), config, engine)
        write_scenes(output, scenes)
    num_aligned = sum(len(scene.names) for scene in scenes)
    doubts = {pair: reason for scene in scenes for pair, reason in scene.doubts.items()}
    for pair, reason in sorted(doubts.items())[:MAX_NAMED]:
        logger.warning("The pair %s %s %s.", *pair, reason)
    if len(doubts) > MAX_NAMED:
        logger.warning("%d more pairs have no say either.", len(doubts) - MAX_NAMED)
    logger.info("Aligned %d of %d images in %d scenes: %s.", num_aligned, len(views), len(scenes), output)
    return scenes


def align_views(
    views: Sequence[View], predictions: Predictions, config: AlignConfig, engine: EngineConfig
) -> list[Scene]:
    """A scene for every component; the clusters of large ones are aligned by the engine's workers."""
    align_clusters = None if is_local(engine) else _by_workers(predictions, config, engine)
    scenes = []
    with tqdm(total=len(views), desc="Align", unit="image", disable=None) as bar:
        for scene in iterate_components(views, predictions, config, align_clusters):
            scenes.append(scene)
            bar.update(len(scene.names))
    return scenes


def _by_workers(predictions: Predictions, config: AlignConfig, engine: EngineConfig) -> AlignClusters:
    make = partial(tuple, (predictions, config))
    return lambda clusters: map_shards(_align_one, make, clusters, engine)


def _align_one(held: tuple[Predictions, AlignConfig], cluster: Cluster) -> list[Scene]:
    return align_cluster(*held, cluster)


def alignment_device(config: InferConfig) -> torch.device:
    """The network's device where it computes in double precision, as CUDA does, else the CPU."""
    device = pick_device(config)
    return device if device.type == "cuda" else torch.device("cpu")


def _chosen(predictions: Predictions, pairs: Path | None) -> Predictions:
    """The predictions of the listed pairs; InputError where one was never predicted."""
    if len(predictions) == 0:
        raise InputError("the pointmap file holds no pairs: run infer_pairs on two photos or more")
    if pairs is None:
        return predictions
    listed = read_pairs(pairs, {name for pair in predictions for name in pair})
    missing = [pair for pair in listed if pair not in predictions]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(listed)} pairs in {pairs} have no pointmaps, first {' '.join(missing[0])}: "
            "run infer_pairs on them"
        )
    return SomePredictions(predictions, listed)


def _load_views(image_dir: Path, predictions: Predictions, cameras: Path | None) -> list[View]:
    """The views of all images of pairs, at the size that the pointmaps were made at."""
    names = sorted({name for pair in predictions for name in pair})
    shapes = set(_sizes(predictions, names))
    size = max(max(shape) for shape in shapes)
    is_square = size != SQUARE_CROP_SIZE and (size, size) in shapes
    known = read_known_cameras(cameras, names) if cameras is not None else None
    return load_views(image_dir, size, names, square_ok=is_square, cameras=known)


def _sizes(predictions: Predictions, names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(height, width) of each image; only as many pairs are read as needed."""
    left = set(names)
    for pair in predictions:
        if left & set(pair):
            prediction = predictions[pair]
            yield from (size_of(prediction, side) for side in (0, 1))
            left -= set(pair)


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["align-scene", *sys.argv[1:]]))
