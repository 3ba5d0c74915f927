"""Where a training step's time goes on this CUDA device: rendering a batch, forward and backward, the update."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dust3r_sfm.errors import InputError
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.train import SMALL
from dust3r_sfm.training.loop import LoopConfig, Trainer, make_batch, objective
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


def _captured(trainer: Trainer, run: Callable[[], object]) -> Callable[[], None]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(trainer.dice.generator)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def main(batch: int = 96) -> None:
    """Print a table of times a step for the shipped model's shape, and the share of the bfloat16 ceiling."""
    if not torch.cuda.is_available():
        raise InputError("the training benchmark needs a CUDA device, and there is none")
    device = torch.device("cuda")
    c, textures = LoopConfig(batch=batch), with_mipmaps(generated_textures(16).to(device))
    model = Dust3r(SMALL).to(device)
    for block in [*model.enc_blocks, *model.dec_blocks, *model.dec_blocks2]:
        block.compile(dynamic=False)
    trainer = Trainer(model, textures, c, objective=torch.compile(objective, dynamic=False))
    ceiling = _matrix_ceiling()
    for (landscape, *_), size in zip(
        trainer.steps(), [(c.easy_height, c.easy_width), (c.height, c.width)], strict=True
    ):
        render = _milliseconds(
            _captured(trainer, lambda n=landscape.batch, s=size: make_batch(trainer.dice, n, s, textures, c.samples))
        )
        whole = _milliseconds(landscape)
        flops = landscape.batch * step_flops(SMALL, size[0] * size[1] // SMALL.patch_size**2)
        network = whole - render
        share = flops / network * 1e3 / ceiling
        print(
            f"{size[0]}x{size[1]}, {landscape.batch} pairs: batch {render:.1f} ms, network {network:.1f} ms "
            f"({share:.0%} of {ceiling / 1e12:.0f} TFLOP/s), {landscape.batch / whole * 1e3:.0f} pairs/s"
        )
    update = _milliseconds(lambda: trainer.optimizer.step(1e-6, 1.0, 0.999))
    print(f"update {update:.1f} ms")
