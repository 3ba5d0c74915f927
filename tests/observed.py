"""Points of a procedural room and the noisy pixels that see them, as tracks of a scene of larger stored photos."""

import dataclasses

import torch
from aligned import true_scene
from procedural import cast_rays

from dust3r_sfm.geometry.transforms import rotation_from_rotvec
from dust3r_sfm.scene import Scene, Tracks


def observed_scene(procedural, width: int = 1024, num_points: int = 150, noise_px: float = 1.0, seed: int = 0) -> Scene:
    """The truth with `num_points` points an image, seen with Gaussian noise in photos of `width` pixels."""
    height_net, width_net = procedural.views[0].size
    scale = width / width_net
    net_from_img = torch.diag(torch.tensor([1 / scale, 1 / scale, 1.0], dtype=torch.float64)).expand(
        len(procedural.views), 3, 3
    )
    sizes = ((width, int(height_net * scale)),) * len(procedural.views)
    scene = true_scene(procedural, net_from_img, sizes)
    return dataclasses.replace(scene, tracks=_tracks(procedural, num_points, noise_px / scale, scale, seed))


def _tracks(procedural, num_points, noise_px, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    points, rows = [], []
    for in_world in procedural.points_in_world:
        flat = in_world.reshape(-1, 3).double()
        points.append(flat[torch.randperm(len(flat), generator=generator)[:num_points]])
    points = torch.cat(points)
    for image, (K, pose) in enumerate(zip(procedural.K.double(), procedural.cam_from_world.double(), strict=True)):
        in_cam = points @ pose[:3, :3].T + pose[:3, 3]
        pixels = (in_cam @ K.T)[:, :2] / in_cam[:, 2:].clamp(min=1e-6)
        height, width = procedural.views[image].size
        inside = (in_cam[:, 2] > 0) & (pixels > 0).all(1) & (pixels[:, 0] < width) & (pixels[:, 1] < height)
        origin = -pose[:3, :3].T @ pose[:3, 3]
        first_hit, _ = cast_rays(procedural.shapes, origin, points - origin)
        seen = (inside & (first_hit > 0.999)).nonzero()[:, 0]
        noise = noise_px * torch.randn(len(seen), 2, generator=generator, dtype=torch.float64)
        rows.append((seen, torch.full_like(seen, image), (pixels[seen] + noise) * scale))
    point, image, keypoints = (torch.cat(column) for column in zip(*rows, strict=True))
    kept = torch.bincount(point, minlength=len(points))[point] >= 2
    number, point = torch.unique(point[kept], return_inverse=True)
    order = torch.argsort(point, stable=True)
    return Tracks(
        points_in_world=points[number].float(),
        colors=torch.full((len(number), 3), 128, dtype=torch.uint8),
        errors=torch.ones(len(number)),
        point_indices=point[order],
        image_indices=image[kept][order],
        keypoints=keypoints[kept][order].float(),
    )


def perturbed(scene: Scene, angle_deg: float = 2.0, shift: float = 0.1, focal: float = 0.05, seed: int = 0) -> Scene:
    """The scene with wrong poses, focals and points, of the given standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    n = len(scene.names)
    turns = rotation_from_rotvec(torch.randn(n, 3, generator=generator) * torch.pi / 180 * angle_deg)
    poses = scene.cam_from_world.clone()
    poses[:, :3] = turns @ poses[:, :3]
    poses[:, :3, 3] += shift * torch.randn(n, 3, generator=generator)
    K = scene.K.clone()
    K[:, [0, 1], [0, 1]] *= 1 + focal * torch.randn(n, 1, generator=generator)
    points = scene.tracks.points_in_world
    points = points + shift * torch.randn(points.shape, generator=generator)
    tracks = dataclasses.replace(scene.tracks, points_in_world=points)
    return dataclasses.replace(scene, cam_from_world=poses, K=K, tracks=tracks)
