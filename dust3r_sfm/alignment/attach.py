"""Images that only an aligned scene has, put beside a refined model; and a model put into the aligned scene's frame."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.geometry.registration import register_similarity
from dust3r_sfm.geometry.transforms import camera_center, inverse, rotation_angle_deg
from dust3r_sfm.scene import Scene

NUM_ROUNDS = 10
"""Times that centres are weighted anew, by how far they were off."""


def in_frame_of(scene: Scene, aligned: Scene) -> Scene:
    """The scene moved, turned and scaled to where an aligned scene has the images of both, most of them closely.

    Two images or fewer, or centres all at one place, leave nothing to scale by: the scene stays as it is.
    """
    shared = [name for name in scene.names if name in aligned.names]
    if len(shared) < 3:
        return scene
    source, target = (
        camera_center(s.cam_from_world.double())[[s.names.index(name) for name in shared]] for s in (scene, aligned)
    )
    weights = torch.ones(len(shared), dtype=torch.float64)
    for _ in range(NUM_ROUNDS):
        scale, rotation, translation = register_similarity(source, target, weights)
        gaps = (scale * source @ rotation.T + translation - target).norm(dim=-1)
        weights = 1 / (1 + (gaps / gaps.median().clamp(min=1e-12)).square())
    if not (torch.isfinite(scale) and scale > 1e-9):
        return scene
    return moved(scene, scale, rotation, translation)


def moved(
    scene: Scene, scale: Float[Tensor, ""], rotation: Float[Tensor, "3 3"], translation: Float[Tensor, "3"]
) -> Scene:
    """The scene in another world: target = scale * rotation @ source + translation."""
    poses = scene.cam_from_world.double()
    rotations = poses[:, :3, :3] @ rotation.T
    centers = scale * camera_center(poses) @ rotation.T + translation
    cam_from_world = _poses(rotations, centers)
    tracks = scene.tracks
    if tracks is not None:
        points = scale * tracks.points_in_world.double() @ rotation.T + translation
        tracks = dataclasses.replace(tracks, points_in_world=points.to(tracks.points_in_world))
    depth = tuple((scale * d).to(d) for d in scene.depth)
    return dataclasses.replace(
        scene, cam_from_world=cam_from_world.to(scene.cam_from_world), depth=depth, tracks=tracks
    )


def attached(scene: Scene, aligned: Scene) -> Scene:
    """The scene with the images that only the aligned one has, in the order of the aligned one after its own.

    Each keeps its aligned pose relative to the refined image that sees most alike (the nearest
    direction of view, then the nearest centre), in the unit that the depths of that image have in both.
    """
    missing = [i for i, name in enumerate(aligned.names) if name not in scene.names]
    if not missing:
        return scene
    own = {name: i for i, name in enumerate(scene.names)}
    anchors = [i for i, name in enumerate(aligned.names) if name in own]
    poses = aligned.cam_from_world.double()
    new_poses, new_depth = [], []
    for i in missing:
        angles = rotation_angle_deg(poses[anchors, :3, :3], poses[i, :3, :3].expand(len(anchors), 3, 3))
        anchor = anchors[int(angles.argmin())]
        refined = own[aligned.names[anchor]]
        scale = _unit_ratio(scene.depth[refined], aligned.depth[anchor])
        relative = poses[i] @ inverse(poses[anchor])
        relative[:3, 3] *= scale
        new_poses.append(relative @ scene.cam_from_world[refined].double())
        new_depth.append(aligned.depth[i] * scale)
    return Scene(
        names=(*scene.names, *(aligned.names[i] for i in missing)),
        K=torch.cat([scene.K, aligned.K[missing].to(scene.K)]),
        cam_from_world=torch.cat([scene.cam_from_world, torch.stack(new_poses).to(scene.cam_from_world)]),
        depth=(*scene.depth, *new_depth),
        confidence=(*scene.confidence, *(aligned.confidence[i] for i in missing)),
        net_from_img=torch.cat([scene.net_from_img, aligned.net_from_img[missing].to(scene.net_from_img)]),
        original_sizes=(*scene.original_sizes, *(aligned.original_sizes[i] for i in missing)),
        tracks=scene.tracks,
        lenses=(*map(scene.lens, range(len(scene.names))), *map(aligned.lens, missing)),
    )


def _unit_ratio(refined: Float[Tensor, "h w"], aligned: Float[Tensor, "h w"]) -> float:
    usable = (refined > 0) & (aligned > 0)
    return float((refined[usable] / aligned[usable]).median()) if usable.any() else 1.0


def _poses(rotations: Float[Tensor, "n 3 3"], centers: Float[Tensor, "n 3"]) -> Float[Tensor, "n 4 4"]:
    poses = torch.eye(4, dtype=rotations.dtype).repeat(len(rotations), 1, 1)
    poses[:, :3, :3] = rotations
    poses[:, :3, 3] = -(rotations @ centers[..., None])[..., 0]
    return poses
