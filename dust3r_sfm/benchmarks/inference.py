"""Benchmark: directed pairs a second, from images in host memory to what the next stages use, and where time goes."""

from __future__ import annotations

import logging
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from dust3r_sfm.graph import pairs_exhaustive, pairs_sequential
from dust3r_sfm.infer_pairs import SHARD_PAIRS, infer_pairs
from dust3r_sfm.match_dense import MatchConfig
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig, Tokens
from dust3r_sfm.pair_network import ENCODE_IMAGES, InferConfig, PairNetwork, encoding_capacity, pick_device, unbatched
from dust3r_sfm.pairs import Pair
from dust3r_sfm.reduction import Reduction, evenly_together, reduced, reduction_of
from dust3r_sfm.schedule import encoding_passes
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

PAIR_FLOP, IMAGE_FLOP = 0.81e12, 0.52e12
"""Of the released shape at 512x384: a directed pair whose encodings are kept, and an encoding."""
ERROR_PAIRS = 8


def main(
    model: Literal["auto", "released", "shipped"] = "auto",
    num_images: int = 16,
    num_pairs: int | None = None,
    repeats: int = 3,
    profile: bool = False,
    config: InferConfig = InferConfig(compiled="on"),  # noqa: B008  frozen
) -> None:
    """Measure inference over all pairs of some images of noise.

    Args:
        model: released is the shape of the published 512 model with random weights, shipped the package's own at
            256x192; auto takes the former on a CUDA device.
        num_images: Images, all of which are paired with one another.
        num_pairs: Where given, directed pairs of a sequence in place of that, written to a file as a run of many
            photos writes them; the memory that it takes is printed.
        repeats: Times that everything is done, after once to warm up; the fastest counts.
        profile: Print the kernels of a CUDA device, or the operations of the CPU, that take most time.
        config: How to run the network; `compiled` is on for a CUDA device.
    """
    has_cuda = torch.cuda.is_available() and config.device in ("auto", "cuda")
    config = config if has_cuda else replace(config, compiled="off")
    released = model == "released" or (model == "auto" and has_cuda)
    torch.manual_seed(0)
    with pick_device(config):  # random weights are drawn where they are used
        network = Dust3r(Dust3rConfig(image_size=512, head="dpt")) if released else Dust3r.from_pretrained()
    size = (384, 512) if released else (192, 256)
    if num_pairs is not None:
        _measure_collection(network, size, num_pairs, config)
        return
    views = noise_views(num_images, size)
    pairs = pairs_exhaustive([view.name for view in views])
    for kept in ("reduced", "dense"):
        reduction = reduction_of(pairs, [view.name for view in views], MatchConfig()) if kept == "reduced" else None
        worker, shards = _worker(network, views, pairs, config, reduction)
        seconds = min(_seconds(worker.device, lambda w=worker, s=shards: _predict(w, s)) for _ in range(repeats + 1))
        _say(f"{kept} predictions on the host", seconds, len(pairs), worker, num_images if released else None)
        if kept == "reduced":
            _say_parts(worker, pairs, reduction)
        if profile:
            _say_profile(lambda w=worker, s=shards: _predict(w, s), worker.device)
    if worker.dtype != torch.float32:
        _say_error(network, worker, pairs[: 2 * ERROR_PAIRS : 2], config)
    if has_cuda:
        logger.info("Peak GPU memory %.1f GB.", torch.cuda.max_memory_allocated() / 1e9)


def noise_views(count: int, size: tuple[int, int]) -> list[View]:
    """Photos that show nothing: speed does not depend on what is seen."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)
    names = [f"{i:06d}.jpg" for i in range(count)]
    unit = torch.eye(3, dtype=torch.float64)
    return [
        View(name=name, image=image, original_size=size[::-1], net_from_img=unit)
        for name, image in zip(names, images, strict=True)
    ]


def _worker(
    model: Dust3r, views: Sequence[View], pairs: Sequence[Pair], config: InferConfig, reduction: Reduction | None
) -> tuple[PairNetwork, list[list[Pair]]]:
    passes = encoding_passes(pairs, encoding_capacity(model.config, views, config))
    shards = [shard for one in passes for shard in evenly_together(one.pairs, SHARD_PAIRS)]
    return PairNetwork(model, views, passes, config, reduction), shards


def _predict(worker: PairNetwork, shards: Sequence[Sequence[Pair]]) -> None:
    worker.encodings.clear()
    for _ in worker.predict_all(shards, bool):
        pass


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _fastest(device: torch.device, run: Callable[[], object], repeats: int = 4) -> float:
    return min(_seconds(device, run) for _ in range(repeats))


def matrix_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two large random matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _fastest(device, lambda: a @ b, repeats=10)


def _say(what: str, seconds: float, num_pairs: int, worker: PairNetwork, num_images: int | None) -> None:
    line = f"{num_pairs / seconds:.1f} directed pairs/s to {what} ({worker.dtype}, batches of {worker.batch_size}"
    logger.info("%s, %s).", line, "compiled" if worker.is_compiled else "not compiled")
    if num_images is not None:
        ceiling = matrix_ceiling(worker.device, worker.dtype)
        share = (num_pairs * PAIR_FLOP + num_images * IMAGE_FLOP) / seconds / ceiling
        logger.info("That is %.0f %% of the %.0f TFLOP/s of a matrix product here.", 100 * share, ceiling / 1e12)


def _say_parts(worker: PairNetwork, pairs: Sequence[Pair], reduction: Reduction | None) -> None:
    """Milliseconds a directed pair of each part, measured alone."""
    batch = list(pairs[: worker.batch_size])
    block = list(worker.views.values())[:ENCODE_IMAGES]
    model, device, milliseconds = worker.model, worker.device, {}
    with torch.inference_mode(), worker.autocast:
        tokens = [worker._tokens(batch, side) for side in (0, 1)]
        layers = model._decode_layers(*tokens)
        milliseconds["encode"] = _fastest(device, lambda: worker._encode(block)) * len(worker.views) / len(block)
        milliseconds["encode"] *= len(batch) / len(pairs)
        milliseconds["decode"] = _fastest(device, lambda: model._decode_layers(*tokens))
        milliseconds["heads"] = _fastest(device, lambda: _heads(model, layers, tokens))
    found = {pair: p for some, p in worker.predict_on_device(batch) for pair, p in zip(some, unbatched(p), strict=True)}
    if reduction is not None:
        milliseconds["reduce and copy"] = _fastest(device, lambda: reduced(found, worker.views, reduction))
    parts = ", ".join(f"{part} {1e3 * seconds / len(batch):.2f}" for part, seconds in milliseconds.items())
    logger.info("Milliseconds a directed pair, each part alone: %s.", parts)


def _say_profile(run: Callable[[], object], device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as found:
        seconds = _seconds(device, run)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = found.key_averages()
    logger.info("%s", rows.table(sort_by=order, row_limit=30, max_name_column_width=90))
    if on_gpu:
        busy = sum(row.self_device_time_total for row in rows if row.device_type == DeviceType.CUDA) / 1e6
        logger.info("Kernels and copies of %.3f s within %.3f s.", busy, seconds)


def _heads(model: Dust3r, layers: tuple[list[Tensor], list[Tensor]], tokens: Sequence[Tokens]) -> None:
    heads = (model.downstream_head1, model.downstream_head2)
    for side, (head, of_side, image) in enumerate(zip(heads, layers, tokens, strict=True)):
        model._predict(head, of_side, image.grid, image.finest[side])


def _say_error(model: Dust3r, worker: PairNetwork, pairs: Sequence[Pair], config: InferConfig) -> None:
    """The distance of pointmaps from those in float32, over their own distance from the camera."""
    exact = replace(config, precision="float32", compiled="off", batch_size=1, keep_dense=True)
    fast = worker.predict(pairs, bool)
    true = infer_pairs(model, list(worker.views.values()), pairs, config=exact)
    for field in ("pointmap0_in_cam0", "pointmap1_in_cam0"):
        errors = torch.cat([_relative(getattr(fast[p], field), getattr(true[p], field)) for p in pairs])
        logger.info("%s: median relative difference from float32 %.2f %%.", field, 100 * errors.median())


def _relative(found: Float[Tensor, "h w 3"], true: Float[Tensor, "h w 3"]) -> Float[Tensor, " n"]:
    return ((found - true).norm(dim=-1) / true.norm(dim=-1).clamp(min=1e-12)).flatten()


def _measure_collection(model: Dust3r, size: tuple[int, int], num_pairs: int, config: InferConfig) -> None:
    """A sequence in which each image meets its 10 next ones, through the stage that writes files."""
    window = 10
    views = noise_views(max(window + 1, -(-num_pairs // (2 * window))), size)
    pairs = pairs_sequential([view.name for view in views], window)[:num_pairs]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pointmaps.h5"
        start = time.perf_counter()
        infer_pairs(model, views, pairs, output, replace(config, max_dense_pairs=0)).close()
        seconds = time.perf_counter() - start
        stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    logger.info("%d directed pairs of %d images in %.1f s, compiling included.", len(pairs), len(views), seconds)
    logger.info("Stored %.0f kB a pair.", stored / len(pairs) / 1e3)
    logger.info("Peak host memory %.1f GB.", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    if torch.cuda.is_available():
        logger.info("Peak GPU memory %.1f GB.", torch.cuda.max_memory_allocated() / 1e9)
