"""Stage: compare the poses of models with reference poses, by the relative poses of all pairs of images."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.formats.cameras_json import read_cameras_json
from dust3r_sfm.geometry.metrics import accuracy_at, all_pairs_errors_deg, auc

logger = logging.getLogger(__name__)

ACCURACY_DEG = (5, 15)
AUC_DEG = (1, 3, 5, 10, 30)

Poses = Mapping[str, Float[Tensor, "4 4"]]
"""cam_from_world by image name."""


@dataclass(frozen=True, kw_only=True)
class PoseReport:
    """How the poses of one scene compare with its reference; fractions are of all pairs of reference images."""

    scene: str
    num_images: int
    """Images that have a reference pose."""
    num_registered: int
    """Those of them that the model has a pose for."""
    num_pairs: int
    rra: dict[int, float]
    """Fraction of relative rotations within so many degrees."""
    rta: dict[int, float]
    """Fraction of relative translation directions within so many degrees."""
    auc: dict[int, float]
    """Area under the recall curve of the worse of both errors, up to so many degrees."""
    median_rotation_deg: float
    median_translation_deg: float
    unregistered: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a median that is infinite is None."""
        return {key: value if finite(value) else None for key, value in asdict(self).items()}


def main(model: tuple[Path, ...], reference: tuple[Path, ...], json: Path | None = None) -> None:
    """Compare COLMAP models with reference poses and print a table.

    Errors are those of the relative poses of all pairs of images with a reference pose. An image
    that the model lacks fails all its pairs. RRA@t, RTA@t: relative rotations, and translation
    directions, within t degrees; AUC@t: area under the recall curve of the worse of the two.

    Args:
        model: Folders with a COLMAP model, or with several as 0, 1, ...: the one with the most images counts.
        reference: For each of them a COLMAP model, a scene folder with a cameras.json, or such a file.
        json: File to write the figures to.
    """
    if len(model) != len(reference) or not model:
        raise InputError(f"every --model needs its --reference: got {len(model)} and {len(reference)}")
    reports = [evaluate_model(*paths) for paths in zip(model, reference, strict=True)]
    print(pose_table(reports))
    if json is not None:
        write_bytes(json, dumps([report.to_dict() for report in reports], indent=1).encode())
    registered, images = (sum(getattr(r, key) for r in reports) for key in ("num_registered", "num_images"))
    logger.info("%d of %d images are registered (scenes: %d).", registered, images, len(reports))


def evaluate_model(model: Path, reference: Path) -> PoseReport:
    """Compare the model at a path with the reference at another."""
    truth = read_reference(reference)
    poses = read_model(model)
    if poses is None:
        logger.warning("There is no model in %s: all images count as not registered.", model)
    elif poses and not set(poses) & set(truth):
        raise InputError(
            f"{model} and {reference} share no image name, first {min(poses)} and {min(truth)}: "
            "names are paths below the image folder"
        )
    return evaluate_poses(poses or {}, truth, scene=_scene_name(reference))


def evaluate_poses(estimated: Poses, reference: Poses, scene: str = "") -> PoseReport:
    """Compare poses by name; images of the reference that have no estimate fail all their pairs, others are ignored."""
    if len(reference) < 2:
        raise InputError(f"a reference needs at least 2 images with poses, {scene or 'this one'} has {len(reference)}")
    names = sorted(reference)
    missing = torch.full((4, 4), torch.nan, dtype=torch.float64)
    rotation, translation = all_pairs_errors_deg(
        torch.stack([estimated.get(name, missing).double() for name in names]),
        torch.stack([reference[name].double() for name in names]),
    )
    worse = torch.maximum(rotation, translation)
    unregistered = tuple(name for name in names if name not in estimated)
    return PoseReport(
        scene=scene,
        num_images=len(names),
        num_registered=len(names) - len(unregistered),
        num_pairs=len(rotation),
        rra=dict(zip(ACCURACY_DEG, accuracy_at(rotation, ACCURACY_DEG), strict=True)),
        rta=dict(zip(ACCURACY_DEG, accuracy_at(translation, ACCURACY_DEG), strict=True)),
        auc={threshold: auc(worse, threshold) for threshold in AUC_DEG},
        median_rotation_deg=rotation.quantile(0.5, interpolation="higher").item(),
        median_translation_deg=translation.quantile(0.5, interpolation="higher").item(),
        unregistered=unregistered,
    )


def read_reference(path: Path) -> dict[str, Tensor]:
    """Reference poses of a COLMAP model, a scene folder or a cameras.json; InputError where it is none of them."""
    if path.is_file() or (path / "cameras.json").is_file():
        frames = read_cameras_json(path)
        return {frame.name: frame.cam_from_world for frame in frames if frame.cam_from_world is not None}
    poses = read_model(path)
    if poses is None:
        raise InputError(f"{path} holds no cameras.json and no COLMAP model: expected a reference there")
    return poses


def read_model(path: Path) -> dict[str, Tensor] | None:
    """Poses of the COLMAP model in a folder; None where there is no model.

    Where the folder holds several (0, 1, ...), the one with the most registered images, the first of
    equals: the frames of different models are not related, so the rest counts as not registered.
    """
    if not path.is_dir():
        raise InputError(f"there is no folder {path}: expected one with a COLMAP model")
    folders = [path] if _is_model(path) else [sub for sub in path.iterdir() if sub.name.isdigit() and _is_model(sub)]
    models = [_read_poses(folder) for folder in sorted(folders, key=lambda folder: (len(folder.name), folder.name))]
    return max(models, key=len, default=None)


def pose_table(reports: Sequence[PoseReport]) -> str:
    """A markdown table in percent, a line a scene, and their mean where there are several."""
    columns = [("RRA", d) for d in ACCURACY_DEG] + [("RTA", d) for d in ACCURACY_DEG] + [("AUC", d) for d in AUC_DEG]
    figures = [[getattr(report, kind.lower())[deg] for kind, deg in columns] for report in reports]
    counts = [[report.scene, f"{report.num_registered}/{report.num_images}"] for report in reports]
    if len(reports) > 1:
        figures.append([sum(values) / len(reports) for values in zip(*figures, strict=True)])
        counts.append(["mean", ""])
    rows = [count + [f"{100 * value:.1f}" for value in values] for count, values in zip(counts, figures, strict=True)]
    return markdown_table(["scene", "registered", *(f"{kind}@{deg}" for kind, deg in columns)], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned markdown table; the first column is flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * max(widths[0], 3), *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    return "\n".join([line(header), line(rule), *map(line, rows)])


def finite(value: Any) -> bool:
    """Whether JSON can hold a value: all but infinities and NaN."""
    return not isinstance(value, float) or math.isfinite(value)


def _is_model(folder: Path) -> bool:
    return any((folder / f"images{suffix}").is_file() for suffix in (".bin", ".txt"))


def _read_poses(folder: Path) -> dict[str, Tensor]:
    import pycolmap

    try:
        model = pycolmap.Reconstruction(folder)
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(f"{folder} cannot be read as a COLMAP model: {error}") from error
    poses = {}
    for image in model.images.values():
        if image.has_pose:
            poses[image.name] = torch.eye(4, dtype=torch.float64)
            poses[image.name][:3] = torch.from_numpy(image.cam_from_world().matrix())
    return poses


def _scene_name(reference: Path) -> str:
    """The folder's name, or that of the one that holds `cameras.json` or `sparse/0`."""
    reference = reference.resolve()
    folder = reference.parent if reference.is_file() else reference
    while folder.name.isdigit() or folder.name == "sparse":
        folder = folder.parent
    return folder.name


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["evaluate", *sys.argv[1:]]))
