"""Trains the network on procedural pairs: `dust3r-sfm train`, or one process a GPU with

    torchrun --standalone --nproc_per_node=4 -m dust3r_sfm.train --output run --textures photos

The averaged weights are written to `weights.safetensors` every few minutes, and the whole state to `state.pt`:
the same command continues an interrupted run, `--init` starts a new one from given weights.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import replacing, write_bytes
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.training.loop import LoopConfig, Trainer, load_state_file, objective
from dust3r_sfm.training.textures import generated_textures, photo_textures, with_mipmaps

logger = logging.getLogger(__name__)

SMALL = Dust3rConfig(
    image_size=256,
    square_ok=True,
    enc_embed_dim=384,
    enc_depth=12,
    enc_num_heads=6,
    dec_embed_dim=256,
    dec_depth=8,
    dec_num_heads=4,
)
"""The shipped model's shape."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run of training."""

    output: Path
    """Folder for weights, state and log."""
    init: str | None = None
    """Weights to start from: "shipped", a file or a name; without it from scratch."""
    textures: Path | None = None
    """Folder of photos for textures, beside the generated ones."""
    num_generated: int = 400
    """Generated textures."""
    model: Dust3rConfig = SMALL
    """Shape of a network from scratch."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    compile: bool = True
    """Compile the blocks on CUDA."""


def _device() -> torch.device:
    """This process's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _load_textures(config: TrainConfig, device: torch.device) -> UInt8[Tensor, "t texels 4"]:
    images = generated_textures(config.num_generated, seed=1)
    if config.textures is not None:
        images = torch.cat([images, photo_textures(config.textures)])
    return with_mipmaps(images.to(device))


def _build(config: TrainConfig, device: torch.device) -> Dust3r:
    torch.manual_seed(config.loop.seed)
    if config.init is None:
        return Dust3r(config.model).to(device)
    return Dust3r.from_pretrained(None if config.init == "shipped" else config.init).to(device)


def _compile_blocks(model: Dust3r) -> None:
    for block in [*model.enc_blocks, *model.dec_blocks, *model.dec_blocks2]:
        block.compile(dynamic=False)


def _resume(trainer: Trainer, output: Path) -> None:
    state, history = output / "state.pt", output / "history.json"
    refusal = InputError(f"{state} is not the state of a run of this model: choose another output folder")
    if not zipfile.is_zipfile(state):  # torch.load would take it for a file of its oldest format
        raise refusal
    try:
        trainer.load_state(load_state_file(state))
    except (RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise refusal from error
    if history.exists():
        trainer.history = json.loads(history.read_text())
    logger.info("Continuing after %.1f minutes and %.2f M pairs.", trainer.minutes_before, trainer.pairs_seen / 1e6)


def _save(trainer: Trainer, plain: Dust3r, output: Path) -> None:
    """Weights by way of `plain`, a model on the CPU that is not compiled; state and history."""
    plain.load_state_dict({k: v.cpu() for k, v in trainer.weights().items()} | {"mask_token": plain.mask_token})
    save_weights(plain, output / "weights.safetensors", {"pairs_seen": str(trainer.pairs_seen)})
    with replacing(output / "state.pt") as temporary:
        torch.save({k: v.cpu() for k, v in trainer.state().items()}, temporary)
    write_bytes(output / "history.json", json.dumps(trainer.history).encode())


def main(config: TrainConfig) -> None:
    """Trains, writing `weights.safetensors`, `state.pt` and `history.json` into the output folder."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, weights = _device(), config.output / "weights.safetensors"
    textures = _load_textures(config, device)
    model = _build(config, device)
    plain = Dust3r(config.model) if config.init is None else _build(config, torch.device("cpu"))
    if world_size > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    config.output.mkdir(parents=True, exist_ok=True)
    compiled = config.compile and device.type == "cuda"
    if compiled:
        _compile_blocks(model)
    loss = torch.compile(objective, dynamic=False) if compiled else objective
    trainer = Trainer(model, textures, config.loop, rank, world_size, loss)
    if (config.output / "state.pt").exists():
        _resume(trainer, config.output)
    trainer.train(lambda trainer: _save(trainer, plain, config.output), logger.info)
    if world_size > 1:
        torch.distributed.destroy_process_group()
    logger.info("Trained on %.2f M pairs; weights in %s.", trainer.pairs_seen / 1e6, weights)


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["train", *sys.argv[1:]]))
