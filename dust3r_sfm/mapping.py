"""Models from verified matches: from the poses of an aligned scene, and by COLMAP's own incremental mapping."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import torch
from jaxtyping import Float

from dust3r_sfm.alignment.focal_priors import FocalPriors
from dust3r_sfm.alignment.refine import (
    MIN_VERIFIED,
    NO_DISTORTION,
    Adjustment,
    CameraModel,
    RefineConfig,
    Support,
    rebuilt,
    refine,
    support,
    thinned,
    with_distortion,
    with_shared_cameras,
    with_tracks,
    without_needless_distortion,
)
from dust3r_sfm.colmap_versions import add_camera, add_image, put_back
from dust3r_sfm.colmap_worker import run_task
from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.formats.sparse_database import SparseMatches, write_database
from dust3r_sfm.geometry.lens import Lens, camera_with_lens, lens_of, straightened
from dust3r_sfm.geometry.resection import AbsolutePose, absolute_pose
from dust3r_sfm.scene import Scene, Tracks
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

SHARED_SCORE = 0.995
"""One camera for all photos of a size is taken where the model explains at least this share of what several do."""
MAX_SHARED_TRY = 40
"""Up to so many images are always mapped with shared cameras, too."""
RESECTION_ERROR_PX = 12.0
MIN_RESECTED = 15
"""Points that have to agree on the pose of an image that saw too few, within so many pixels (COLMAP's own)."""
HOPELESS = 0.7
"""Models that explain less than this share of another, of no more images, are not adjusted to the end."""
ROUND_FACTORS = (16.0, 4.0, 1.0)
"""How tolerant the rounds of triangulation are that start from the poses of an aligned scene."""
RELAXED: dict[str, Any] = {
    "min_num_matches": 10,
    "mapper": {
        "init_min_num_inliers": 40,
        "init_min_tri_angle": 6.0,
        "abs_pose_min_num_inliers": 15,
        "abs_pose_min_inlier_ratio": 0.2,
    },
}
"""COLMAP's options for a second try where the first one leaves images out."""


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of the cameras of photos, by name."""

    poses: frozenset[str]
    """Those whose pose is held."""
    intrinsics: frozenset[str]
    """Those whose intrinsics are held."""
    focal_priors: FocalPriors
    groups: Mapping[str, str] | None
    """Photos of one group share a camera; None where that is to be found out."""


def known_of(views: Sequence[View]) -> Known:
    groups = {view.name: view.camera_group for view in views if view.camera_group is not None}
    held = frozenset(view.name for view in views if view.known_K is not None and not view.focal_sigma)
    return Known(
        poses=frozenset(view.name for view in views if view.known_cam_from_world is not None),
        intrinsics=held,
        focal_priors={v.name: (float(v.known_K.diagonal()[:2].mean()), v.focal_sigma) for v in views if v.focal_sigma},
        groups={name: group for name, group in groups.items() if name not in held} if groups else None,
    )


@dataclass(frozen=True, eq=False)
class Model:
    """A candidate for the poses of some images."""

    origin: str
    """`alignment`, `mapping`, or `extension` of photos whose poses are known."""
    reconstruction: pycolmap.Reconstruction
    support: Support
    """Counted on the sparse matches alone, so that all candidates are compared by the same ones."""

    @property
    def names(self) -> set[str]:
        return {self.reconstruction.image(i).name for i in self.reconstruction.reg_image_ids()}

    def without(self, names: Collection[str]) -> Model:
        """The model less some of its images."""
        kept = {i: image.camera_id for i, image in self.reconstruction.images.items() if image.name not in names}
        less = rebuilt(self.reconstruction, list(self.reconstruction.cameras.values()), kept)
        return Model(self.origin, less, support(less))


def camera_guesses(
    views: Sequence[View], sparse: SparseMatches, model: CameraModel = "SIMPLE_RADIAL"
) -> dict[str, pycolmap.Camera]:
    """A first camera of each view that has keypoints: the known one, or COLMAP's guess as a camera of the model."""
    guesses = {}
    for view in views:
        if view.name not in sparse.cameras:
            continue
        if view.known_K is not None:
            guess = camera_with_lens(view.known_K.double().numpy(), view.original_size, view.lens)
            guess.has_prior_focal_length = True
        else:
            found = sparse.cameras[view.name]
            lens = Lens(model, NO_DISTORTION[model]) if model in NO_DISTORTION else None
            guess = camera_with_lens(found.calibration_matrix(), view.original_size, lens)
            guess.has_prior_focal_length = found.has_prior_focal_length
        guesses[view.name] = guess
    return guesses


def map_incrementally(views: Sequence[View], sparse: SparseMatches, work: Path, config: RefineConfig) -> list[Model]:
    """The models of COLMAP's incremental mapping, most verified images first; none where it finds none.

    Where images stay out it is tried again with milder thresholds, and what explains more is taken.
    Of few images, or where some stay out, it is also tried with one camera for all photos of a size
    from the start: a few images leave their focals open, and what has fewer unknowns is more often right.
    """
    guesses = camera_guesses(views, sparse, config.camera_model)
    names = [view.name for view in views if view.name in guesses]
    if len(names) < 2 or not sparse.geometries:
        return []
    known = known_of(views)
    best = _map_guesses(names, guesses, None, sparse, work, known, config)
    sizes = [(guesses[name].width, guesses[name].height) for name in names]
    is_open = not known.intrinsics and known.groups is None and len(set(sizes)) < len(sizes)
    if is_open and (len(names) <= MAX_SHARED_TRY or not best or best[0].support.images < len(names)):
        shared = _map_guesses(names, guesses, [sizes.index(s) + 1 for s in sizes], sparse, work, known, config)
        if shared and (not best or _sharing_suffices(shared[0].support, best[0].support)):
            return shared
    return best


def _sharing_suffices(shared: Support, own: Support) -> bool:
    """Whether one camera for all photos of a size explains about as much as several."""
    return shared.explains_more_than(own) or (shared.images >= own.images and shared.score >= SHARED_SCORE * own.score)


def _map_guesses(
    names: Sequence[str],
    guesses: Mapping[str, pycolmap.Camera],
    camera_ids: Sequence[int] | None,
    sparse: SparseMatches,
    work: Path,
    known: Known,
    config: RefineConfig,
) -> list[Model]:
    """The better of two tries, the second one with milder thresholds where images stay out."""
    database = work / "mapping.db"
    write_database(database, names, [guesses[name] for name in names], sparse, camera_ids)
    held = [i for i, name in enumerate(names, start=1) if name in known.intrinsics]
    best: list[Model] = []
    for options in ({}, RELAXED):
        models = map_images(database, work / "models", held, {"min_model_size": 3} | options)
        models = [_polished(model, known, config) for model in models]
        models.sort(key=lambda m: (m.support.images, m.support.score), reverse=True)
        if models and (not best or models[0].support.explains_more_than(best[0].support)):
            best = models
        if best and best[0].support.images == len(names):
            break
    return best


def map_images(
    database: Path,
    output: Path,
    constant_cameras: Sequence[int],
    options: dict[str, Any],
    previous: Path | None = None,
) -> list[pycolmap.Reconstruction]:
    """The models of COLMAP's incremental mapping; with a `previous` one the one that continues it, whose poses stay."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    paths = {"database": database.absolute(), "output": output.absolute()}
    if previous is not None:
        paths["previous"] = previous.absolute()
    if not run_task("map_images", **paths, constant_cameras=constant_cameras, options=options):
        return []
    folders = sorted((folder for folder in output.iterdir() if folder.name.isdigit()), key=lambda f: int(f.name))
    if (output / "images.bin").is_file():  # where COLMAP may leave a continued model
        folders = [output]
    models = [pycolmap.Reconstruction(folder) for folder in folders]
    for model in models if previous is not None else ():
        put_back(model, pycolmap.Reconstruction(previous))
    return models


def _polished(reconstruction: pycolmap.Reconstruction, known: Known, config: RefineConfig) -> Model:
    """A mapped model, adjusted to focal priors, with one camera for photos of a size where that explains as much."""
    if known.focal_priors:  # COLMAP's mapping takes them for a start
        once = dataclasses.replace(config, num_rounds=1)
        reconstruction = _refined(reconstruction, once, known).reconstruction
    own = support(reconstruction, config)
    shared = share_cameras(reconstruction, own, known, config)
    if shared is None:
        return Model("mapping", reconstruction, own)
    return Model("mapping", shared.reconstruction, shared.after)


def share_cameras(
    reconstruction: pycolmap.Reconstruction, own: Support, known: Known, config: RefineConfig
) -> Adjustment | None:
    """The model adjusted with one camera for all photos of a size; None where several explain clearly more.

    Where it is known which photos share a camera, they do.
    """
    if known.groups is None and known.intrinsics:
        return None
    shared = with_shared_cameras(reconstruction, known.groups)
    if shared is None:
        return None
    once = dataclasses.replace(config, num_rounds=1)  # it starts close to its end
    adjusted = _refined(shared, once, known)
    if known.groups is not None:
        return adjusted
    enough = adjusted.after.images >= own.images and adjusted.after.score >= SHARED_SCORE * own.score
    return adjusted if enough and not adjusted.kept_input else None


def map_from_alignment(
    scene: Scene,
    views: Sequence[View],
    sparse: SparseMatches,
    work: Path,
    config: RefineConfig,
    rival: Support | None = None,
) -> tuple[Model, Support]:
    """The model that the matches give under the poses of an aligned scene, and what these explained as they were.

    Points are triangulated, all is adjusted, and so again with less tolerance. Images that see
    too few of them lean on the scene's dense tracks, which take part as they are. The last and
    longest round is left out where the poses still explain far less than a `rival` of as many images.
    """
    known = known_of(views)
    bare = colmap_from_scene(Scene(**{**vars(scene), "tracks": None}))
    with_distortion(bare, set(scene.names) - known.intrinsics, config.camera_model)
    triangulated = triangulate(bare, scene.names, sparse, work, ROUND_FACTORS[-1])
    before = support(triangulated, config)
    current = triangulate(bare, scene.names, sparse, work, ROUND_FACTORS[0])
    dense_error_px = config.max_error_px * stored_per_net(scene) / 2
    for factor in ROUND_FACTORS:
        weak = _weak_images(current)
        leaning = _touching(scene.tracks, weak)
        current = thinned(current)
        full = with_tracks(current, leaning, _ids(scene)) if len(leaning.errors) else current
        error_px = max(config.max_error_px, dense_error_px if len(leaning.errors) else 0) * factor
        angle_deg = config.min_angle_deg if factor == 1 else 0.5
        round_config = dataclasses.replace(config, max_error_px=error_px, min_angle_deg=angle_deg, num_rounds=2)
        adjusted = _refine_and_share(full, round_config, known)
        placed = resected(adjusted.reconstruction, sparse, known.poses)
        current = triangulate(placed, scene.names, sparse, work, factor)
    after = support(current, config)
    if rival is not None and after.images <= rival.images and after.score < HOPELESS * rival.score:
        return Model("alignment", current, after), before
    final = _refine_and_share(current, config, known)
    after = support(final.reconstruction, config)
    if before.explains_more_than(after):
        return Model("alignment", triangulated, before), before
    return Model("alignment", final.reconstruction, after), before


def with_settled_lenses(model: Model, known: Known, config: RefineConfig) -> pycolmap.Reconstruction:
    """The model without the distortions that were found to be none, adjusted to their absence."""
    settled = pycolmap.Reconstruction(model.reconstruction)
    if not without_needless_distortion(settled, model.names - known.intrinsics):
        return model.reconstruction
    return _refined(settled, dataclasses.replace(config, num_rounds=1), known).reconstruction


def resected(
    reconstruction: pycolmap.Reconstruction, sparse: SparseMatches, posed: Collection[str]
) -> pycolmap.Reconstruction:
    """A copy in which images that see too few points stand where the points of their matches see them, if anywhere."""
    new = pycolmap.Reconstruction(reconstruction)
    ids = {image.name: i for i, image in new.images.items()}
    weak = {new.image(i + 1).name for i in _weak_images(new)} - set(posed)
    for name in sorted(weak):
        points, pixels = [np.zeros((0, 3))], [np.zeros((0, 2))]
        for pair, geometry in sparse.geometries.items():
            if name not in pair or not set(pair) <= ids.keys() or set(pair) <= weak:
                continue
            side = pair.index(name)
            seen = [(p.point3D_id if p.has_point3D() else -1) for p in new.image(ids[pair[1 - side]]).points2D]
            rows = [(row[side], seen[row[1 - side]]) for row in geometry.inlier_matches.tolist()]
            rows = [(own, point) for own, point in rows if point >= 0]
            points.append(np.array([new.point3D(point).xyz for _, point in rows]).reshape(-1, 3))
            pixels.append(sparse.keypoints[name][[own for own, _ in rows]].reshape(-1, 2))
        image = new.image(ids[name])
        pose = _pose_of(new.camera(image.camera_id), np.concatenate(points), np.concatenate(pixels))
        if pose is not None and int(pose.inliers.sum()) >= MIN_RESECTED:
            rigid = pycolmap.Rigid3d(pose.cam_from_world[:3].numpy())
            new.frame(image.frame_id).set_cam_from_world(image.camera_id, rigid)
    return new


def _pose_of(
    camera: pycolmap.Camera, points: Float[np.ndarray, "n 3"], pixels: Float[np.ndarray, "n 2"]
) -> AbsolutePose | None:
    K = camera.calibration_matrix()
    straight = straightened(pixels, K, lens_of(camera))
    usable = np.isfinite(straight).all(axis=1)
    return absolute_pose(*map(torch.from_numpy, (points[usable], straight[usable], K)), RESECTION_ERROR_PX)


def _refine_and_share(reconstruction: pycolmap.Reconstruction, config: RefineConfig, known: Known) -> Adjustment:
    adjusted = _refined(reconstruction, config, known)
    if adjusted.kept_input and known.groups is None:
        return adjusted
    return share_cameras(adjusted.reconstruction, adjusted.after, known, config) or adjusted


def _refined(reconstruction: pycolmap.Reconstruction, config: RefineConfig, known: Known) -> Adjustment:
    return refine(reconstruction, config, known.poses, known.intrinsics, known.focal_priors)


def triangulate(
    reconstruction: pycolmap.Reconstruction,
    names: Sequence[str],
    sparse: SparseMatches,
    work: Path,
    factor: float,
    two_views: bool = False,
) -> pycolmap.Reconstruction:
    """Points of all matches under a model's poses (ids 1, 2, ...), within `factor` times COLMAP's tolerances.

    Where poses are beyond doubt two views may make a point: COLMAP asks for three. Without points
    where there are no matches or COLMAP fails.
    """
    model, output = work / "model", work / "triangulated"
    for folder in (model, output):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    cameras = [reconstruction.camera(reconstruction.image(i).camera_id) for i in range(1, len(names) + 1)]
    keypoints = {name: sparse.keypoints.get(name, np.zeros((0, 2))) for name in names}
    bare = with_keypoints(reconstruction, cameras, list(names), {name: np.zeros((0, 2)) for name in names})
    bare.write(model)
    database = work / "triangulation.db"
    write_database(database, names, cameras, sparse)
    if sparse.geometries and run_task(
        "triangulate",
        database=database.absolute(),
        model=model.absolute(),
        output=output.absolute(),
        options=_triangulation_options(factor, two_views),
    ):
        return pycolmap.Reconstruction(output)
    return with_keypoints(reconstruction, cameras, list(names), keypoints)


def _triangulation_options(factor: float, two_views: bool) -> dict[str, Any]:
    return {
        "mapper": {"filter_max_reproj_error": 4.0 * factor, "filter_min_tri_angle": 1.5 / factor},
        "triangulation": {
            "create_max_angle_error": 2.0 * factor,
            "continue_max_angle_error": 2.0 * factor,
            "merge_max_reproj_error": 4.0 * factor,
            "complete_max_reproj_error": 4.0 * factor,
            "min_angle": 1.5 / factor,
            "ignore_two_view_tracks": not two_views,
        },
    }


def with_keypoints(
    reconstruction: pycolmap.Reconstruction,
    cameras: Sequence[pycolmap.Camera],
    names: Sequence[str],
    keypoints: Mapping[str, np.ndarray],
) -> pycolmap.Reconstruction:
    """The poses of a model with a camera and keypoints of its own for each image, and no points."""
    new = pycolmap.Reconstruction()
    for i, (name, camera) in enumerate(zip(names, cameras, strict=True), start=1):
        own = pycolmap.Camera(
            camera_id=i, model=camera.model.name, width=camera.width, height=camera.height, params=camera.params
        )
        add_camera(new, own)
        image = pycolmap.Image(name=name, camera_id=i, image_id=i, keypoints=keypoints[name])
        add_image(new, image, reconstruction.image(i).cam_from_world())
    return new


def stored_per_net(scene: Scene) -> float:
    """Pixels of the stored files in one network pixel, the median over images."""
    scales = np.sqrt(np.abs(np.linalg.det(scene.net_from_img.double().numpy()[:, :2, :2])))
    return float(1 / np.median(scales))


def _ids(scene: Scene) -> list[int]:
    return list(range(1, len(scene.names) + 1))


def _weak_images(reconstruction: pycolmap.Reconstruction) -> set[int]:
    """Indices of the images that see too few points."""
    return {i - 1 for i in reconstruction.reg_image_ids() if reconstruction.image(i).num_points3D < MIN_VERIFIED}


def _touching(tracks: Tracks | None, images: Collection[int]) -> Tracks:
    """The tracks that one of the images sees."""
    if tracks is None:
        return Tracks(
            *(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.uint8), torch.zeros(0)),
            *(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0, 2)),
        )
    seen = torch.zeros(len(tracks.errors), dtype=torch.bool)
    seen[tracks.point_indices[torch.isin(tracks.image_indices, torch.tensor(sorted(images), dtype=torch.long))]] = True
    return select_tracks(tracks, seen.numpy())


def select_tracks(tracks: Tracks, kept: np.ndarray) -> Tracks:
    """Some of the tracks, numbered anew."""
    mask = torch.from_numpy(kept)
    number = mask.long().cumsum(0) - 1
    observed = mask[tracks.point_indices]
    return Tracks(
        points_in_world=tracks.points_in_world[mask],
        colors=tracks.colors[mask],
        errors=tracks.errors[mask],
        point_indices=number[tracks.point_indices[observed]],
        image_indices=tracks.image_indices[observed],
        keypoints=tracks.keypoints[observed],
    )
