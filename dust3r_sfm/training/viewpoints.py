"""Two cameras of a procedural world that see part of the same: orbits, forward motion, pure rotation, zoom."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.training.world import COURT, DISTANCE, EYE, Dice, World, constant, rotation_from_rotvec

CANDIDATES = 4
WIDE = 0.8
USUAL = math.radians(58)  # field of view along the longer side
FRAMED = 0.6  # share of the cameras that stand as far from their subject as their field of view asks for
LOW = 12  # side of the small depth maps on which candidates are judged


def look_at(
    center: Float[Tensor, "*b 3"], target: Float[Tensor, "*b 3"], roll: Float[Tensor, "*b"]
) -> Float[Tensor, "*b 3 4"]:
    """world_from_cam of a camera (x right, y down, z ahead) that looks at a point; the world's z points up."""
    z = torch.nn.functional.normalize(target - center, dim=-1)
    down = torch.zeros_like(z)
    down[..., 2] = -1.0
    down[..., 0] = 1e-3
    x = torch.nn.functional.normalize(torch.linalg.cross(down, z), dim=-1)
    y = torch.linalg.cross(z, x)
    rotation = torch.stack([x, y, z], -1)
    turn = torch.stack([torch.zeros_like(roll), torch.zeros_like(roll), roll], -1)
    return torch.cat([rotation @ rotation_from_rotvec(turn), center[..., None]], -1)


def _stations(dice: Dice, world: World, fov: Float[Tensor, " b"], n: int) -> tuple[Tensor, Tensor]:
    """Places of n cameras a scene and what they look at (b, n, 3).

    Most frame their subject as a photographer does: the narrower the field of view, the farther they stand.
    """
    b = len(world.kind)
    num, court = world.subjects.shape[1], (world.kind == COURT)[:, None]
    pick = dice.integer(num, b, n)
    at_wall = court & dice.chance(0.6, b, n)
    pick = torch.where(at_wall, num - 4 + dice.integer(4, b, n), pick)
    subject = world.subjects.gather(1, pick[..., None].expand(b, n, 3))
    subject = torch.where(dice.chance(0.3, b, n, 1), subject * 0.3, subject)
    azimuth = dice.uniform(b, n, high=2 * math.pi)
    distance = dice.ranged(DISTANCE, world.kind, b, n) * world.radius[:, None]
    subject, azimuth, distance = _facing(dice, world, at_wall, (subject, azimuth, distance))
    framing = (math.tan(0.5 * USUAL) / torch.tan(0.5 * fov)).clamp(0.5, 4.0)[:, None]
    distance = torch.where(dice.chance(FRAMED, b, n), distance * framing, distance)
    height = dice.ranged(EYE, world.kind, b, n) + subject[..., 2] * dice.uniform(b, n) * ~court
    place = subject + torch.stack([azimuth.cos() * distance, azimuth.sin() * distance, torch.zeros_like(distance)], -1)
    place[..., 2] = height
    return _along_streets(dice, world, _within(world, place), subject)


def _facing(
    dice: Dice, world: World, at_wall: Tensor, otherwise: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Subject, azimuth and distance of cameras of which most that look at a wall see it from its front, as a whole."""
    b, n = at_wall.shape
    facing = at_wall & dice.chance(0.7, b, n)
    turn = 0.5 * math.pi * dice.integer(4, b, n)
    sides = world.room[:, None, :2]
    normal = torch.stack([turn.cos(), turn.sin()], -1)
    aside = torch.stack([-turn.sin(), turn.cos()], -1) * 0.3 * dice.normal(b, n, 1)
    rise = world.room[:, None, 2] * dice.uniform(b, n, low=0.1, high=0.45)
    subject = torch.cat([(normal + aside) * sides, rise[..., None]], -1)
    azimuth = turn + math.pi + 0.45 * dice.normal(b, n)
    width = (normal.flip(-1).abs() * sides).sum(-1)
    distance = width * dice.uniform(b, n, low=math.log(0.5), high=math.log(2.5)).exp()
    found = subject, azimuth, distance
    return tuple(
        torch.where(facing.reshape(b, n, *[1] * (x.ndim - 2)), x, y) for x, y in zip(found, otherwise, strict=True)
    )


def _along_streets(dice: Dice, world: World, place: Tensor, subject: Tensor) -> tuple[Tensor, Tensor]:
    """Most cameras in a long court stand anywhere on it and look along it, at the height of eyes or of a car's roof."""
    b, n = place.shape[:2]
    room = world.room[:, None]
    along = (world.kind == COURT)[:, None] & (room[..., 0] > 2.5 * room[..., 1]) & dice.chance(0.7, b, n)
    stand = torch.cat(
        [dice.uniform(b, n, 2, low=-0.7, high=0.7) * room[..., :2], dice.uniform(b, n, 1, low=1.2, high=2.2)], -1
    )
    ahead = -stand[..., :1].sign() * dice.uniform(b, n, 1, low=0.2, high=1.0) * room[..., :1]
    ahead = torch.cat([ahead, 0.5 * stand[..., 1:2], stand[..., 2:]], -1)
    along = along[..., None]
    return torch.where(along, stand, place), torch.where(along, ahead, subject)


def _within(world: World, place: Tensor) -> Tensor:
    """Places kept in the room, and above the ground."""
    side = 0.9 * world.room[:, None, :2]
    height = place[..., 2].clamp(min=0.02).minimum(0.93 * world.room[:, None, 2])
    return torch.cat([place[..., :2].clamp(-side, side), height[..., None]], -1)


def _orbit(dice: Dice, world: World, place: Tensor, subject: Tensor) -> Tensor:
    b, n = place.shape[:2]
    arm = place - subject
    angle = (dice.uniform(b, n, low=0.05, high=1.25) ** 1.4 * 1.1) * dice.sign(b, n)
    turn = torch.stack([torch.zeros_like(angle), torch.zeros_like(angle), angle], -1)
    arm = (rotation_from_rotvec(turn) @ arm[..., None])[..., 0] * (0.18 * dice.normal(b, n, 1)).exp()
    arm[..., 2] += 0.2 * dice.normal(b, n) * arm.norm(dim=-1)
    return _within(world, subject + arm)


def _second(dice: Dice, world: World, pose0: Tensor, subject0: Tensor, fov0: Tensor) -> tuple[Tensor, Tensor]:
    """CANDIDATES second cameras a scene (b, n, 3, 4), each a random kind of motion of the first, and fields of view."""
    b, n = len(world.kind), CANDIDATES
    pose = pose0[:, None].expand(b, n, 3, 4)
    place, rotation, subject = pose[..., 3], pose[..., :3], subject0[:, None].expand(b, n, 3)
    distance = (place - subject).norm(dim=-1, keepdim=True)
    jitter = 0.15 * distance * fov0[:, None, None] * dice.normal(b, n, 3)
    roll = 0.08 * dice.normal(b, n)
    around = look_at(_orbit(dice, world, place, subject), subject + jitter, roll)
    step = torch.stack([0.12 * dice.normal(b, n), 0.05 * dice.normal(b, n), dice.uniform(b, n, low=0.05, high=0.6)], -1)
    side = torch.stack([0.25 * dice.normal(b, n), 0.1 * dice.normal(b, n), 0.08 * dice.normal(b, n)], -1)
    wobble = rotation_from_rotvec(0.06 * dice.normal(b, n, 3))
    swing = rotation_from_rotvec(
        torch.stack([0.15 * dice.normal(b, n), 0.45 * fov0[:, None] * dice.normal(b, n), 0.1 * dice.normal(b, n)], -1)
    )

    def moved(delta: Tensor, turn: Tensor) -> Tensor:
        to = _within(world, place + (rotation @ (delta * distance)[..., None])[..., 0])
        return torch.cat([rotation @ turn, to[..., None]], -1)

    free_place, _ = _stations(dice, world, fov0, n)
    free = look_at(free_place, subject + jitter, roll)
    options = torch.stack([around, moved(step, wobble), moved(side, wobble), moved(0 * side, swing), free], 2)
    weights = constant((0.55, 0.7, 0.86, 0.9), place.device)
    choice = (dice.uniform(b, n, 1) > weights).sum(-1)
    chosen = options.gather(2, choice[..., None, None, None].expand(b, n, 1, 3, 4))[:, :, 0]
    zoom = torch.where(dice.chance(0.25, b, n), (0.35 * dice.normal(b, n)).exp(), 1.0)
    return chosen, (fov0[:, None] * zoom).clamp(0.27, 1.95)


def _fields_of_view(dice: Dice, b: int) -> Float[Tensor, " b"]:
    """In radians: most as of a phone or a camera's normal zoom, the others from 18 to 105 degrees."""
    anything = dice.uniform(b, low=math.log(math.radians(18)), high=math.log(math.radians(105))).exp()
    usual = (math.log(USUAL) + 0.22 * dice.normal(b)).exp().clamp(0.5, 1.8)
    return torch.where(dice.chance(0.6, b), usual, anything)


def cameras_from(
    pose: Float[Tensor, "*b 3 4"], fov: Float[Tensor, "*b"], height: int, width: int, shift: Tensor | None = None
) -> Float[Tensor, "*b 16"]:
    """Rows of cameras for the renderer.

    `fov` in radians spans the longer side; `shift` (*b, 2) is the principal point's, from the middle, in widths.
    """
    focal = 0.5 * max(height, width) / torch.tan(0.5 * fov)
    center = constant((0.5 * width, 0.5 * height), fov.device).expand(*fov.shape, 2)
    if shift is not None:
        center = center + shift * width
    return torch.cat([pose.flatten(-2), focal[..., None], focal[..., None], center], -1)


def _points(cameras: Tensor, depth: Tensor) -> Tensor:
    """World points (b, n, h*w, 3) of small depth maps."""
    h, w = depth.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(h, device=depth.device) + 0.5, torch.arange(w, device=depth.device) + 0.5, indexing="ij"
    )
    fx, fy, cx, cy = cameras[..., None, None, 12:].unbind(-1)
    local = torch.stack([(x - cx) / fx * depth, (y - cy) / fy * depth, depth], -1).flatten(-3, -2)
    m = cameras[..., :12].unflatten(-1, (3, 4))
    return local @ m[..., :3].transpose(-1, -2) + m[..., None, :, 3]


def overlap(cameras0: Tensor, depth0: Tensor, cameras1: Tensor, depth1: Tensor) -> Float[Tensor, "b n"]:
    """Share of camera 0's valid pixels that each camera 1 sees too (within 5 % of its own depth).

    cameras0 (b, 1, 16) with depth0 (b, 1, h, w), cameras1 (b, n, 16) with depth1 (b, n, h, w).
    """
    h, w = depth1.shape[-2:]
    points, valid = _points(cameras0, depth0), (depth0 > 0).flatten(-2)
    m = cameras1[..., :12].unflatten(-1, (3, 4))
    local = (points - m[..., None, :, 3]) @ m[..., :3]
    z = local[..., 2].clamp(min=1e-6)
    u = local[..., 0] / z * cameras1[..., None, 12] + cameras1[..., None, 14]
    v = local[..., 1] / z * cameras1[..., None, 13] + cameras1[..., None, 15]
    inside = (local[..., 2] > 1e-6) & (u >= 0) & (u < w) & (v >= 0) & (v < h)
    index = v.long().clamp(0, h - 1) * w + u.long().clamp(0, w - 1)
    seen = depth1.flatten(-2).gather(-1, index)
    agrees = (seen - local[..., 2]).abs() < 0.05 * seen + 0.1 * (seen / cameras1[..., None, 12])
    return (inside & agrees & valid).float().sum(-1) / valid.float().sum(-1).clamp(min=1)


def sample_cameras(
    dice: Dice, world: World, render_depth, height: int, width: int, wide_share: float = 0.0
) -> Float[Tensor, "b 2 16"]:
    """Two cameras a scene with an overlap from about 0.1 to 0.95, chosen among candidates by small depth maps.

    `render_depth(primitives, lights, cameras, h, w)` gives depth (b, n, h, w). A share of the pairs takes the
    candidate that moved farthest, up to WIDE of the distance, among those with enough overlap.
    """
    b, n = len(world.kind), CANDIDATES
    fov0 = _fields_of_view(dice, b)
    place, subject = _stations(dice, world, fov0, n)
    jitter = 0.2 * (place - subject).norm(dim=-1, keepdim=True) * fov0[:, None, None] * dice.normal(b, n, 3)
    roll = torch.where(dice.chance(0.1, b, n), 0.8, 0.07) * dice.normal(b, n)
    pose0 = look_at(place, subject + 0.5 * jitter, roll)
    lh, lw = (LOW, LOW * width // height) if height <= width else (LOW * height // width, LOW)
    small = cameras_from(pose0, fov0[:, None].expand(b, n), lh, lw)
    depth = render_depth(world.primitives, world.lights, small, lh, lw)
    valid = (depth > 0).float()
    near = (depth > 0.12 * world.radius[:, None, None, None]).float()
    spread = depth.clamp(min=1e-3).log().flatten(-2).std(-1).clamp(max=0.8)  # not a bare wall
    score = valid.mean((-1, -2)) + near.mean((-1, -2)) + spread + 0.2 * dice.uniform(b, n)
    best = score.argmax(1)
    at = torch.arange(b, device=best.device)
    pose0, subject, small, depth = (
        pose0[at, best],
        subject[at, best],
        small[at, best][:, None],
        depth[at, best][:, None],
    )
    pose1, fov1 = _second(dice, world, pose0, subject, fov0)
    small1 = cameras_from(pose1, fov1, lh, lw)
    depth1 = render_depth(world.primitives, world.lights, small1, lh, lw)
    share = torch.minimum(overlap(small, depth, small1, depth1), 1.5 * (depth1 > 0).float().mean((-1, -2)))
    wanted = dice.uniform(b, 1, low=0.12, high=0.95)
    miss = (share - wanted).abs() + (share < 0.08) * 2.0
    if wide_share:
        moved = (pose1[..., 3] - pose0[:, None, :, 3]).norm(dim=-1)
        distance = depth.sum((1, 2, 3)) / (depth > 0).sum((1, 2, 3)).clamp(min=1)
        narrow = 1 - (moved / distance[:, None].clamp(min=1e-6)).clamp(max=WIDE) + (share < 0.15) * 2.0
        miss = torch.where(dice.chance(wide_share, b, 1), narrow, miss)
    best = miss.argmin(1)
    shift = 0.06 * dice.normal(b, 2, 2) * dice.chance(0.3, b, 2, 1)
    pose, fov = torch.stack([pose0, pose1[at, best]], 1), torch.stack([fov0, fov1[at, best]], 1)
    return cameras_from(pose, fov, height, width, shift)
