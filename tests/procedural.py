"""Scenes whose answer is known: a room with spheres and boxes, ray-cast exactly, and what a perfect network would say.

Units are metres; the world is x right, y down, z forward, its origin in the middle of the room's floor plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dust3r_sfm.pairs import Pair, PairPrediction
from dust3r_sfm.views import View

ROOM = torch.tensor([4.0, 1.6, 4.0], dtype=torch.float64)  # half sizes
STORED_PER_NET = 2  # pixels of the stored file in one network pixel


@dataclass(frozen=True, eq=False)
class Shapes:
    """The world: a room of half sizes ROOM, spheres (centre, radius) and axis-aligned boxes (lower, upper corner)."""

    sphere_centers: Tensor
    sphere_radii: Tensor
    box_lower: Tensor
    box_upper: Tensor


@dataclass(frozen=True, eq=False)
class ProceduralScene:
    """Photos, the perfect (or noisy) predictions of all asked pairs, and the truth they come from.

    `K`, `cam_from_world` (n 4 4), `depth` (n times h w) belong to the network images; `predictions` hold each pair's
    pointmaps times `scales[pair]`, plus noise; a confidence is 10 where the other camera sees the point, else 2.
    """

    views: list[View]
    predictions: dict[Pair, PairPrediction]
    cam_from_world: Tensor
    K: Tensor
    depth: list[Tensor]
    points_in_world: list[Tensor]
    scales: dict[Pair, float]
    shapes: Shapes

    @property
    def names(self) -> list[str]:
        return [view.name for view in self.views]

    @property
    def centers(self) -> Tensor:
        """Camera centres in the world, n 3."""
        rotations = self.cam_from_world[:, :3, :3]
        return -(rotations.mT @ self.cam_from_world[:, :3, 3:])[..., 0]

    @property
    def size(self) -> float:
        """The extent of the scene as seen: the diagonal of the box around all points."""
        points = torch.cat([p.reshape(-1, 3) for p in self.points_in_world])
        return float((points.amax(0) - points.amin(0)).norm())


def make_scene(
    num_views: int,
    size: tuple[int, int] = (48, 64),
    seed: int = 0,
    noise: float = 0.0,
    vary_focal: bool = False,
    mix_orientations: bool = False,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> ProceduralScene:
    """Cameras on an arc that look inward; `size` is (h, w) of the network images.

    `noise` is the standard deviation of each point's error, relative to its distance from camera 0. `pairs` are
    directed index pairs, by default all. With `mix_orientations` every second view is of the transposed size.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = _random_shapes(generator)
    cam_from_world = _cameras_on_arc(num_views, generator)
    sizes = [size[::-1] if mix_orientations and i % 2 else size for i in range(num_views)]
    K = torch.stack([_random_intrinsics(s, vary_focal, generator) for s in sizes])
    casts = [_cast_view(shapes, *camera) for camera in zip(K, cam_from_world, sizes, strict=True)]
    views = [_view(f"photos/{i:03d}.jpg", points, normals) for i, (_, points, normals) in enumerate(casts)]
    points = [points for _, points, _ in casts]

    predictions, scales = {}, {}
    for i, j in itertools.permutations(range(num_views), 2) if pairs is None else pairs:
        pair = Pair(views[i].name, views[j].name)
        scales[pair] = math.exp(float(torch.rand((), generator=generator)) * 2 - 1)
        visible = [_visible(shapes, points[i], cam_from_world[j], K[j], sizes[j])]
        visible += [_visible(shapes, points[j], cam_from_world[i], K[i], sizes[i])]
        maps = [scales[pair] * _transform(cam_from_world[i], points[k]) for k in (i, j)]
        maps = [m + noise * m.norm(dim=-1, keepdim=True) * _randn(m.shape, generator) for m in maps]
        confidences = [torch.where(v, 10.0, 2.0) for v in visible]
        predictions[pair] = PairPrediction(maps[0].float(), confidences[0], maps[1].float(), confidences[1])
    depth = [depth.float() for depth, _, _ in casts]
    points = [p.float() for p in points]
    return ProceduralScene(views, predictions, cam_from_world.float(), K.float(), depth, points, scales, shapes)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _random_shapes(generator: torch.Generator) -> Shapes:
    """Five spheres and five boxes around the room's middle, out of the cameras' way."""
    angle, radius = _uniform((10,), 0, 2 * math.pi, generator), _uniform((10,), 0.2, 1.5, generator)
    centers = torch.stack([radius * angle.cos(), _uniform((10,), -0.8, 1.2, generator), radius * angle.sin()], dim=-1)
    half = _uniform((5, 3), 0.15, 0.45, generator)
    return Shapes(centers[:5], _uniform((5,), 0.15, 0.5, generator), centers[5:] - half, centers[5:] + half)


def _cameras_on_arc(num_views: int, generator: torch.Generator) -> Tensor:
    """cam_from_world, n 4 4: 20 degrees apart or less, 150 degrees in all, looking near the middle."""
    step = math.radians(min(20.0, 150.0 / max(num_views - 1, 1)))
    poses = []
    for i in range(num_views):
        angle = (i - (num_views - 1) / 2) * step
        radius = 3.2 + float(_uniform((), -0.4, 0.4, generator))
        height = float(_uniform((), -0.8, 0.4, generator))
        center = torch.tensor([radius * math.sin(angle), height, -radius * math.cos(angle)], dtype=torch.float64)
        forward = _unit(_uniform((3,), -0.4, 0.4, generator) - center)
        roll = float(_uniform((), -0.1, 0.1, generator))
        down = torch.tensor([math.sin(roll), math.cos(roll), 0.0], dtype=torch.float64)
        right = _unit(torch.linalg.cross(down, forward))
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
        pose[:3, 3] = -pose[:3, :3] @ center
        poses.append(pose)
    return torch.stack(poses)


def _random_intrinsics(size: tuple[int, int], vary_focal: bool, generator: torch.Generator) -> Tensor:
    focal = max(size) * (float(_uniform((), 0.7, 1.4, generator)) if vary_focal else 0.9)
    return torch.tensor([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1]], dtype=torch.float64)


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True)


def _transform(target_from_source: Tensor, points: Tensor) -> Tensor:
    return points @ target_from_source[:3, :3].T + target_from_source[:3, 3]


def _cast_view(shapes: Shapes, K: Tensor, cam_from_world: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Depth (h w), points in the world (h w 3) and normals (h w 3) at the pixels' centres."""
    y, x = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) + 0.5 for s in size), indexing="ij")
    rays_in_cam = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], dim=-1)
    rays = rays_in_cam @ cam_from_world[:3, :3]  # their length along z is 1, so the ray's parameter is the depth
    origin = -cam_from_world[:3, :3].T @ cam_from_world[:3, 3]
    depth, normals = cast_rays(shapes, origin, rays)
    return depth, origin + depth[..., None] * rays, normals


def cast_rays(shapes: Shapes, origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """First hit of rays (... 3) from one origin (3): the ray's parameter (...) and the surface's normal (... 3)."""
    to_room, room_normal = _exit_of_box(-ROOM, ROOM, origin, rays)
    hits, normals = [to_room], [room_normal]
    for lower, upper in zip(shapes.box_lower, shapes.box_upper, strict=True):
        t0, t1 = (lower - origin) / rays, (upper - origin) / rays
        near, axis = torch.minimum(t0, t1).max(dim=-1)
        far = torch.maximum(t0, t1).amin(dim=-1)
        hits.append(torch.where((near < far) & (near > 0), near, torch.inf))
        normals.append(torch.nn.functional.one_hot(axis, 3) * -rays.sign())
    for center, radius in zip(shapes.sphere_centers, shapes.sphere_radii, strict=True):
        a, b, c = rays.square().sum(-1), rays @ (origin - center), (origin - center).square().sum() - radius**2
        root = b.square() - a * c
        t = (-b - root.clamp(min=0).sqrt()) / a
        hits.append(torch.where((root > 0) & (t > 0), t, torch.inf))
        normals.append(_unit(origin + t[..., None] * rays - center))
    t, first = torch.stack(hits).min(dim=0)
    normals = torch.stack(normals)
    return t, normals.gather(0, first[None, ..., None].expand(1, *normals.shape[1:]))[0]


def _exit_of_box(lower: Tensor, upper: Tensor, origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    t, axis = torch.maximum((lower - origin) / rays, (upper - origin) / rays).min(dim=-1)
    return t, torch.nn.functional.one_hot(axis, 3) * -rays.sign()


def _visible(shapes: Shapes, points: Tensor, cam_from_world: Tensor, K: Tensor, size: tuple[int, int]) -> Tensor:
    """True where a camera sees world points (h w 3): inside its image, in front of it and not hidden."""
    in_cam = _transform(cam_from_world, points)
    pixels = (in_cam @ K.T)[..., :2] / in_cam[..., 2:].clamp(min=1e-6)
    height, width = size
    inside = (pixels >= 0).all(-1) & (pixels[..., 0] < width) & (pixels[..., 1] < height) & (in_cam[..., 2] > 0)
    origin = -cam_from_world[:3, :3].T @ cam_from_world[:3, 3]
    first_hit, _ = cast_rays(shapes, origin, points - origin)
    return inside & (first_hit > 0.999)


def _view(name: str, points: Tensor, normals: Tensor) -> View:
    """A photo coloured by where its points lie (waves and a checkerboard) and lit from above."""
    frequencies = torch.tensor([[3.1, 7.3, 5.9], [4.3, 2.9, 8.3], [6.7, 5.3, 3.7]], dtype=torch.float64)
    waves = (points @ frequencies.T).sin() * 0.25 + 0.5
    checker = ((points * 2.5 + 0.13).floor().sum(-1, keepdim=True) % 2) * 0.3 + 0.7
    light = torch.tensor([0.37, -0.84, -0.4], dtype=torch.float64)
    shade = (normals @ light)[..., None] * 0.25 + 0.75
    image = (waves * checker * shade * 255).clamp(0, 255).to(torch.uint8)
    height, width = image.shape[:2]
    net_from_img = torch.diag(torch.tensor([1 / STORED_PER_NET, 1 / STORED_PER_NET, 1.0], dtype=torch.float64))
    return View(
        name=name,
        image=image,
        original_size=(width * STORED_PER_NET, height * STORED_PER_NET),
        net_from_img=net_from_img,
    )
