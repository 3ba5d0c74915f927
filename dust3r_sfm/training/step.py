"""One step's loss and gradient: by captured CUDA graphs where there is CUDA, so that no launch is waited for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dust3r_sfm.pairs import PairPrediction
from dust3r_sfm.training.batches import Batch, Source, make_batch
from dust3r_sfm.training.config import LoopConfig
from dust3r_sfm.training.losses import (
    confidence_loss,
    log_space_error,
    masked_mean,
    pose_error,
    regression_error,
    stack_prediction,
    token_matching_loss,
)
from dust3r_sfm.training.optimizer import Optimizer
from dust3r_sfm.training.world import Dice

REPORT = ("error0", "error1", "log_confidence", "log_confidence_apart", "pose", "matching")
"""What a step says: mean errors of view 0 and 1, mean log confidence of pairs and of photos of two worlds, the error of
the poses (0 where it does not count), and the matching loss."""


def objective(
    prediction: PairPrediction,
    truth: Float[Tensor, "d 2 h w 3"],
    valid: Bool[Tensor, "d 2 h w"],
    apart: Bool[Tensor, " d"],
    centers: Float[Tensor, "d 3"],
    alpha: float,
    pose: float = 0.0,
    log_space: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, " 5"]]:
    """The confidence-aware loss with `pose` times that of poses, and the first five of REPORT.

    Every pixel of photos of two worlds counts as one that is wrong by as much as the scene is far: no coordinates are
    learned there, only that the confidence is low.
    """
    predicted, confidence = stack_prediction(prediction)
    error = (log_space_error if log_space else regression_error)(predicted, truth, valid)
    alien = apart[:, None, None, None].expand_as(valid)
    known = valid & ~alien
    loss = confidence_loss(torch.where(alien, 1.0, error), confidence, valid | alien, alpha)
    poses = loss.new_zeros(())
    if pose:
        errors = pose_error(predicted, truth, valid, confidence, centers).sum(-1)
        poses = masked_mean(errors, ~apart & valid.flatten(1).any(1))
        loss = loss + pose * poses
    log_confidence = confidence.log()
    report = [masked_mean(error[:, k], known[:, k]) for k in (0, 1)]
    report += [masked_mean(log_confidence, where) for where in (known, alien)]
    return loss, torch.stack([*report, poses]).detach()


def _one_row(values: Tensor, dim: int) -> Tensor:
    return values.flatten(dim, dim + 1).unsqueeze(dim)


def pair_loss(
    model: nn.Module, matcher: nn.Module, batch: Batch, config: LoopConfig, objective: Callable = objective
) -> tuple[Float[Tensor, ""], Float[Tensor, " 6"]]:
    """The whole loss, both directions from one encoding; and REPORT."""
    b = len(batch.images)
    tokens = model.encode(batch.images.transpose(0, 1).flatten(0, 1))
    features0, features1 = tokens.features[:b], tokens.features[b:]
    first = dataclasses.replace(tokens, features=torch.cat([features0, features1]))
    second = dataclasses.replace(tokens, features=torch.cat([features1, features0]))
    prediction = model.decode(first, second)
    # as images of one row: what is compiled serves landscape and portrait alike
    maps = (getattr(prediction, field.name) for field in dataclasses.fields(prediction))
    prediction = PairPrediction(*(_one_row(values, 1) for values in maps))
    truth, valid = _one_row(batch.truth, 2), _one_row(batch.valid, 2)
    settings = config.confidence_alpha, config.pose, config.log_space
    loss, report = objective(prediction, truth, valid, batch.apart, batch.centers, *settings)
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


class Engine:
    """What all steps share: the network with its matcher, the optimizer, the sources, the dice; and graph memory."""

    def __init__(
        self, together: nn.ModuleDict, optimizer: Optimizer, source: Source, config: LoopConfig, objective: Callable
    ) -> None:
        self.together, self.optimizer, self.source, self.config = together, optimizer, source, config
        self.objective = objective
        self.cuda = source.textures.is_cuda
        # graphs are replayed one after the other, and what one leaves is read before the next: they share memory
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None
        self.restart_dice(config.seed)

    def restart_dice(self, seed: int) -> None:
        """Before any step is captured: graphs keep the generator."""
        self.dice = Dice(self.source.textures.device, seed)

    def make(self, size: tuple[int, int]) -> Batch:
        return make_batch(self.dice, self.config.batch_of(size), size, self.source, self.config)

    def learn(self, batch: Batch) -> Float[Tensor, " 6"]:
        """Fills the optimizer's gradient; returns REPORT."""
        with _tensor_float32(self.cuda):  # for the network alone: the truth is worth all its digits
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if self.cuda else nullcontext():
                loss, report = pair_loss(
                    self.together["model"], self.together["matcher"], batch, self.config, self.objective
                )
            loss.backward()
        self.optimizer.take_gradients()
        return report


def capture(run: Callable[[], object], pool: tuple, dice: Dice | None = None) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of `run`, after three runs to warm up, and what it returned: the place of later results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if dice is not None:
        graph.register_generator_state(dice.generator)
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return graph, result


class Step:
    """A fresh batch, forward and backward, for images of one size; one CUDA graph where there is CUDA."""

    def __init__(self, engine: Engine, size: tuple[int, int]) -> None:
        self.engine, self.size, self.batch = engine, size, engine.config.batch_of(size)
        self.graph = None
        if engine.cuda:
            self.graph, self.report = capture(self._run, engine.pool, engine.dice)

    def _run(self) -> Float[Tensor, " 6"]:
        return self.engine.learn(self.engine.make(self.size))

    def prepare(self) -> None:
        """Called one step ahead, after the step before has called `fetch`."""

    def fetch(self) -> None:
        """Called right before the step."""

    def __call__(self) -> Float[Tensor, " 6"]:
        """Fills the optimizer's gradient; the report is overwritten by the next call."""
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.report


class OverlappedStep:
    """As `Step`, but the batch is made by `prepare`, on CUDA on a stream of its own, while the last step still runs."""

    def __init__(self, engine: Engine, size: tuple[int, int], maker: Maker) -> None:
        self.engine, self.size, self.batch, self.maker = engine, size, engine.config.batch_of(size), maker
        self.graph = None
        if engine.cuda:
            self.made, self.taken = torch.cuda.Event(), torch.cuda.Event()
            self.slot, self.current = engine.make(size), engine.make(size)
            self.make_graph, _ = capture(self._make, maker.pool, engine.dice)
            self.graph, self.report = capture(lambda: engine.learn(self.current), engine.pool)

    def _make(self) -> None:
        self.slot.copy_from(self.engine.make(self.size))

    def prepare(self) -> None:
        """Starts to make a batch; the one before it has been fetched."""
        if self.graph is None:
            self.slot = self.engine.make(self.size)
            return
        with torch.cuda.stream(self.maker.stream):
            self.maker.stream.wait_event(self.taken)
            self.make_graph.replay()
            self.made.record()

    def fetch(self) -> None:
        """Takes what `prepare` made."""
        if self.graph is None:
            self.current = self.slot
            return
        torch.cuda.current_stream().wait_event(self.made)
        self.current.copy_from(self.slot)
        self.taken.record()

    def __call__(self) -> Float[Tensor, " 6"]:
        if self.graph is None:
            return self.engine.learn(self.current)
        self.graph.replay()
        return self.report


class Maker:
    """The stream that makes batches, and the memory of its graphs."""

    def __init__(self, cuda: bool) -> None:
        self.stream = torch.cuda.Stream() if cuda else None
        self.pool = torch.cuda.graph_pool_handle() if cuda else None


def make_steps(engine: Engine, sizes: list[tuple[int, int]]) -> dict[tuple[int, int], Step | OverlappedStep]:
    """A step for each size."""
    if not engine.config.overlap:
        return {size: Step(engine, size) for size in sizes}
    maker = Maker(engine.cuda)
    steps = {size: OverlappedStep(engine, size, maker) for size in sizes}
    if maker.stream is not None:
        maker.stream.wait_stream(torch.cuda.current_stream())
    return steps
