"""Benchmark: what a run over many images costs the process that drives it, with a network that does next to nothing."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from dust3r_sfm.engine import EngineConfig
from dust3r_sfm.graph import pairs_sequential
from dust3r_sfm.infer_pairs import InferConfig, infer_pairs
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

SIDE = 32
"""Pixels of an image's side."""


class DriverFigures(NamedTuple):
    images: int
    pairs: int
    seconds: float
    cpu_s: float
    """Of the driver itself, which other programs on the machine do not change much."""
    memory_mb: float
    """What the driver took beyond what it had before the images, at most."""


def stub_network() -> Dust3r:
    """A network of one narrow layer of each kind."""
    narrow = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2}
    narrow |= {"dec_embed_dim": 32, "dec_depth": 1, "dec_num_heads": 2}
    return Dust3r(Dust3rConfig(image_size=SIDE, **narrow))


def main(
    counts: tuple[int, ...] = (2500, 5000, 10000),
    window: int = 1,
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> list[DriverFigures]:
    """Predict pairs of synthetic images with a stub network, and measure the driver's time and memory.

    Args:
        counts: How many images, one run each in a process of its own.
        window: Next images that each is paired with.
        engine: Where shards are done.
    """
    found = []
    context = multiprocessing.get_context("spawn")
    for count in counts:
        receiver, sender = context.Pipe(duplex=False)
        run = context.Process(target=_run, args=(count, window, engine, sender))
        run.start()
        sender.close()  # else nothing says that the run has failed
        figures = receiver.recv()
        run.join()
        found.append(figures)
        logger.info(
            "%d images, %d pairs: %.1f s; the driver took %.2f ms of a core a pair and %.0f MB, %.1f kB an image.",
            *(figures.images, figures.pairs, figures.seconds, 1e3 * figures.cpu_s / figures.pairs),
            *(figures.memory_mb, 1e3 * figures.memory_mb / figures.images),
        )
    return found


def _run(count: int, window: int, engine: EngineConfig, sender: Connection) -> None:
    before = _peak_mb()
    start, cpu = time.perf_counter(), time.process_time()
    generator = torch.Generator().manual_seed(0)
    shape = (SIDE, SIDE, 3)
    views = [
        View(
            name=f"{i:06d}.jpg",
            image=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            original_size=(SIDE, SIDE),
            net_from_img=torch.eye(3, dtype=torch.float64),
        )
        for i in range(count)
    ]
    pairs = pairs_sequential([view.name for view in views], window)
    with tempfile.TemporaryDirectory() as folder:
        network = stub_network()
        infer_pairs(
            network, views, pairs, Path(folder) / "pointmaps.h5", InferConfig(max_dense_pairs=len(pairs)), engine
        ).close()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    sender.send(DriverFigures(count, len(pairs), seconds, cpu, _peak_mb() - before))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
