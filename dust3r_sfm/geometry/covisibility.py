"""Which cameras see the same, from nothing but where they stand and look."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.geometry.transforms import inverse

MIN_AXIS_ANGLE_DEG = 5.0  # axes that are closer to parallel meet nowhere in particular
BASELINES_TO_PARALLEL_SCENES = 10.0
GRID = 12


def focus_depths(cam_from_world: Float[Tensor, "n 4 4"]) -> Float[Tensor, " n"]:
    """How far along its optical axis each camera's subject is, in units of the world.

    The median depth at which its axis passes closest to those of the others, in front of both; for a camera whose axis
    no other's comes to, the others' median; where all look the same way, ten times the median distance to the nearest.
    """
    world_from_cam = inverse(cam_from_world)
    centers, axes = world_from_cam[:, :3, 3], world_from_cam[:, :3, 2]
    offsets = centers[None] - centers[:, None]  # from i to j
    cosines = axes @ axes.mT
    along_i, along_j = (offsets * axes[:, None]).sum(-1), (offsets * axes[None]).sum(-1)
    sin2 = 1 - cosines**2
    # the points of two lines that are closest: c_i + t_i a_i and c_j + t_j a_j
    t_i = (along_i - cosines * along_j) / sin2
    t_j = (cosines * along_i - along_j) / sin2
    meets = (sin2 > math.sin(math.radians(MIN_AXIS_ANGLE_DEG)) ** 2) & (t_i > 0) & (t_j > 0)
    depths = torch.where(meets, t_i, torch.nan).nanmedian(dim=1).values
    if depths.isnan().all():
        distances = torch.linalg.vector_norm(offsets, dim=-1).fill_diagonal_(torch.inf)
        return (BASELINES_TO_PARALLEL_SCENES * distances.min(dim=1).values.median()).expand(len(centers)).clone()
    return torch.where(depths.isnan(), depths.nanmedian(), depths)


def frustum_overlaps(
    K: Float[Tensor, "n 3 3"],
    sizes: Float[Tensor, "n 2"],
    cam_from_world: Float[Tensor, "n 4 4"],
    depths: Float[Tensor, " n"],
    max_angle_deg: float = 60.0,
) -> Float[Tensor, "n n"]:
    """Share of camera i's image, at one depth for all of it, that camera j sees from less than an angle aside.

    `sizes` are (width, height) in the pixels of K. Nothing is known of what stands between.
    """
    steps = (torch.arange(GRID, dtype=K.dtype) + 0.5) / GRID
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    pixels = torch.stack([x, y], dim=-1).reshape(1, -1, 2) * sizes[:, None]
    rays = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1) @ torch.linalg.inv(K).mT
    world_from_cam = inverse(cam_from_world)
    points = rays * depths[:, None, None] @ world_from_cam[:, :3, :3].mT + world_from_cam[:, None, :3, 3]
    in_cam = points[:, None] @ cam_from_world[None, :, :3, :3].mT + cam_from_world[None, :, None, :3, 3]  # i j p 3
    projected = in_cam @ K.mT
    at = projected[..., :2] / projected[..., 2:]
    inside = ((at >= 0) & (at < sizes[None, :, None])).all(dim=-1) & (in_cam[..., 2] > 0)
    to_points = points[:, None] - world_from_cam[None, :, None, :3, 3]
    cosines = torch.nn.functional.cosine_similarity(
        to_points, points[:, None] - world_from_cam[:, None, None, :3, 3], -1
    )
    return (inside & (cosines > math.cos(math.radians(max_angle_deg)))).to(K.dtype).mean(dim=-1)
