"""DUSt3R's training losses, and one that teaches tokens of the same place to be alike."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dust3r_sfm.pairs import PairPrediction


def mean_distance(
    pointmaps: Float[Tensor, "b 2 h w 3"], valid: Bool[Tensor, "b 2 h w"], floor: float = 1e-8
) -> Float[Tensor, "b 1 1 1 1"]:
    """Mean distance to the origin of the valid points of both views."""
    distance = torch.where(valid, pointmaps.norm(dim=-1), 0.0).sum((1, 2, 3))
    return (distance / valid.sum((1, 2, 3)).clamp(min=1)).clamp(min=floor)[:, None, None, None, None]


def regression_error(
    predicted: Float[Tensor, "b 2 h w 3"],
    truth: Float[Tensor, "b 2 h w 3"],
    valid: Bool[Tensor, "b 2 h w"],
    normalize: bool = True,
) -> Float[Tensor, "b 2 h w"]:
    """Distance between predicted and true points, each side divided by its mean distance to the origin (eq. 2, 3)."""
    if normalize:
        predicted, truth = predicted / mean_distance(predicted, valid), truth / mean_distance(truth, valid)
    return (predicted - truth).norm(dim=-1)


def log_space_error(
    predicted: Float[Tensor, "b 2 h w 3"], truth: Float[Tensor, "b 2 h w 3"], valid: Bool[Tensor, "b 2 h w"]
) -> Float[Tensor, "b 2 h w"]:
    """As `regression_error`, but what is near counts as much as what is far.

    Each side is divided by the geometric mean of its distances, which a far background hardly moves, and distances d
    become log(1 + d).
    """
    compressed = []
    for points in (predicted, truth):
        distance = points.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        logs = torch.where(valid[..., None], distance.log(), 0.0).sum((1, 2, 3, 4))
        distance_to_one = (-logs / valid.sum((1, 2, 3)).clamp(min=1)).exp()[:, None, None, None, None]
        compressed.append(points * ((distance * distance_to_one).log1p() / distance))
    return (compressed[0] - compressed[1]).norm(dim=-1)


def pose_error(
    predicted: Float[Tensor, "b 2 h w 3"],
    truth: Float[Tensor, "b 2 h w 3"],
    valid: Bool[Tensor, "b 2 h w"],
    confidence: Float[Tensor, "b 2 h w"],
    center1_in_cam0: Float[Tensor, "b 3"],
) -> Float[Tensor, "b 2"]:
    """How far each view's camera is off where its predicted points put it: radians, plus distance over the baseline.

    The first step of Gauss and Newton from the true pose, in which an error in depth along a pixel's ray costs nothing:
    with true intrinsics, directions from the camera to the points must be those of the pixels, each as important as
    its confidence. Scales are matched as in `regression_error`. A step is linear in the predicted points. View 0's
    camera is at the origin; where it is found elsewhere, the focal length is wrong.
    """
    scale, true_scale = mean_distance(predicted, valid), mean_distance(truth, valid)
    centers = torch.stack([torch.zeros_like(center1_in_cam0), center1_in_cam0], 1) / true_scale[:, :, 0, 0]
    points, true_points = (
        (x - centers[:, :, None, None]).flatten(2, 3) for x in (predicted / scale, truth / true_scale)
    )
    true_points = torch.where(valid.flatten(2)[..., None], true_points, 1.0)
    distance = true_points.norm(dim=-1, keepdim=True).clamp(min=0.05)
    weights = torch.where(valid, confidence.detach(), 0.0).flatten(2)[..., None]
    weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-6)
    moved, turned = _pose_step(true_points / distance, points / distance, 1 / distance, weights)
    baseline = centers[:, 1:].norm(dim=-1)
    return moved.norm(dim=-1) / (baseline + 0.2) + turned.norm(dim=-1)


def _pose_step(
    directions: Float[Tensor, "b 2 n 3"],
    points: Float[Tensor, "b 2 n 3"],
    nearness: Float[Tensor, "b 2 n 1"],
    weights: Float[Tensor, "b 2 n 1"],
) -> tuple[Float[Tensor, "b 2 3"], Float[Tensor, "b 2 3"]]:
    """Shift and turn of a camera by which its rays hit the points best; both are over the points' distance here.

    Normal equations of 6 unknowns by blocks of 3, damped where shift and turn look alike.
    """
    across = points - (points * directions).sum(-1, keepdim=True) * directions
    eye = torch.eye(3, device=points.device)
    projector = eye - directions[..., None] * directions[..., None, :]
    shift_shift = (weights[..., None] * nearness[..., None] ** 2 * projector).sum(2)
    turn_turn = (weights[..., None] * projector).sum(2)
    # a turn w moves a ray d by w x d; d x (P a) = d x a, so the mixed block is that of -[d]x
    shift_turn = _cross_matrix((weights * nearness * directions).sum(2)).neg()
    shift_right = (weights * nearness * across).sum(2)
    turn_right = (weights * torch.linalg.cross(directions, across)).sum(2)
    trace = shift_shift.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    turn_inverse = _inverse(turn_turn + 1e-4 * eye)
    mixed = _times(shift_turn, turn_inverse)
    schur = shift_shift - _times(mixed, shift_turn.mT) + (0.01 * trace + 1e-6) * eye
    moved = _times(_inverse(schur), shift_right[..., None] - _times(mixed, turn_right[..., None]))
    turned = _times(turn_inverse, turn_right[..., None] - _times(shift_turn.mT, moved))
    return moved[..., 0], turned[..., 0]


def _times(a: Float[Tensor, "*b r 3"], b: Float[Tensor, "*b 3 c"]) -> Float[Tensor, "*b r c"]:
    """A product of small matrices in full precision, whatever autocast does to others."""
    return (a[..., None] * b[..., None, :, :]).sum(-2)


def _cross_matrix(v: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def _inverse(m: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3 3"]:
    """By cofactors: nothing that a captured graph cannot hold."""
    a, b, c = m.unbind(-2)
    columns = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -1)
    return columns / (a * columns[..., 0]).sum(-1)[..., None, None]


def masked_mean(values: Float[Tensor, "b *n"], valid: Bool[Tensor, "b *n"]) -> Float[Tensor, ""]:
    """Mean over the valid entries of the batch; 0 where there is none."""
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def confidence_loss(
    error: Float[Tensor, "b 2 h w"],
    confidence: Float[Tensor, "b 2 h w"],
    valid: Bool[Tensor, "b 2 h w"],
    alpha: float = 0.2,
) -> Float[Tensor, ""]:
    """Sum over both views of mean(C e - alpha log C) over the valid pixels (eq. 4)."""
    loss = confidence * error - alpha * confidence.log()
    return masked_mean(loss[:, 0], valid[:, 0]) + masked_mean(loss[:, 1], valid[:, 1])


def stack_prediction(prediction: PairPrediction) -> tuple[Float[Tensor, "b 2 h w 3"], Float[Tensor, "b 2 h w"]]:
    """Both views' pointmaps and confidences, where the views have one size."""
    pointmaps = torch.stack([prediction.pointmap0_in_cam0, prediction.pointmap1_in_cam0], 1)
    return pointmaps, torch.stack([prediction.confidence0, prediction.confidence1], 1)


def token_targets(
    points_in_cam1: Float[Tensor, "b h w 3"],
    K1: Float[Tensor, "b 3 3"],
    depth1: Float[Tensor, "b h w"],
    valid0: Bool[Tensor, "b h w"],
    patch: int = 16,
) -> Int[Tensor, "b n"]:
    """For the middle of each patch of view 0 the patch of view 1 that sees the same point, -100 where none does.

    `points_in_cam1` are view 0's points in camera 1; a point is seen where it lies within 3 % of view 1's depth.
    """
    h, w = depth1.shape[-2:]
    middle = slice(patch // 2, None, patch)
    points, valid = points_in_cam1[:, middle, middle].flatten(1, 2), valid0[:, middle, middle].flatten(1)
    z = points[..., 2].clamp(min=1e-6)
    u = points[..., 0] / z * K1[:, None, 0, 0] + K1[:, None, 0, 2]
    v = points[..., 1] / z * K1[:, None, 1, 1] + K1[:, None, 1, 2]
    inside = valid & (points[..., 2] > 1e-6) & (u >= 0) & (u < w) & (v >= 0) & (v < h)
    x, y = u.clamp(0, w - 1).long(), v.clamp(0, h - 1).long()
    seen = depth1.flatten(1).gather(1, y * w + x)
    visible = inside & ((seen - z).abs() < 0.03 * z)
    return torch.where(visible, y // patch * (w // patch) + x // patch, -100)


def token_matching_loss(
    tokens0: Float[Tensor, "b n c"],
    tokens1: Float[Tensor, "b m c"],
    targets: Int[Tensor, "b n"],
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """Cross-entropy of each token's true partner among the other view's tokens, by cosine similarity."""
    a, b = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (tokens0, tokens1))
    log_p = (a @ b.transpose(1, 2) / temperature).log_softmax(-1)
    chosen = -log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return masked_mean(chosen, targets >= 0)
