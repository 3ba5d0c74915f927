"""Keypoints carried through an aligned scene: where they land, what is matched near there, what is refuted."""

import numpy as np
import pytest
import torch
from observed import observed_scene, perturbed
from procedural import make_scene

from dust3r_sfm.alignment.guidance import guided_matches, merged, predict, refuted, trust


@pytest.fixture(scope="module")
def scene():
    return observed_scene(make_scene(5, (96, 128), pairs=[]), noise_px=0.3)


def matches(scene, image0, image1):
    """Pixels of the points that both images see."""
    tracks = scene.tracks
    rows = [torch.nonzero(tracks.image_indices == i)[:, 0] for i in (image0, image1)]
    both = np.intersect1d(*(tracks.point_indices[r].numpy() for r in rows))
    pixels = [
        dict(zip(tracks.point_indices[r].tolist(), tracks.keypoints[r].double().numpy(), strict=True)) for r in rows
    ]
    return tuple(np.array([of[point] for point in both]) for of in pixels)


def test_keypoints_land_where_the_other_image_shows_the_same_point(scene):
    keypoints0, keypoints1 = matches(scene, 1, 2)
    prediction = predict(scene, 1, 2, keypoints0)
    error = np.linalg.norm(prediction.pixels - keypoints1, axis=1)
    assert prediction.is_confident.mean() > 0.8
    assert np.median(error[prediction.is_confident]) < 4  # half a network pixel of 8 stored ones


def test_points_outside_the_other_image_or_hidden_there_are_not_confident(scene):
    behind = predict(scene, 0, 4, np.array([[-5.0, 10.0], [2000.0, 10.0]]))
    assert not behind.is_confident.any()
    height, width = scene.depth[1].shape
    covered = list(scene.depth)
    covered[2] = scene.depth[2] / 10  # something stands in front of everything in image 2
    hidden = predict(type(scene)(**{**vars(scene), "depth": tuple(covered)}), 1, 2, matches(scene, 1, 2)[0])
    assert not hidden.is_confident.any()


def test_matches_that_contradict_confident_geometry_are_refuted_and_no_others(scene):
    keypoints0, keypoints1 = matches(scene, 1, 2)
    wrong = np.arange(len(keypoints1)) % 3 == 0
    spoilt = np.where(wrong[:, None], keypoints1[::-1] + 200, keypoints1)
    prediction = predict(scene, 1, 2, keypoints0)
    found = refuted(prediction, spoilt, 60.0)
    assert found[wrong & prediction.is_confident].mean() > 0.95
    assert found[~wrong].mean() < 0.05
    assert not found[~prediction.is_confident].any()


def test_a_scene_is_believed_where_most_pairs_agree_and_not_where_they_do_not(scene):
    verified = {(i, j): matches(scene, i, j) for i in range(5) for j in range(i + 1, 5)}
    assert trust(scene, verified).believed
    one_wrong = dict(verified)
    one_wrong[1, 2] = (verified[1, 2][0], verified[1, 2][1][::-1])
    outvoted = trust(scene, one_wrong)
    assert outvoted.believed
    assert outvoted.num_agreeing < outvoted.num_pairs
    assert not trust(perturbed(scene, angle_deg=20.0, shift=0.5), verified).believed
    assert not trust(scene, {}).believed


def test_guided_matching_finds_what_repeats_elsewhere_and_the_ratio_test_loses(scene):
    keypoints0, keypoints1 = matches(scene, 1, 2)
    descriptors = descriptors_like(len(keypoints0))
    twins = keypoints1 + [400.0, 0.0]  # every structure stands twice in image 1
    all1, described1 = np.concatenate([keypoints1, twins]), np.concatenate([descriptors, descriptors])
    prediction = predict(scene, 1, 2, keypoints0)
    found = guided_matches(prediction, all1, descriptors, described1, 30.0)
    assert len(found) > 0.7 * prediction.is_confident.sum()
    assert (found[:, 0] == found[:, 1]).mean() > 0.98
    assert len(np.unique(found[:, 1])) == len(found)


def descriptors_like(number):
    generator = np.random.default_rng(0)
    raw = generator.random((number, 128)) ** 4
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True) * 512).round().astype(np.uint8)


def test_unlike_descriptors_near_the_prediction_do_not_match(scene):
    keypoints0, keypoints1 = matches(scene, 1, 2)
    descriptors = descriptors_like(2 * len(keypoints0))
    half = len(keypoints0)
    assert (
        len(guided_matches(predict(scene, 1, 2, keypoints0), keypoints1, descriptors[:half], descriptors[half:], 10.0))
        == 0
    )


def test_merging_keeps_each_keypoint_once():
    both = merged(np.array([[0, 1], [2, 3]]), np.array([[0, 5], [6, 3], [7, 8]]))
    assert both.tolist() == [[0, 1], [2, 3], [7, 8]]
