"""COLMAP databases: cameras, images, keypoints, matches and verified pairs, with the ids of the models beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pycolmap
from jaxtyping import Bool, Float, Float32, UInt32

from dust3r_sfm.files import replacing
from dust3r_sfm.formats.colmap import colmap_from_scene, first_ids
from dust3r_sfm.formats.keypoints import IndexedMatches, index_scenes, stored_keypoints
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.scene import Scene

MAX_ERROR_PX = 1.0
"""Matches farther from their epipolar lines are no inliers; in network pixels, so it grows with the stored file."""
MIN_INLIERS = 15
"""Pairs with fewer inliers are not verified, as in COLMAP; their matches are written all the same."""


def write_database(
    scenes: Sequence[Scene] | Scene, matches: Mapping[Pair, Matches] | IndexedMatches | None, path: Path
) -> None:
    """Writes the `database.db` that COLMAP would have had before it made these scenes' models.

    Cameras have their focal lengths as priors; ids of cameras, rigs, frames and images are
    the models' of `write_colmap` with `first_ids`, and so are an image's first keypoints.
    Pairs of one scene are CALIBRATED with the scene's relative pose and the matches that
    agree with it. Matches of images outside the scenes are passed over; without `matches`
    they are those of the scenes' tracks.
    """
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    indexed = matches if isinstance(matches, IndexedMatches) else index_scenes(scenes, matches)
    inliers = {pair: rows for scene in scenes for pair, rows in _inliers(scene, indexed).items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.unlink(missing_ok=True)  # of a killed run
        try:
            _write(temporary, scenes, indexed, inliers)
        except RuntimeError as error:
            raise OSError(f"the database {path} could not be written ({error}): is the disk full?") from error


def _inliers(scene: Scene, indexed: IndexedMatches) -> dict[Pair, UInt32[np.ndarray, "_k 2"]]:
    """Of each pair of the scene, the matches that agree with its pose, where they are enough."""
    index_of = {name: i for i, name in enumerate(scene.names)}
    K, cam_from_world = (t.detach().cpu().double().numpy() for t in (scene.K, scene.cam_from_world))
    rays_from_pixels = np.linalg.inv(K)
    found = {}
    for pair, rows in indexed.indices.items():
        if pair.name0 not in index_of or pair.name1 not in index_of:
            continue
        i, j = index_of[pair.name0], index_of[pair.name1]
        cam1_from_cam0 = cam_from_world[j] @ np.linalg.inv(cam_from_world[i])
        F = rays_from_pixels[j].T @ _essential(cam1_from_cam0) @ rays_from_pixels[i]
        xy0, xy1 = (indexed.keypoints[name].take(rows[:, k], axis=0) for k, name in enumerate(pair))
        kept = _on_epipolar_lines(F, xy0, xy1)
        if kept.sum() >= MIN_INLIERS:
            found[pair] = rows.compress(kept, axis=0)
    return found


def _essential(cam1_from_cam0: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "3 3"]:
    x, y, z = cam1_from_cam0[:3, 3]
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ cam1_from_cam0[:3, :3]


def _on_epipolar_lines(
    F: Float[np.ndarray, "3 3"], xy0: Float32[np.ndarray, "m 2"], xy1: Float32[np.ndarray, "m 2"]
) -> Bool[np.ndarray, " m"]:
    """Whether the Sampson distance is at most MAX_ERROR_PX; nowhere where both cameras stand in one place."""
    F = (F / max(np.linalg.norm(F), np.finfo(float).tiny)).astype(np.float32)
    lines1, lines0 = xy0 @ F[:, :2].T + F[:, 2], xy1 @ F[:2] + F[2]
    distance = np.einsum("nk,nk->n", xy1, lines1[:, :2]) + lines1[:, 2]
    square = np.einsum("nk,nk->n", lines0[:, :2], lines0[:, :2]) + np.einsum("nk,nk->n", lines1[:, :2], lines1[:, :2])
    return (distance**2 <= MAX_ERROR_PX**2 * square) & (square > 0)


def _write(
    path: Path, scenes: Sequence[Scene], indexed: IndexedMatches, inliers: Mapping[Pair, UInt32[np.ndarray, "_k 2"]]
) -> None:
    numbered = zip(scenes, first_ids(scenes), strict=True)
    models = [colmap_from_scene(scene, first_id=first_id, equal_share=True) for scene, first_id in numbered]
    image_of = {image.name: image for model in models for image in model.images.values()}
    database = pycolmap.Database.open(str(path))
    try:
        with pycolmap.DatabaseTransaction(database):
            for scene, model in zip(scenes, models, strict=True):
                _write_cameras_and_images(database, model)
                for name, xy in stored_keypoints(scene, indexed).items():
                    database.write_keypoints(image_of[name].image_id, xy)
            for pair, rows in indexed.indices.items():
                if len(rows):
                    image0, image1 = image_of[pair.name0], image_of[pair.name1]
                    database.write_matches(image0.image_id, image1.image_id, rows)
                    if pair in inliers:
                        geometry = _two_view_geometry(image0, image1, inliers[pair])
                        database.write_two_view_geometry(image0.image_id, image1.image_id, geometry)
    finally:
        database.close()


def _write_cameras_and_images(database: pycolmap.Database, model: pycolmap.Reconstruction) -> None:
    for camera in model.cameras.values():
        camera.has_prior_focal_length = True
        database.write_camera(camera, use_camera_id=True)
    for rig in model.rigs.values():
        database.write_rig(rig, use_rig_id=True)
    for image_id, image in sorted(model.images.items()):
        database.write_frame(model.frames[image.frame_id], use_frame_id=True)
        bare = pycolmap.Image(name=image.name, camera_id=image.camera_id, image_id=image_id)
        database.write_image(bare, use_image_id=True)


def _two_view_geometry(
    image0: pycolmap.Image, image1: pycolmap.Image, inliers: UInt32[np.ndarray, "k 2"]
) -> pycolmap.TwoViewGeometry:
    cam1_from_cam0 = image1.cam_from_world() * image0.cam_from_world().inverse()
    return pycolmap.TwoViewGeometry(
        config=pycolmap.TwoViewGeometryConfiguration.CALIBRATED,
        E=pycolmap.essential_matrix_from_pose(cam1_from_cam0),
        cam2_from_cam1=cam1_from_cam0,
        inlier_matches=inliers,
    )
