"""Scenes that continue a COLMAP model: its images, cameras and points keep their numbers, its points their places."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pycolmap
import torch
from jaxtyping import Bool, Float64, Int64
from scipy.spatial import cKDTree

from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.formats.colmap_scenes import numbered_tracks_of
from dust3r_sfm.geometry.lens import bent
from dust3r_sfm.scene import Scene, SceneIds, Tracks, share_in_empty_cells

SAME_PX = 1.0
"""Keypoints of one photo that are so near are one, in photos of 1024 pixels, else in proportion."""
MAX_ERROR_PX = 4.0
"""How far from an earlier point's projection a keypoint may lie that joins the point; in the same measure."""
MAX_ANGLE_DEG, MAX_SHIFT = 0.05, 1e-3
"""Between poses of the scene and the model that are the same; shifts as a share of the cameras' extent."""


def continued(scenes: Sequence[Scene], previous: pycolmap.Reconstruction) -> list[Scene]:
    """The scenes with the points of a model of some of their images, and its numbers; all else has fresh ones.

    Points stay where they are. What a scene has found where the model has a point's keypoint joins that
    point, as far as it agrees; the rest are new points, where a new image sees them or the model's images have
    none. Points that fewer than two images of a scene see are left out. A scene that is not in the model's
    frame has its numbers alone.
    """
    image_of = {image.name: image for image in previous.images.values()}
    next_image, next_camera = 1 + max(previous.images, default=0), 1 + max(previous.cameras, default=0)
    next_point = 1 + max(previous.points3D, default=0)
    result = []
    for scene in scenes:
        camera_of = {_camera_key(scene, i): image_of[n].camera_id for i, n in enumerate(scene.names) if n in image_of}
        images, cameras = [], []
        for i, name in enumerate(scene.names):
            key = _camera_key(scene, i)
            if name not in image_of and key not in camera_of:
                camera_of[key], next_camera = next_camera, next_camera + 1
            images.append(image_of[name].image_id if name in image_of else next_image)
            cameras.append(image_of[name].camera_id if name in image_of else camera_of[key])
            next_image += name not in image_of
        numbered = dataclasses.replace(scene, ids=SceneIds(tuple(images), tuple(cameras), (), next_point))
        result.append(_with_points(numbered, previous))
    return result


def _camera_key(scene: Scene, index: int) -> object:
    return (scene.original_sizes[index], scene.lens(index), *scene.K_img(index).ravel().tolist())


def _with_points(scene: Scene, previous: pycolmap.Reconstruction) -> Scene:
    there = [i for i, image_id in enumerate(scene.ids.images) if image_id in previous.images]
    bare = colmap_from_scene(dataclasses.replace(scene, tracks=None))
    poses = np.stack([bare.image(image_id).cam_from_world().matrix() for image_id in scene.ids.images])
    if not _is_same_frame(poses[there], [previous.image(scene.ids.images[i]) for i in there]):
        return scene
    old, point_ids = numbered_tracks_of(previous, [scene.ids.images[i] for i in there])
    old = dataclasses.replace(old, image_indices=torch.tensor(there)[old.image_indices])
    tracks = old if scene.tracks is None else _joined(scene, poses, old, scene.tracks)
    return dataclasses.replace(scene, tracks=tracks, ids=dataclasses.replace(scene.ids, points=point_ids))


def _is_same_frame(poses: Float64[np.ndarray, "n 3 4"], images: Sequence[pycolmap.Image]) -> bool:
    if len(images) < 2:
        return False
    known = np.stack([image.cam_from_world().matrix() for image in images])
    cosines = (np.einsum("nij,nij->n", poses[:, :, :3], known[:, :, :3]) - 1) / 2
    centers, known_centers = (-np.einsum("nji,nj->ni", p[:, :, :3], p[:, :, 3]) for p in (poses, known))
    extent = np.linalg.norm(np.ptp(known_centers, axis=0))
    shifts = np.linalg.norm(centers - known_centers, axis=1)
    return bool((cosines >= np.cos(np.radians(MAX_ANGLE_DEG))).all() and (shifts <= MAX_SHIFT * extent).all())


def _joined(scene: Scene, poses: Float64[np.ndarray, "n 3 4"], old: Tracks, new: Tracks) -> Tracks:
    """The old points with the keypoints of new ones that are the same, and the other new points."""
    units = np.array([max(size) / 1024 for size in scene.original_sizes])
    points, images = new.point_indices.numpy(), new.image_indices.numpy()
    same = _points_at(old, new, SAME_PX * units)
    target = _most_frequent(points, same, len(new.errors))
    goal = target[points]
    errors = np.full(len(points), np.inf)
    usable = (goal >= 0) & ((same < 0) | (same == goal))
    errors[usable] = (
        _reprojection_errors(scene, poses, old, goal[usable], new, np.flatnonzero(usable)) / units[images[usable]]
    )
    joins = _first_of_each(goal, images, errors, old, len(scene.names)) & (errors <= MAX_ERROR_PX)
    fresh = np.flatnonzero((target < 0) & _fills_holes(scene, old, new))
    number = np.full(len(new.errors), -1)
    number[fresh] = len(old.errors) + np.arange(len(fresh))
    rows = np.concatenate([np.flatnonzero(joins), np.flatnonzero(number[points] >= 0)])
    indices = np.where(number[points] >= 0, number[points], goal)[rows]
    by_point = np.argsort(np.concatenate([old.point_indices.numpy(), indices]), kind="stable")
    return Tracks(
        points_in_world=torch.cat([old.points_in_world, new.points_in_world[fresh]]),
        colors=torch.cat([old.colors, new.colors[fresh]]),
        errors=torch.cat([old.errors, new.errors[fresh]]),
        point_indices=torch.cat([old.point_indices, torch.from_numpy(indices)])[by_point],
        image_indices=torch.cat([old.image_indices, new.image_indices[rows]])[by_point],
        keypoints=torch.cat([old.keypoints, new.keypoints[rows]])[by_point],
    )


def _fills_holes(scene: Scene, old: Tracks, new: Tracks) -> Bool[np.ndarray, " p"]:
    """Whether new points are seen where old ones are not: mostly, or by an image that sees no old one at all."""
    is_new_image = ~np.isin(new.image_indices.numpy(), old.image_indices.numpy())
    by_new_image = np.bincount(new.point_indices.numpy(), weights=is_new_image, minlength=len(new.errors))
    return (share_in_empty_cells(new, old, scene.original_sizes) > 0.5) | (by_new_image > 0)


def _points_at(old: Tracks, new: Tracks, radius_px: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " o"]:
    """The old point whose keypoint each new keypoint is, by image; -1 where there is none so near."""
    found = np.full(len(new.point_indices), -1)
    for image in new.image_indices.unique().tolist():
        there, here = (np.flatnonzero(tracks.image_indices.numpy() == image) for tracks in (old, new))
        if len(there) and len(here):
            tree = cKDTree(old.keypoints.numpy()[there])
            distances, nearest = tree.query(new.keypoints.numpy()[here])
            points = old.point_indices.numpy()[there[nearest]]
            found[here] = np.where(distances <= radius_px[image], points, -1)
    return found


def _most_frequent(
    keys: Int64[np.ndarray, " o"], values: Int64[np.ndarray, " o"], count: int
) -> Int64[np.ndarray, " k"]:
    """For each key the value, of those that are not negative, that it has most often; -1 where it has none."""
    pairs, counts = np.unique(np.stack([keys, values], axis=1)[values >= 0], axis=0, return_counts=True)
    result = np.full(count, -1)
    order = np.argsort(counts, kind="stable")  # the last one assigned stays
    result[pairs[order, 0]] = pairs[order, 1]
    return result


def _reprojection_errors(
    scene: Scene,
    poses: Float64[np.ndarray, "n 3 4"],
    old: Tracks,
    goal: Int64[np.ndarray, " m"],
    new: Tracks,
    rows: Int64[np.ndarray, " m"],
) -> Float64[np.ndarray, " m"]:
    """Pixels between new keypoints, of some rows, and the projections of old points; infinite behind the camera."""
    errors, images = np.full(len(rows), np.inf), new.image_indices.numpy()[rows]
    points, keypoints = old.points_in_world.double().numpy()[goal], new.keypoints.double().numpy()[rows]
    for image in np.unique(images).tolist():
        K = scene.K_img(image)
        in_cam = points @ poses[image, :, :3].T + poses[image, :, 3]
        here = np.flatnonzero((images == image) & (in_cam[:, 2] > 0))
        straight = (in_cam[here] @ K.T)[:, :2] / in_cam[here, 2:]
        errors[here] = np.linalg.norm(bent(straight, K, scene.lens(image)) - keypoints[here], axis=1)
    return np.where(np.isfinite(errors), errors, np.inf)


def _first_of_each(
    goal: Int64[np.ndarray, " o"],
    images: Int64[np.ndarray, " o"],
    errors: Float64[np.ndarray, " o"],
    old: Tracks,
    num_images: int,
) -> Bool[np.ndarray, " o"]:
    """Whether a keypoint is the best of its point and image, which do not have one yet."""
    taken = old.point_indices.numpy() * num_images + old.image_indices.numpy()
    place = goal * num_images + images
    order = np.lexsort((errors, place))
    is_first = np.zeros(len(goal), dtype=bool)
    is_first[order] = np.diff(place[order], prepend=-num_images - 1) != 0
    return is_first & (goal >= 0) & ~np.isin(place, taken)
