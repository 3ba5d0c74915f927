"""Training pairs out of the user's own scenes: photos with cameras and depth maps, cropped anew at every draw.

Pairs are chosen by overlap, measured through the depth maps as the share of a photo's pixels that the other one sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dust3r_sfm.depth_views import DepthView
from dust3r_sfm.training.synthetic import TrainingPairs, camera_rows
from dust3r_sfm.training.viewpoints import overlap
from dust3r_sfm.training.world import Dice, constant

LOW = 32
"""Long side of the small depth maps on which overlap is measured."""
OVERLAP = (0.1, 0.95)
"""Pairs of less share too little to learn from, of more no baseline."""
BINS = 8
"""Ranges of overlap that are drawn equally often."""
MIN_ZOOM = 0.55
"""A crop's side, as a share of the largest that fits."""


def pair_overlaps(views: Sequence[DepthView], device: torch.device | str = "cpu") -> Float[Tensor, "n n"]:
    """[i, j]: the share of view i's valid pixels that view j sees too, the smaller of both ways."""
    small = [_shrunk(view) for view in views]
    h, w = (max(depth.shape[side] for depth, _ in small) for side in (0, 1))
    depth = torch.stack([_padded(depth, (h, w)) for depth, _ in small]).to(device)
    K = torch.stack([K for _, K in small]).to(device)
    rows = camera_rows(K, torch.stack([view.cam_from_world.float() for view in views]).to(device))
    seen = [overlap(rows[i, None, None], depth[i, None, None], rows[None], depth[None])[0] for i in range(len(views))]
    seen = torch.stack(seen).cpu()
    return torch.minimum(seen, seen.T)


def _shrunk(view: DepthView) -> tuple[Float[Tensor, "h w"], Float[Tensor, "3 3"]]:
    """Depth at the middle of each cell of a small grid, and its intrinsics."""
    height, width = view.depth.shape
    scale = LOW / max(height, width)
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    y, x = ((torch.arange(n) + 0.5) / scale for n in (h, w))
    depth = view.depth[y.long().clamp(max=height - 1)][:, x.long().clamp(max=width - 1)]
    K = view.K.float().clone()
    K[:2] *= scale
    return depth.float(), K


def _padded(values: Tensor, size: tuple[int, int]) -> Tensor:
    """With zeros below and to the right."""
    h, w = values.shape[:2]
    out = values.new_zeros((*size, *values.shape[2:]))
    out[:h, :w] = values
    return out


def select_pairs(overlaps: Float[Tensor, "n n"]) -> tuple[Int[Tensor, "p 2"], Float[Tensor, " p"]]:
    """Pairs within OVERLAP, and how often to draw each: every range of overlap that occurs equally often."""
    chosen = ((overlaps >= OVERLAP[0]) & (overlaps <= OVERLAP[1])).triu(1).nonzero()
    share = overlaps[chosen[:, 0], chosen[:, 1]]
    bins = ((share - OVERLAP[0]) / (OVERLAP[1] - OVERLAP[0]) * BINS).long().clamp(0, BINS - 1)
    weights = 1 / bins.bincount(minlength=BINS)[bins].float()
    return chosen, weights / weights.sum().clamp(min=1e-9)


@dataclass(frozen=True, eq=False)
class ScenePairs:
    """All photos of the scenes on a device, padded to one size, and the pairs of them to draw."""

    images: UInt8[Tensor, "n 3 h w"]
    depth: Float[Tensor, "n h w"]
    sizes: Float[Tensor, "n 2"]
    """(width, height) of each photo."""
    K: Float[Tensor, "n 3 3"]
    cam_from_world: Float[Tensor, "n 4 4"]
    pairs: Int[Tensor, "p 2"]
    cumulative: Float[Tensor, " p"]
    """Chances of the pairs, summed up."""

    def sample(self, dice: Dice, batch: int, size: tuple[int, int]) -> TrainingPairs:
        """Random pairs in random order, each photo cropped to (height, width); without synchronisation."""
        drawn = torch.searchsorted(self.cumulative, dice.uniform(batch)).clamp(max=len(self.pairs) - 1)
        index = self.pairs[drawn]
        index = torch.where(dice.chance(0.5, batch, 1), index, index.flip(1)).flatten()
        corner, step = self._crops(dice, index, size)
        image, depth = _cut_image(self.images[index], corner, step, size), self._cut_depth(index, corner, step, size)
        K = self.K[index]
        focal = K.diagonal(dim1=1, dim2=2)[:, :2] / step[:, None]
        center = (K[:, :2, 2] - corner) / step[:, None]
        cut_K = torch.zeros_like(K)
        cut_K[:, 0, 0], cut_K[:, 1, 1], cut_K[:, 0, 2], cut_K[:, 1, 2] = *focal.T, *center.T
        cut_K[:, 2, 2] = 1.0
        both = (batch, 2)
        pose = self.cam_from_world[index].unflatten(0, both)
        return TrainingPairs(image.unflatten(0, both), depth.unflatten(0, both), cut_K.unflatten(0, both), pose)

    def _crops(
        self, dice: Dice, index: Int[Tensor, " v"], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "v 2"], Float[Tensor, " v"]]:
        """Upper left corners (x, y) of the crops, and how many pixels of a photo are one of its crop."""
        wanted = constant((float(size[1]), float(size[0])), index.device)
        largest = (self.sizes[index] / wanted).amin(-1)
        step = largest * dice.uniform(len(index), low=MIN_ZOOM)
        free = self.sizes[index] - step[:, None] * wanted
        return free * dice.uniform(len(index), 2), step

    def _cut_depth(
        self, index: Int[Tensor, " v"], corner: Float[Tensor, "v 2"], step: Float[Tensor, " v"], size: tuple[int, int]
    ) -> Float[Tensor, "v h w"]:
        """The nearest pixel's: no blending over edges."""
        x, y = _pixels(corner, step, size, (0.5, 0.5))
        height, width = self.depth.shape[1:]
        at = y.long().clamp(0, height - 1)[:, :, None] * width + x.long().clamp(0, width - 1)[:, None]
        return self.depth[index].flatten(1).gather(1, at.flatten(1)).unflatten(1, size)


def _pixels(
    corner: Float[Tensor, "v 2"], step: Float[Tensor, " v"], size: tuple[int, int], within: tuple[float, float]
) -> tuple[Float[Tensor, "v w"], Float[Tensor, "v h"]]:
    """x of a crop's columns and y of its rows in the photo, at a place (x, y) within each pixel."""
    columns = torch.arange(size[1], device=corner.device) + within[0]
    rows = torch.arange(size[0], device=corner.device) + within[1]
    return corner[:, :1] + step[:, None] * columns, corner[:, 1:] + step[:, None] * rows


def _cut_image(
    images: UInt8[Tensor, "v 3 height width"],
    corner: Float[Tensor, "v 2"],
    step: Float[Tensor, " v"],
    size: tuple[int, int],
) -> Float[Tensor, "v 3 h w"]:
    """Crops in [0, 1]: the mean of four bilinear samples a pixel, as photos are finer than their crops."""
    images, total = images.float() / 255, 0
    height, width = images.shape[-2:]
    for within in ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
        x, y = _pixels(corner, step, size, within)
        x, y = (2 * x / width - 1)[:, None].expand(-1, *size), (2 * y / height - 1)[:, :, None].expand(-1, *size)
        total = total + torch.nn.functional.grid_sample(
            images, torch.stack([x, y], -1), padding_mode="border", align_corners=False
        )
    return total / 4


def make_scene_pairs(scenes: Sequence[Sequence[DepthView]], device: torch.device | str) -> ScenePairs | None:
    """The pairs of all scenes; None where no two photos overlap as they should."""
    views, pairs, weights = [], [], []
    for scene in scenes:
        chosen, chances = select_pairs(pair_overlaps(scene, device))
        pairs.append(chosen + len(views))
        weights.append(chances * len(chosen) ** 0.5)  # larger scenes have more to give
        views += scene
    chances = torch.cat(weights)
    if not len(chances):
        return None
    size = tuple(max(view.depth.shape[side] for view in views) for side in (0, 1))
    return ScenePairs(
        images=torch.stack([_padded(view.image, size).permute(2, 0, 1) for view in views]).to(device),
        depth=torch.stack([_padded(_known(view.depth), size) for view in views]).to(device),
        sizes=torch.tensor([view.depth.shape[::-1] for view in views], dtype=torch.float32, device=device),
        K=torch.stack([view.K.float() for view in views]).to(device),
        cam_from_world=torch.stack([view.cam_from_world.float() for view in views]).to(device),
        pairs=torch.cat(pairs).to(device),
        cumulative=(chances / chances.sum()).cumsum(0).to(device),
    )


def _known(depth: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    usable: Bool[Tensor, "h w"] = depth.isfinite() & (depth > 0)
    return torch.where(usable, depth, 0.0).float()
