"""Trains the network on procedural pairs and the user's own scenes: `dust3r-sfm train`, or one process a GPU with

    torchrun --standalone --nproc_per_node=4 -m dust3r_sfm.train --config small_256 --output run --textures photos

The averaged weights are written to `weights.safetensors` every few minutes, and the whole state to `state.pt`:
the same command continues an interrupted run, `--init` starts a new one from given weights.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import pickle
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import replacing, write_bytes, writing
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.models.stem import read_xfeat
from dust3r_sfm.training.augment import apply_changes
from dust3r_sfm.training.batches import Source
from dust3r_sfm.training.config import LoopConfig
from dust3r_sfm.training.datasets import ScenePairs, make_scene_pairs
from dust3r_sfm.training.loop import Trainer, load_state_file
from dust3r_sfm.training.render import load_kernel
from dust3r_sfm.training.stage_files import with_stage
from dust3r_sfm.training.step import objective
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
"""The shipped model's shape, but for XFeat's features, which `xfeat` adds."""
TEXTURE_BLOCK = 20
"""Textures of one seed, by one thread."""
SCENE_MARGIN = 1.5
"""Photos of scenes are kept so much larger than they are trained on, for crops."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run of training."""

    output: Path = Path("run")
    """Folder for weights, state and history."""
    config: str | None = None
    """Stage whose settings become the defaults shown here: small_256, large_512, dpt_512, or a JSON file."""
    init: str | None = None
    """Weights to start from: "shipped", a file or a name; without it from scratch."""
    reshape: bool = False
    """Start a network of `model`'s shape, with all that fits by name from `init`; else init's own shape counts."""
    xfeat: Path | None = None
    """XFeat's published checkpoint (xfeat.pt): let the network see its frozen features too, beside its own patches."""
    textures: Path | None = None
    """Folder of photos for textures, beside the generated ones."""
    num_generated: int = 160
    """Generated textures."""
    scenes: tuple[Path, ...] = ()
    """Folders of your own photos with poses and depth to train on too: a cameras.json with depth maps, TUM's files, or
    COLMAP's dense workspace."""
    dev_scenes: Path | None = None
    """Folder of scenes and fixed pairs, as evaluate-pairs takes it, to measure on while training."""
    model: Dust3rConfig = SMALL
    """Shape of a network from scratch."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    compile: bool = True
    """Compile the blocks on CUDA."""
    compile_all: bool = False
    """Compile the heads' outputs and the changes of the photos too."""
    bf16_residual: bool = False
    """Keep the residual stream in bfloat16 where the blocks are computed in it."""


def configured(arguments: Sequence[str]) -> Callable[..., None]:
    """`main`, with the defaults of the stage that `--config` names in the arguments."""
    stage = None
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, value = argument.partition("=")
        stage = argument if before == "--config" else value if name == "--config" and equals else stage
    if stage is None:
        return main
    default = with_stage(TrainConfig(config=stage), stage)

    def run(config: TrainConfig = default) -> None:
        main(config)

    run.__doc__ = main.__doc__
    return run


def main(config: TrainConfig) -> None:
    """Trains, writing `weights.safetensors`, `state.pt` and `history.json` into the output folder."""
    started = time.monotonic()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with writing(config.output, is_folder=True) if rank == 0 else nullcontext():
        _train(config, rank, world_size, started)


def _train(config: TrainConfig, rank: int, world_size: int, started: float) -> None:
    device, weights = _device(), config.output / "weights.safetensors"
    loading = ThreadPoolExecutor(4)  # what takes its time runs side by side
    textures, scenes = loading.submit(_load_textures, config), loading.submit(_load_scenes, config, device)
    kernel = loading.submit(_build_kernel, device)
    plain = _build(config)
    judge = _Judge(config.dev_scenes, plain, device, loading) if config.dev_scenes and rank == 0 else None
    model = _build(config).to(device)
    source = Source(with_mipmaps(textures.result().to(device)), scenes.result())
    kernel.result()
    if judge is not None:
        judge.dev_pairs.result()
    loading.shutdown()
    if world_size > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    config.output.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(config, model, source, (rank, world_size), started)
    if (config.output / "state.pt").exists():
        _resume(trainer, config.output)
    with _Saver(plain, config.output) as save:
        trainer.train(save, logger.info, judge)
    if world_size > 1:
        torch.distributed.destroy_process_group()
    logger.info("Trained on %.2f M pairs; weights in %s.", trainer.pairs_seen / 1e6, weights)


def make_trainer(config: TrainConfig, model: Dust3r, source: Source, place: tuple[int, int], started: float) -> Trainer:
    """Of a model on its device; `place` is this process's rank and how many there are."""
    model.residual_in_bfloat16 = config.bf16_residual
    loss = objective
    if config.compile and source.textures.is_cuda:
        torch._dynamo.config.recompile_limit = 64  # one for each size of images
        _compile_blocks(model)
        loss = torch.compile(objective, dynamic=False)
        if config.compile_all:
            model._predict = torch.compile(model._predict, dynamic=False)
            source = Source(source.textures, source.scenes, torch.compile(apply_changes, dynamic=False))
    return Trainer(model, source, config.loop, *place, loss, started)


def _device() -> torch.device:
    """This process's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _build_kernel(device: torch.device) -> None:
    """Builds the renderer, before it is asked for."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
        load_kernel("cuda")


def _load_textures(config: TrainConfig) -> UInt8[Tensor, "t 256 256 3"]:
    counts = [min(TEXTURE_BLOCK, config.num_generated - k) for k in range(0, config.num_generated, TEXTURE_BLOCK)]
    with ThreadPoolExecutor() as pool:  # one after the other they would take longest of all at the start
        textures = [*pool.map(generated_textures, counts, range(1, 1 + len(counts)))]
    textures += [] if config.textures is None else [photo_textures(config.textures)]
    if not textures:
        raise InputError("there are no textures: expected num_generated above 0, or a folder of photos")
    return torch.cat(textures)


def _load_scenes(config: TrainConfig, device: torch.device) -> ScenePairs | None:
    if not config.scenes:
        return None
    from dust3r_sfm.formats.depth_scenes import read_depth_scene

    long_side = round(config.loop.width * SCENE_MARGIN)
    scenes = [read_depth_scene(folder, long_side) for folder in config.scenes]
    pairs = make_scene_pairs(scenes, device)
    if pairs is None:
        raise InputError(
            f"no two of the {sum(map(len, scenes))} photos of {', '.join(map(str, config.scenes))} see enough of the "
            f"same: expected pairs that share a tenth of their pixels or more"
        )
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.DEBUG
    logger.log(level, "%d pairs of %d photos of %d scenes.", len(pairs.pairs), len(pairs.images), len(scenes))
    return pairs


def _build(config: TrainConfig) -> Dust3r:
    """The network with its first weights, on the CPU."""
    torch.manual_seed(config.loop.seed)
    if config.init is None:
        model = Dust3r(config.model)
        if model.stem is not None and config.xfeat is None:
            raise InputError("a new network that is to see XFeat's features needs them: give --xfeat, or --init")
    else:
        given = Dust3r.from_pretrained(None if config.init == "shipped" else config.init)
        given.name = given.name.removeprefix("shipped ")  # they will no longer be
        shape = dataclasses.replace(config.model, stem=given.config.stem)
        model = _reshaped(given, shape) if config.reshape else given
    return model if config.xfeat is None else _with_xfeat(model, config.xfeat)


def _with_xfeat(model: Dust3r, path: Path) -> Dust3r:
    """The same with XFeat's features, which change nothing before they are trained on."""
    weights = read_xfeat(path)
    if model.stem is None:
        model = _reshaped(model, dataclasses.replace(model.config, stem="xfeat"))
    model.stem.xfeat.load_state_dict(weights)
    return model


def _reshaped(given: Dust3r, shape: Dust3rConfig) -> Dust3r:
    """A network of another shape with all weights of the given one that fit by name and size; the rest is new."""
    model = Dust3r(shape)
    model.name, model.licence = given.name, given.licence
    own = model.state_dict()
    fitting = {k: x for k, x in given.state_dict().items() if k in own and own[k].shape == x.shape}
    model.load_state_dict(own | fitting)
    new = sorted({name.split(".")[0] for name in own.keys() - fitting.keys()})
    if "patch_embed" in new or "enc_blocks" in new or "dec_blocks" in new:
        raise InputError(f"the weights to start from do not fit the model's shape in {', '.join(new)}")
    logger.info("Carried over %d of %d weights; new: %s.", len(fitting), len(own), ", ".join(new) or "nothing")
    return model


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


class _Saver:
    """Writes weights, by way of `plain`, a model on the CPU that is not compiled, state and history, in a thread.

    A checkpoint is left out while the last one is still being written, as on a slow disk: the run does not wait for it,
    but at its end.
    """

    def __init__(self, plain: Dust3r, output: Path) -> None:
        self.plain, self.output, self.thread = plain, output, ThreadPoolExecutor(1)
        self.last: Future | None = None

    def __enter__(self) -> _Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()
        if self.last is not None:
            self.last.result()

    def __call__(self, trainer: Trainer) -> None:
        if self.last is not None:
            if not (trainer.is_over or self.last.done()):
                return
            self.last.result()
        weights = {k: v.cpu() for k, v in trainer.weights().items()}
        state = {k: v.to("cpu", copy=True) for k, v in trainer.state().items()}
        self.last = self.thread.submit(self._write, weights, state, list(trainer.history), trainer.pairs_seen)

    def _write(self, weights: dict[str, Tensor], state: dict[str, Tensor], history: list, pairs_seen: int) -> None:
        self.plain.load_state_dict(self.plain.state_dict() | weights)
        save_weights(self.plain, self.output / "weights.safetensors", {"pairs_seen": str(pairs_seen)})
        with replacing(self.output / "state.pt") as temporary:
            torch.save(state, temporary)
        write_bytes(self.output / "history.json", json.dumps(history).encode())


class _Judge:
    """Measures the averaged weights on fixed pairs of photos, by a network of its own that is not compiled."""

    def __init__(self, dev_scenes: Path, plain: Dust3r, device: torch.device, loading: ThreadPoolExecutor) -> None:
        try:
            from dust3r_sfm import evaluate_pairs
        except ImportError as error:
            raise InputError(
                f"measuring on --dev_scenes needs {error.name}: install it, or leave the option"
            ) from error
        c = plain.config
        self.stage, self.device = evaluate_pairs, device
        self.model = copy.deepcopy(plain).to(device)  # with what is frozen in it, which the trainer's weights lack
        self.dev_pairs = loading.submit(evaluate_pairs.load_dev_pairs, dev_scenes, c.image_size, c.square_ok)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        self.model.load_state_dict(self.model.state_dict() | trainer.weights())
        report = self.stage.evaluate_pairs(self.model, self.dev_pairs.result(), self.device, batch_size=32)
        return report.figures()


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["train", *sys.argv[1:]]))
