"""Queries among points of a procedural room that keypoints of known descriptors see."""

import numpy as np
import pycolmap
import pytest
import torch
from observed import observed_scene
from procedural import make_scene

from dust3r_sfm.alignment.localization import (
    Features,
    PointMatches,
    QueryCamera,
    Structure,
    camera_pose,
    joined,
    mutual_matches,
    refined_by_guidance,
    scored,
    sparse_matches,
)

NOISE_PX = 0.5


def described(points, seed):
    """Nearly the same vector of length 512 for each sight of a point, as SIFT's bytes."""
    bases = np.random.default_rng(1).gamma(0.4, size=(points.max() + 1, 128))
    rows = bases[points] + 0.02 * np.random.default_rng(seed).random((len(points), 128))
    return (512 * rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.uint8)


@pytest.fixture(scope="module")
def observed():
    return observed_scene(make_scene(5, (48, 64), pairs=[]), num_points=200, noise_px=NOISE_PX)


@pytest.fixture(scope="module")
def features(observed):
    tracks, found = observed.tracks, {}
    for i, name in enumerate(observed.names):
        here = tracks.image_indices == i
        points = tracks.point_indices[here].numpy()
        found[name] = Features(tracks.keypoints[here].double().numpy(), described(points, i)), points
    return found


@pytest.fixture(scope="module")
def query(observed):
    return observed.names[2]


@pytest.fixture(scope="module")
def structure(observed, features, query):
    others = {name: value for name, value in features.items() if name != query}
    return Structure(
        observed.tracks.points_in_world.double().numpy(),
        {name: own for name, (own, _) in others.items()},
        {name: points for name, (_, points) in others.items()},
    )


@pytest.fixture(scope="module")
def truth(observed):
    """cam_from_world and camera of the query."""
    width, height = observed.original_sizes[2]
    K = observed.K_img(2)
    camera = pycolmap.Camera(model="SIMPLE_PINHOLE", width=width, height=height, params=[K[0, 0], K[0, 2], K[1, 2]])
    return observed.cam_from_world[2, :3].double().numpy(), camera


def with_focal(camera, factor):
    f, cx, cy = camera.params
    return pycolmap.Camera(
        model="SIMPLE_PINHOLE", width=camera.width, height=camera.height, params=[factor * f, cx, cy]
    )


def errors(pose, truth):
    """Degrees, and units (of a room 8 wide)."""
    turn = pose[:, :3] @ truth[:, :3].T
    centers = [-p[:, :3].T @ p[:, 3] for p in (pose, truth)]
    return np.degrees(np.arccos(min(1, (np.trace(turn) - 1) / 2))), np.linalg.norm(centers[0] - centers[1])


def test_matches_of_descriptors_are_mutual_and_right(features, observed):
    (own0, points0), (own1, points1) = (features[name] for name in observed.names[:2])
    rows = mutual_matches(own0, own1)
    assert len(rows) > 100
    assert (points0[rows[:, 0]] == points1[rows[:, 1]]).mean() > 0.95
    assert len(np.unique(rows[:, 1])) == len(rows)
    nothing = Features(np.zeros((0, 2)), np.zeros((0, 128), np.uint8))
    assert len(mutual_matches(own0, nothing)) == len(mutual_matches(nothing, own0)) == 0


def test_a_known_camera_is_found_and_held(structure, features, query, truth):
    pose, camera = truth
    matches = sparse_matches(structure, list(structure.features), features[query][0])
    found = camera_pose(matches, QueryCamera((camera.width, camera.height), known=camera), 8.0)
    assert found.num_inliers > 0.9 * len(matches) > 100
    assert found.camera.params.tolist() == camera.params.tolist()
    angle, distance = errors(found.cam_from_world, pose)
    assert angle < 0.1
    assert distance < 0.01


@pytest.mark.parametrize(("factor", "is_held"), [(1.0, True), (1.6, False)])
def test_a_guessed_camera_is_held_where_it_explains_as_much_and_freed_where_not(
    structure, features, query, truth, factor, is_held
):
    pose, camera = truth
    guess = with_focal(camera, factor)
    matches = sparse_matches(structure, list(structure.features), features[query][0])
    found = camera_pose(matches, QueryCamera((camera.width, camera.height), guesses=(guess,)), 8.0)
    assert (found.camera.mean_focal_length() == guess.mean_focal_length()) == is_held
    assert abs(found.camera.mean_focal_length() / camera.mean_focal_length() - 1) < 0.01
    assert errors(found.cam_from_world, pose)[1] < 0.03


def test_a_focal_is_found_where_nothing_is_known(structure, features, query, truth):
    pose, camera = truth
    matches = sparse_matches(structure, list(structure.features), features[query][0])
    found = camera_pose(matches, QueryCamera((camera.width, camera.height)), 8.0)
    assert abs(found.camera.mean_focal_length() / camera.mean_focal_length() - 1) < 0.01
    assert errors(found.cam_from_world, pose)[0] < 0.2


def test_guidance_refines_a_pose_that_is_degrees_off(structure, features, query, truth):
    pose, camera = truth
    turn = pycolmap.Rotation3d(np.radians([2.0, -1.5, 1.0])).matrix()
    start = scored(camera, turn @ pose, joined([]), 8.0)
    known = QueryCamera((camera.width, camera.height), known=camera)
    images = list(structure.features)
    found = refined_by_guidance(start, known, structure, images, features[query][0], 60.0, 4.0)
    assert errors(found.cam_from_world, pose)[0] < 0.1
    assert len(np.unique(found.matches.points_in_world, axis=0)) == len(found.matches)


def test_matches_by_chance_explain_nearly_nothing(truth):
    _, camera = truth
    random = np.random.default_rng(0)
    size = (camera.width, camera.height)
    matches = PointMatches(random.random((300, 2)) * size, random.normal(size=(300, 3)) * 4)
    found = camera_pose(matches, QueryCamera(size, known=camera), 8.0)
    assert found is None or found.num_inliers < 20
    assert camera_pose(joined([]), QueryCamera(size), 8.0) is None


def test_a_lens_is_part_of_the_camera(observed, truth):
    pose, camera = truth
    bent = pycolmap.Camera(
        model="SIMPLE_RADIAL", width=camera.width, height=camera.height, params=[*camera.params, -0.2]
    )
    points = observed.tracks.points_in_world.double().numpy()
    in_cam = points @ pose[:, :3].T + pose[:, 3]
    points, in_cam = points[in_cam[:, 2] > 0.5], in_cam[in_cam[:, 2] > 0.5]
    pixels = bent.img_from_cam(in_cam)
    inside = ((pixels > 0) & (pixels < (bent.width, bent.height))).all(axis=1)
    found = camera_pose(PointMatches(pixels[inside], points[inside]), QueryCamera((1, 1), known=bent), 2.0)
    assert errors(found.cam_from_world, pose)[1] < 1e-4
    assert torch.isfinite(torch.from_numpy(found.cam_from_world)).all()
