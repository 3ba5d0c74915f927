"""What a perfect alignment of a procedural scene would give."""

import torch

from dust3r_sfm.scene import Scene


def true_scene(procedural, net_from_img=None, original_sizes=None) -> Scene:
    """The truth as a scene; other maps to stored files than the views' may be given."""
    views = procedural.views
    return Scene(
        names=tuple(procedural.names),
        K=procedural.K,
        cam_from_world=procedural.cam_from_world,
        depth=tuple(procedural.depth),
        confidence=tuple(torch.ones_like(depth) for depth in procedural.depth),
        net_from_img=torch.stack([view.net_from_img for view in views]) if net_from_img is None else net_from_img,
        original_sizes=tuple(view.original_size for view in views) if original_sizes is None else original_sizes,
    )


def hit_error(procedural, tracks):
    """How far each point lies from where the ray of its first observation meets the world, relative to the depth."""
    from procedural import STORED_PER_NET, cast_rays

    first = torch.unique(tracks.point_indices, return_inverse=False)
    firsts = torch.searchsorted(tracks.point_indices, first)
    errors = torch.zeros(len(first), dtype=torch.float64)
    for image in range(len(procedural.views)):
        here = tracks.image_indices[firsts] == image
        pose, K = procedural.cam_from_world[image].double(), procedural.K[image].double()
        pixels = torch.nn.functional.pad(tracks.keypoints[firsts[here]].double() / STORED_PER_NET, (0, 1), value=1.0)
        origin = -pose[:3, :3].T @ pose[:3, 3]
        rays = pixels @ torch.linalg.inv(K).T @ pose[:3, :3]
        depth, _ = cast_rays(procedural.shapes, origin, rays)
        distance = (tracks.points_in_world[first[here]].double() - origin - depth[:, None] * rays).norm(dim=-1)
        errors[here] = distance / depth
    return errors
