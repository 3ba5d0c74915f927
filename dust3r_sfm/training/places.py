"""Places seen from many sides, each photo taken and kept in its own way: procedural worlds, or flat photos."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dust3r_sfm.training import render as r
from dust3r_sfm.training.augment import augment
from dust3r_sfm.training.synthetic import _render_depth, auto_exposure, develop
from dust3r_sfm.training.viewpoints import sample_cameras
from dust3r_sfm.training.world import Dice, sample_world


def sample_places(
    dice: Dice, num_places: int, num_views: int, height: int, width: int, textures: UInt8[Tensor, "t texels 4"]
) -> Float[Tensor, "places views 3 h w"]:
    """Photos in [0, 1] of random worlds, each by `num_views` cameras of which every two in turn overlap.

    The changes that training makes to a photo are made twice, so that no colour can be relied on.
    """
    world = sample_world(dice, num_places, len(textures))

    def render_depth(primitives: Tensor, lights: Tensor, cameras: Tensor, h: int, w: int) -> Tensor:
        return _render_depth(primitives, lights, cameras, h, w, textures)

    pairs = [sample_cameras(dice, world, render_depth, height, width) for _ in range((num_views + 1) // 2)]
    cameras = torch.cat(pairs, dim=1)[:, :num_views]
    images = []
    for some in cameras.split(2, dim=1):  # the renderer's memory is that of two views
        color, _ = r.render(world.primitives, world.lights, some.contiguous(), textures, height, width, 1)
        images.append(develop(color, auto_exposure(color)).permute(0, 1, 4, 2, 3))
    return augment(dice, augment(dice, torch.cat(images, dim=1)))


def sample_flat_places(
    dice: Dice, photos: UInt8[Tensor, "places side side 3"], num_views: int, height: int, width: int
) -> Float[Tensor, "places views 3 h w"]:
    """Views in [0, 1] of photos as flat places: turned, enlarged, moved and seen from aside, each kept in its own way.

    They lack depth, and cost next to nothing: for machines on which worlds take too long to render.
    """
    count = len(photos) * num_views
    angle, zoom = dice.uniform(count, low=-0.3, high=0.3), dice.uniform(count, low=0.45, high=1.0)
    stretch, moved = dice.uniform(count, low=0.8, high=1.25), dice.uniform(2, count, low=-0.45, high=0.45)
    aside = dice.uniform(2, count, low=-0.35, high=0.35)
    cos, sin, one = zoom * angle.cos(), zoom * angle.sin(), torch.ones_like(zoom)
    rows = [[cos * stretch, -sin, moved[0]], [sin, cos / stretch, moved[1]], [aside[0], aside[1], one]]
    photo_from_view = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, device=dice.device) * height / width,
        torch.linspace(-1, 1, width, device=dice.device),
        indexing="ij",
    )
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1).flatten(0, 1) @ photo_from_view.mT
    grid = (points[..., :2] / points[..., 2:].clamp(min=0.2)).unflatten(1, (height, width))
    images = photos.permute(0, 3, 1, 2).float() / 255
    views = nn.functional.grid_sample(
        images.repeat_interleave(num_views, dim=0), grid, padding_mode="reflection", align_corners=False
    )
    views = views.clamp(0, 1).unflatten(0, (len(photos), num_views))
    return augment(dice, augment(dice, views))
