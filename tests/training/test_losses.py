"""Losses against published figures, their gradients where distances vanish, partners of tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dust3r_sfm.pairs import PairPrediction
from dust3r_sfm.training.losses import (
    confidence_loss,
    log_space_error,
    masked_mean,
    mean_distance,
    pose_error,
    regression_error,
    stack_prediction,
    token_matching_loss,
    token_targets,
)

DATA = Path(__file__).parent.parent / "data"
FACTS = json.loads((DATA / "facts.json").read_text())["losses"]


@pytest.fixture(scope="module")
def golden():
    """Predicted and true pointmaps of both views in camera 0, confidence and validity; (b, 2, h, w[, 3])."""
    with np.load(DATA / "geometry.npz") as file:
        data = {k: torch.from_numpy(file[k]) for k in file.files if k.startswith("loss_")}
    cam0_from_world = torch.linalg.inv(data["loss_pose1"])

    def both(name):
        return torch.stack([data[f"loss_{name}1"], data[f"loss_{name}2"]], 1)

    world = both("gt")
    truth = (
        torch.einsum("bij,bvhwj->bvhwi", cam0_from_world[:, :3, :3], world)
        + cam0_from_world[:, None, None, None, :3, 3]
    )
    return both("pred"), truth, both("conf"), both("valid").bool()


@pytest.mark.parametrize(("norm", "normalize"), [("avg_dis", True), ("none", False)])
def test_losses_equal_the_published_ones(golden, norm, normalize):
    predicted, truth, confidence, valid = golden
    total, parts = FACTS[f"conf_loss(regr3d(l21, norm={norm}), alpha=0.2)"]
    error = regression_error(predicted, truth, valid, normalize)
    assert float(confidence_loss(error, confidence, valid, 0.2)) == pytest.approx(total, rel=1e-5)
    for view in (0, 1):
        expected = parts[f"Regr3D_pts3d_{view + 1}"]
        assert float(masked_mean(error[:, view], valid[:, view])) == pytest.approx(expected, rel=1e-5)


def test_both_views_of_a_pair_share_one_scale(golden):
    """The published error without the truth's normalisation is of the prediction over its mean distance."""
    predicted, truth, _, valid = golden
    scale = mean_distance(predicted, valid)
    assert float(scale[0]) == pytest.approx(float(predicted[0][valid[0]].norm(dim=-1).mean()), rel=1e-5)
    error = regression_error(predicted / scale, truth, valid, normalize=False)
    for view in (0, 1):
        expected = FACTS["Regr3D gt_scale per-view means"][f"Regr3D_pts3d_{view + 1}"]
        assert float(masked_mean(error[:, view], valid[:, view])) == pytest.approx(expected, rel=1e-5)


def test_the_error_does_not_depend_on_the_predicted_scale(golden):
    predicted, truth, _, valid = golden
    error = regression_error(predicted, truth, valid)
    scaled = regression_error(torch.stack([3.0 * predicted[0], 0.01 * predicted[1]]), truth, valid)
    assert torch.allclose(error, scaled, rtol=1e-4, atol=1e-5)
    assert not regression_error(7 * truth, truth, valid)[valid].gt(1e-5).any()


def test_what_is_not_valid_does_not_count(golden):
    predicted, truth, confidence, valid = golden
    assert not valid.all()
    loss = confidence_loss(regression_error(predicted, truth, valid), confidence, valid)
    predicted, truth, confidence = predicted.clone(), truth.clone(), confidence.clone()
    predicted[~valid], truth[~valid], confidence[~valid] = 1e6, -1e6, 50.0
    changed = confidence_loss(regression_error(predicted, truth, valid), confidence, valid)
    assert float(changed) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("case", ["prediction is the truth", "prediction is zero", "nothing is valid"])
def test_gradients_are_finite(golden, case):
    predicted, truth, confidence, valid = golden
    if case == "prediction is the truth":
        predicted = truth
    elif case == "prediction is zero":
        predicted = torch.zeros_like(truth)
    else:
        valid = torch.zeros_like(valid)
    predicted, confidence = predicted.clone().requires_grad_(), confidence.clone().requires_grad_()
    loss = confidence_loss(regression_error(predicted, truth, valid), confidence, valid)
    loss.backward()
    assert loss.isfinite()
    assert predicted.grad.isfinite().all()
    assert confidence.grad.isfinite().all()


def test_the_best_confidence_is_alpha_over_the_error():
    error = torch.full((1, 2, 4, 4), 0.05)
    valid = torch.ones_like(error, dtype=torch.bool)
    losses = {c: float(confidence_loss(error, torch.full_like(error, c), valid, 0.2)) for c in (3.5, 4.0, 4.5)}
    assert min(losses, key=losses.get) == 4.0


def test_views_are_stacked_in_order():
    maps = [torch.randn((2, 3, 5, 3)) for _ in range(2)]
    confidences = [torch.rand((2, 3, 5)) for _ in range(2)]
    pointmaps, confidence = stack_prediction(PairPrediction(maps[0], confidences[0], maps[1], confidences[1]))
    assert torch.equal(pointmaps[:, 1], maps[1])
    assert torch.equal(confidence[:, 0], confidences[0])


def wall(depth, h=32, w=48, focal=40.0):
    """K, depth map and points of a wall across the view."""
    K = torch.tensor([[focal, 0, w / 2], [0, focal, h / 2], [0, 0, 1.0]])[None]
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    points = torch.stack([(x - w / 2) / focal * depth, (y - h / 2) / focal * depth, torch.full((h, w), depth)], -1)
    return K, torch.full((1, h, w), depth), points[None]


def test_a_token_of_an_unmoved_camera_is_its_own_partner():
    K, depth, points = wall(5.0)
    assert token_targets(points, K, depth, depth > 0).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_a_sideways_step_of_one_patch_moves_partners_by_one():
    K, depth, points = wall(5.0)
    points = points + torch.tensor([16 / 40 * 5.0, 0, 0])  # camera 1 stands to the left: all is one patch further right
    assert token_targets(points, K, depth, depth > 0).tolist() == [[1, 2, -100, 4, 5, -100]]


@pytest.mark.parametrize("case", ["hidden", "behind", "not valid"])
def test_a_token_that_is_not_seen_has_no_partner(case):
    K, depth, points = wall(5.0)
    valid = depth > 0
    if case == "hidden":
        depth = depth.clone()
        depth[:, :, :16] = 4.0  # something stands before the first column of patches
    elif case == "behind":
        points = points.clone()
        points[:, :, :16] *= -1
    else:
        valid[:, :, :16] = False
    assert token_targets(points, K, depth, valid).tolist() == [[-100, 1, 2, -100, 4, 5]]


def test_alike_tokens_of_partners_cost_nothing_and_unlike_ones_a_lot():
    one_hot = 3 * torch.eye(12)[None].expand(2, -1, -1)
    right = torch.arange(12).expand(2, -1)
    assert float(token_matching_loss(one_hot, one_hot, right)) == pytest.approx(0, abs=1e-4)
    assert float(token_matching_loss(one_hot, one_hot, right.roll(1, 1))) == pytest.approx(1 / 0.07, rel=1e-3)
    assert float(token_matching_loss(one_hot, torch.ones_like(one_hot), right)) == pytest.approx(np.log(12), rel=1e-5)


def test_tokens_are_compared_by_direction():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, 6, 4), generator=g), torch.randn((2, 5, 4), generator=g)
    targets = torch.randint(0, 5, (2, 6), generator=g)
    longer = [tokens * (0.1 + 5 * torch.rand((*tokens.shape[:2], 1), generator=g)) for tokens in (a, b)]
    assert float(token_matching_loss(*longer, targets)) == pytest.approx(float(token_matching_loss(a, b, targets)))
    cosine = torch.nn.functional.cosine_similarity(a[:, :, None], b[:, None], dim=-1) / 0.07
    expected = torch.nn.functional.cross_entropy(cosine.flatten(0, 1), targets.flatten())
    assert float(token_matching_loss(a, b, targets)) == pytest.approx(float(expected), rel=1e-5)


def test_tokens_without_a_partner_do_not_count():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn((1, 6, 4), generator=g), torch.randn((1, 6, 4), generator=g)
    some = torch.tensor([[0, -100, 2, -100, -100, 5]])
    each = [token_matching_loss(a, b, torch.full((1, 6), -100).index_fill_(1, torch.tensor([i]), i)) for i in (0, 2, 5)]
    assert float(token_matching_loss(a, b, some)) == pytest.approx(float(sum(each) / 3), rel=1e-5)
    assert token_matching_loss(a, b, torch.full((1, 6), -100)) == 0


def seen_by_two_cameras(b=2):
    """Points of both views in camera 0's frame, each before its own camera; validity, confidence, camera 1's place."""
    g = torch.Generator().manual_seed(0)
    ahead = torch.randn((b, 2, 6, 8, 3), generator=g) + torch.tensor([0.0, 0.0, 6.0])
    centers = torch.randn((b, 3), generator=g)
    truth = ahead.clone()
    truth[:, 1] += centers[:, None, None]
    return truth, torch.ones(truth.shape[:-1], dtype=torch.bool), torch.ones(truth.shape[:-1]), centers


def test_points_that_slide_along_their_pixels_rays_leave_the_poses_right():
    truth, valid, confidence, centers = seen_by_two_cameras()
    assert pose_error(4.0 * truth, truth, valid, confidence, centers).max() < 1e-4  # whatever the scale
    stretch = 1 + 0.2 * torch.rand(valid.shape, generator=torch.Generator().manual_seed(1))[..., None]
    origins = torch.stack([torch.zeros_like(centers), centers], 1)[:, :, None, None]
    along = origins + stretch * (truth - origins)
    errors = pose_error(along, truth, valid, confidence, torch.zeros_like(centers))
    assert errors[:, 0].max() < 1e-4
    assert regression_error(along, truth, valid).mean() > 0.02


def test_a_small_motion_of_the_points_is_found_as_the_cameras():
    truth, valid, confidence, centers = seen_by_two_cameras()
    scale = mean_distance(truth, valid)[:, 0, 0, 0]
    shift = torch.tensor([0.002, -0.001, 0.003])
    moved = truth.clone()
    moved[:, 1] += (shift * scale)[:, None, None]
    errors = pose_error(moved, truth, valid, confidence, centers)
    expected = shift.norm() / ((centers / scale).norm(dim=-1) + 0.2)
    assert errors[:, 0].max() < 2e-3  # but for the scale, which the shift changed a little
    assert torch.allclose(errors[:, 1], expected, rtol=0.35)  # damped, and the scale is both views'
    angle = 0.004
    turn = torch.tensor([[1, 0, angle], [0, 1, 0], [-angle, 0, 1.0]])
    turned = truth.clone()
    origins = centers[:, None, None]
    turned[:, 1] = (truth[:, 1] - origins) @ turn.T + origins
    assert torch.allclose(pose_error(turned, truth, valid, confidence, centers)[:, 1], torch.tensor(angle), rtol=0.2)


def test_points_of_a_wrong_focal_length_put_the_first_camera_elsewhere():
    truth, valid, confidence, centers = seen_by_two_cameras()
    deeper = truth * torch.tensor([1.0, 1.0, 1.1])
    assert pose_error(deeper, truth, valid, confidence, centers)[:, 0].min() > 0.05


def test_points_that_are_not_believed_or_not_valid_do_not_move_a_camera():
    truth, valid, confidence, centers = seen_by_two_cameras()
    wrong = truth.clone()
    wrong[:, :, 0] *= torch.tensor([1.0, 3.0, 1.0])
    confidence[:, :, 0] = 1e-6
    believed = pose_error(wrong, truth, valid, torch.ones_like(confidence), centers)
    assert pose_error(wrong, truth, valid, confidence, centers).max() < 0.2 * believed.min()  # the scale alone is off
    valid[:, :, 0] = False
    assert pose_error(wrong, truth, valid, confidence, centers).max() < 1e-4


@pytest.mark.parametrize("case", ["nothing is valid", "the prediction is the truth", "all points are the camera"])
def test_poses_have_finite_gradients(case):
    truth, valid, confidence, centers = seen_by_two_cameras()
    valid = valid & (case != "nothing is valid")
    predicted = (0.0 * truth if case == "all points are the camera" else truth.clone()).requires_grad_()
    pose_error(predicted, truth, valid, confidence, centers).sum().backward()
    assert predicted.grad.isfinite().all()


def test_in_log_space_scale_is_free_and_near_counts_as_far():
    g = torch.Generator().manual_seed(0)
    truth = torch.randn((2, 2, 6, 8, 3), generator=g) + torch.tensor([0.0, 0.0, 4.0])
    truth[:, :, :, :4] *= 100.0  # half of each view is far away
    valid = torch.ones(truth.shape[:-1], dtype=torch.bool)
    assert log_space_error(7.0 * truth, truth, valid).max() < 1e-5
    near, far = truth.clone(), truth.clone()
    near[:, :, :, 4:] *= 1.2
    far[:, :, :, :4] *= 1.2
    errors = [log_space_error(wrong, truth, valid).mean() for wrong in (near, far)]
    assert errors[0].item() == pytest.approx(errors[1].item(), rel=0.3)
    assert errors[0] > 5 * regression_error(near, truth, valid).mean()
    hidden = truth.clone()
    hidden[0, 0, 0, 0] = 1e6
    valid[0, 0, 0, 0] = False
    assert torch.allclose(log_space_error(hidden, truth, valid)[valid], torch.zeros(()), atol=1e-5)


def test_in_log_space_gradients_are_finite_without_points():
    predicted = torch.zeros((1, 2, 2, 2, 3), requires_grad=True)
    truth, valid = torch.ones((1, 2, 2, 2, 3)), torch.zeros((1, 2, 2, 2), dtype=torch.bool)
    log_space_error(predicted, truth, valid).sum().backward()
    assert predicted.grad.isfinite().all()
