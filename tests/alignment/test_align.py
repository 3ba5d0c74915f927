"""Alignment against the truth of procedural scenes."""

from dataclasses import replace

import pytest
import torch
from procedural import STORED_PER_NET, ProceduralScene, make_scene

from dust3r_sfm.alignment.align import AlignConfig, align, align_components
from dust3r_sfm.errors import InputError, ReconstructionError
from dust3r_sfm.geometry.metrics import all_pairs_errors_deg
from dust3r_sfm.geometry.registration import register_similarity
from dust3r_sfm.geometry.transforms import camera_center
from dust3r_sfm.pairs import Pair, PairPrediction


@pytest.fixture(scope="module")
def exact():
    return make_scene(5, (48, 64), vary_focal=True)


@pytest.fixture(scope="module")
def noisy():
    return make_scene(5, (48, 64), noise=0.01, seed=2)


def indices(scene, truth):
    return [truth.names.index(name) for name in scene.names]


def rotation_error_deg(scene, truth: ProceduralScene) -> float:
    """Largest over all pairs of images."""
    return float(
        all_pairs_errors_deg(scene.cam_from_world.double(), truth.cam_from_world[indices(scene, truth)].double())[
            0
        ].max()
    )


def center_error(scene, truth: ProceduralScene) -> float:
    """Largest error of a centre after the best similarity, relative to the size of the scene."""
    centers, true_centers = camera_center(scene.cam_from_world).double(), truth.centers[indices(scene, truth)].double()
    scale, rotation, translation = register_similarity(centers, true_centers)
    return float((scale * centers @ rotation.mT + translation - true_centers).norm(dim=-1).max()) / truth.size


def focal_errors(scene, truth: ProceduralScene):
    return (scene.K[:, 0, 0] / truth.K[indices(scene, truth), 0, 0] - 1).abs()


def depth_errors(scene, truth: ProceduralScene):
    """Median relative error of each image's depths, up to the one scale of the scene."""
    ratios = [depth / truth.depth[i] for depth, i in zip(scene.depth, indices(scene, truth), strict=True)]
    scale = torch.cat([ratio.flatten() for ratio in ratios]).median()
    return torch.stack([(ratio / scale - 1).abs().median() for ratio in ratios])


def with_known(truth: ProceduralScene, poses=(), focals=()):
    """The views with the true poses and intrinsics of some."""
    stored_from_net = torch.diag(torch.tensor([STORED_PER_NET, STORED_PER_NET, 1.0]))
    return [
        replace(
            view,
            known_cam_from_world=truth.cam_from_world[i] if i in poses else None,
            known_K=stored_from_net @ truth.K[i] if i in focals else None,
        )
        for i, view in enumerate(truth.views)
    ]


def pick(predictions, keep):
    return {pair: prediction for pair, prediction in predictions.items() if keep(pair)}


def test_exact_predictions_give_the_scene_whatever_scale_each_pair_has(exact):
    scene = align(exact.views, exact.predictions)
    assert set(scene.names) == set(exact.names)
    assert rotation_error_deg(scene, exact) < 0.05
    assert center_error(scene, exact) < 1e-3
    assert focal_errors(scene, exact).max() < 1e-3
    assert depth_errors(scene, exact).max() < 1e-3


def test_one_percent_of_noise_moves_nothing_by_much(noisy):
    scene = align(noisy.views, noisy.predictions)
    assert rotation_error_deg(scene, noisy) < 0.5
    assert center_error(scene, noisy) < 0.01
    assert depth_errors(scene, noisy).max() < 0.01


def test_ten_percent_of_noise_does_not_shrink_the_scene():
    truth = make_scene(5, (48, 64), noise=0.1)
    scene = align(truth.views, truth.predictions)
    assert rotation_error_deg(scene, truth) < 3
    assert focal_errors(scene, truth).max() < 0.1
    assert depth_errors(scene, truth).max() < 0.1


def test_without_known_poses_the_world_is_the_camera_with_most_pairs_and_the_median_depth_is_one(exact):
    middle = exact.names[2]
    scene = align(exact.views, pick(exact.predictions, lambda pair: middle in pair))
    torch.testing.assert_close(scene.cam_from_world[scene.names.index(middle)], torch.eye(4))
    assert torch.cat([depth.flatten() for depth in scene.depth]).median() == pytest.approx(1, rel=1e-4)
    assert rotation_error_deg(scene, exact) < 0.05


def test_portrait_and_landscape_views_of_any_focal_align_together():
    truth = make_scene(4, (48, 64), vary_focal=True, mix_orientations=True, noise=0.01)
    scene = align(truth.views, truth.predictions)
    assert [tuple(depth.shape) for depth in scene.depth] == [(48, 64), (64, 48)] * 2
    assert rotation_error_deg(scene, truth) < 0.5
    assert focal_errors(scene, truth).max() < 0.02


def test_a_chain_of_one_direction_is_enough(exact):
    # The last image is never the camera of a frame: its focal and pose come from its points in another's.
    names = exact.names
    chain = pick(exact.predictions, lambda pair: names.index(pair.name1) == names.index(pair.name0) + 1)
    scene = align(exact.views, chain)
    assert len(scene.names) == 5
    assert rotation_error_deg(scene, exact) < 0.1
    assert focal_errors(scene, exact).max() < 2e-3


def test_one_pair_makes_a_scene(exact):
    pair = Pair(exact.names[3], exact.names[1])
    scene = align(exact.views, {pair: exact.predictions[pair]})
    assert set(scene.names) == set(pair)
    assert rotation_error_deg(scene, exact) < 0.05
    assert focal_errors(scene, exact).max() < 1e-3


@pytest.mark.timeout(60)
def test_a_graph_in_parts_ends_and_gives_a_scene_for_each_part(exact):
    names = exact.names
    parts = [set(names[2:]), set(names[:2])]
    inside = pick(exact.predictions, lambda pair: any(set(pair) <= part for part in parts))
    scenes = align_components(exact.views, inside)
    assert [set(scene.names) for scene in scenes] == parts
    assert all(rotation_error_deg(scene, exact) < 0.05 for scene in scenes)


def test_an_image_without_a_pair_is_in_no_scene(exact):
    lone = exact.names[0]
    scenes = align_components(exact.views, pick(exact.predictions, lambda pair: lone not in pair))
    assert len(scenes) == 1
    assert set(scenes[0].names) == set(exact.names) - {lone}


@pytest.mark.parametrize("known", [(1,), (0, 3), (4, 2, 1), range(5)])
def test_known_poses_of_any_images_are_kept_and_place_the_rest(exact, known):
    scene = align(with_known(exact, poses=known), exact.predictions)
    order = indices(scene, exact)
    found, expected = scene.cam_from_world, exact.cam_from_world[order]
    for i in known:
        assert torch.equal(found[order.index(i)], expected[order.index(i)])
    assert rotation_error_deg(scene, exact) < 0.05
    if len(known) > 1:  # scale, too, is known
        torch.testing.assert_close(camera_center(found), camera_center(expected), atol=0.005, rtol=0)
        assert all((d / exact.depth[i] - 1).abs().median() < 1e-3 for d, i in zip(scene.depth, order, strict=True))


def test_known_poses_hold_against_noise(noisy):
    scene = align(with_known(noisy, poses=(0, 4)), noisy.predictions)
    order = indices(scene, noisy)
    assert torch.equal(scene.cam_from_world[order.index(4)], noisy.cam_from_world[4])
    errors = (camera_center(scene.cam_from_world) - noisy.centers[order]).norm(dim=-1)
    assert errors.max() < 0.01 * noisy.size


def test_two_known_cameras_in_one_place_fix_the_world_and_leave_the_scale(exact):
    views = with_known(exact, poses=(0, 1))
    views[1] = replace(views[1], known_cam_from_world=views[0].known_cam_from_world)
    scene = align(views, exact.predictions)
    assert scene.cam_from_world.isfinite().all()
    assert torch.equal(scene.cam_from_world[0], exact.cam_from_world[0])


@pytest.mark.parametrize("known", [(2,), (0, 1), range(5)])
def test_predictions_that_take_the_lens_for_another_are_mended_by_the_known_one(exact, known):
    """All of space in each pair's frame is drawn out by 1.4 along camera 0's axis, as for a lens as much longer."""
    stretch = torch.tensor([1.0, 1.0, 1.4])
    wrong = dict(exact.predictions)
    for pair, p in exact.predictions.items():
        if exact.names.index(pair.name0) in known:
            pointmaps = {f"pointmap{k}_in_cam0": getattr(p, f"pointmap{k}_in_cam0") * stretch for k in (0, 1)}
            wrong[pair] = replace(p, **pointmaps)
    scene = align(with_known(exact, focals=known), wrong)
    assert rotation_error_deg(scene, exact) < 0.05
    assert center_error(scene, exact) < 1e-3
    assert depth_errors(scene, exact).max() < 1e-3


@pytest.mark.parametrize("known", [(2,), (0, 1), range(5)])
def test_known_intrinsics_of_any_images_are_kept(noisy, known):
    scene = align(with_known(noisy, focals=known), noisy.predictions)
    order = indices(scene, noisy)
    for i in known:
        torch.testing.assert_close(scene.K[order.index(i)], noisy.K[i], rtol=1e-6, atol=1e-4)
    assert rotation_error_deg(scene, noisy) < 0.5


def test_a_focal_prior_pulls_the_more_the_smaller_its_standard_deviation():
    truth = make_scene(3, (48, 64), noise=0.01)
    found = []
    for sigma in (0.0, 0.03, 1.0):
        views = [replace(view, known_K=view.known_K.clone()) for view in with_known(truth, focals=range(3))]
        for view in views:
            view.known_K[[0, 1], [0, 1]] *= 1.05
        scene = align([replace(view, focal_sigma=sigma) for view in views], truth.predictions)
        found.append(float((scene.K[:, 0, 0] / truth.K[indices(scene, truth), 0, 0]).mean()))
    assert found[0] == pytest.approx(1.05, abs=1e-6)
    assert 1.05 - 1e-4 > found[1] > found[2] + 0.003
    assert found[2] == pytest.approx(1.0, abs=0.015)


def test_a_known_principal_point_off_the_centre_is_honoured(exact):
    """Each prediction is cut at the left and above: its principal point is off the network image's centre."""
    views, predictions = cropped(with_known(exact, focals=range(5)), exact.predictions, top=6, left=16)
    scene = align(views, predictions)
    shift = torch.tensor([16.0, 6.0])
    torch.testing.assert_close(scene.K[:, :2, 2], exact.K[indices(scene, exact), :2, 2] - shift)
    assert rotation_error_deg(scene, exact) < 0.05


def test_a_crop_off_the_centre_keeps_the_stored_photos_principal_point(exact):
    views, predictions = cropped(exact.views, exact.predictions, top=6, left=16)
    scene = align(views, predictions)
    torch.testing.assert_close(scene.K[:, :2, 2], torch.tensor([32.0 - 16, 24.0 - 6]).expand(5, 2))
    assert rotation_error_deg(scene, exact) < 0.05
    assert focal_errors(scene, exact).max() < 1e-3


def cropped(views, predictions, top, left):
    shift = torch.eye(3, dtype=torch.float64)
    shift[:2, 2] = -torch.tensor([left, top])
    views = [replace(v, image=v.image[top:, left:], net_from_img=shift @ v.net_from_img) for v in views]
    fields = ("pointmap0_in_cam0", "confidence0", "pointmap1_in_cam0", "confidence1")
    cut = {p: PairPrediction(*(getattr(q, f)[top:, left:] for f in fields)) for p, q in predictions.items()}
    return views, cut


def test_known_cameras_of_a_photo_that_is_stored_lying_on_its_side_are_turned_with_it(exact):
    # The stored file is the upright photo turned by a quarter: upright (x, y) = stored (height - y, x), in scale.
    height, width = (s * STORED_PER_NET for s in exact.views[0].size)
    upright_from_stored = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, height], [0.0, 0.0, 1.0]], dtype=torch.float64)
    stored_from_upright_cam = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    views = with_known(exact, poses=(0, 2), focals=(0,))
    pose = views[0].known_cam_from_world.clone()
    pose[:3] = stored_from_upright_cam @ pose[:3]
    K = views[0].known_K[[1, 0, 2]][:, [1, 0, 2]].clone()
    K[0, 2], K[1, 2] = height - K[0, 2], K[1, 2]
    views[0] = replace(
        views[0],
        original_size=(height, width),
        net_from_img=views[0].net_from_img @ upright_from_stored,
        known_cam_from_world=pose,
        known_K=K,
    )
    scene = align(views, exact.predictions)
    torch.testing.assert_close(scene.cam_from_world, exact.cam_from_world, atol=2e-3, rtol=0)
    torch.testing.assert_close(scene.K[0], exact.K[0])


def spoiled(truth, spoil):
    """The predictions with a fifth of the pixels of both maps changed by `spoil(points, confidence)`."""
    generator = torch.Generator().manual_seed(0)

    def change(points, confidence):
        points, confidence = points.clone(), confidence.clone()
        chosen = torch.rand(confidence.shape, generator=generator) < 0.2
        points[chosen], confidence[chosen] = spoil(points[chosen], confidence[chosen])
        return points, confidence

    return {
        pair: PairPrediction(*change(p.pointmap0_in_cam0, p.confidence0), *change(p.pointmap1_in_cam0, p.confidence1))
        for pair, p in truth.predictions.items()
    }


@pytest.mark.parametrize(
    "spoil",
    [
        lambda points, confidence: (torch.full_like(points, torch.nan), confidence),
        lambda points, confidence: (points * torch.inf, confidence),
        lambda points, confidence: (points, torch.full_like(confidence, torch.nan)),
        lambda points, confidence: (-points, confidence),
        lambda points, confidence: (points * 1e6, confidence),
        lambda points, confidence: (torch.zeros_like(points), confidence),
        lambda points, confidence: (torch.randn_like(points), torch.full_like(confidence, 1.01)),
    ],
    ids=["nan points", "infinite points", "nan confidences", "mirrored", "far away", "at the camera", "unsure noise"],
)
def test_a_fifth_of_spoiled_pixels_does_no_harm(noisy, spoil):
    scene = align(noisy.views, spoiled(noisy, spoil))
    assert rotation_error_deg(scene, noisy) < 0.5
    assert center_error(scene, noisy) < 0.005
    assert depth_errors(scene, noisy).max() < 0.01
    assert all(depth.isfinite().all() and (depth >= 0).all() for depth in scene.depth)


@pytest.mark.parametrize("num_wrong", [1, 3])
def test_confident_pairs_of_another_place_do_not_bend_the_scene(noisy, num_wrong):
    other = make_scene(5, (48, 64), seed=9)
    wrong = [Pair(noisy.names[i], noisy.names[j]) for i, j in ((0, 4), (3, 1), (1, 2))][:num_wrong]
    predictions = dict(noisy.predictions)
    for pair in wrong:
        turned = other.predictions[pair.reversed()]
        predictions[pair] = replace(turned, confidence0=turned.confidence0 * 2, confidence1=turned.confidence1 * 2)
    scene = align(noisy.views, predictions)
    assert rotation_error_deg(scene, noisy) < 0.5
    assert center_error(scene, noisy) < 0.005


def test_a_network_that_is_never_sure_still_gives_a_scene(exact):
    unsure = {
        pair: replace(p, confidence0=torch.ones_like(p.confidence0), confidence1=torch.ones_like(p.confidence1))
        for pair, p in exact.predictions.items()
    }
    assert rotation_error_deg(align(exact.views, unsure), exact) < 0.05


def test_random_pointmaps_give_some_scene_or_a_sentence(exact):
    generator = torch.Generator().manual_seed(0)
    noise = {
        pair: PairPrediction(
            torch.randn(48, 64, 3, generator=generator) * 5,
            1 + torch.rand(48, 64, generator=generator),
            torch.randn(48, 64, 3, generator=generator) * 5,
            1 + torch.rand(48, 64, generator=generator),
        )
        for pair in exact.predictions
    }
    scene = align(exact.views, noise)
    assert scene.cam_from_world.isfinite().all()
    assert scene.K.isfinite().all()


def test_pixels_that_no_pair_sees_have_depth_and_confidence_zero(exact):
    holes = {
        pair: replace(p, pointmap0_in_cam0=holed(p.pointmap0_in_cam0), pointmap1_in_cam0=holed(p.pointmap1_in_cam0))
        for pair, p in exact.predictions.items()
    }
    scene = align(exact.views, holes)
    for depth, confidence in zip(scene.depth, scene.confidence, strict=True):
        assert (depth[:10] == 0).all()
        assert (confidence[:10] == 0).all()
        assert (depth[10:] > 0).all()
        assert (confidence[10:] >= 2).all()


def holed(pointmap):
    pointmap = pointmap.clone()
    pointmap[:10] = torch.nan
    return pointmap


def test_confidence_is_the_highest_of_all_pairs_and_zero_under_the_mask(exact):
    mask = torch.ones(48, 64, dtype=torch.bool)
    mask[:, 40:] = False
    views = [replace(exact.views[0], mask=mask), *exact.views[1:]]
    scene = align(views, exact.predictions)
    maps = [p.confidence0 for pair, p in exact.predictions.items() if pair.name0 == exact.names[0]]
    maps += [p.confidence1 for pair, p in exact.predictions.items() if pair.name1 == exact.names[0]]
    assert torch.equal(scene.confidence[0], torch.stack(maps).amax(dim=0) * mask)
    assert rotation_error_deg(scene, exact) < 0.05


def test_points_under_a_mask_take_no_part(exact):
    mask = torch.ones(48, 64, dtype=torch.bool)
    mask[:, 30:] = False
    garbage = {
        pair: replace(
            p,
            pointmap0_in_cam0=torch.where(mask[..., None], p.pointmap0_in_cam0, 3.0),
            pointmap1_in_cam0=torch.where(mask[..., None], p.pointmap1_in_cam0, 3.0),
        )
        for pair, p in exact.predictions.items()
    }
    scene = align([replace(view, mask=mask) for view in exact.views], garbage)
    assert rotation_error_deg(scene, exact) < 0.05


def test_the_same_input_gives_the_same_scene(noisy):
    first, second = (align(noisy.views, noisy.predictions) for _ in range(2))
    assert torch.equal(first.cam_from_world, second.cam_from_world)
    assert torch.equal(first.depth[0], second.depth[0])


def test_pairs_of_images_that_were_not_given_are_left(exact):
    scene = align(exact.views[:3], exact.predictions)
    assert set(scene.names) == set(exact.names[:3])


def test_fewer_samples_and_steps_still_align(exact):
    scene = align(exact.views, exact.predictions, AlignConfig(max_iters=2, max_samples=200))
    assert rotation_error_deg(scene, exact) < 0.1


def test_predictions_without_a_usable_point_are_a_sentence(exact):
    nothing = {
        pair: replace(p, pointmap0_in_cam0=torch.full_like(p.pointmap0_in_cam0, torch.nan))
        for pair, p in exact.predictions.items()
    }
    with pytest.raises(ReconstructionError, match="none of 20 pairs of 5 images"):
        align(exact.views, nothing)
    with pytest.raises(ReconstructionError, match="none of 0 pairs"):
        align_components(exact.views, {})


def test_pointmaps_of_another_size_than_the_view_are_a_sentence(exact):
    views = [replace(exact.views[0], image=exact.views[0].image[:32]), *exact.views[1:]]
    with pytest.raises(InputError, match=r"\(48, 64\) pixels for photos/000.jpg"):
        align(views, exact.predictions)


@pytest.mark.parametrize(
    "known", [{"known_K": torch.zeros(3, 3)}, {"known_cam_from_world": 2 * torch.eye(4)}], ids=["K", "pose"]
)
def test_known_cameras_that_are_none_are_a_sentence(exact, known):
    views = [replace(exact.views[0], **known), *exact.views[1:]]
    with pytest.raises(InputError, match="photos/000.jpg: .*known|photos/000.jpg: a known"):
        align(views, exact.predictions)


@pytest.mark.parametrize(
    "flatten",
    [
        lambda points: torch.ones_like(points),
        lambda points: points * torch.tensor([0.0, 0.0, 1.0]),
        lambda points: points * torch.tensor([1e-20, 1e-20, 1e-20]),
        lambda points: points * torch.tensor([1e20, 1e20, 1e20]),
    ],
    ids=["one point", "one line", "tiny", "huge"],
)
def test_degenerate_pointmaps_give_finite_scenes_or_a_sentence(exact, flatten):
    flat = {
        pair: replace(p, pointmap0_in_cam0=flatten(p.pointmap0_in_cam0), pointmap1_in_cam0=flatten(p.pointmap1_in_cam0))
        for pair, p in exact.predictions.items()
    }
    try:
        scene = align(exact.views, flat, AlignConfig(max_iters=20))
    except ReconstructionError:
        return
    assert scene.cam_from_world.isfinite().all()
    assert scene.K.isfinite().all()
    assert all(depth.isfinite().all() for depth in scene.depth)
    rotations = scene.cam_from_world[:, :3, :3]
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(5, 3, 3), atol=1e-4, rtol=0)


def test_half_precision_predictions_are_taken(exact):
    half = {
        pair: PairPrediction(
            p.pointmap0_in_cam0.half(), p.confidence0.half(), p.pointmap1_in_cam0.half(), p.confidence1.half()
        )
        for pair, p in exact.predictions.items()
    }
    assert rotation_error_deg(align(exact.views, half), exact) < 0.2


def test_many_pairs_share_the_samples(exact, monkeypatch):
    monkeypatch.setattr("dust3r_sfm.alignment.align.MAX_SAMPLES_IN_ALL", 1000)
    assert rotation_error_deg(align(exact.views, exact.predictions), exact) < 0.1
