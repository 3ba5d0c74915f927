"""SIFT by COLMAP, on photos of one wall."""

import numpy as np
import pytest
from PIL import Image

from dust3r_sfm.pairs import Pair
from dust3r_sfm.sparse_features import extract_sift

NAMES = ["a b/my first photo.png", "my second  photo.png", "third.png"]


@pytest.fixture
def photos(tmp_path):
    spots = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8))
    wall = spots.resize((400, 300), Image.Resampling.BICUBIC)
    for shift, name in enumerate(NAMES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        wall.crop((10 * shift, 5 * shift, 300 + 10 * shift, 250 + 5 * shift)).save(path)
    return tmp_path / "photos"


def test_listed_pairs_are_matched_whatever_their_names(photos, tmp_path):
    pairs = [Pair(NAMES[1], NAMES[0]), Pair(NAMES[0], NAMES[1]), Pair(NAMES[1], NAMES[2])]
    sparse = extract_sift(photos, NAMES, pairs, tmp_path / "features.db")
    assert sorted(sparse.keypoints) == sorted(NAMES)
    assert sorted(tuple(sorted(pair)) for pair in sparse.geometries) == [(NAMES[0], NAMES[1]), (NAMES[1], NAMES[2])]
    for pair, geometry in sparse.geometries.items():
        ends = [sparse.keypoints[name][geometry.inlier_matches[:, side]] for side, name in enumerate(pair)]
        shift = NAMES.index(pair.name0) - NAMES.index(pair.name1)
        assert np.median(ends[1] - ends[0], axis=0) == pytest.approx([10 * shift, 5 * shift], abs=0.2)
