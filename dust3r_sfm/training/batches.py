"""What a step learns from: fresh procedural pairs, pairs of the user's scenes, and photos of two worlds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dust3r_sfm.training.augment import apply_changes, augment
from dust3r_sfm.training.config import LoopConfig
from dust3r_sfm.training.datasets import ScenePairs
from dust3r_sfm.training.losses import token_targets
from dust3r_sfm.training.synthetic import TrainingPairs, rigid_inverse, sample_pairs
from dust3r_sfm.training.world import Dice


@dataclass(frozen=True, eq=False)
class Batch:
    """What a step reads."""

    images: Float[Tensor, "b 2 3 h w"]
    truth: Float[Tensor, "d 2 h w 3"]
    """Pointmaps of both directions (d = 2 b): camera 0's frame first, then camera 1's with the views exchanged."""
    valid: Bool[Tensor, "d 2 h w"]
    targets: Int[Tensor, "d n"]
    """The partner of each token of the first view among the second's."""
    apart: Bool[Tensor, " d"]
    """Photos of two worlds: there is nothing to learn but that."""
    centers: Float[Tensor, "d 3"]
    """The second camera's place in the first one's frame."""

    def copy_from(self, other: Batch) -> None:
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


@dataclass(frozen=True, eq=False)
class Source:
    """Where pairs come from."""

    textures: UInt8[Tensor, "t texels 4"]
    scenes: ScenePairs | None = None
    """The user's own."""
    apply: Callable[..., Tensor] = apply_changes
    """`augment`'s arithmetic, perhaps compiled."""


@torch.no_grad()
def make_batch(dice: Dice, batch: int, size: tuple[int, int], source: Source, config: LoopConfig) -> Batch:
    """A fresh batch of pairs on the dice's device, without synchronisation; size is (height, width)."""
    num_real = max(1, round(config.scene_share * batch)) if source.scenes and config.scene_share else 0
    num_fresh, parts = batch - num_real, []
    if num_fresh:
        shares = {"wide_share": config.wide_share, "courts": config.courts, "one_make": config.one_make}
        fresh = sample_pairs(dice, num_fresh, *size, source.textures, config.samples, **shares)
        parts.append(fresh)
    if num_real:
        parts.append(source.scenes.sample(dice, num_real, size))
    pairs = parts[0] if len(parts) == 1 else _joined(*parts)
    num_apart = round(config.apart_share * num_fresh) if num_fresh > 1 else 0
    return _batch(dice, pairs, source.apply, num_fresh, num_apart)


def _joined(a: TrainingPairs, b: TrainingPairs) -> TrainingPairs:
    names = ("images", "depth", "K", "cam_from_world")
    return TrainingPairs(*(torch.cat([getattr(a, name), getattr(b, name)]) for name in names))


def _batch(dice: Dice, pairs: TrainingPairs, apply: Callable[..., Tensor], num_fresh: int, num_apart: int) -> Batch:
    """The first `num_apart` of the `num_fresh` first pairs get the second photo of another of these."""
    forth, back, valid = pairs.pointmaps(0), pairs.pointmaps(1), pairs.valid
    targets = torch.cat(
        [
            token_targets(back[:, 0], pairs.K[:, 1], pairs.depth[:, 1], valid[:, 0]),
            token_targets(forth[:, 1], pairs.K[:, 0], pairs.depth[:, 0], valid[:, 1]),
        ]
    )
    images = augment(dice, pairs.images, apply) * 2 - 1
    if num_apart:
        others = images[:num_fresh, 1].roll(-1, 0)[:num_apart]
        second = torch.cat([others, images[num_apart:, 1]])
        images = torch.stack([images[:, 0], second], 1)
    apart = torch.arange(len(images), device=images.device).repeat(2) < num_apart
    targets = targets.masked_fill(apart[:, None], -100)
    truth, valid = torch.cat([forth, back.flip(1)]), torch.cat([valid, valid.flip(1)])
    cam0_from_cam1 = pairs.cam_from_world[:, 0] @ rigid_inverse(pairs.cam_from_world[:, 1])
    centers = torch.cat([cam0_from_cam1[:, :3, 3], rigid_inverse(cam0_from_cam1)[:, :3, 3]])
    return Batch(images, truth, valid, targets, apart, centers)
