"""What poses, focals and confidences are judged by. Errors that do not exist (nothing was estimated) are infinite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.geometry.transforms import inverse, rotation_angle_deg


def relative_rotation_error_deg(
    estimated_cam1_from_cam0: Float[Tensor, "*#b 4 4"], reference_cam1_from_cam0: Float[Tensor, "*#b 4 4"]
) -> Float[Tensor, "*#b"]:
    """Angle of the rotation between the two, 0 to 180 degrees; infinite where the estimate is not finite."""
    error = rotation_angle_deg(estimated_cam1_from_cam0[..., :3, :3], reference_cam1_from_cam0[..., :3, :3])
    return error.nan_to_num(nan=torch.inf)


def relative_translation_error_deg(
    estimated_cam1_from_cam0: Float[Tensor, "*#b 4 4"],
    reference_cam1_from_cam0: Float[Tensor, "*#b 4 4"],
    min_baseline: float = 1e-6,
) -> Float[Tensor, "*#b"]:
    """Angle between the directions of the two translations, 0 to 180 degrees, signed (the opposite direction is 180).

    A direction exists only with a baseline. Where the reference's is shorter than `min_baseline`
    (in its own unit) any estimate is right: 0. Where only the estimate's is zero it is as
    wrong as can be: 180. Infinite where the estimate is not finite.
    """
    estimated, reference = torch.broadcast_tensors(
        estimated_cam1_from_cam0[..., :3, 3], reference_cam1_from_cam0[..., :3, 3]
    )
    estimated_baseline = torch.linalg.vector_norm(estimated, dim=-1)
    unit = estimated / estimated_baseline.clamp(min=torch.finfo(estimated.dtype).tiny)[..., None]
    # atan2 of sine and cosine keeps its digits at 0 and at 180 degrees, where acos loses half of them.
    sine = torch.linalg.vector_norm(torch.linalg.cross(unit, reference, dim=-1), dim=-1)
    error = torch.rad2deg(torch.atan2(sine, (unit * reference).sum(dim=-1)))
    error = torch.where(estimated_baseline == 0, 180.0, error)
    error = torch.where(torch.linalg.vector_norm(reference, dim=-1) < min_baseline, 0.0, error)
    finite = estimated_cam1_from_cam0.isfinite().all(dim=-1).all(dim=-1)
    return torch.where(finite, error, torch.inf)


def all_pairs_errors_deg(
    estimated_cam_from_world: Float[Tensor, "n 4 4"], reference_cam_from_world: Float[Tensor, "n 4 4"]
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Relative rotation and translation errors of the n (n - 1) / 2 pairs (i < j): cam_j_from_cam_i.

    Poses that were not estimated are NaN, and all their pairs have infinite errors. Baselines
    under a millionth of the longest one count as none (see `relative_translation_error_deg`).
    """
    n = len(reference_cam_from_world)
    i, j = torch.triu_indices(n, n, offset=1, device=reference_cam_from_world.device)
    estimated = estimated_cam_from_world[j] @ inverse(estimated_cam_from_world[i])
    reference = reference_cam_from_world[j] @ inverse(reference_cam_from_world[i])
    longest = torch.linalg.vector_norm(reference[:, :3, 3], dim=-1).amax().item() if len(i) else 0.0
    rotation = relative_rotation_error_deg(estimated, reference)
    return rotation, relative_translation_error_deg(estimated, reference, min_baseline=1e-6 * longest)


def accuracy_at(errors: Float[Tensor, " p"], thresholds: Sequence[int | float]) -> tuple[float, ...]:
    """For each threshold, the fraction of errors below it (RRA@15 of rotation errors, RTA@15 of translation errors)."""
    return tuple((errors < threshold).double().mean().item() for threshold in thresholds)


def auc(errors: Float[Tensor, " p"], threshold: int | float) -> float:
    """Area under the recall curve from 0 to `threshold`, over `threshold`: 1 when all errors are zero.

    The curve is the one of the relative-pose benchmarks: straight lines from (0, 0) through
    (k-th smallest error, k / p) for all errors below `threshold`, and level from there on.
    """
    ordered = errors[errors < threshold].double().sort().values
    recall = torch.arange(len(ordered) + 1, dtype=torch.float64, device=errors.device) / len(errors)
    curve = torch.cat([recall, recall[-1:]])
    at = torch.cat([ordered.new_zeros(1), ordered, ordered.new_full((1,), threshold)])
    return (torch.trapezoid(curve, at) / threshold).item()


def mean_average_accuracy(
    rotation_errors: Float[Tensor, " p"], translation_errors: Float[Tensor, " p"], max_deg: int = 30
) -> float:
    """mAA(30): the fraction of pairs with both errors below t degrees, averaged over t = 1, 2, ..., `max_deg`."""
    worse = torch.maximum(rotation_errors, translation_errors)
    accuracies = accuracy_at(worse, range(1, max_deg + 1))
    return sum(accuracies) / max_deg


def focal_error(estimated: Float[Tensor, "*#b"], reference: Float[Tensor, "*#b"]) -> Float[Tensor, "*#b"]:
    """|estimated - reference| / reference; infinite where nothing finite was estimated."""
    return ((estimated - reference).abs() / reference).nan_to_num(nan=torch.inf)


def relative_depth_errors(depth: Float[Tensor, " n"], reference: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """|s depth - reference| / reference with s the median of reference / depth over depths in front; references > 0.

    Infinite where no depth is in front of the camera.
    """
    in_front = depth > 0
    if not in_front.any():
        return torch.full_like(reference, torch.inf)
    scale = (reference[in_front] / depth[in_front]).median()
    return ((scale * depth - reference).abs() / reference).nan_to_num(nan=torch.inf)


def roc_auc(positives: Float[Tensor, " p"], negatives: Float[Tensor, " q"]) -> float:
    """How well a score separates two sets: the chance that a positive's exceeds a negative's (ties count half)."""
    difference = positives.double()[:, None] - negatives.double()
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()
