"""Where a query photo was taken: its pixels matched to points of a posed reference, and the camera that sees them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pycolmap
import torch
from jaxtyping import Bool, Float64, Int64, UInt8

from dust3r_sfm.alignment.guidance import MAX_ANGLE, Prediction, guided_matches
from dust3r_sfm.geometry.colmap_types import ransac_options
from dust3r_sfm.geometry.resection import absolute_pose_unknown_focal

MAX_RATIO = 0.8
"""Best over second-best descriptor angle of a match, COLMAP's own."""
FREE_FOCAL_GAIN = 1.1
"""A focal of the query's own must explain so many times what a camera of the reference does to be believed."""
FOCAL_BOUNDS = (0.2, 10.0)
"""Focals over the longer side of the image that a query may have."""
MAX_MATCHES = 4096
"""Matches that take part in RANSAC, thinned evenly: more cost time and gain no accuracy."""
NUM_GUIDED_ROUNDS = 2
BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Features:
    """Keypoints of an image in pixels of the stored file, corner origin, and their descriptors."""

    keypoints: Float64[np.ndarray, "k 2"]
    descriptors: UInt8[np.ndarray, "k d"]


@dataclass(frozen=True, eq=False)
class Structure:
    """Points of a reference, and in which keypoints of its images they are seen."""

    points_in_world: Float64[np.ndarray, "p 3"]
    features: dict[str, Features]
    """By image name."""
    point_of: dict[str, Int64[np.ndarray, " _k"]]
    """By image name, the point of each keypoint; -1 for none."""


@dataclass(frozen=True, eq=False)
class PointMatches:
    """Pixels of the query and the points that they are thought to see."""

    pixels: Float64[np.ndarray, "m 2"]
    points_in_world: Float64[np.ndarray, "m 3"]

    def __len__(self) -> int:
        return len(self.pixels)

    def thinned(self) -> PointMatches:
        """At most `MAX_MATCHES` of them."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), MAX_MATCHES)).astype(int))
        return PointMatches(self.pixels[rows], self.points_in_world[rows])


@dataclass(frozen=True, eq=False)
class QueryCamera:
    """What is known of the camera of a query before it is localised."""

    size: tuple[int, int]
    """(width, height) of the stored file."""
    known: pycolmap.Camera | None = None
    """Held as it is."""
    guesses: tuple[pycolmap.Camera, ...] = ()
    """Cameras that it may have been taken with, where none is known."""


@dataclass(frozen=True, eq=False)
class CameraPose:
    """A camera that sees points, and how well."""

    cam_from_world: Float64[np.ndarray, "3 4"]
    camera: pycolmap.Camera
    matches: PointMatches
    inliers: Bool[np.ndarray, " m"]
    score: float
    """Inliers, each counted as 1 - (error / max_error)^2."""

    @property
    def num_inliers(self) -> int:
        return int(self.inliers.sum())


def joined(parts: Iterable[PointMatches]) -> PointMatches:
    """All matches of some, each once."""
    parts = [PointMatches(np.zeros((0, 2)), np.zeros((0, 3))), *parts]
    rows = np.concatenate([np.concatenate([p.pixels, p.points_in_world], axis=1) for p in parts])
    rows = rows[np.isfinite(rows).all(axis=1)]
    rows = rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]
    return PointMatches(rows[:, :2], rows[:, 2:])


def camera_pose(matches: PointMatches, camera: QueryCamera, max_error_px: float) -> CameraPose | None:
    """The camera that sees most points at their pixels (RANSAC, then refinement); None where fewer than four agree.

    A known camera is held. Else each guess is tried as it is, and freed from there; and a pinhole
    of any focal. A focal of the query's own is taken only where it explains clearly more.
    """
    few = matches.thinned()
    if camera.known is not None:
        return _estimate(few, camera.known, max_error_px, refine_focal=False)
    held = [_estimate(few, guess, max_error_px, refine_focal=False) for guess in camera.guesses]
    free = [_estimate(few, guess, max_error_px, refine_focal=True) for guess in camera.guesses]
    best, best_free = _best(held), _best([*free, _any_focal(few, camera.size, max_error_px)])
    if best is None or (best_free is not None and best_free.score > FREE_FOCAL_GAIN * best.score):
        return best_free
    return best


def mutual_matches(features0: Features, features1: Features) -> Int64[np.ndarray, "m 2"]:
    """Rows of both images' keypoints whose descriptors are each other's nearest, and clearly nearer than the second."""
    if len(features0.keypoints) == 0 or len(features1.keypoints) == 0:
        return np.zeros((0, 2), dtype=np.int64)
    descriptors0, descriptors1 = (f.descriptors.astype(np.float32) / 512 for f in (features0, features1))
    best1 = np.full(len(descriptors1), -np.inf, dtype=np.float32)
    found = []
    for start in range(0, len(descriptors0), BLOCK_ROWS):
        cosines = torch.from_numpy(descriptors0[start : start + BLOCK_ROWS] @ descriptors1.T)
        best1 = np.maximum(best1, cosines.numpy().max(axis=0))  # many times faster than torch's along this axis
        found.append(cosines.topk(min(2, len(descriptors1)), dim=1))
    best, nearest = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    angles = np.arccos(best.clip(-1, 1))
    good = (best[:, 0] >= best1[nearest[:, 0]]) & (angles[:, 0] <= MAX_ANGLE)
    if angles.shape[1] == 2:
        good &= angles[:, 0] <= MAX_RATIO * angles[:, 1]
    return np.stack([np.flatnonzero(good), nearest[good, 0]], axis=1)


def sparse_matches(structure: Structure, images: Sequence[str], query: Features) -> PointMatches:
    """The query's keypoints that match a keypoint of one of the images that sees a point."""
    parts = []
    for name in images:
        rows = mutual_matches(query, structure.features[name]) if name in structure.features else []
        if len(rows):
            point = structure.point_of[name][rows[:, 1]]
            rows, point = rows[point >= 0], point[point >= 0]
            parts.append(PointMatches(query.keypoints[rows[:, 0]], structure.points_in_world[point]))
    return joined(parts)


def refined_by_guidance(
    pose: CameraPose,
    camera: QueryCamera,
    structure: Structure,
    images: Sequence[str],
    query: Features,
    radius_px: float,
    max_error_px: float,
) -> CameraPose | None:
    """The camera that the keypoints agree on which match points near where a first pose sees them; or None.

    The points are those that the images see. Twice, the second time within a third of the radius.
    """
    found: CameraPose | None = None
    for round_index in range(NUM_GUIDED_ROUNDS):
        matches = _near(found or pose, structure, images, query, radius_px / 3**round_index)
        better = camera_pose(matches, camera, max_error_px)
        if better is None:
            return found
        found = better
    return found


def errors_px(
    camera: pycolmap.Camera, cam_from_world: Float64[np.ndarray, "3 4"], matches: PointMatches
) -> Float64[np.ndarray, " m"]:
    """Distance of each pixel from where the camera sees its point; infinite for points behind it."""
    in_cam = matches.points_in_world @ cam_from_world[:, :3].T + cam_from_world[:, 3]
    errors = np.full(len(matches), np.inf)
    front = in_cam[:, 2] > 0
    if front.any():
        errors[front] = np.linalg.norm(camera.img_from_cam(in_cam[front]) - matches.pixels[front], axis=1)
    return np.where(np.isfinite(errors), errors, np.inf)


def scored(
    camera: pycolmap.Camera, cam_from_world: Float64[np.ndarray, "3 4"], matches: PointMatches, max_error_px: float
) -> CameraPose:
    """A given pose with what it explains of the matches."""
    errors = errors_px(camera, cam_from_world, matches)
    inliers = errors <= max_error_px
    score = float((1 - np.square(errors[inliers] / max_error_px)).sum())
    return CameraPose(cam_from_world, camera, matches, inliers, score)


def _estimate(
    matches: PointMatches, camera: pycolmap.Camera, max_error_px: float, refine_focal: bool
) -> CameraPose | None:
    if len(matches) < 4:
        return None
    own = copy.deepcopy(camera)  # refined in place
    found = pycolmap.estimate_and_refine_absolute_pose(
        matches.pixels,
        matches.points_in_world,
        own,
        {"ransac": ransac_options(max_error_px)},
        # COLMAP's tolerance of 1 stops early in scenes of large units
        {
            "refine_focal_length": refine_focal,
            "gradient_tolerance": 1e-3,
            "loss_function_scale": max_error_px / 8,
        },
    )
    low, high = (ratio * max(camera.width, camera.height) for ratio in FOCAL_BOUNDS)
    if found is None or (refine_focal and not low <= own.mean_focal_length() <= high):
        return None
    pose = scored(own, np.array(found["cam_from_world"].matrix()), matches, max_error_px)
    return pose if pose.num_inliers >= 4 else None


def _any_focal(matches: PointMatches, size: tuple[int, int], max_error_px: float) -> CameraPose | None:
    width, height = size
    points, pixels = torch.from_numpy(matches.points_in_world), torch.from_numpy(matches.pixels)
    found = absolute_pose_unknown_focal(points, pixels, (height, width), max_error_px)
    if found is None:
        return None
    params = [found[1], width / 2, height / 2]
    camera = pycolmap.Camera(model="SIMPLE_PINHOLE", width=width, height=height, params=params)
    return scored(camera, found[0].cam_from_world[:3].numpy(), matches, max_error_px)


def _best(poses: Iterable[CameraPose | None]) -> CameraPose | None:
    return max((pose for pose in poses if pose is not None), key=lambda pose: pose.score, default=None)


def _near(
    pose: CameraPose, structure: Structure, images: Sequence[str], query: Features, radius_px: float
) -> PointMatches:
    """Matches of the query's keypoints with the points that the images see, near their projections."""
    points, descriptors = [], []
    taken = np.zeros(len(structure.points_in_world), dtype=bool)
    for name in images:
        rows = np.flatnonzero(structure.point_of.get(name, np.zeros(0, dtype=np.int64)) >= 0)
        point = structure.point_of[name][rows] if len(rows) else rows
        _, first = np.unique(point, return_index=True)
        rows, point = rows[first], point[first]
        rows, point = rows[~taken[point]], point[~taken[point]]
        taken[point] = True
        points.append(point)
        descriptors.append(structure.features[name].descriptors[rows] if len(rows) else np.zeros((0, 128), np.uint8))
    seen = np.concatenate([np.zeros(0, dtype=np.int64), *points])
    in_world = structure.points_in_world[seen]
    in_cam = in_world @ pose.cam_from_world[:, :3].T + pose.cam_from_world[:, 3]
    front = in_cam[:, 2] > 0
    pixels = np.full((len(seen), 2), -1e6)
    if front.any():
        pixels[front] = pose.camera.img_from_cam(in_cam[front])
    inside = front & (pixels >= 0).all(axis=1) & (pixels < (pose.camera.width, pose.camera.height)).all(axis=1)
    prediction = Prediction(pixels, inside)
    if not inside.any():
        return joined([])
    rows = guided_matches(prediction, query.keypoints, np.concatenate(descriptors), query.descriptors, radius_px)
    return PointMatches(query.keypoints[rows[:, 1]], in_world[rows[:, 0]])
