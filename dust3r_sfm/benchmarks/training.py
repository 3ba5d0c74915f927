"""Where a training step's time goes on this CUDA device: rendering a batch, forward and backward, the update."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dust3r_sfm.benchmarks.profiling import profile_table
from dust3r_sfm.errors import InputError
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.train import SMALL, TrainConfig, make_trainer
from dust3r_sfm.training.batches import Source
from dust3r_sfm.training.config import LoopConfig
from dust3r_sfm.training.loop import Trainer
from dust3r_sfm.training.step import OverlappedStep, Step, capture
from dust3r_sfm.training.textures import generated_textures, with_mipmaps


def step_flops(c: Dust3rConfig, num_tokens: int) -> float:
    """Floating-point operations of forward and backward over a pair in both directions: matrix products alone."""

    def block(dim: int, cross: int) -> float:
        matrices = (4 + 4 * cross + 2 * c.mlp_ratio) * dim * dim
        return 2 * num_tokens * matrices + (1 + cross) * 4 * num_tokens**2 * dim

    encoder = 2 * c.enc_depth * block(c.enc_embed_dim, 0)
    decoders = 4 * c.dec_depth * block(c.dec_embed_dim, 1)
    return 3 * (encoder + decoders)


def _milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def _matrix_ceiling() -> float:
    """FLOP/s of an 8192-wide bfloat16 product of random matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (_milliseconds(lambda: a @ b) * 1e-3)


def _report(trainer: Trainer, step: Step | OverlappedStep, ceiling: float) -> None:
    """A line for images of one size."""
    size, engine = step.size, trainer.engine
    made, _ = capture(lambda: engine.make(size), engine.pool, engine.dice)
    batch = _milliseconds(made.replay)

    def whole_step() -> None:
        step.fetch()
        step.prepare()
        step()

    step.prepare()
    whole = _milliseconds(whole_step)
    flops = step.batch * step_flops(SMALL, size[0] * size[1] // SMALL.patch_size**2)
    print(
        f"{size[0]}x{size[1]}, {step.batch} pairs: batch {batch:.1f} ms, step {whole:.1f} ms, "
        f"{step.batch / whole * 1e3:.0f} pairs/s, {flops / whole * 1e3 / ceiling:.0%} of {ceiling / 1e12:.0f} TFLOP/s, "
        f"{torch.cuda.max_memory_allocated() / 2**30:.0f} GiB at most"
    )


def main(
    batch: int = 96,
    overlap: bool = False,
    compile_all: bool = False,
    bf16_residual: bool = False,
    stem: bool = False,
    pose: float = 0.0,
    profile: bool = False,
) -> None:
    """Print the times of a step for the shipped model's shape, and the share of the bfloat16 ceiling.

    Args:
        batch: Pairs of 192x256.
        overlap: Make the next batch while the network learns.
        compile_all: Compile the heads' outputs and the changes of the photos too.
        bf16_residual: Keep the residual stream in bfloat16.
        stem: Let the network see XFeat's features.
        pose: Weight of the loss of poses.
        profile: Print the kernels of a step of 192x256 that take longest, outside its graph.
    """
    if not torch.cuda.is_available():
        raise InputError("the training benchmark needs a CUDA device, and there is none")
    start = time.perf_counter()
    loop = LoopConfig(batch=batch, heights=(192,), portrait=0.0, overlap=overlap, apart_share=0.05, pose=pose)
    config = TrainConfig(output=Path(), loop=loop, compile_all=compile_all, bf16_residual=bf16_residual)
    source = Source(with_mipmaps(generated_textures(16).cuda()))
    model = Dust3r(dataclasses.replace(SMALL, stem="xfeat" if stem else "none")).cuda()
    trainer = make_trainer(config, model, source, (0, 1), start)
    easy, full = trainer.steps()
    print(f"Ready after {time.perf_counter() - start:.0f} s.")
    ceiling = _matrix_ceiling()
    for step in (*easy.values(), *full.values()):
        _report(trainer, step, ceiling)
    print(f"update {_milliseconds(lambda: trainer.optimizer.step(1e-6, 1.0, 0.999)):.1f} ms")
    if profile:
        engine, size = trainer.engine, (192, 256)
        engine.learn(engine.make(size))
        print(profile_table(lambda: engine.learn(engine.make(size)), rows=40))
