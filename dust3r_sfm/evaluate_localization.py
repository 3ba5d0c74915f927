"""Stage: leave-one-out localisation: each posed photo of a scene is a query, the others are its reference.

python -m dust3r_sfm.evaluate_localization --scenes castle entry --output out --methods auto pnp relative
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64
from tqdm import tqdm

from dust3r_sfm.errors import InputError
from dust3r_sfm.evaluate import finite, markdown_table
from dust3r_sfm.extract_descriptors import describe_views
from dust3r_sfm.files import holding, write_bytes
from dust3r_sfm.formats.sparse_database import SparseMatches
from dust3r_sfm.geometry.transforms import rotation_angle_deg
from dust3r_sfm.infer_pairs import InferConfig
from dust3r_sfm.localize import locate_all
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.queries import known_camera, make_query, reference_features
from dust3r_sfm.query_poses import LocateConfig, Located
from dust3r_sfm.reference import Reference, image_folder_of, read_reference, without_image
from dust3r_sfm.views import View, load_views

logger = logging.getLogger(__name__)

Method = Literal["auto", "pnp", "relative"]
FINE, COARSE = (0.01, 2.0), (0.05, 10.0)
"""Errors of position, as a share of the largest distance between two cameras, and of rotation in degrees."""
FINE_M = 0.25


@dataclass(frozen=True, kw_only=True)
class LocalizationReport:
    """How queries of one scene were localised; a query without a pose is infinitely wrong."""

    scene: str
    method: str
    num_queries: int
    num_located: int
    median_rotation_deg: float
    median_position: float
    """As a share of the largest distance between two cameras."""
    recall_fine: float
    recall_coarse: float
    errors: dict[str, tuple[float, float]]
    """By query, degrees and position; empty of those without a pose."""

    def to_dict(self) -> dict[str, object]:
        """For JSON, which has no infinity."""
        return {key: value if finite(value) else None for key, value in asdict(self).items()}


def main(
    scenes: tuple[Path, ...],
    output: Path,
    image_dir: Path | None = None,
    methods: tuple[Method, ...] = ("auto",),
    intrinsics: Literal["unknown", "known"] = "unknown",
    metric: bool = False,
    every: int = 1,
    num_matched: int = 10,
    model: str | None = None,
    config: LocateConfig = LocateConfig(),  # noqa: B008  frozen
    infer: InferConfig = InferConfig(),  # noqa: B008  frozen
) -> None:
    """Localise each posed photo in the others of its scene and print a table of errors.

    Recall is the share of queries within 1 % of the largest distance between two cameras (0.25
    units with --metric) and 2 degrees, and within 5 % and 10 degrees.

    Args:
        scenes: Folders with a cameras.json, or COLMAP models with their photos.
        output: Folder for localization.json, and for features and pointmaps, which a second run takes up.
        image_dir: The photos, of a single scene; the folder images beside each where not given.
        methods: How to localise; one line of the table each.
        intrinsics: Whether the query's own camera is given.
        metric: The scenes' unit is the metre.
        every: Take every so many-th photo of a scene as a query.
        num_matched: Reference images that a query is compared with.
        model: Checkpoint file, folder or hub name; the shipped weights where not given.
        config: How to find a pose; its method is one of `methods`.
        infer: How to run the network.
    """
    if image_dir is not None and len(scenes) > 1:
        raise InputError(f"--image_dir goes with one scene, got {len(scenes)}: put the photos beside each as images")
    if every < 1:
        raise InputError(f"every must be at least 1, got {every}: it counts photos")
    network = Dust3r.from_pretrained(model)
    reports: list[LocalizationReport] = []
    with holding(output):
        for scene in scenes:
            trial = _trial(scene, image_dir, network, output, num_matched, every, intrinsics == "known", infer)
            for method in methods:
                found = locate_each(trial, dataclasses.replace(config, method=method))
                reports.append(report(scene.resolve().name, method, trial.reference, found, metric))
                content = json.dumps([one.to_dict() for one in reports], indent=1)
                write_bytes(output / "localization.json", content.encode())
    print(table(reports, metric))
    located, total = (sum(getattr(r, key) for r in reports) for key in ("num_located", "num_queries"))
    logger.info("%d of %d queries were localised (scenes: %d).", located, total, len(scenes))


@dataclass(frozen=True, eq=False)
class Trial:
    """A scene whose images are localised in one another."""

    network: Dust3r
    reference: Reference
    views: list[View]
    """Of all images, with what is known of their cameras."""
    queries: list[View]
    sparse: SparseMatches
    descriptors: Float32[np.ndarray, "n d"]
    """Of all images."""
    folder: Path
    num_matched: int
    is_known: bool
    infer: InferConfig


def locate_each(trial: Trial, config: LocateConfig) -> dict[str, Located | None]:
    """Every query in the reference without it."""
    found: dict[str, Located | None] = {}
    names = [view.name for view in trial.views]
    for view in tqdm(trial.queries, desc=f"{trial.folder.name}, {config.method}", unit="query", disable=None):
        index = names.index(view.name)
        rest = trial.reference.only(set(names) - {view.name})
        camera = trial.reference.cameras[view.name] if trial.is_known else None
        query = make_query(view, camera, rest, trial.sparse)
        alike = np.argsort(-trial.descriptors @ trial.descriptors[index], kind="stable")
        neighbors = {view.name: [names[i] for i in alike if i != index][: trial.num_matched]}
        others = [other for other in trial.views if other.name != view.name]
        work = trial.folder / f"query-{index}"
        work.mkdir(exist_ok=True)
        sparse = without_image(trial.sparse, view.name)
        found |= locate_all(trial.network, [query], neighbors, rest, sparse, others, work, config, trial.infer)
    return found


def report(
    scene: str, method: str, reference: Reference, found: Mapping[str, Located | None], metric: bool = False
) -> LocalizationReport:
    """The errors of queries against the reference's own poses of them."""
    centers = np.array([_center(pose) for pose in reference.cam_from_world.values()])
    extent = float(np.linalg.norm(centers[:, None] - centers[None], axis=-1).max())
    errors = {}
    for name, located in found.items():
        truth = reference.cam_from_world[name]
        if located is not None:
            pose = located.pose.cam_from_world
            turn = rotation_angle_deg(torch.from_numpy(pose[:, :3].copy()), torch.from_numpy(truth[:, :3].copy()))
            errors[name] = float(turn), float(np.linalg.norm(_center(pose) - _center(truth))) / extent
    angles, positions = np.array([errors.get(name, (np.inf, np.inf)) for name in found]).T
    fine = (FINE_M / extent if metric else FINE[0]), FINE[1]
    return LocalizationReport(
        scene=scene,
        method=method,
        num_queries=len(found),
        num_located=len(errors),
        median_rotation_deg=_median(angles),
        median_position=_median(positions),
        recall_fine=float(((positions <= fine[0]) & (angles <= fine[1])).mean()),
        recall_coarse=float(((positions <= COARSE[0]) & (angles <= COARSE[1])).mean()),
        errors=errors,
    )


def table(reports: Sequence[LocalizationReport], metric: bool = False) -> str:
    """A markdown table, a line a scene and method."""
    header = ["scene", "method", "localised", "median deg", "median position"]
    header += [
        f"{f'{FINE_M} m' if metric else f'{FINE[0]:.0%}'}, {FINE[1]:g} deg",
        f"{COARSE[0]:.0%}, {COARSE[1]:g} deg",
    ]
    rows = [
        [
            *(r.scene, r.method, f"{r.num_located}/{r.num_queries}"),
            *(f"{r.median_rotation_deg:.3f}", f"{r.median_position:.3%}" if finite(r.median_position) else "none"),
            *(f"{100 * r.recall_fine:.1f}", f"{100 * r.recall_coarse:.1f}"),
        ]
        for r in reports
    ]
    return markdown_table(header, rows)


def _trial(
    scene: Path,
    image_dir: Path | None,
    network: Dust3r,
    output: Path,
    num_matched: int,
    every: int,
    is_known: bool,
    infer: InferConfig,
) -> Trial:
    reference = read_reference(scene)
    image_dir = image_dir or image_folder_of(scene)
    if image_dir is None:
        raise InputError(f"{scene} has no folder images beside it: name its photos with --image_dir")
    if len(reference.names) < 3:
        raise InputError(f"{scene} has {len(reference.names)} posed images: leaving one out needs at least 3")
    size, square_ok = network.config.image_size, network.config.square_ok
    cameras = {name: known_camera(camera) for name, camera in reference.cameras.items()}
    views = load_views(image_dir, size, reference.names, square_ok=square_ok, cameras=cameras)
    queries = views if is_known else load_views(image_dir, size, reference.names, square_ok=square_ok)
    folder = output / scene.resolve().name
    folder.mkdir(exist_ok=True)
    sparse = reference_features(scene, image_dir, network, views, folder)
    rows = describe_views(network, views)
    return Trial(network, reference, views, queries[::every], sparse, rows, folder, num_matched, is_known, infer)


def _center(pose: Float64[np.ndarray, "3 4"]) -> Float64[np.ndarray, "3"]:
    return -pose[:, :3].T @ pose[:, 3]


def _median(values: Float64[np.ndarray, " n"]) -> float:
    """The upper one of the middle two: half of the queries are at least so good."""
    return float(np.sort(values)[len(values) // 2])


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["evaluate-localization", *sys.argv[1:]]))
