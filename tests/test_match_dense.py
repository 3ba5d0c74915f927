import dataclasses
from importlib import import_module

import pytest
import torch
from procedural import make_scene

from dust3r_sfm.anchor_matches import anchor_pixels
from dust3r_sfm.engine import EngineConfig
from dust3r_sfm.formats.matches import read_matches
from dust3r_sfm.formats.pointmaps import PointmapShards
from dust3r_sfm.match_dense import MatchConfig, _Matcher, main, match_dense, match_pair
from dust3r_sfm.pairs import Pair, PairPrediction

SIZE = (96, 128)


@pytest.fixture(scope="module")
def scene():
    return make_scene(3, SIZE, seed=3)


@pytest.fixture(scope="module")
def matches(scene):
    return match_dense(scene.views, scene.predictions)


def errors_from_anchors(scene, pair, found):
    """Distances in pixels of the matches of image 0's anchors from where camera 1 sees the anchors' true points."""
    i, j = (scene.names.index(name) for name in pair)
    anchors = anchor_pixels(*SIZE, MatchConfig())
    grid = {(float(c) + 0.5, float(r) + 0.5) for r, c in anchors}
    at_anchor = torch.tensor([tuple(k.tolist()) in grid for k in found.keypoints0])
    x, y = found.keypoints0[at_anchor].long().unbind(-1)
    pose = scene.cam_from_world[j]
    projected = (scene.points_in_world[i][y, x] @ pose[:3, :3].T + pose[:3, 3]) @ scene.K[j].T
    return (projected[:, :2] / projected[:, 2:] - found.keypoints1[at_anchor]).norm(dim=-1)


def test_every_undirected_pair_is_matched_once(scene, matches):
    assert {frozenset(pair) for pair in matches} == {frozenset(pair) for pair in scene.predictions}
    assert len(matches) == 3


def test_matches_of_exact_pointmaps_are_exact_to_a_fraction_of_a_pixel(scene, matches):
    for pair, found in matches.items():
        errors = errors_from_anchors(scene, pair, found)
        assert len(errors) > 200
        assert errors.median() < 0.02
        assert (errors < 1).double().mean() > 0.95


def test_an_anchor_is_the_same_keypoint_in_all_pairs_of_its_image(scene, matches):
    of_image0 = [
        {tuple(k) for k in found.keypoints0.tolist()} for pair, found in matches.items() if pair[0] == scene.names[0]
    ]
    assert len(of_image0) == 2
    assert len(of_image0[0] & of_image0[1]) > 200


def test_matches_found_in_both_directions_score_higher(scene):
    pair = Pair(scene.names[0], scene.names[1])
    forward, backward = scene.predictions[pair], scene.predictions[pair.reversed()]
    one, both = match_pair(forward), match_pair(forward, reverse=backward)
    assert len(both.scores) >= len(one.scores)
    assert both.scores.median() == pytest.approx(2 * one.scores.median().item(), rel=0.01)


def test_a_useless_reverse_prediction_does_not_move_matches(scene):
    pair = Pair(scene.names[0], scene.names[1])
    noise = torch.randn(2, *SIZE, 3, generator=torch.Generator().manual_seed(0))
    useless = PairPrediction(noise[0], torch.ones(SIZE), noise[1], torch.ones(SIZE))
    alone = match_pair(scene.predictions[pair])
    found = match_pair(scene.predictions[pair], reverse=useless)
    partner = {tuple(k0): k1 for k0, k1 in zip(found.keypoints0.tolist(), found.keypoints1.tolist(), strict=True)}
    moved = [
        (torch.tensor(partner[tuple(k0)]) - torch.tensor(k1)).norm().item()
        for k0, k1 in zip(alone.keypoints0.tolist(), alone.keypoints1.tolist(), strict=True)
        if tuple(k0) in partner
    ]
    assert len(moved) > 500
    assert torch.tensor(moved).quantile(0.99) < 0.5


def test_masked_border_and_infinite_pixels_do_not_match(scene):
    pair = Pair(scene.names[0], scene.names[1])
    prediction = scene.predictions[pair]
    points1 = prediction.pointmap1_in_cam0.clone()
    points1[:, 80:] = torch.nan
    mask = torch.ones(SIZE, dtype=torch.bool)
    mask[:, :60] = False
    view0 = dataclasses.replace(scene.views[0], mask=mask)
    found = match_pair(dataclasses.replace(prediction, pointmap1_in_cam0=points1), view0, scene.views[1])
    assert len(found.scores) > 20
    assert (found.keypoints0[:, 0] >= 60).all()
    assert (found.keypoints1[:, 0] <= 80).all()
    for keypoints in (found.keypoints0, found.keypoints1):
        assert (keypoints >= 3).all()
        assert (keypoints <= torch.tensor([SIZE[1] - 3, SIZE[0] - 3])).all()


def test_pixels_of_low_confidence_do_not_match(scene):
    pair = Pair(scene.names[0], scene.names[1])
    confidence = torch.full(SIZE, 5.0)
    confidence[:, :64] = 1.01
    found = match_pair(dataclasses.replace(scene.predictions[pair], confidence0=confidence))
    assert len(found.scores) > 20
    assert (found.keypoints0[:, 0] >= 64).all()


def test_surfaces_side_by_side_have_almost_no_matches():
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    left = torch.stack([x, y, torch.full_like(x, 100)], dim=-1)
    right = left + torch.tensor([140.0, 0, 0])
    ones = torch.full(SIZE, 3.0)
    assert len(match_pair(PairPrediction(left, ones, right, ones)).scores) < 100


def test_the_back_of_a_thin_board_does_not_match_its_front():
    """Each is the other's nearest, and yet no pixel sees both: the rest of the pair shows how near is near."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    front = torch.stack([x, y, torch.full_like(x, 100)], dim=-1)
    back = front.clone()
    back[:, 100:, 2] += 6
    ones = torch.full(SIZE, 3.0)
    found = match_pair(PairPrediction(front, ones, back, ones))
    assert len(found.scores) > 500
    assert (found.keypoints0[:, 0] < 101).all()


@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_a_prediction_without_any_surface_has_no_matches(value):
    points, confidence = torch.full((*SIZE, 3), value), torch.ones(SIZE)
    found = match_pair(PairPrediction(points, confidence, points, confidence))
    assert found.keypoints0.isfinite().all()
    assert len(found.scores) == 0 or value == 0.0


def test_images_of_different_shapes_match():
    scene = make_scene(2, SIZE, seed=1, mix_orientations=True)
    (pair, found), *_ = match_dense(scene.views, scene.predictions).items()
    assert len(found.scores) > 200
    assert found.keypoints1[:, 1].max() > SIZE[0]


def test_the_stage_writes_what_the_function_returns(scene, tmp_path):
    pairs = list(scene.predictions)
    shards = PointmapShards(tmp_path / "pointmaps.h5")
    shards.add([str(i) for i in range(len(pairs))], list(scene.predictions.values()))
    predictions = shards.finish(pairs, [str(i) for i in range(len(pairs))])
    expected = match_dense(scene.views, predictions)
    predictions.close()
    main(tmp_path / "pointmaps.h5", tmp_path / "new" / "matches.h5")
    written = read_matches(tmp_path / "new" / "matches.h5")
    assert_same(written, expected)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for pair, matches in expected.items():
        assert torch.equal(found[pair].keypoints1, matches.keypoints1)


def test_shares_are_put_together_and_what_is_there_is_not_matched_again(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("dust3r_sfm.match_dense"), "SHARD_PAIRS", 1)
    asked, match, output = [], _Matcher.match, tmp_path / "matches.h5"
    monkeypatch.setattr(_Matcher, "match", lambda self, pair: asked.append(pair) or match(self, pair))
    shards = PointmapShards(tmp_path / "pointmaps.h5")
    keys = [str(i) for i in range(len(scene.predictions))]
    shards.add(keys, list(scene.predictions.values()))
    with shards.finish(list(scene.predictions), keys) as predictions:
        expected = match_dense(scene.views, predictions)
        whole, config = list(expected), MatchConfig()
        first = match_dense([], predictions, config, output, EngineConfig(shard="1/2"))
        assert not output.exists()
        assert_same(first, {pair: expected[pair] for pair in whole[:1]})
        asked.clear()
        assert_same(match_dense([], predictions, config, output), expected)
        assert asked == whole[1:]
        assert_same(match_dense([], predictions, config, output), expected)
        assert asked == whole[1:]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["matches.h5", "pointmaps.h5", "pointmaps.shards"]
        mask = torch.ones(SIZE, dtype=torch.bool)
        view = dataclasses.replace(scene.views[0], mask=mask)
        match_dense([view], predictions, config, output)
        assert asked == whole[1:] + whole[:2]
