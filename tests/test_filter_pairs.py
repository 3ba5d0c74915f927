import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from aligned import true_scene
from procedural import make_scene

from dust3r_sfm.errors import InputError, ReconstructionError
from dust3r_sfm.filter_pairs import FilterConfig, decide_pairs, filter_pairs, keep_pairs, main, pair_score, with_doubts
from dust3r_sfm.formats.pairs import read_pairs
from dust3r_sfm.geometry.transforms import inverse, rotation_from_rotvec
from dust3r_sfm.graph import connected_components
from dust3r_sfm.pairs import Pair, PairPrediction

PLAIN = FilterConfig(min_confidence=3.0, min_bridge_confidence=1.5)


def prediction(confidence0, confidence1=None):
    """Constant confidences over maps of two sizes; the pointmaps do not matter here."""
    confidence1 = confidence0 if confidence1 is None else confidence1
    return PairPrediction(
        torch.ones(4, 6, 3), torch.full((4, 6), confidence0), torch.ones(5, 3, 3), torch.full((5, 3), confidence1)
    )


def both_ways(scores):
    pairs = {Pair(*names): score for names, score in scores.items()}
    return {direction: prediction(score) for pair, score in pairs.items() for direction in (pair, pair.reversed())}


def kept(decisions):
    return {decision.pair for decision in decisions if decision.kept}


def test_pairs_that_the_alignment_contradicts_are_dropped_with_its_reason():
    decisions = decide_pairs(both_ways({"ab": 5.0, "bc": 4.0}), list("abc"), PLAIN)
    truth = true_scene(make_scene(2, (8, 8), pairs=[]))
    scene = replace(truth, doubts={Pair("b", "a"): "contradicts the others"})
    judged = with_doubts(decisions, [truth, scene])
    assert kept(judged) == kept(decisions) - {Pair("b", "a")}
    assert judged[1].reason == "contradicts the others"


def test_pairs_below_the_threshold_are_dropped_and_each_has_its_reason():
    predictions = both_ways({"ab": 5.0, "bc": 4.0, "ac": 2.0})
    decisions = decide_pairs(predictions, list("abc"), PLAIN)
    assert [decision.pair for decision in decisions] == list(predictions)
    assert kept(decisions) == {Pair(*names) for names in ("ab", "ba", "bc", "cb")}
    by_pair = {decision.pair: decision for decision in decisions}
    assert by_pair[Pair("a", "b")].reason == "confidence 5.000 reaches 3.000"
    assert by_pair[Pair("a", "c")].reason == "confidence 2.000 is below 3.000"
    assert by_pair[Pair("a", "c")].score == pytest.approx(2.0)


def test_the_best_weak_pair_between_two_parts_is_kept_in_both_directions():
    predictions = both_ways({"ab": 5.0, "cd": 5.0, "bc": 2.0, "ad": 1.9})
    decisions = decide_pairs(predictions, list("abcd"), PLAIN)
    assert kept(decisions) == {Pair(*names) for names in ("ab", "ba", "cd", "dc", "bc", "cb")}
    bridge = next(decision for decision in decisions if decision.pair == Pair("b", "c"))
    assert bridge.reason == "confidence 2.000 is below 3.000, but no better pairs connect these parts"


def test_parts_that_only_noise_connects_stay_apart():
    predictions = both_ways({"ab": 5.0, "cd": 5.0, "bc": 1.4, "ad": 1.2})
    decisions = decide_pairs(predictions, list("abcd"), PLAIN)
    assert connected_components(list("abcd"), kept(decisions)) == [["a", "b"], ["c", "d"]]
    assert "is below 1.500" in next(d.reason for d in decisions if d.pair == Pair("b", "c"))


def test_one_direction_is_enough_and_each_is_judged_on_its_own():
    predictions = {Pair("a", "b"): prediction(5.0), Pair("c", "b"): prediction(4.0), Pair("b", "c"): prediction(2.0)}
    decisions = decide_pairs(predictions, list("abc"), PLAIN)
    assert kept(decisions) == {Pair("a", "b"), Pair("c", "b")}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("side", [0, 1])
def test_confidences_that_are_no_numbers_or_zero_drop_the_pair_with_the_image_named(value, side):
    broken = prediction(9.0)
    confidence = (broken.confidence0, broken.confidence1)[side]
    confidence[...] = value
    predictions = {Pair("a", "b"): broken, Pair("b", "c"): prediction(5.0), Pair("a", "c"): prediction(5.0)}
    decision = decide_pairs(predictions, list("abc"), PLAIN)[0]
    assert not decision.kept
    assert decision.score == 0.0
    assert decision.reason == f"confidences of {'ab'[side]} are {'all zero' if value == 0 else 'not finite'}"


def test_a_point_that_is_no_number_drops_the_pair():
    broken = prediction(9.0)
    broken.pointmap1_in_cam0[2, 1, 0] = float("nan")
    decisions = decide_pairs({Pair("a", "b"): broken, Pair("b", "a"): prediction(5.0)}, ["a", "b"], PLAIN)
    assert [decision.kept for decision in decisions] == [False, True]
    assert decisions[0].reason == "points of b are not finite"


def test_the_score_is_the_typical_confidence_of_the_weaker_image():
    assert pair_score(prediction(4.0, 4.0)) == pytest.approx(4.0)
    assert pair_score(prediction(100.0, 1.0)) == pytest.approx(1.0)
    half_seen = prediction(4.0, 4.0)
    half_seen.confidence0[:2] = 1.0
    assert pair_score(half_seen) == pytest.approx(2.0)


def test_a_few_pixels_of_huge_confidence_do_not_carry_a_pair():
    spiked = prediction(1.1)
    spiked.confidence0[0, 0] = spiked.confidence1[0, 0] = 1e4
    assert pair_score(spiked) < 2.5


@pytest.mark.parametrize("level", [1.2, 1.5, 3.0, 10.0, 60.0])
def test_without_thresholds_the_level_of_a_models_confidences_does_not_matter(level):
    """Twelve images in two rooms: pairs within a room vary about the level, those between know next to nothing."""
    generator = np.random.default_rng(0)
    names = [f"{i:02d}" for i in range(12)]
    predictions = {}
    for i, j in itertools.permutations(range(12), 2):
        share = generator.uniform(0.5, 1.2) if (i < 6) == (j < 6) else generator.uniform(0, 0.05)
        predictions[Pair(names[i], names[j])] = prediction(level**share)
    same_room = {pair for pair in predictions if (pair.name0 < "06") == (pair.name1 < "06")}
    assert kept(decide_pairs(predictions, names)) == same_room


def test_a_chain_of_weak_but_real_pairs_is_held_together_without_thresholds():
    names = list("abcdef")
    predictions = both_ways({"ab": 4.0, "bc": 4.0, "cd": 1.3, "de": 4.0, "ef": 4.0, "af": 1.1, "ad": 1.02})
    decisions = decide_pairs(predictions, names)
    assert connected_components(names, kept(decisions)) == [names]
    assert Pair("a", "f") not in kept(decisions)


def test_predictions_of_unknown_images_are_an_error():
    with pytest.raises(InputError, match="not there: c"):
        decide_pairs({Pair("a", "c"): prediction(2.0)}, ["a", "b"])


def test_no_pair_worth_aligning_is_an_error_with_the_best_score():
    predictions = both_ways({"ab": 1.2, "bc": 1.1})
    with pytest.raises(ReconstructionError, match=r"none of 4 pairs .* best has confidence 1.20"):
        filter_pairs(predictions, PLAIN)


class ReadsNoted(dict):
    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, pair):
        self.read.add(pair)
        return super().__getitem__(pair)


def test_kept_predictions_are_read_only_when_asked_for_and_others_are_gone():
    predictions = ReadsNoted(both_ways({"ab": 5.0, "bc": 4.0, "ac": 2.0}))
    decisions = decide_pairs(predictions, list("abc"), PLAIN)
    predictions.read.clear()
    subset = keep_pairs(predictions, decisions)
    assert list(subset) == [Pair(*names) for names in ("ab", "ba", "bc", "cb")]
    assert len(subset) == 4
    assert not predictions.read - {Pair("a", "b")}  # the type checker looks at the first one
    assert subset[Pair("c", "b")].confidence0[0, 0] == 4.0
    assert predictions.read >= {Pair("c", "b")}
    assert Pair("a", "c") not in subset
    with pytest.raises(KeyError):
        subset[Pair("a", "c")]


def test_the_stage_writes_the_kept_pairs_and_says_what_stays_connected(tmp_path, caplog):
    from dust3r_sfm.formats.pointmaps import PointmapShards

    predictions = both_ways({"ab": 5.0, "bc": 4.0, "ac": 2.0, "de": 6.0})
    shards = PointmapShards(tmp_path / "pointmaps.h5")
    keys = ["".join(pair) for pair in predictions]
    shards.add(keys, list(predictions.values()))
    shards.finish(list(predictions), keys).close()
    with caplog.at_level(logging.INFO, logger="dust3r_sfm"):
        main(tmp_path / "pointmaps.h5", tmp_path / "new" / "pairs.txt", PLAIN)
    expected = [Pair(*names) for names in ("ab", "ba", "bc", "cb", "de", "ed")]
    assert read_pairs(tmp_path / "new" / "pairs.txt", list("abcde")) == expected
    assert "Kept 6 of 8 pairs; 3 of 5 images stay connected." in caplog.text


def test_the_stage_says_what_to_run_where_there_are_no_predictions(tmp_path):
    with pytest.raises(InputError, match="run infer_pairs first"):
        main(tmp_path / "none.h5", tmp_path / "pairs.txt")


def moved(prediction, cam0_from_cam0):
    """The same with image 1 elsewhere, as sure as before."""
    in_cam0 = prediction.pointmap1_in_cam0 @ cam0_from_cam0[:3, :3].T + cam0_from_cam0[:3, 3]
    return replace(prediction, pointmap1_in_cam0=in_cam0)


@pytest.fixture(scope="module")
def lookalike():
    """Six photos, predictions of little noise, and a pair whose directions agree on a wrong place of image 3."""
    scene = make_scene(6, (24, 32), noise=0.01)
    wrong = Pair(scene.names[0], scene.names[3])
    turn = torch.eye(4)
    turn[:3, :3] = rotation_from_rotvec(torch.tensor([0.0, 1.5, 0.0]))
    cam3_from_cam0 = scene.cam_from_world[3] @ inverse(scene.cam_from_world[0])
    back = cam3_from_cam0 @ inverse(turn) @ inverse(cam3_from_cam0)
    back[:3, 3] *= scene.scales[wrong.reversed()]
    predictions = dict(scene.predictions)
    for pair, move in ((wrong, turn), (wrong.reversed(), back)):
        predictions[pair] = moved(predictions[pair], move)
    return scene, predictions, wrong


def test_a_sure_pair_that_contradicts_the_others_is_dropped_with_the_reason(lookalike):
    scene, predictions, wrong = lookalike
    decisions = {d.pair: d for d in decide_pairs(predictions, scene.names, FilterConfig(min_confidence=1.5))}
    assert {pair for pair, decision in decisions.items() if not decision.kept} == {wrong, wrong.reversed()}
    assert "it contradicts the other pairs: rotation" in decisions[wrong].reason
    assert "0 of 4 triangles agree" in decisions[wrong].reason
    assert "3 of 4 triangles agree" in decisions[Pair(scene.names[0], scene.names[1])].reason
    keep = FilterConfig(min_confidence=1.5, contradictions="keep")
    assert all(decision.kept for decision in decide_pairs(predictions, scene.names, keep))


def test_verified_matches_tell_which_of_two_stories_is_true(lookalike):
    """A chain 0-1-2 and its end 3, which one pair puts beside 2 and another, as sure, elsewhere beside 0."""
    scene, predictions, wrong = lookalike
    names = scene.names[:4]
    true = [Pair(names[a], names[b]) for a, b in ((0, 1), (1, 2), (2, 3))]
    some = {d: predictions[d] for pair in [*true, wrong] for d in (pair, pair.reversed())}
    matches = dict.fromkeys(true, 200)
    decisions = decide_pairs(some, names, FilterConfig(min_confidence=1.5), matches)
    assert {d.pair for d in decisions if not d.kept} == {wrong, wrong.reversed()}
    assert "200 verified matches" in next(d.reason for d in decisions if d.pair == true[0])
    matches[wrong], matches[true[1]] = 200, 0
    decisions = decide_pairs(some, names, FilterConfig(min_confidence=1.5), matches)
    assert {d.pair for d in decisions if not d.kept} == {true[1], true[1].reversed()}


def test_a_contradicting_pair_stays_where_an_image_has_no_other(lookalike):
    scene, predictions, wrong = lookalike
    some = {p: x for p, x in predictions.items() if scene.names[3] not in p or p in (wrong, wrong.reversed())}
    decisions = decide_pairs(some, scene.names, FilterConfig(min_confidence=1.5))
    assert all(decision.kept for decision in decisions)
