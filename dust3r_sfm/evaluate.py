"""Stage: compare the poses of models with reference poses, by the relative poses of all pairs of images."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any

import pycolmap
import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.colmap_worker import run_task
from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.formats.cameras_json import read_cameras_json
from dust3r_sfm.formats.colmap import colmap_from_scene, read_colmap
from dust3r_sfm.formats.scenes import read_scenes
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
    method: str = ""
    """Of several that were compared: aligned, refined, COLMAP."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a median that is infinite is None."""
        return {key: value if finite(value) else None for key, value in asdict(self).items()}


def main(
    model: tuple[Path, ...],
    reference: tuple[Path, ...],
    json: Path | None = None,
    image_dir: tuple[Path, ...] = (),
    with_colmap: bool = False,
) -> None:
    """Compare COLMAP models with reference poses and print a table.

    Errors are those of the relative poses of all pairs of images with a reference pose. An image
    that the model lacks fails all its pairs. RRA@t, RTA@t: relative rotations, and translation
    directions, within t degrees; AUC@t: area under the recall curve of the worse of the two.

    Args:
        model: Folders with a COLMAP model, or with several as 0, 1, ...: the one with the most images counts. Of an
            output folder of reconstruct the scene before refinement is compared, too.
        reference: For each of them a COLMAP model, a scene folder with a cameras.json, or such a file.
        json: File to write the figures to.
        image_dir: For each of them the folder of its photos, where these are some of the reference's alone.
        with_colmap: Let COLMAP's incremental mapping (SIFT, all pairs) make a model of the same photos, to compare
            with; they are those of image_dir, or in images/ beside the reference.
    """
    if len(model) != len(reference) or not model:
        raise InputError(f"every --model needs its --reference: got {len(model)} and {len(reference)}")
    if len(image_dir) not in (0, len(model)):
        raise InputError(f"every --model needs its --image_dir, or none has one: got {len(model)} and {len(image_dir)}")
    reports = []
    for path, truth, photos in zip(model, reference, image_dir or (None,) * len(model), strict=True):
        reports += compare(path, truth, photos, with_colmap)
    print(pose_table(reports))
    if json is not None:
        write_bytes(json, dumps([report.to_dict() for report in reports], indent=1).encode())
    ours = [report for report in reports if report.method in ("", "refined")]
    registered, images = (sum(getattr(r, key) for r in ours) for key in ("num_registered", "num_images"))
    logger.info("%d of %d images are registered (scenes: %d).", registered, images, len(ours))


def compare(model: Path, reference: Path, image_dir: Path | None, with_colmap: bool) -> list[PoseReport]:
    """The reports on a model: of a run's output before and after refinement, and of COLMAP's own where asked for."""
    truth = read_reference(reference)
    if image_dir is not None:
        truth = {name: pose for name, pose in truth.items() if (image_dir / name).is_file()}
        if not truth:
            raise InputError(f"no photo of {image_dir} has a pose in {reference}: names are paths below the folder")
    estimates: dict[str, Poses | None] = {}
    aligned = model / "aligned.h5"
    if aligned.is_file() and (model / "sparse").is_dir():
        estimates["aligned"] = _poses_of(colmap_from_scene(read_scenes(aligned)[0]))
        estimates["refined"] = read_model(model / "sparse")
    else:
        estimates["refined" if with_colmap else ""] = read_model(model)
    if with_colmap:
        estimates["COLMAP"] = colmap_poses(_photos_of(reference, image_dir), sorted(truth))
    name = _scene_name(reference) if image_dir is None else _scene_name(image_dir)
    return [_checked_report(poses, truth, model, reference, name, method) for method, poses in estimates.items()]


def colmap_poses(image_dir: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Poses of the largest model of COLMAP's incremental mapping, of SIFT matches of all pairs; none where it fails."""
    with tempfile.TemporaryDirectory(prefix="colmap") as work:
        database, output = Path(work) / "database.db", Path(work) / "sparse"
        output.mkdir()
        done = run_task(
            "sift", database=database, image_dir=image_dir.absolute(), names=list(names), pairs=None, cameras={}
        ) and run_task("map_images", database=database, output=output, constant_cameras=[], options={})
        return (read_model(output) or {}) if done else {}


def _photos_of(reference: Path, image_dir: Path | None) -> Path:
    if image_dir is not None:
        return image_dir
    folder = (reference if reference.is_dir() else reference.parent) / "images"
    if not folder.is_dir():
        raise InputError(f"COLMAP needs the photos, and there is no folder {folder}: name it by --image_dir")
    return folder


def evaluate_model(model: Path, reference: Path) -> PoseReport:
    """Compare the model at a path with the reference at another."""
    return _checked_report(read_model(model), read_reference(reference), model, reference, _scene_name(reference))


def _checked_report(
    poses: Poses | None, truth: Poses, model: Path, reference: Path, scene: str, method: str = ""
) -> PoseReport:
    if poses is None:
        logger.warning("There is no model in %s: all images count as not registered.", model)
    elif poses and not set(poses) & set(truth):
        raise InputError(
            f"{model} and {reference} share no image name, first {min(poses)} and {min(truth)}: "
            "names are paths below the image folder"
        )
    return dataclasses.replace(evaluate_poses(poses or {}, truth, scene), method=method)


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
    models = [
        _poses_of(read_colmap(folder)) for folder in sorted(folders, key=lambda folder: (len(folder.name), folder.name))
    ]
    return max(models, key=len, default=None)


def pose_table(reports: Sequence[PoseReport]) -> str:
    """A markdown table in percent, a line a scene and method, and the means of each method over several scenes."""
    columns = [("RRA", d) for d in ACCURACY_DEG] + [("RTA", d) for d in ACCURACY_DEG] + [("AUC", d) for d in AUC_DEG]

    def row(scene: str, method: str, registered: str, figures: Sequence[float]) -> list[str]:
        return [scene, *([method] if has_methods else []), registered, *(f"{100 * value:.1f}" for value in figures)]

    has_methods = any(report.method for report in reports)
    rows, by_method = [], defaultdict(list)
    for r in reports:
        figures = [getattr(r, kind.lower())[deg] for kind, deg in columns]
        by_method[r.method].append(figures)
        rows.append(row(r.scene, r.method, f"{r.num_registered}/{r.num_images}", figures))
    for method, all_figures in by_method.items():
        if len(all_figures) > 1:
            means = [sum(values) / len(all_figures) for values in zip(*all_figures, strict=True)]
            rows.append(row("mean", method, "", means))
    header = ["scene", *(["method"] if has_methods else []), "registered"]
    return markdown_table([*header, *(f"{kind}@{deg}" for kind, deg in columns)], rows)


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


def _poses_of(reconstruction: pycolmap.Reconstruction) -> dict[str, Tensor]:
    poses = {}
    for image in reconstruction.images.values():
        if image.has_pose:
            poses[image.name] = torch.eye(4, dtype=torch.float64)
            poses[image.name][:3] = torch.from_numpy(image.cam_from_world().matrix())
    return poses


def _scene_name(reference: Path) -> str:
    """The folder's name, or that of the one that holds `cameras.json`, `sparse/0` or `images`."""
    reference = reference.resolve()
    folder = reference.parent if reference.is_file() else reference
    while folder.name.isdigit() or folder.name in ("sparse", "images"):
        folder = folder.parent
    return folder.name


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["evaluate", *sys.argv[1:]]))
