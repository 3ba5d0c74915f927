"""Training pairs, and whole scenes of photos, out of procedural worlds: exact pointmaps, intrinsics and poses."""

from __future__ import annotations

import math
from ctypes import CDLL
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from dust3r_sfm.training import render as r
from dust3r_sfm.training.textures import generated_textures, with_mipmaps
from dust3r_sfm.training.viewpoints import cameras_from, look_at, overlap, sample_cameras
from dust3r_sfm.training.world import COURTS, TABLE, Dice, World, constant, sample_world


@dataclass(frozen=True, eq=False)
class TrainingPairs:
    """A batch of two views a scene with their ground truth."""

    images: Float[Tensor, "b 2 3 h w"]
    """In [0, 1]."""
    depth: Float[Tensor, "b 2 h w"]
    """z in the camera; 0 where nothing is."""
    K: Float[Tensor, "b 2 3 3"]
    cam_from_world: Float[Tensor, "b 2 4 4"]

    @property
    def valid(self) -> Bool[Tensor, "b 2 h w"]:
        return self.depth > 0

    def pointmaps(self, frame: int) -> Float[Tensor, "b 2 h w 3"]:
        """Both views' points in the frame of camera 0 or 1."""
        b, _, h, w = self.depth.shape
        y, x = torch.meshgrid(
            torch.arange(h, device=self.depth.device) + 0.5,
            torch.arange(w, device=self.depth.device) + 0.5,
            indexing="ij",
        )
        fx, fy = self.K[..., 0, 0, None, None], self.K[..., 1, 1, None, None]
        cx, cy = self.K[..., 0, 2, None, None], self.K[..., 1, 2, None, None]
        local = torch.stack([(x - cx) / fx * self.depth, (y - cy) / fy * self.depth, self.depth], -1)
        T = self.cam_from_world[:, frame, None] @ rigid_inverse(self.cam_from_world)
        moved = local.flatten(2, 3) @ T[..., :3, :3].transpose(-1, -2) + T[..., None, :3, 3]
        return moved.unflatten(2, (h, w))

    def overlaps(self) -> Float[Tensor, " b"]:
        """Share of view 0's valid pixels that view 1 sees too."""
        rows = camera_rows(self.K, self.cam_from_world)
        return overlap(rows[:, :1], self.depth[:, :1], rows[:, 1:], self.depth[:, 1:])[:, 0]


def rigid_inverse(T: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 4 4"]:
    """The inverse of rigid transforms; unlike geometry's, without a copy to the device, as a captured step needs."""
    R = T[..., :3, :3].transpose(-1, -2)
    out = torch.cat([R, -(R @ T[..., :3, 3:])], -1)
    return torch.cat([out, T[..., 3:, :]], -2)


def camera_rows(K: Float[Tensor, "*b 3 3"], cam_from_world: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 16"]:
    """Cameras as the renderer takes them."""
    pose = rigid_inverse(cam_from_world)[..., :3, :].flatten(-2)
    numbers = torch.stack([K[..., 0, 0], K[..., 1, 1], K[..., 0, 2], K[..., 1, 2]], -1)
    return torch.cat([pose, numbers], -1)


def camera_matrices(rows: Float[Tensor, "*b 16"]) -> tuple[Float[Tensor, "*b 3 3"], Float[Tensor, "*b 4 4"]]:
    """K and cam_from_world of the renderer's cameras."""
    K = torch.zeros((*rows.shape[:-1], 3, 3), device=rows.device)
    K[..., 0, 0], K[..., 1, 1], K[..., 0, 2], K[..., 1, 2], K[..., 2, 2] = *rows[..., 12:].unbind(-1), 1.0
    last = constant((0.0, 0.0, 0.0, 1.0), rows.device).expand(*rows.shape[:-1], 1, 4)
    return K, rigid_inverse(torch.cat([rows[..., :12].unflatten(-1, (3, 4)), last], -2))


def _render_depth(primitives: Tensor, lights: Tensor, cameras: Tensor, h: int, w: int, textures: Tensor) -> Tensor:
    kernel = r.load_kernel("cuda") if cameras.is_cuda else None
    if kernel is None:
        b, v = cameras.shape[:2]
        origin, direction, scene = r._rays(cameras, h, w)
        depth, which, _ = r._nearest(primitives, scene, origin, direction)
        return torch.where(which >= 0, depth, torch.zeros_like(depth)).reshape(b, v, h, w)
    return r.render_fused(kernel, primitives, lights, cameras, textures, h, w, with_color=False)[1]


def develop(color: Float[Tensor, "*b h w 3"], exposure: Float[Tensor, "*#b 1 1 1"]) -> Float[Tensor, "*b h w 3"]:
    """Linear light to display values in [0, 1]: exposure, a soft shoulder, gamma 1/1.6."""
    x = color.clamp(min=0) * exposure
    return (x / (1 + 0.35 * x)).clamp(0, 1) ** (1 / 1.6)


def auto_exposure(color: Float[Tensor, "b v h w 3"]) -> Float[Tensor, "b v 1 1 1"]:
    """One exposure a scene, that puts its mean at a middle gray."""
    return (
        (0.32 / color.mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-3))
        .clamp(0.2, 6.0)
        .expand(-1, color.shape[1], 1, 1, 1)
    )


def sample_pairs(
    dice: Dice,
    batch: int,
    height: int,
    width: int,
    textures: UInt8[Tensor, "t texels 4"],
    samples: int = 1,
    kernel: CDLL | None = None,
    wide_share: float = 0.0,
    courts: float = COURTS,
    one_make: float = 0.0,
) -> TrainingPairs:
    """Random worlds seen by two cameras each: fresh at every call, on the dice's device.

    `wide_share` is of the pairs with a wide baseline, see `sample_cameras`; `courts` and `one_make` of certain worlds,
    see `sample_world`. With `kernel`, of `load_kernel` for the CPU, they are rendered ten times faster there.
    """
    world = sample_world(dice, batch, len(textures), courts, one_make)

    def render_depth(primitives: Tensor, lights: Tensor, cameras: Tensor, h: int, w: int) -> Tensor:
        if kernel is None:
            return _render_depth(primitives, lights, cameras, h, w, textures)
        return r.render_fused(kernel, primitives, lights, cameras, textures, h, w, with_color=False)[1]

    rows = sample_cameras(dice, world, render_depth, height, width, wide_share)
    render = r.render if kernel is None else partial(r.render_fused, kernel)
    color, depth = render(world.primitives, world.lights, rows, textures, height, width, samples)
    exposure = auto_exposure(color)
    K, cam_from_world = camera_matrices(rows)
    return TrainingPairs(develop(color, exposure).permute(0, 1, 4, 2, 3), depth, K, cam_from_world)


@dataclass(frozen=True, eq=False)
class SyntheticViews:
    """Photos of one procedural scene with the truth about them."""

    images: UInt8[Tensor, "n h w 3"]
    K: Float[Tensor, "n 3 3"]
    cam_from_world: Float[Tensor, "n 4 4"]
    depth: Float[Tensor, "n h w"]


def _pick_scene(dice: Dice, textures: int) -> World:
    """A table-top scene, the kind that many cameras can walk around."""
    while True:
        world = sample_world(dice, 1, textures)
        if int(world.kind[0]) == TABLE:
            return world


def demo_views(num_views: int = 8, size: tuple[int, int] = (384, 512), seed: int = 0) -> SyntheticViews:
    """A walk around a table-top scene, on the CPU, textured by generated textures; size is (height, width)."""
    dice = Dice("cpu", seed)
    textures = with_mipmaps(generated_textures(24, seed))
    world = _pick_scene(dice, len(textures))
    middle = world.subjects[0].mean(0)
    distance = 2.2 * float(world.radius[0])
    angles = torch.linspace(-0.5, 0.5, num_views) * math.radians(75) + float(dice.uniform(1)[0]) * 2 * math.pi
    height = 0.55 * distance + 0.08 * distance * dice.normal(num_views)
    place = middle + torch.stack([angles.cos() * distance, angles.sin() * distance, height], -1)
    target = middle + 0.04 * distance * dice.normal(num_views, 3)
    pose = look_at(place, target, 0.04 * dice.normal(num_views))
    rows = cameras_from(pose, torch.full((num_views,), math.radians(58)), *size)[None]
    color, depth = r.render(world.primitives, world.lights, rows, textures, *size, samples=2)
    K, cam_from_world = camera_matrices(rows[0])
    images = (develop(color, auto_exposure(color))[0] * 255).round().to(torch.uint8)
    return SyntheticViews(images, K, cam_from_world, depth[0])
