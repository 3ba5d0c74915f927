"""The training loop: fresh procedural pairs at every step, both directions of a pair from one encoding.

One process a GPU. Gradients are averaged over the processes; forward and backward are one captured CUDA graph,
so that a step launches a handful of operations and the next batch is rendered without waiting for the last.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from dust3r_sfm.pairs import PairPrediction
from dust3r_sfm.training.augment import augment
from dust3r_sfm.training.losses import (
    confidence_loss,
    masked_mean,
    regression_error,
    stack_prediction,
    token_matching_loss,
    token_targets,
)
from dust3r_sfm.training.optimizer import Optimizer
from dust3r_sfm.training.synthetic import sample_pairs
from dust3r_sfm.training.world import Dice


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What a run does; the learning rate warms up linearly, then falls along a half cosine over the given time."""

    minutes: float = 20.0
    """Length of the run, by the clock, from its first step."""
    max_steps: int = 10**9
    """The run ends after so many steps, those before a resume included, even before its time."""
    batch: int = 64
    """Pairs a process and step; each is trained in both directions."""
    height: int = 192
    """Of the images; all sizes are multiples of 16."""
    width: int = 256
    easy_share: float = 0.35
    """Share of the time, at the start, with smaller images and more of them."""
    easy_height: int = 128
    easy_width: int = 160
    portrait: float = 0.3
    """Share of the batches that are portrait: height and width exchanged."""
    panorama: float = 0.08
    """Share of the batches that are panoramas, two thirds as high and as many pixels; none at the easy start."""
    samples: int = 2
    """Colour samples a pixel of the renderer."""
    learning_rate: float = 1e-3
    final_share: float = 0.02
    """The learning rate at the end, as a share."""
    warmup_steps: int = 200
    muon: bool = True
    """Muon for the matrices of the blocks; else AdamW for all."""
    weight_decay: float = 0.05
    clip: float = 1.0
    """Largest norm of the gradient."""
    average_decay: float = 0.999
    """Of the moving average of the weights, which is what is saved."""
    matching: float = 0.1
    """Weight of the loss that makes encoded tokens of the same place alike; 0: without."""
    confidence_alpha: float = 0.2
    seed: int = 0
    save_minutes: float = 2.0
    """Time between checkpoints."""
    log_steps: int = 100


@dataclass(frozen=True, eq=False)
class Batch:
    """What a step reads."""

    images: Float[Tensor, "b 2 3 h w"]
    truth: Float[Tensor, "d 2 h w 3"]
    """Pointmaps of both directions (d = 2 b): camera 0's frame first, then camera 1's with the views exchanged."""
    valid: Bool[Tensor, "d 2 h w"]
    targets: Int[Tensor, "d n"]
    """The partner of each token of the first view among the second's."""


@torch.no_grad()
def make_batch(
    dice: Dice, batch: int, size: tuple[int, int], textures: UInt8[Tensor, "t texels 4"], samples: int
) -> Batch:
    """A fresh batch of pairs on the dice's device, without synchronisation; size is (height, width)."""
    pairs = sample_pairs(dice, batch, *size, textures, samples)
    forth, back, valid = pairs.pointmaps(0), pairs.pointmaps(1), pairs.valid
    targets = [
        token_targets(back[:, 0], pairs.K[:, 1], pairs.depth[:, 1], valid[:, 0]),
        token_targets(forth[:, 1], pairs.K[:, 0], pairs.depth[:, 0], valid[:, 1]),
    ]
    images = augment(dice, pairs.images) * 2 - 1
    truth = torch.cat([forth, back.flip(1)])
    return Batch(images, truth, torch.cat([valid, valid.flip(1)]), torch.cat(targets))


def objective(
    prediction: PairPrediction, truth: Float[Tensor, "d 2 h w 3"], valid: Bool[Tensor, "d 2 h w"], alpha: float
) -> tuple[Float[Tensor, ""], Float[Tensor, " 3"]]:
    """The confidence-aware loss; to report, the mean errors of view 0 and 1 and the mean log confidence."""
    predicted, confidence = stack_prediction(prediction)
    error = regression_error(predicted, truth, valid)
    report = [masked_mean(error[:, k], valid[:, k]) for k in (0, 1)]
    report = torch.stack([*report, masked_mean(confidence.log(), valid)]).detach()
    return confidence_loss(error, confidence, valid, alpha), report


def pair_loss(
    model: nn.Module, matcher: nn.Module, batch: Batch, config: LoopConfig, objective: Callable = objective
) -> tuple[Float[Tensor, ""], Float[Tensor, " 4"]]:
    """The whole loss; to report, what `objective` does and the matching loss."""
    b = len(batch.images)
    tokens = model.encode(batch.images.transpose(0, 1).flatten(0, 1))
    features0, features1 = tokens.features[:b], tokens.features[b:]
    first = dataclasses.replace(tokens, features=torch.cat([features0, features1]))
    second = dataclasses.replace(tokens, features=torch.cat([features1, features0]))
    loss, report = objective(model.decode(first, second), batch.truth, batch.valid, config.confidence_alpha)
    matching = loss.new_zeros(())
    if config.matching:
        matching = token_matching_loss(matcher(first.features), matcher(second.features), batch.targets)
        loss = loss + config.matching * matching
    return loss, torch.cat([report, matching.detach()[None]])


@contextmanager
def _tensor_float32(enabled: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _Step:
    """A fresh batch, forward and backward, for images of one size; one CUDA graph where there is CUDA."""

    def __init__(self, trainer: Trainer, size: tuple[int, int]) -> None:
        self.trainer, self.size, self.graph = trainer, size, None
        c = trainer.config
        self.batch = c.batch * c.height * c.width // (size[0] * size[1])
        if trainer.textures.is_cuda:
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.trainer.dice.generator)
        with torch.cuda.graph(self.graph):
            self.report = self._run()

    def _run(self) -> Float[Tensor, " 4"]:
        t = self.trainer
        batch = make_batch(t.dice, self.batch, self.size, t.textures, t.config.samples)
        cuda = t.textures.is_cuda
        with _tensor_float32(cuda):  # for the network alone: the truth is worth all its digits
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if cuda else nullcontext():
                loss, report = pair_loss(t.together["model"], t.together["matcher"], batch, t.config, t.objective)
            loss.backward()
        t.optimizer.take_gradients()
        return report

    def __call__(self) -> Float[Tensor, " 4"]:
        """Fills the optimizer's gradient; the report is overwritten by the next call."""
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.report


def learning_rate(config: LoopConfig, step: int, progress: float) -> float:
    """Linear warm-up by steps, half a cosine by the share of the time that has passed."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return (
        config.learning_rate
        * min(1.0, (step + 1) / config.warmup_steps)
        * (config.final_share + (1 - config.final_share) * cosine)
    )


class Trainer:
    """A run of training in this process; `train` calls back with the averaged weights at every checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        textures: UInt8[Tensor, "t texels 4"],
        config: LoopConfig,
        rank: int = 0,
        world_size: int = 1,
        objective: Callable = objective,
    ) -> None:
        self.objective = objective
        self.model, self.textures, self.config, self.rank, self.world_size = model, textures, config, rank, world_size
        device = textures.device
        dim = model.enc_norm.weight.numel()
        self.together = nn.ModuleDict({"model": model, "matcher": nn.Linear(dim, 128, bias=False).to(device)})
        self.optimizer = Optimizer(self.together, muon=config.muon, weight_decay=config.weight_decay)
        if world_size > 1:
            torch.distributed.broadcast(self.optimizer.parameters, 0)
        self.optimizer.average.copy_(self.optimizer.parameters)
        self.pairs_seen, self.minutes_before = 0, 0.0
        self.history: list[dict[str, float]] = []
        self._restart_dice(0)

    def _restart_dice(self, round_: int) -> None:
        self.dice = Dice(self.textures.device, self.config.seed + 1000 * self.rank + 1_000_003 * round_)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights of the model, by its own parameters' names."""
        weights = self.optimizer.averaged_weights()
        return {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}

    def state(self) -> dict[str, Tensor]:
        """Tensors with which a new process continues this run."""
        numbers = torch.tensor([self.pairs_seen, self.minutes_before], dtype=torch.float64)
        return self.optimizer.state() | {"run": numbers}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.optimizer.load_state(state)
        self.pairs_seen, self.minutes_before = int(state["run"][0]), float(state["run"][1])
        self._restart_dice(self.pairs_seen)  # not the same worlds again

    def steps(self) -> list[list[_Step]]:
        """Landscape and portrait, of the easy start and of the rest, which has panoramas too."""
        c = self.config
        easy, full = (c.easy_height, c.easy_width), (c.height, c.width)
        wide = (round(c.height / 24) * 16, round(c.width * 1.5 / 16) * 16)
        sizes = [[easy, easy[::-1]], [full, full[::-1], *([wide] if c.panorama else [])]]
        return [[_Step(self, size) for size in stage] for stage in sizes]

    def _choose(self, steps: list[list[_Step]], progress: float) -> _Step:
        stage, draw = steps[progress >= self.config.easy_share], torch.rand((), generator=self.chooser)
        if draw < self.config.portrait:
            return stage[1]
        return stage[-1] if len(stage) > 2 and draw < self.config.portrait + self.config.panorama else stage[0]

    def train(self, save: Callable[[Trainer], None], log: Callable[[str], None]) -> None:
        """Runs until the time or the steps are over; `save` is called at every checkpoint on the first process."""
        c, steps = self.config, self.steps()
        self.chooser = torch.Generator().manual_seed(c.seed)  # the same on every process
        self._clock: float | None = None
        start = last_save = last_log = time.monotonic()
        offset, totals, count = self.minutes_before, torch.zeros(5, device=self.textures.device), 0
        logged = self.pairs_seen
        for step in range(self.optimizer.step_count, c.max_steps):
            elapsed = self.minutes_before = self._agree(offset + (time.monotonic() - start) / 60, step)
            if elapsed >= c.minutes:
                break
            chosen = self._choose(steps, elapsed / c.minutes)
            report = chosen()
            if self.world_size > 1:
                torch.distributed.all_reduce(self.optimizer.gradient, torch.distributed.ReduceOp.AVG)
            norm = self.optimizer.step(
                learning_rate(c, self.optimizer.step_count, elapsed / c.minutes), c.clip, c.average_decay
            )
            totals += torch.cat([report, norm[None]])
            count += 1
            self.pairs_seen += chosen.batch * self.world_size
            if self.rank == 0 and (step + 1) % c.log_steps == 0:
                now = time.monotonic()
                self._log(log, (totals / count).tolist(), (self.pairs_seen - logged) / (now - last_log), elapsed)
                totals.zero_()
                count, last_log, logged = 0, now, self.pairs_seen
            if self.rank == 0 and time.monotonic() - last_save > 60 * c.save_minutes:
                save(self)
                last_save = time.monotonic()
        if self.rank == 0:
            save(self)

    def _agree(self, elapsed: float, step: int) -> float:
        """The first process's clock, asked every 50 steps: all stop at the same step."""
        if self.world_size == 1:
            return elapsed
        if self._clock is None or step % 50 == 0:
            clock = torch.tensor([elapsed], device=self.textures.device, dtype=torch.float64)
            torch.distributed.broadcast(clock, 0)
            self._clock = float(clock)
        return self._clock

    def _log(self, log: Callable[[str], None], means: list[float], speed: float, elapsed: float) -> None:
        names = ("error0", "error1", "log_confidence", "matching", "gradient")
        row = {
            "minutes": elapsed,
            "pairs": self.pairs_seen,
            "pairs_per_second": speed,
            **dict(zip(names, means, strict=True)),
        }
        self.history.append(row)
        log(
            f"{elapsed:6.2f} min {self.pairs_seen / 1e6:7.3f} M pairs {speed:7.0f} pairs/s"
            f"  error {means[0]:.4f} {means[1]:.4f}  log C {means[2]:.3f}  matching {means[3]:.3f}  |g| {means[4]:.3f}"
        )


def load_state_file(path: Path) -> dict[str, Tensor]:
    """A checkpoint of `Trainer.state`; tensors only."""
    return torch.load(path, map_location="cpu", weights_only=True)
