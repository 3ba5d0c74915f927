"""Bundle adjustment by COLMAP's solver: robust, with rounds that drop outliers, and never to a worse end than start."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pycolmap

from dust3r_sfm.alignment.focal_priors import Bundle, FocalPriors, bundle_with_priors, take_over
from dust3r_sfm.colmap_versions import add_camera, add_image, ceres_options, solved
from dust3r_sfm.geometry.lens import PINHOLES, Lens, bend_px, camera_with_lens, lens_of
from dust3r_sfm.scene import Tracks

MIN_VERIFIED = 30
"""Points that an image must see for its pose to count as verified; COLMAP asks as much to register one."""
MAX_FOCAL_RATIO = 2.0
"""A focal that leaves its prior by more, up or down, is set back and held."""
FOCAL_BOUNDS = (0.2, 10.0)
"""Focals over the longer side of the image that any camera may have whose focal is not known."""
WORSE = 0.98
"""Adjusting must leave at least this share of the score: points of small angles are dropped on purpose."""
MIN_BEND_PX = 0.5
"""Distortion that moves no pixel of an image further is left out of its model."""
NOISE_PX = 1.0
"""Of keypoints: errors that are a few times larger say little for a model."""
CameraModel = Literal["SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"]
NO_DISTORTION = {"SIMPLE_RADIAL": (0.0,), "RADIAL": (0.0, 0.0), "OPENCV": (0.0, 0.0, 0.0, 0.0)}


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    max_error_px: float = 4.0
    """Observations that miss their point by more are dropped; in pixels of the stored files."""
    min_angle_deg: float = 1.5
    """Points whose rays meet under smaller angles are dropped."""
    num_rounds: int = 3
    """Times that all is adjusted and what does not fit is dropped; earlier rounds tolerate larger errors."""
    max_iters: int = 50
    """Steps of the solver in a round."""
    camera_model: CameraModel = "SIMPLE_RADIAL"
    """The model of cameras whose intrinsics are not known; distortion that moves no pixel by half is left out."""


@dataclass(frozen=True)
class Support:
    """How much of the photos a model explains."""

    images: int
    """Those that see at least `MIN_VERIFIED` points."""
    observations: int
    """Pixels that lie within `max_error_px` of their point's projection."""
    points: int
    score: float
    """Observations, each counted as 1 - (error / max_error)^2."""
    evidence: float
    """Observations, each by how much likelier it is than a chance one, less what its point's own three unknowns
    explain: of two models the one with more explains more. A wrong model that splits tracks, or bends cameras until all
    is within a few pixels, may have more observations, but not more evidence."""
    mean_error_px: float

    def explains_more_than(self, other: Support) -> bool:
        """The rule for all choices between models: more verified images first, then more evidence."""
        return (self.images, self.evidence) > (other.images, other.evidence)


@dataclass(frozen=True)
class Adjustment:
    """The refined model or, where adjusting did not help, the one that was given."""

    reconstruction: pycolmap.Reconstruction
    before: Support
    after: Support
    reason: str
    """`refined`, or why the given model was kept."""

    @property
    def kept_input(self) -> bool:
        return self.reason != "refined"


def refine(
    reconstruction: pycolmap.Reconstruction,
    config: RefineConfig = RefineConfig(),
    constant_poses: Collection[str] = (),
    constant_intrinsics: Collection[str] = (),
    focal_priors: FocalPriors | None = None,
) -> Adjustment:
    """The model after rounds of robust bundle adjustment and of dropping what does not fit, as a copy.

    Poses and intrinsics of the named images are held. Focals whose value and relative standard
    deviation are given are drawn to them as by a Gaussian prior. The given model is returned where the
    solver fails, a camera leaves all bounds, or fewer images or pixels are explained afterwards.
    """
    before = support(reconstruction, config)
    candidate = pycolmap.Reconstruction(reconstruction)
    names = {image.name for image in candidate.images.values()}
    start = {i: camera.mean_focal_length() for i, camera in candidate.cameras.items()}
    held = set(constant_poses), set(constant_intrinsics)
    fault = ""
    if len(names) < 2 or candidate.num_points3D() < MIN_VERIFIED:
        fault = f"there are {len(names)} images and {candidate.num_points3D()} points: too few to adjust"
    for factor in () if fault else [4.0 ** (i / 2) for i in range(config.num_rounds)][::-1]:
        fault = fault or _adjust(candidate, config, factor, *held, focal_priors or {}, start)
        if not fault:
            _drop_outliers(candidate, config.max_error_px * factor, config.min_angle_deg if factor == 1 else 0.1)
    after = support(candidate, config)
    fault = fault or _fault(reconstruction, candidate) or _worse(before, after)
    if fault:
        return Adjustment(reconstruction, before, before, fault)
    return Adjustment(candidate, before, after, "refined")


def support(reconstruction: pycolmap.Reconstruction, config: RefineConfig = RefineConfig()) -> Support:
    """What a model explains, counted on its own observations."""
    errors, image_ids, point_ids = observation_errors(reconstruction)
    inside = errors <= config.max_error_px
    # A point that one image alone sees verifies nothing.
    _, point, lengths = np.unique(point_ids[inside], return_inverse=True, return_counts=True)
    lengths = lengths[point]
    inside[inside], lengths = lengths >= 2, lengths[lengths >= 2]
    counts = np.unique(image_ids[inside], return_counts=True)[1]
    likelier = 1 - np.log1p(np.square(errors[inside] / NOISE_PX)) / np.log1p((config.max_error_px / NOISE_PX) ** 2)
    return Support(
        images=int((counts >= MIN_VERIFIED).sum()),
        observations=int(inside.sum()),
        points=len(np.unique(point_ids[inside])),
        score=float((1 - np.square(errors[inside] / config.max_error_px)).sum()),
        evidence=float((likelier * (1 - 1.5 / lengths)).sum()),  # of 2 n numbers a point's own 3 explain as many
        mean_error_px=float(errors[inside].mean()) if inside.any() else 0.0,
    )


def observation_errors(reconstruction: pycolmap.Reconstruction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reprojection error in pixels, image id and point id of every observation; infinite behind the camera."""
    points = reconstruction.points3D
    errors, image_ids, point_ids = [np.zeros(0)], [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for image_id in sorted(reconstruction.reg_image_ids()):
        image = reconstruction.image(image_id)
        seen = [point2D for point2D in image.points2D if point2D.has_point3D()]
        if not seen:
            continue
        ids = np.array([point2D.point3D_id for point2D in seen], dtype=np.int64)
        pixels = np.array([point2D.xy for point2D in seen])
        in_world = np.array([points[i].xyz for i in ids.tolist()])
        in_cam = image.cam_from_world() * in_world
        in_front = in_cam[:, 2] > 0
        projected = np.full_like(pixels, np.inf)
        if in_front.any():
            projected[in_front] = reconstruction.camera(image.camera_id).img_from_cam(in_cam[in_front])
        error = np.linalg.norm(projected - pixels, axis=1)
        errors.append(np.where(np.isfinite(error), error, np.inf))
        image_ids.append(np.full(len(ids), image_id, dtype=np.int64))
        point_ids.append(ids)
    return np.concatenate(errors), np.concatenate(image_ids), np.concatenate(point_ids)


def with_shared_cameras(
    reconstruction: pycolmap.Reconstruction, group_of: Mapping[str, str] | None = None
) -> pycolmap.Reconstruction | None:
    """The same model where images of one size, and of one group where these are given by name, share one camera.

    It has their median intrinsics. None where no images can share one that do not yet.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for image_id in sorted(reconstruction.reg_image_ids()):
        camera = reconstruction.camera(reconstruction.image(image_id).camera_id)
        name = reconstruction.image(image_id).name
        group = "" if group_of is None else group_of.get(name, name)
        groups.setdefault((camera.width, camera.height, camera.model, group), []).append(image_id)
    if all(len({reconstruction.image(i).camera_id for i in group}) == 1 for group in groups.values()):
        return None
    cameras, camera_of = [], {}
    for camera_id, ((width, height, model, _), group) in enumerate(groups.items(), start=1):
        params = np.median([reconstruction.camera(reconstruction.image(i).camera_id).params for i in group], axis=0)
        cameras.append(
            pycolmap.Camera(camera_id=camera_id, model=model.name, width=width, height=height, params=params.tolist())
        )
        camera_of.update(dict.fromkeys(group, camera_id))
    return rebuilt(reconstruction, cameras, camera_of)


def with_distortion(
    reconstruction: pycolmap.Reconstruction, names: Collection[str], model: str = "SIMPLE_RADIAL"
) -> None:
    """Turn the SIMPLE_PINHOLE cameras of the named images into ones of another model that bends nothing, in place."""
    for image in reconstruction.images.values():
        camera = reconstruction.camera(image.camera_id)
        if image.name in names and camera.model == pycolmap.CameraModelId.SIMPLE_PINHOLE and model not in PINHOLES:
            K, size = camera.calibration_matrix(), (camera.width, camera.height)
            _become(camera, camera_with_lens(K, size, Lens(model, NO_DISTORTION[model])))


def without_needless_distortion(reconstruction: pycolmap.Reconstruction, names: Collection[str]) -> bool:
    """Turn cameras of the named images whose distortion is none into SIMPLE_PINHOLE ones, in place; whether any was.

    It bends no pixel by more than `MIN_BEND_PX`, or folds the image: a polynomial that few points hold.
    """
    changed = False
    for camera_id in {image.camera_id for image in reconstruction.images.values() if image.name in names}:
        camera = reconstruction.camera(camera_id)
        K, size, lens = camera.calibration_matrix(), (camera.width, camera.height), lens_of(camera)
        if lens is not None and not MIN_BEND_PX < bend_px(K, size, lens) < math.inf:
            K[0, 0] = K[1, 1] = camera.mean_focal_length()
            _become(camera, camera_with_lens(K, size))
            changed = True
    return changed


def _become(camera: pycolmap.Camera, other: pycolmap.Camera) -> None:
    params = list(other.params)
    camera.model = other.model
    camera.params = params


def with_tracks(
    reconstruction: pycolmap.Reconstruction, tracks: Tracks, image_ids: Sequence[int]
) -> pycolmap.Reconstruction:
    """A model with more points, each with keypoints of its own; `image_ids` are those of the tracks' image indices."""
    cameras = list(reconstruction.cameras.values())
    camera_of = {i: reconstruction.image(i).camera_id for i in reconstruction.reg_image_ids()}
    images = np.array(image_ids, dtype=np.int64)[tracks.image_indices.numpy()]
    pixels = tracks.keypoints.double().numpy()
    new = rebuilt(reconstruction, cameras, camera_of, {i: pixels[images == i] for i in camera_of})
    start = {i: len(reconstruction.image(i).points2D) for i in camera_of}
    elements: list[list[pycolmap.TrackElement]] = [[] for _ in range(len(tracks.errors))]
    for point, image_id in zip(tracks.point_indices.tolist(), images.tolist(), strict=True):
        elements[point].append(pycolmap.TrackElement(image_id, start[image_id]))
        start[image_id] += 1
    for xyz, color, seen in zip(tracks.points_in_world.double().numpy(), tracks.colors.numpy(), elements, strict=True):
        new.add_point3D(xyz, pycolmap.Track(seen), color)
    return new


def rebuilt(
    reconstruction: pycolmap.Reconstruction,
    cameras: list[pycolmap.Camera],
    camera_of: dict[int, int],
    more_keypoints: Mapping[int, np.ndarray] | None = None,
) -> pycolmap.Reconstruction:
    """The images that `camera_of` has by id, with their points, other cameras, and keypoints after their own."""
    new = pycolmap.Reconstruction()
    for camera in cameras:
        add_camera(new, camera)
    for image_id, camera_id in sorted(camera_of.items()):
        old = reconstruction.image(image_id)
        keypoints = np.array([point2D.xy for point2D in old.points2D]).reshape(-1, 2)
        keypoints = np.concatenate([keypoints, (more_keypoints or {}).get(image_id, np.zeros((0, 2)))])
        image = pycolmap.Image(name=old.name, camera_id=camera_id, image_id=image_id, keypoints=keypoints)
        add_image(new, image, old.cam_from_world())
    for point in reconstruction.points3D.values():
        elements = [element for element in point.track.elements if element.image_id in camera_of]
        if len(elements) >= 2:
            new.add_point3D(point.xyz, pycolmap.Track(elements), point.color)
    return new


def thinned(reconstruction: pycolmap.Reconstruction, max_points: int = 300) -> pycolmap.Reconstruction:
    """A copy with `max_points` points of each image, those that most images see: as good for poses, and far faster."""
    lengths = {i: point.track.length() for i, point in reconstruction.points3D.items()}
    kept: set[int] = set()
    for image_id in reconstruction.reg_image_ids():
        seen = [p.point3D_id for p in reconstruction.image(image_id).points2D if p.has_point3D()]
        kept |= set(sorted(seen, key=lambda i: (-lengths[i], i))[:max_points])
    new = pycolmap.Reconstruction(reconstruction)
    for point_id in lengths.keys() - kept:
        new.delete_point3D(point_id)
    return new


def _adjust(
    reconstruction: pycolmap.Reconstruction,
    config: RefineConfig,
    factor: float,
    poses: set[str],
    intrinsics: set[str],
    priors: FocalPriors,
    start: Mapping[int, float],
) -> str:
    """One bundle adjustment in place, Cauchy's loss as wide as the round is tolerant; why it failed, or nothing."""
    pycolmap.logging.minloglevel = max(2, pycolmap.logging.minloglevel)  # warnings of single steps that fail
    options = solver_options(config, factor)
    before = {i: camera.mean_focal_length() for i, camera in reconstruction.cameras.items()}
    held = {image.camera_id for image in reconstruction.images.values() if image.name in intrinsics}
    for _ in range(2):
        bundle = bundle_with_priors(reconstruction, priors)
        _hold(bundle, reconstruction, poses, held)
        if not solved(pycolmap.create_default_bundle_adjuster(options, bundle.config, bundle.reconstruction)):
            return "the solver found no solution"
        take_over(reconstruction, bundle.reconstruction)
        ratios = {i: reconstruction.camera(i).mean_focal_length() / focal for i, focal in start.items()}
        strayed = {i for i, ratio in ratios.items() if not 1 / MAX_FOCAL_RATIO <= ratio <= MAX_FOCAL_RATIO}
        if not strayed - held:
            return ""
        for camera_id in strayed:
            _set_focal(reconstruction.camera(camera_id), before[camera_id])
        held |= strayed
    return ""


def _hold(bundle: Bundle, reconstruction: pycolmap.Reconstruction, poses: set[str], cameras: set[int]) -> None:
    """Hold the named poses and cameras; without two of them what fixes the world."""
    images = [reconstruction.image(i) for i in sorted(reconstruction.reg_image_ids())]
    frames = [image.frame_id for image in images if image.name in poses]
    if len(frames) < 2 and bundle.has_priors:  # cameras of priors are held, and would be taken for the world's
        frames = frames or [images[0].frame_id]
    elif len(frames) < 2:
        bundle.config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    for frame_id in frames:
        bundle.config.set_constant_rig_from_world_pose(frame_id)
    for camera_id in cameras:
        bundle.config.set_constant_cam_intrinsics(camera_id)


def solver_options(config: RefineConfig, factor: float = 1.0) -> pycolmap.BundleAdjustmentOptions:
    options = pycolmap.BundleAdjustmentOptions(print_summary=False)
    ceres = ceres_options(options)
    ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
    ceres.loss_function_scale = factor * config.max_error_px / 4
    ceres.solver_options.max_num_iterations = config.max_iters
    ceres.solver_options.function_tolerance = 1e-6
    return options


def _set_focal(camera: pycolmap.Camera, focal: float) -> None:
    params = list(camera.params)
    for i in camera.focal_length_idxs():
        params[i] = focal
    for i in camera.extra_params_idxs():
        params[i] = 0.0
    camera.params = params


def _drop_outliers(reconstruction: pycolmap.Reconstruction, max_error_px: float, min_angle_deg: float) -> None:
    pycolmap.ObservationManager(reconstruction).filter_all_points3D(max_error_px, min_angle_deg)


def _fault(given: pycolmap.Reconstruction, refined: pycolmap.Reconstruction) -> str:
    """What is absurd in a refined model; empty where nothing is."""
    if refined.num_reg_images() < given.num_reg_images():
        return "images were lost"
    for image_id in refined.reg_image_ids():
        image = refined.image(image_id)
        camera = refined.camera(image.camera_id)
        low, high = (ratio * max(camera.width, camera.height) for ratio in FOCAL_BOUNDS)
        if not np.isfinite(image.cam_from_world().matrix()).all() or not np.isfinite(camera.params).all():
            return f"the camera of {image.name} is not finite any more"
        is_held = camera.mean_focal_length() == given.camera(image.camera_id).mean_focal_length()
        if not is_held and not low <= camera.mean_focal_length() <= high:
            return f"the focal of {image.name} left all bounds ({camera.mean_focal_length():.0f} pixels)"
    return ""


def _worse(before: Support, after: Support) -> str:
    if after.images < before.images or after.score < WORSE * before.score:
        return (
            f"{after.images} images and {after.observations} observations were explained afterwards, "
            f"{before.images} and {before.observations} before"
        )
    return ""
