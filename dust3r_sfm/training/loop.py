"""The training loop: fresh pairs at every step, both directions of a pair from one encoding.

One process a GPU. Gradients are averaged over the processes; forward and backward are one captured CUDA graph,
so that a step launches a handful of operations and the next batch is rendered without waiting for the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dust3r_sfm.training.batches import Source
from dust3r_sfm.training.config import LoopConfig, learning_rate
from dust3r_sfm.training.optimizer import Optimizer
from dust3r_sfm.training.step import REPORT, Engine, OverlappedStep, Step, make_steps, objective

ASK_SECONDS = 3.0
"""Between two looks at the first process's clock."""
Steps = dict[tuple[int, int], Step | OverlappedStep]


class Trainer:
    """A run of training in this process; `train` calls back at every checkpoint and measurement."""

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        config: LoopConfig,
        rank: int = 0,
        world_size: int = 1,
        objective: Callable = objective,
        started: float | None = None,
    ) -> None:
        """`started` is when the session began, on the monotonic clock: now, where not given."""
        self.model, self.config, self.rank, self.world_size = model, config, rank, world_size
        self.device = source.textures.device
        matcher = nn.Linear(model.enc_norm.weight.numel(), 128, bias=False).to(self.device)
        together = nn.ModuleDict({"model": model, "matcher": matcher})
        self.optimizer = Optimizer(together, muon=config.muon, weight_decay=config.weight_decay)
        if world_size > 1:
            torch.distributed.broadcast(self.optimizer.parameters, 0)
        self.optimizer.average.copy_(self.optimizer.parameters)
        self.engine = Engine(together, self.optimizer, source, config, objective)
        self.pairs_seen, self.minutes_before, self.is_over = 0, 0.0, False
        self.history: list[dict[str, float]] = []
        self.started = time.monotonic() if started is None else started
        self._restart_dice(0)

    def _restart_dice(self, round_: int) -> None:
        self.engine.restart_dice(self.config.seed + 1000 * self.rank + 1_000_003 * round_)

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

    def steps(self) -> list[Steps]:
        """By size, of the easy start (none where it is over) and of the rest."""
        c = self.config
        is_easy = self.minutes_before < c.easy_share * c.minutes
        easy = _both_ways(c.easy_heights, c.easy_width, c.portrait) if is_easy else []
        full = _both_ways(c.heights, c.width, c.portrait)
        made = make_steps(self.engine, [*easy, *(size for size in full if size not in easy)])
        return [{size: made[size] for size in sizes} for sizes in (easy, full)]

    def _choose(self, steps: list[Steps], progress: float) -> Step | OverlappedStep:
        c = self.config
        is_easy = progress < c.easy_share
        heights, width = (c.easy_heights, c.easy_width) if is_easy else (c.heights, c.width)
        height = heights[int(torch.randint(len(heights), (), generator=self.chooser))]
        upright = bool(torch.rand((), generator=self.chooser) < c.portrait)
        return steps[not is_easy][(width, height) if upright else (height, width)]

    def train(
        self,
        save: Callable[[Trainer], None],
        log: Callable[[str], None],
        measure: Callable[[Trainer], dict[str, float]] | None = None,
    ) -> None:
        """Runs until the time or the steps are over.

        On the first process `save` is called at every checkpoint, in the end with `is_over`; `measure` at the start,
        now and then and after the last checkpoint; the others wait for it with their next gradient.
        """
        c, steps, progress = self.config, self.steps(), _Progress(self, log)
        self.chooser = torch.Generator().manual_seed(c.seed + self.optimizer.step_count)  # the same on every process
        self._clock, self._asked_again, self._asked_after = [0.0, _minutes_since(self.started)], 0, 1
        save_timer, measure_timer = _Timer(c.save_minutes), _Timer(c.measure_minutes)
        is_first, offset, start = self.rank == 0, self.minutes_before, time.monotonic()
        if is_first and measure is not None:
            self._measure(measure, log)
        following = None
        for step in range(self.optimizer.step_count, c.max_steps):
            elapsed, session = self._agree(offset + _minutes_since(start), _minutes_since(self.started))
            self.minutes_before = elapsed
            if elapsed >= c.minutes or session >= c.session_minutes:
                break
            if following is None:
                following = self._choose(steps, elapsed / c.minutes)
                following.prepare()
            chosen, following = following, self._choose(steps, elapsed / c.minutes)
            chosen.fetch()
            following.prepare()
            report, norm = self._update(chosen, elapsed / c.minutes)
            self.pairs_seen += chosen.batch * self.world_size
            progress.add(report, norm)
            if is_first and (step + 1) % c.log_steps == 0:
                progress.log(elapsed)
            if is_first and measure is not None and measure_timer.rings():
                self._measure(measure, log)
            if is_first and save_timer.rings():
                save(self)
        self.is_over = True
        if is_first:
            save(self)
            if measure is not None:
                self._measure(measure, log)
                save(self)

    def _update(self, step: Step | OverlappedStep, progress: float) -> tuple[Tensor, Tensor]:
        """One step of all processes; what it reports, and the gradient's norm."""
        c, report = self.config, step()
        if self.world_size > 1:
            torch.distributed.all_reduce(self.optimizer.gradient, torch.distributed.ReduceOp.AVG)
        rate = learning_rate(c, self.optimizer.step_count, progress)
        return report, self.optimizer.step(rate, c.clip, c.average_decay)

    def _measure(self, measure: Callable[[Trainer], dict[str, float]], log: Callable[[str], None]) -> None:
        row = measure(self)
        self.history.append({"minutes": self.minutes_before, "pairs": self.pairs_seen, **row})
        log(f"{self.minutes_before:6.2f} min  " + "  ".join(f"{name} {value:.3f}" for name, value in row.items()))

    def _agree(self, elapsed: float, session: float) -> tuple[float, float]:
        """The first process's clocks, asked every few seconds, at most every 50 steps: all stop at the same step."""
        if self.world_size == 1:
            return elapsed, session
        if self._asked_again == 0:
            steps = min(50.0, max(1.0, ASK_SECONDS / 60 / max((session - self._clock[1]) / self._asked_after, 1e-9)))
            clock = torch.tensor([elapsed, session, steps], device=self.device, dtype=torch.float64)
            torch.distributed.broadcast(clock, 0)
            *self._clock, steps = clock.tolist()
            self._asked_again = self._asked_after = int(steps)
        self._asked_again -= 1
        return self._clock[0], self._clock[1]


class _Progress:
    """Means since the last line of the log, summed on the device."""

    def __init__(self, trainer: Trainer, log: Callable[[str], None]) -> None:
        self.trainer, self.write = trainer, log
        self.totals = torch.zeros(len(REPORT) + 1, device=trainer.device)
        self._restart()

    def _restart(self) -> None:
        self.totals.zero_()
        self.count, self.since, self.pairs = 0, time.monotonic(), self.trainer.pairs_seen

    def add(self, report: Tensor, norm: Tensor) -> None:
        self.totals += torch.cat([report, norm[None]])
        self.count += 1

    def log(self, elapsed: float) -> None:
        pairs, means = self.trainer.pairs_seen, (self.totals / self.count).tolist()
        speed = (pairs - self.pairs) / (time.monotonic() - self.since)
        row = {"minutes": elapsed, "pairs": pairs, "pairs_per_second": speed}
        row |= dict(zip((*REPORT, "gradient"), means, strict=True))
        self.trainer.history.append(row)
        self.write(
            f"{elapsed:6.2f} min {pairs / 1e6:7.3f} M pairs {speed:7.0f} pairs/s  error {means[0]:.4f} {means[1]:.4f}"
            f"  log C {means[2]:.3f}, apart {means[3]:.3f}  pose {means[4]:.3f}  matching {means[5]:.3f}"
            f"  |g| {means[6]:.3f}"
        )
        self._restart()


class _Timer:
    """Rings at most once in so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.last = minutes, time.monotonic()

    def rings(self) -> bool:
        if _minutes_since(self.last) < self.minutes:
            return False
        self.last = time.monotonic()
        return True


def _both_ways(heights: tuple[int, ...], width: int, portrait: float) -> list[tuple[int, int]]:
    """All (height, width) that may be drawn, in a fixed order."""
    sizes = [(height, width) for height in heights]
    if portrait:
        sizes += [size[::-1] for size in sizes]
    return list(dict.fromkeys(sizes if portrait < 1 else sizes[len(heights) :]))


def _minutes_since(start: float) -> float:
    return (time.monotonic() - start) / 60


def load_state_file(path: Path) -> dict[str, Tensor]:
    """A checkpoint of `Trainer.state`; tensors only."""
    return torch.load(path, map_location="cpu", weights_only=True)
