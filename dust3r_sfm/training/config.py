"""What a run of training does, and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What a run does.

    The learning rate warms up linearly, stays for `constant_share` of the time, none where not given, and falls along a
    half cosine until the time is over. Repeated runs of limited time, each from the last weights, gained only while it
    fell (NOTES.md).
    """

    minutes: float = 20.0
    """Length of the run, by the clock, from its first step."""
    session_minutes: float = math.inf
    """This process ends after so many minutes from its start, with all saved; the same command continues the run."""
    max_steps: int = 10**9
    """The run ends after so many steps, those before a resume included, even before its time."""
    batch: int = 64
    """Pairs a process and step, at width x the first of heights; other sizes come with about as many pixels."""
    width: int = 256
    """Long side of the images; all sizes are multiples of 16."""
    heights: tuple[int, ...] = (192, 256, 144)
    """Short sides: each batch draws one. One that stands there twice is drawn twice as often."""
    easy_share: float = 0.35
    """Share of the time, at the start, with smaller images and more of them."""
    easy_width: int = 160
    easy_heights: tuple[int, ...] = (128,)
    portrait: float = 0.3
    """Share of the batches that are portrait: height and width exchanged."""
    samples: int = 2
    """Colour samples a pixel of the renderer."""
    wide_share: float = 0.0
    """Share of the procedural pairs whose cameras stand as far apart as the overlap allows."""
    courts: float = 0.3
    """Share of the worlds that are courts, with facades of portals and windows."""
    one_make: float = 0.35
    """Share of the worlds in which hardly a colour tells one thing from the next, as where all is of one stone."""
    apart_share: float = 0.0
    """Share of the procedural pairs whose photos are of two worlds, to teach low confidence."""
    scene_share: float = 0.5
    """Share of the pairs that come from the user's scenes, where there are some."""
    learning_rate: float = 1e-3
    constant_share: float = 0.0
    """Share of the time before the learning rate begins to fall."""
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
    log_space: bool = False
    """Distances by their logarithm in the loss, so that a far background does not outweigh what is near."""
    pose: float = 0.0
    """Weight of the loss on where the predicted points put the cameras; 0: without."""
    confidence_alpha: float = 0.2
    seed: int = 0
    save_minutes: float = 2.0
    """Time between checkpoints."""
    measure_minutes: float = 3.0
    """Time between measurements on the dev pairs, where there are some."""
    log_steps: int = 100
    overlap: bool = False
    """On CUDA, make the next batch on a stream of its own while the network learns from the last."""

    def __post_init__(self) -> None:
        for name in ("heights", "easy_heights"):
            sides = (getattr(self, name.replace("heights", "width")), *getattr(self, name))
            if len(sides) < 2 or any(side < 16 or side % 16 for side in sides):
                raise ValueError(f"{name} and their width must be multiples of 16, at least one height, got {sides}")
        for name in (
            "easy_share",
            "portrait",
            "wide_share",
            "courts",
            "one_make",
            "apart_share",
            "scene_share",
            "constant_share",
            "final_share",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")

    def batch_of(self, size: tuple[int, int]) -> int:
        """Pairs of (height, width) a step: about constant pixels, so constant tokens and memory."""
        return max(1, self.batch * self.heights[0] * self.width // (size[0] * size[1]))


def learning_rate(config: LoopConfig, step: int, progress: float) -> float:
    """Linear warm-up by steps; then by the share of the time that has passed: constant, then half a cosine."""
    falling = (progress - config.constant_share) / max(1 - config.constant_share, 1e-9)
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(falling, 0.0), 1.0)))
    return (
        config.learning_rate
        * min(1.0, (step + 1) / config.warmup_steps)
        * (config.final_share + (1 - config.final_share) * cosine)
    )
