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
    ray_error,
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


def test_directions_are_seen_from_each_camera_and_depth_along_them_is_free():
    g = torch.Generator().manual_seed(0)
    truth = torch.randn((3, 2, 6, 8, 3), generator=g) + torch.tensor([0.0, 0.0, 6.0])
    centers = torch.randn((3, 3), generator=g)
    valid = torch.ones(truth.shape[:-1], dtype=torch.bool)
    assert ray_error(4.0 * truth, truth, valid, centers).max() < 1e-5  # whatever the scale
    origins = torch.stack([torch.zeros(3, 3), centers], 1)[:, :, None, None]
    stretch = 1 + 0.3 * torch.rand(valid.shape, generator=g)[..., None]
    along = origins + stretch * (truth - origins)
    along_scaled = along * mean_distance(truth, valid) / mean_distance(along, valid)
    own = ray_error(along, truth, valid, centers)
    assert own[:, 0].max() < 1e-5  # of view 0 depth is free; view 1's camera moves with the scale that is wrong
    assert regression_error(along_scaled, truth, valid).mean() > 0.02
    angle = torch.tensor(0.01)
    turn = torch.tensor([[angle.cos(), 0, angle.sin()], [0, 1, 0], [-angle.sin(), 0, angle.cos()]])
    upright = truth.clone()
    upright[..., 1] = 0.0  # at right angles to the axis
    centers[:, 1] = 0.0
    turned = torch.stack([upright[:, 0], centers[:, None, None] + (upright[:, 1] - centers[:, None, None]) @ turn.T], 1)
    # the mean distance hardly changes, so every direction of view 1 is off by the angle
    assert torch.allclose(ray_error(turned, upright, valid, centers)[:, 1], angle, rtol=0.15)


def test_directions_have_finite_gradients_at_the_camera():
    predicted = torch.zeros((1, 2, 2, 2, 3), requires_grad=True)
    truth, valid = torch.ones((1, 2, 2, 2, 3)), torch.ones((1, 2, 2, 2), dtype=torch.bool)
    ray_error(predicted, truth, valid, torch.zeros(1, 3)).sum().backward()
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
