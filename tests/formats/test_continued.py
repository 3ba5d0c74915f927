"""A model of three photos of a procedural room, numbered as nobody would, and a scene of these and two more."""

import dataclasses

import numpy as np
import pycolmap
import pytest
import torch
from observed import observed_scene
from procedural import make_scene

from dust3r_sfm.formats.colmap import colmap_from_scene, read_colmap, write_colmap
from dust3r_sfm.formats.continued import continued
from dust3r_sfm.formats.database import write_database
from dust3r_sfm.formats.scenes import read_scenes, write_scenes
from dust3r_sfm.scene import Scene, SceneIds

IMAGES, CAMERAS, GAP = (7, 30, 12), (5, 5, 9), 3


@pytest.fixture(scope="module")
def scene():
    """Its first two photos are of one camera."""
    observed = observed_scene(make_scene(5, (48, 64), pairs=[], vary_focal=True), num_points=60, noise_px=0.5)
    K = observed.K.clone()
    K[1] = K[0]
    return dataclasses.replace(observed, K=K)


@pytest.fixture(scope="module")
def previous(scene):
    """The first three photos and two thirds of the points that two of them see, each third id left out."""
    tracks = scene.tracks
    seen = tracks.image_indices < 3
    lengths = torch.bincount(tracks.point_indices[seen], minlength=len(tracks.errors))
    kept = (lengths >= 2) & (torch.arange(len(lengths)) % 3 > 0)
    rows = seen & kept[tracks.point_indices]
    number = kept.long().cumsum(0) - 1
    ids = tuple((GAP * torch.arange(int(kept.sum())) + 11).tolist())
    stacked = {field: getattr(scene, field)[:3] for field in ("K", "cam_from_world", "net_from_img")}
    lists = {field: getattr(scene, field)[:3] for field in ("names", "depth", "confidence", "original_sizes")}
    part = dataclasses.replace(
        tracks,
        points_in_world=tracks.points_in_world[kept] + 0.002,  # its own opinion of where they are
        colors=tracks.colors[kept],
        errors=tracks.errors[kept],
        point_indices=number[tracks.point_indices[rows]],
        image_indices=tracks.image_indices[rows],
        keypoints=tracks.keypoints[rows],
    )
    return colmap_from_scene(Scene(**stacked, **lists, tracks=part, ids=SceneIds(IMAGES, CAMERAS, ids, 1)))


def _sees(point, image_ids):
    return any(e.image_id in image_ids for e in point.track.elements)


def test_what_was_in_the_model_keeps_numbers_cameras_poses_and_places(scene, previous):
    model = colmap_from_scene(*continued([scene], previous))
    for image_id, image in previous.images.items():
        found = model.images[image_id]
        assert (found.name, found.camera_id) == (image.name, image.camera_id)
        np.testing.assert_allclose(found.cam_from_world().matrix(), image.cam_from_world().matrix(), atol=1e-9)
    for camera_id, camera in previous.cameras.items():
        np.testing.assert_allclose(model.cameras[camera_id].params, camera.params)
    assert len(previous.points3D) > 40
    for point_id, point in previous.points3D.items():
        np.testing.assert_allclose(model.points3D[point_id].xyz, point.xyz, atol=1e-6)
        old, new = ({(e.image_id) for e in p.track.elements} for p in (point, model.points3D[point_id]))
        assert old <= new


def test_new_photos_and_points_have_fresh_numbers(scene, previous):
    model = colmap_from_scene(*continued([scene], previous))
    names = {image.name: i for i, image in model.images.items()}
    assert [names[name] for name in scene.names[3:]] == [31, 32]
    assert {model.images[i].camera_id for i in (31, 32)} == {10, 11}
    fresh = set(model.points3D) - set(previous.points3D)
    assert min(fresh) == 1 + max(previous.points3D)
    assert len(fresh) == max(fresh) - min(fresh) + 1


def test_points_that_new_photos_see_grow_and_are_not_doubled(scene, previous):
    (found,) = continued([scene], previous)
    model = colmap_from_scene(found)
    assert 0.9 * len(scene.tracks.errors) < len(model.points3D) <= len(scene.tracks.errors)
    grown = [i for i, p in previous.points3D.items() if model.points3D[i].track.length() > p.track.length()]
    assert len(grown) > 0.3 * len(previous.points3D)
    seen_by_new = scene.tracks.point_indices[scene.tracks.image_indices >= 3].unique()
    assert sum(_sees(point, {31, 32}) for point in model.points3D.values()) > 0.95 * len(seen_by_new)
    pairs = torch.stack([found.tracks.point_indices, found.tracks.image_indices], dim=1)
    assert len(pairs.unique(dim=0)) == len(pairs)


def test_points_that_only_the_model_s_photos_see_fill_holes(scene, previous):
    """Everything the scene has found is seen five pixels off, so that nothing of it is a keypoint of the model."""
    shifted = dataclasses.replace(scene.tracks, keypoints=scene.tracks.keypoints + 5)
    model = colmap_from_scene(*continued([dataclasses.replace(scene, tracks=shifted)], previous))

    def cells(image):
        keypoints = [tuple((p.xy // (1024 / 24)).astype(int)) for p in image.points2D if p.has_point3D()]
        return set(keypoints)

    taken = {i: cells(image) for i, image in previous.images.items()}
    fresh = [p for i, p in model.points3D.items() if i not in previous.points3D and not _sees(p, {31, 32})]
    assert 0 < len(fresh) < len(previous.points3D) / 2
    for point in fresh:
        seen = [(e.image_id, model.images[e.image_id].points2D[e.point2D_idx].xy) for e in point.track.elements]
        filled = [tuple((xy // (1024 / 24)).astype(int)) not in taken[i] for i, xy in seen]
        assert np.mean(filled) > 0.5


def test_twice_is_once(scene, previous):
    once = continued([scene], previous)
    twice = colmap_from_scene(*continued(once, previous))
    once = colmap_from_scene(*once)
    assert set(twice.points3D) == set(once.points3D)
    for point_id, point in once.points3D.items():
        assert twice.points3D[point_id].track.length() == point.track.length()


def test_points_of_another_frame_stay_away_but_numbers_are_kept(scene, previous):
    poses = scene.cam_from_world.clone()
    poses[:, 0, 3] += 0.1
    (found,) = continued([dataclasses.replace(scene, cam_from_world=poses)], previous)
    assert found.ids.images[:3] == IMAGES
    assert found.tracks is scene.tracks
    assert min(colmap_from_scene(found).points3D) == 1 + max(previous.points3D)


def test_a_point_whose_photos_left_is_left_out(scene, previous):
    last = {field: getattr(scene, field)[1:] for field in ("K", "cam_from_world", "net_from_img")}
    last |= {field: getattr(scene, field)[1:] for field in ("names", "depth", "confidence", "original_sizes")}
    (found,) = continued([Scene(**last)], previous)
    model = colmap_from_scene(found)
    assert set(model.images) == {30, 12, 31, 32}
    both = {i for i, p in previous.points3D.items() if {30, 12} <= {e.image_id for e in p.track.elements}}
    assert set(model.points3D) == both


def test_database_and_files_have_the_same_numbers(scene, previous, tmp_path):
    found = continued([scene], previous)
    write_scenes(tmp_path / "scene.h5", found)
    assert read_scenes(tmp_path / "scene.h5")[0].ids == found[0].ids
    write_colmap(found[0], tmp_path / "model")
    write_database(found, None, tmp_path / "database.db")
    model, database = read_colmap(tmp_path / "model"), pycolmap.Database.open(str(tmp_path / "database.db"))
    stored = {image.image_id: (image.name, image.camera_id) for image in database.read_all_images()}
    assert stored == {i: (image.name, image.camera_id) for i, image in model.images.items()}
    for image_id, image in model.images.items():
        keypoints = database.read_keypoints(image_id)[: len(image.points2D), :2]
        np.testing.assert_allclose(keypoints, [p.xy for p in image.points2D], atol=1e-3)
    database.close()
