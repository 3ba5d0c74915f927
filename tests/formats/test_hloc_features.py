"""Features and matches in hloc's layout come in SIFT's place, and mistakes in them are named."""

import dataclasses

import h5py
import numpy as np
import pytest
from features import SIZES, true_matches, write_features, write_matches
from observed import observed_scene
from PIL import Image
from procedural import make_scene

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.hloc_features import read_feature_matches, read_features
from dust3r_sfm.pairs import Pair
from dust3r_sfm.sparse_features import check_both, import_features
from dust3r_sfm.views import load_views


def keypoints_of(number):
    return np.random.default_rng(number).uniform(1, 47, (number, 2))


def test_keypoints_get_the_half_pixel_and_descriptors_their_length(tmp_path):
    keypoints = {"a/0.jpg": keypoints_of(5), "b.jpg": keypoints_of(4)}
    descriptors = {name: np.eye(8)[: len(xy)] * 3 for name, xy in keypoints.items()}
    found = read_features(write_features(tmp_path / "f.h5", keypoints, descriptors=descriptors), SIZES)
    assert list(found.keypoints) == ["a/0.jpg", "b.jpg"]
    np.testing.assert_allclose(found.keypoints["b.jpg"], keypoints["b.jpg"], atol=1e-5)
    np.testing.assert_allclose(found.descriptors["a/0.jpg"], 512 * np.eye(8)[:5])


def test_pairs_of_folders_of_both_directions_and_of_old_keys_are_found_once(tmp_path):
    keypoints = {"a/0.jpg": keypoints_of(3), "b.jpg": keypoints_of(4), "c.jpg": keypoints_of(3)}
    groups = {"a-0.jpg/b.jpg": [2, -1, 3], "b.jpg/a-0.jpg": [-1, -1, 0, 2], "b.jpg_c.jpg": [-1, 2], "z.jpg/b.jpg": [0]}
    found = read_feature_matches(write_matches(tmp_path / "m.h5", groups), keypoints)
    assert {pair: rows.tolist() for pair, rows in found.items()} == {
        Pair("a/0.jpg", "b.jpg"): [[0, 2], [2, 3]],
        Pair("b.jpg", "c.jpg"): [[1, 2]],
    }


def test_files_of_other_photos_or_features_are_refused(tmp_path):
    keypoints = {"a/0.jpg": keypoints_of(3), "b.jpg": keypoints_of(4)}
    features = write_features(tmp_path / "f.h5", keypoints)
    with pytest.raises(InputError, match=r"are of a file of \(64, 48\) pixels, but it has \(128, 96\)"):
        read_features(features, {"b.jpg": (128, 96)})
    with pytest.raises(InputError, match="has no features of any of the 1 photos"):
        read_features(features, {"other.jpg": (64, 48)})
    with pytest.raises(InputError, match="a/0.jpg and b.jpg in .* belong to other features"):
        read_feature_matches(write_matches(tmp_path / "m.h5", {"a-0.jpg/b.jpg": [4]}), keypoints)
    with pytest.raises(InputError, match="has no matches of pairs of the 2 photos"):
        read_feature_matches(write_matches(tmp_path / "n.h5", {"x.jpg/y.jpg": [0]}), keypoints)
    with pytest.raises(InputError, match="cannot tell the images a-0.jpg and a/0.jpg apart"):
        read_feature_matches(tmp_path / "m.h5", {"a-0.jpg": keypoints_of(3), **keypoints})
    with h5py.File(tmp_path / "arrays.h5", "w") as file:
        file["points"], file["count"] = np.zeros((3, 3)), 3
    with pytest.raises(InputError, match="has no matches of pairs of the 2 photos"):
        read_feature_matches(tmp_path / "arrays.h5", keypoints)
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(InputError, match="cannot be read as hloc's features"):
        read_features(tmp_path / "text.h5", SIZES)
    with pytest.raises(InputError, match="there are no matches at"):
        read_feature_matches(tmp_path / "none.h5", keypoints)
    with pytest.raises(InputError, match="--features is given without --matches"):
        check_both(features, None)


def test_true_matches_are_verified_and_wrong_ones_are_not(tmp_path):
    procedural = make_scene(2, (96, 128), pairs=[])
    scene = observed_scene(procedural, width=256, num_points=60, noise_px=0.1)
    for i, name in enumerate(["b.jpg", "c.jpg"]):
        Image.new("RGB", scene.original_sizes[i], (80 * i, 0, 0)).save(tmp_path / name)
    scene = dataclasses.replace(scene, names=("b.jpg", "c.jpg"))
    keypoints, matches = true_matches(scene)
    matches0 = matches["b.jpg/c.jpg"]
    wrong = matches0.copy()
    wrong[::4] = np.roll(wrong, 7)[::4]
    sizes = dict.fromkeys(keypoints, scene.original_sizes[0])
    features = write_features(tmp_path / "f.h5", keypoints, sizes)
    found = import_features(
        tmp_path, load_views(tmp_path, 64), features, write_matches(tmp_path / "m.h5", {"b.jpg/c.jpg": wrong})
    )
    (geometry,) = found.geometries.values()
    inliers = geometry.inlier_matches
    is_true = matches0[inliers[:, 0]] == inliers[:, 1]
    assert len(inliers) > 0.6 * (matches0 >= 0).sum()
    assert is_true.mean() > 0.85  # of 0.75
