"""What stands in for calls that the older pycolmap lacks does the same as the newer one's."""

import numpy as np
import pycolmap
import pytest
from observed import observed_scene
from PIL import Image
from procedural import make_scene

from dust3r_sfm.colmap_versions import is_valid, matched, put_back, read_descriptors
from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.sparse_features import extract_sift

NAMES = ["0.png", "1.png"]


@pytest.fixture(scope="module")
def model():
    return colmap_from_scene(observed_scene(make_scene(3, (48, 64), pairs=[]), num_points=50))


def test_descriptors_are_matched_as_colmap_matches_them(tmp_path):
    generator = np.random.default_rng(0)
    spots = Image.fromarray(generator.integers(0, 256, (60, 80), dtype=np.uint8))
    wall = np.asarray(spots.resize((800, 600), Image.Resampling.BICUBIC), dtype=float)
    for shift, name in enumerate(NAMES):
        noisy = wall[10 * shift : 500 + 10 * shift, :700] + generator.normal(0, 12, (500, 700))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / name)
    extract_sift(tmp_path, NAMES, None, tmp_path / "features.db")
    with pycolmap.Database.open(tmp_path / "features.db") as database:
        ids = [image.image_id for image in sorted(database.read_all_images(), key=lambda image: image.name)]
        theirs = {tuple(row) for row in np.asarray(database.read_matches(*ids)).tolist()}
        ours = {tuple(row) for row in matched(*(read_descriptors(database, i) for i in ids)).tolist()}
    assert len(theirs) > 200
    assert len(ours & theirs) > 0.98 * len(ours | theirs)


def test_descriptors_without_a_second_one_to_compare_with_have_no_match():
    few, many = np.full((1, 128), 45, dtype=np.uint8), np.full((5, 128), 45, dtype=np.uint8)
    assert matched(few, many).shape == matched(many, few[:0]).shape == (0, 2)


def test_a_continued_model_is_put_back_where_the_first_was(model):
    moved, fewer = pycolmap.Reconstruction(model), pycolmap.Reconstruction(model)
    fewer.deregister_frame(fewer.image(3).frame_id)
    moved.transform(pycolmap.Sim3d(3.0, pycolmap.Rotation3d(), np.array([1.0, -2.0, 5.0])))
    put_back(moved, fewer)
    for i in (1, 2, 3):
        pose, truth = (m.image(i).cam_from_world().matrix() for m in (moved, model))
        np.testing.assert_allclose(pose, truth, atol=1e-9)


def test_a_track_of_a_keypoint_that_another_point_has_is_not_valid(model):
    broken = pycolmap.Reconstruction(model)
    assert is_valid(broken)
    first, second = sorted(broken.points3D)[:2]
    broken.points3D[first].track = broken.points3D[second].track
    assert not is_valid(broken)
