"""Reduced predictions: small on the disk, and alignment, depth and matches are those of whole ones."""

import os

import pytest
import torch
from procedural import make_scene

from dust3r_sfm.alignment.align import AlignConfig, align
from dust3r_sfm.formats.pointmaps import PointmapShards, shard_folder
from dust3r_sfm.match_dense import MatchConfig, match_dense
from dust3r_sfm.pairs import Pair, SomePredictions
from dust3r_sfm.reduction import evenly_together, reduced, reduction_of, together


@pytest.fixture(scope="module")
def scene():
    return make_scene(4, (96, 128), seed=4, noise=0.002)


@pytest.fixture(scope="module")
def predictions(scene, tmp_path_factory):
    """Whole and reduced ones, both from files."""
    folder = tmp_path_factory.mktemp("predictions")
    pairs = list(scene.predictions)
    reduction = reduction_of(pairs, scene.names, MatchConfig())
    views = {view.name: view for view in scene.views}
    kinds = {"whole": scene.predictions, "reduced": reduced(scene.predictions, views, reduction)}
    for name, kind in kinds.items():
        shards = PointmapShards(folder / f"{name}.h5")
        shards.add([str(pair) for pair in pairs], [kind[pair] for pair in pairs])
        kinds[name] = shards.finish(pairs, [str(pair) for pair in pairs])
    return kinds


def test_the_alignment_is_that_of_whole_predictions(scene, predictions):
    whole, small = (align(scene.views, predictions[kind]) for kind in ("whole", "reduced"))
    torch.testing.assert_close(small.cam_from_world, whole.cam_from_world, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(small.K, whole.K, rtol=2e-3, atol=0.1)


def test_depth_is_as_near_the_truth_as_that_of_whole_predictions(scene, predictions):
    errors = {}
    for kind in ("whole", "reduced"):
        found = align(scene.views, predictions[kind])
        ratios = [d / true for d, true in zip(found.depth, scene.depth, strict=True)]
        scale = torch.cat([ratio[ratio > 0] for ratio in ratios]).median()
        assert all((ratio > 0).float().mean() > 0.97 for ratio in ratios)
        errors[kind] = torch.cat([(ratio / scale - 1).abs().flatten() for ratio in ratios])
    assert errors["reduced"].median() < 1.5 * errors["whole"].median() + 1e-3
    assert errors["reduced"].quantile(0.9) < 0.02


def test_fewer_samples_than_are_kept_align_too(scene, predictions):
    found = align(scene.views, predictions["reduced"], AlignConfig(max_samples=300))
    whole = align(scene.views, predictions["whole"])
    torch.testing.assert_close(found.cam_from_world, whole.cam_from_world, rtol=0.02, atol=0.02)


def test_matches_are_those_of_whole_predictions(scene, predictions):
    expected = match_dense(scene.views, scene.predictions)
    found = match_dense(scene.views, predictions["reduced"])
    assert list(found) == list(expected)
    for pair, matches in found.items():
        torch.testing.assert_close(matches.keypoints0, expected[pair].keypoints0, rtol=0, atol=1 / 64)
        torch.testing.assert_close(matches.keypoints1, expected[pair].keypoints1, rtol=0, atol=1 / 64)
        torch.testing.assert_close(matches.scores, expected[pair].scores, rtol=1e-3, atol=0)


def test_matches_stay_where_only_one_direction_is_used(scene, predictions):
    pairs = list(predictions["reduced"])
    for chosen in (pairs[0], pairs[0].reversed()):
        (found,) = match_dense(scene.views, SomePredictions(predictions["reduced"], [chosen])).items()
        assert found[0] == chosen
        assert len(found[1].scores) > 500


def test_a_pair_of_512_by_384_takes_less_than_200_kb(tmp_path):
    """On average over an exhaustive graph of 16 images: every fifth pair of an image keeps its depth."""
    scene = make_scene(2, (384, 512), noise=0.002)
    views = {view.name: view for view in scene.views}
    reduction = reduction_of(list(scene.predictions), scene.names, MatchConfig())
    assert reduction.depth_pairs == set(scene.predictions)
    kept = reduced(scene.predictions, views, reduction)
    shards = PointmapShards(tmp_path / "kept.h5")
    shards.add(list(map(str, kept)), list(kept.values()))
    (shard,) = shard_folder(tmp_path / "kept.h5").glob("*.h5")
    depth_bytes = 384 * 512 * 3
    assert os.path.getsize(shard) / len(kept) - depth_bytes + depth_bytes / 5 < 200_000


def test_depth_is_kept_of_one_pair_in_five_with_the_nearest_names():
    names = [f"{i:02d}" for i in range(30)]
    pairs = [Pair(a, b) for a in names for b in names if a != b]
    chosen = reduction_of(pairs, names, MatchConfig()).depth_pairs
    assert {pair.name1 for pair in chosen if pair.name0 == "10"} == {"08", "09", "11", "12"}
    assert reduction_of([Pair("a", "b")], ["a", "b"], MatchConfig()).depth_pairs == {Pair("a", "b")}


def test_both_directions_of_a_pair_share_a_shard():
    pairs = [Pair(a, b) for a, b in ("ab", "ba", "ac", "cb", "bc", "ca", "ac")]
    assert together(pairs, 1) == [pairs[:2], pairs[2:3], pairs[3:5], pairs[5:]]
    assert together([], 4) == []


def test_shards_are_as_equal_as_pairs_allow():
    pairs = [pair for i in range(120) for pair in (Pair("a", f"{i}"), Pair(f"{i}", "a"))]
    assert [len(shard) for shard in evenly_together(pairs, 32)] == [30] * 8
    assert [len(shard) for shard in evenly_together(pairs[:66], 32)] == [22] * 3
    assert sum(evenly_together(pairs[:67], 32), []) == pairs[:67]
    assert evenly_together([], 32) == []
