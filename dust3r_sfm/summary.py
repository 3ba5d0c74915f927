"""What a run did, for `summary.json`: every image, every pair, counts, timings, versions."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from dust3r_sfm.files import write_bytes
from dust3r_sfm.filter_pairs import PairDecision
from dust3r_sfm.formats.exif import GpsFix
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.priors import origin_line
from dust3r_sfm.scene import Scene, Tracks
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

PACKAGES = ("dust3r_sfm", "torch", "pycolmap", "numpy", "scipy", "h5py")


@dataclass
class Summary:
    """Filled stage by stage; what is not known yet stays empty."""

    rejected: Mapping[str, str] = field(default_factory=dict)
    """Images that could not be used and why."""
    names: Sequence[str] = ()
    """Images that could."""
    image_dir: Path | None = None
    views: Sequence[View] = ()
    matches: Mapping[Pair, Matches] = field(default_factory=dict)
    model: Dust3r | None = None
    decisions: Sequence[PairDecision] = ()
    scenes: Sequence[Scene] = ()
    refinement: Mapping[str, Any] = field(default_factory=dict)
    """The models that were compared, and what each explains."""
    origin: GpsFix | None = None
    """Of positions from GPS."""
    timings_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        logger.debug("stage %s", stage)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings_s[stage] = self.timings_s.get(stage, 0.0) + time.perf_counter() - start

    def images(self) -> dict[str, dict[str, Any]]:
        """Every image: the model it is registered in, or the reason why it is in none."""
        model_of = {name: i for i, scene in enumerate(self.scenes) for name in scene.names}
        reasons = {name: f"{name} {reason}" for name, reason in self.rejected.items()}
        decisions: dict[str, list[PairDecision]] = {name: [] for name in self.names if name not in model_of}
        for decision in self.decisions:
            for name in decisions.keys() & set(decision.pair):
                decisions[name].append(decision)
        reasons |= {name: _reason(name, mine) for name, mine in decisions.items()}
        found = {name: {"registered": True, "model": i} for name, i in model_of.items()}
        found |= {name: {"registered": False, "reason": reason} for name, reason in reasons.items()}
        return dict(sorted(found.items()))

    def counts(self) -> dict[str, int]:
        return {
            "images": len(self.names) + len(self.rejected),
            "registered": sum(len(scene.names) for scene in self.scenes),
            "pairs": len(self.decisions),
            "kept_pairs": sum(decision.kept for decision in self.decisions),
            "models": len(self.scenes),
            "points": sum(len(s.tracks.points_in_world) for s in self.scenes if s.tracks is not None),
        }

    def closing_line(self) -> str:
        c = self.counts()
        models = f"{c['models']} model{'' if c['models'] == 1 else 's'}"
        return (
            f"{c['registered']} of {c['images']} images registered in {models} with {c['points']} points; "
            f"{c['kept_pairs']} of {c['pairs']} directed pairs kept; {sum(self.timings_s.values()):.0f} s."
        )

    def content(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        return {
            "counts": self.counts(),
            "image_dir": self.image_dir and str(self.image_dir.resolve()),
            "models": [_model_figures(scene, i) for i, scene in enumerate(self.scenes)],
            "refinement": self.refinement,
            "origin": self.origin and origin_line(self.origin),
            "network": self.model and {"name": self.model.name, "licence": self.model.licence},
            "timings_s": {stage: round(seconds, 3) for stage, seconds in self.timings_s.items()},
            "versions": versions(),
            "images": self.images(),
            "pairs": [_pair_line(decision) for decision in self.decisions],
        }

    def write(self, path: Path) -> None:
        write_bytes(path, json.dumps(self.content(), indent=1).encode())


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: metadata.version(package) for package in PACKAGES}


def _reason(name: str, decisions: Sequence[PairDecision]) -> str:
    """Why an image is in no model, by what became of its pairs."""
    if not decisions:
        return "no pair of it was predicted"
    if not any(decision.kept for decision in decisions):
        best = max(decisions, key=lambda decision: decision.score)
        other = best.pair.name1 if best.pair.name0 == name else best.pair.name0
        return f"all of its {len(decisions)} directed pairs were dropped; the best, with {other}: {best.reason}"
    return "the alignment found no pose for it"


def _pair_line(decision: PairDecision) -> dict[str, Any]:
    name0, name1 = decision.pair
    score = round(decision.score, 4)
    return {"name0": name0, "name1": name1, "kept": decision.kept, "reason": decision.reason, "score": score}


def _model_figures(scene: Scene, index: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"folder": f"sparse/{index}", "images": len(scene.names)}
    if isinstance(scene.tracks, Tracks) and len(scene.tracks.points_in_world):
        figures["points"] = len(scene.tracks.points_in_world)
        figures["mean_track_length"] = round(len(scene.tracks.point_indices) / figures["points"], 3)
        figures["mean_reprojection_error_px"] = round(float(scene.tracks.errors.mean()), 3)
    return figures
