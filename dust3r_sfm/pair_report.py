"""The figures of pairwise prediction, per scene and in total, and how far the confidences can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dust3r_sfm.evaluate import markdown_table
from dust3r_sfm.geometry.metrics import accuracy_at, mean_average_accuracy, roc_auc


@dataclass(frozen=True, eq=False, kw_only=True)
class PairErrors:
    """What was measured on each directed pair; infinite where nothing could be estimated."""

    scenes: tuple[str, ...]
    rotation_deg: Float[Tensor, " p"]
    translation_deg: Float[Tensor, " p"]
    rotation_both_known_deg: Float[Tensor, " p"]
    """With the pointmap given camera 0's reference focal, too."""
    translation_both_known_deg: Float[Tensor, " p"]
    rotation_own_focal_deg: Float[Tensor, " p"]
    """With camera 1's focal estimated, in place of the reference K."""
    translation_own_focal_deg: Float[Tensor, " p"]
    rotation_both_ways_deg: Float[Tensor, " p"]
    """With the reference K of both cameras, by the mean of the poses of both directions of the pair."""
    translation_both_ways_deg: Float[Tensor, " p"]
    rotation_own_focal_both_ways_deg: Float[Tensor, " p"]
    """The same with both focals estimated."""
    translation_own_focal_both_ways_deg: Float[Tensor, " p"]
    focal: Float[Tensor, " p"]
    """Relative error of camera 0's focal."""
    confidence: Float[Tensor, "p 2"]
    """Median confidence of image 0 and of image 1."""
    confidence_reversed: Float[Tensor, "p 2"]
    """Of the same two images where the pair is predicted the other way round."""
    depth: Float[Tensor, "p 3"]
    """Median relative depth error of image 0: of all pixels, their more confident half, the rest; NaN without a map."""
    confidence_across: Float[Tensor, "q 2"]
    """Median confidences of pairs of photos of two different scenes."""


@dataclass(frozen=True, kw_only=True)
class PoseScores:
    """Relative poses of pairs; accuracies are fractions."""

    rra15: float
    rta15: float
    maa30: float
    median_rotation_deg: float
    median_translation_deg: float


@dataclass(frozen=True, kw_only=True)
class SceneScores:
    scene: str
    num_pairs: int
    reference_focal: PoseScores
    """With the reference K of camera 1."""
    both_known: PoseScores
    """With the reference K of both cameras: z is scaled so that image 0's pointmap has the focal of its K."""
    own_focal: PoseScores
    """With the focal that the network's own pointmaps give."""
    both_ways: PoseScores
    """With the reference K of both cameras, from all pixels: the mean of the poses of both directions of the pair."""
    own_focal_both_ways: PoseScores
    """The same with the focals that the network's own pointmaps give."""
    focal_error: float
    """Median of |f - reference| / reference."""
    depth_error: float | None
    """Median over pairs of the median relative depth error after scale alignment; None without depth maps."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Whether confidence means something; None where there was nothing to measure it on."""

    confident_half_deg: float
    """Median pose error (K of camera 1, the worse of rotation and translation) of the more confident half of pairs."""
    other_half_deg: float
    confident_half_both_ways_deg: float
    """The same of both ways with the reference K of both cameras, by the mean confidence of both directions."""
    other_half_both_ways_deg: float
    confident_half_depth: float | None
    """Median relative depth error of each image's more confident half of pixels, median over pairs."""
    other_half_depth: float | None
    separation: float | None
    """Chance that a true pair is more confident than one of photos of two scenes (area under the ROC curve).

    A pair's confidence is the mean of its two images' median confidences, in logarithms."""
    separation_weaker_image: float | None
    """The same with the less confident of the two images standing for the pair."""


@dataclass(frozen=True, kw_only=True)
class PairReport:
    scenes: tuple[SceneScores, ...]
    total: SceneScores
    calibration: Calibration
    seconds: Mapping[str, float]
    """Wall time of the parts."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: None in its place."""
        return _json_safe(asdict(self))

    def figures(self) -> dict[str, float]:
        """The total in a line of a run's history; without what was not measured."""
        total, c = self.total, self.calibration
        poses = {"": total.reference_focal, "both_": total.both_known, "own_": total.own_focal}
        poses |= {"both_ways_": total.both_ways, "own_both_ways_": total.own_focal_both_ways}
        values = {f"{of}{name}": getattr(poses[of], name) for of in poses for name in ("rra15", "rta15", "maa30")}
        values |= {"focal_error": total.focal_error, "depth_error": total.depth_error}
        values |= {"separation": c.separation, "separation_weaker_image": c.separation_weaker_image}
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}

    def table(self) -> str:
        """A markdown table, a line a scene and their total, and three lines on the confidences."""
        header = ["scene", "pairs", "RRA@15", "RTA@15", "mAA(30)", "rot deg", "trans deg"]
        header += ["both K: RRA@15", "RTA@15", "mAA(30)", "own focal: RRA@15", "RTA@15", "mAA(30)"]
        header += ["both K, both ways: RRA@15", "RTA@15", "mAA(30)"]
        header += ["own focal, both ways: RRA@15", "RTA@15", "mAA(30)"]
        header += ["focal err %", "depth err %"]
        rows = [_row(scores) for scores in (*self.scenes, self.total)]
        c = self.calibration
        lines = [
            f"Pose error of the more confident half of the pairs {c.confident_half_deg:.1f} deg, of the rest "
            f"{c.other_half_deg:.1f} deg; depth error of the more confident half of the pixels "
            f"{_percent(c.confident_half_depth)} %, of the rest {_percent(c.other_half_depth)} %.",
            f"Both ways with both K: pose error of the more confident half of the pairs "
            f"{c.confident_half_both_ways_deg:.1f} deg, of the rest {c.other_half_both_ways_deg:.1f} deg.",
            f"Area under the ROC curve between true pairs and pairs of two scenes: {_fraction(c.separation)}, "
            f"by the less confident image of each {_fraction(c.separation_weaker_image)}.",
        ]
        return "\n".join([markdown_table(header, rows), "", *lines])


def make_report(errors: PairErrors, seconds: Mapping[str, float]) -> PairReport:
    """The figures of all pairs, and of each scene in the order of its first pair."""
    scenes = list(dict.fromkeys(errors.scenes))
    masks = {scene: torch.tensor([s == scene for s in errors.scenes]) for scene in scenes}
    everything = torch.ones(len(errors.scenes), dtype=torch.bool)
    return PairReport(
        scenes=tuple(_scene_scores(scene, errors, masks[scene]) for scene in scenes),
        total=_scene_scores("total", errors, everything),
        calibration=_calibration(errors),
        seconds=dict(seconds),
    )


def _scene_scores(name: str, errors: PairErrors, mask: Bool[Tensor, " p"]) -> SceneScores:
    return SceneScores(
        scene=name,
        num_pairs=int(mask.sum()),
        reference_focal=_pose_scores(errors.rotation_deg[mask], errors.translation_deg[mask]),
        both_known=_pose_scores(errors.rotation_both_known_deg[mask], errors.translation_both_known_deg[mask]),
        own_focal=_pose_scores(errors.rotation_own_focal_deg[mask], errors.translation_own_focal_deg[mask]),
        both_ways=_pose_scores(errors.rotation_both_ways_deg[mask], errors.translation_both_ways_deg[mask]),
        own_focal_both_ways=_pose_scores(
            errors.rotation_own_focal_both_ways_deg[mask], errors.translation_own_focal_both_ways_deg[mask]
        ),
        focal_error=errors.focal[mask].median().item(),
        depth_error=_median_or_none(errors.depth[mask, 0]),
    )


def _pose_scores(rotation: Float[Tensor, " p"], translation: Float[Tensor, " p"]) -> PoseScores:
    return PoseScores(
        rra15=accuracy_at(rotation, [15])[0],
        rta15=accuracy_at(translation, [15])[0],
        maa30=mean_average_accuracy(rotation, translation, 30),
        median_rotation_deg=rotation.median().item(),
        median_translation_deg=translation.median().item(),
    )


def _calibration(errors: PairErrors) -> Calibration:
    pair_confidence = errors.confidence.log().mean(dim=-1)
    both_ways_confidence = (pair_confidence + errors.confidence_reversed.log().mean(dim=-1)) / 2
    halves = _median_halves(torch.maximum(errors.rotation_deg, errors.translation_deg), pair_confidence)
    both_ways = torch.maximum(errors.rotation_both_ways_deg, errors.translation_both_ways_deg)
    both_ways_halves = _median_halves(both_ways, both_ways_confidence)
    across = errors.confidence_across
    weaker, weaker_across = errors.confidence.amin(dim=-1), across.amin(dim=-1)
    return Calibration(
        confident_half_deg=halves[0],
        other_half_deg=halves[1],
        confident_half_both_ways_deg=both_ways_halves[0],
        other_half_both_ways_deg=both_ways_halves[1],
        confident_half_depth=_median_or_none(errors.depth[:, 1]),
        other_half_depth=_median_or_none(errors.depth[:, 2]),
        separation=roc_auc(pair_confidence, across.log().mean(dim=-1)) if len(across) else None,
        separation_weaker_image=roc_auc(weaker, weaker_across) if len(across) else None,
    )


def _median_halves(errors: Float[Tensor, " p"], confidence: Float[Tensor, " p"]) -> tuple[float, float]:
    """Median error of the more confident half, and of the rest."""
    by_confidence = errors[confidence.argsort(descending=True, stable=True)]
    half = (len(errors) + 1) // 2
    return by_confidence[:half].median().item(), by_confidence[half:].median().item()


def _median_or_none(values: Float[Tensor, " p"]) -> float | None:
    known = values[~values.isnan()]
    return known.median().item() if len(known) else None


def _row(scores: SceneScores) -> list[str]:
    known = scores.reference_focal
    others = (scores.both_known, scores.own_focal, scores.both_ways, scores.own_focal_both_ways)
    angles = [f"{known.median_rotation_deg:.1f}", f"{known.median_translation_deg:.1f}"]
    return [
        *(scores.scene, str(scores.num_pairs)),
        *(f"{100 * known.rra15:.1f}", f"{100 * known.rta15:.1f}", f"{known.maa30:.3f}", *angles),
        *(text for s in others for text in (f"{100 * s.rra15:.1f}", f"{100 * s.rta15:.1f}", f"{s.maa30:.3f}")),
        *(_percent(scores.focal_error), _percent(scores.depth_error)),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _json_safe(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
