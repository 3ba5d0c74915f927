"""The pose of one query: from SIFT matches where they suffice, else by way of DUSt3R's pointmaps, else none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dust3r_sfm.alignment.localization import (
    CameraPose,
    Features,
    PointMatches,
    QueryCamera,
    Structure,
    camera_pose,
    joined,
    refined_by_guidance,
    sparse_matches,
)
from dust3r_sfm.network_poses import dense_matches, most_agreed, relative_poses
from dust3r_sfm.pairs import Predictions
from dust3r_sfm.reference import Reference
from dust3r_sfm.views import View

QUERY = "query://"
"""Before the names of queries where they meet those of reference images; no path below a folder begins so."""
MIN_INLIER_SHARE = 0.1
"""Of SIFT matches: chance reaches a few hundredths."""
MIN_GUIDED_SHARE = 0.5
GUIDANCE_RADII = 2.0, 6.0
"""SIFT matches are sought within so many times `max_error_px` of a pose by SIFT, and of one by pointmaps."""
IMAGES_AT_ONCE = 4
"""Images whose keypoints are matched together."""
SETTLED = 5
"""No further images are matched where so many times `min_inliers` agree."""
NETWORK_ERROR_PX = 12.0
"""How far matches of pointmaps may lie from a pose that they agree with, in network pixels."""


@dataclass(frozen=True, kw_only=True)
class LocateConfig:
    method: Literal["auto", "pnp", "relative"] = "auto"
    """auto: SIFT, and DUSt3R where that does not suffice. pnp: matches of DUSt3R's pointmaps with the reference alone.
    relative: DUSt3R's relative pose, in the reference's unit."""
    max_error_px: float = 8.0
    """SIFT matches agree with a pose that sees their points so near; in photos of 1024 pixels, else in proportion."""
    min_inliers: int = 15
    """SIFT matches that must agree on a pose."""
    min_dense_inliers: int = 300
    """Matches of pointmaps that must agree on a pose."""
    min_dense_share: float = 0.35
    """And their share of all of them."""


@dataclass(frozen=True, eq=False)
class Query:
    """A photo to be localised."""

    view: View
    """Its name stands behind `QUERY`, so that a reference image may be called the same."""
    camera: QueryCamera
    features: Features

    @property
    def name(self) -> str:
        return self.view.name.removeprefix(QUERY)


@dataclass(frozen=True, eq=False)
class Located:
    """Where a query was taken, and what says so."""

    pose: CameraPose
    by: Literal["sift", "pnp", "relative"]


def locate_by_sift(query: Query, images: Sequence[str], structure: Structure, config: LocateConfig) -> Located | None:
    """The pose from SIFT matches with the points that the images see; None where too few agree.

    The images that are most alike are asked first, and the others only where these do not settle it.
    """
    matches: list[PointMatches] = []
    found: Located | None = None
    for start in range(0, len(images), IMAGES_AT_ONCE):
        matches += [sparse_matches(structure, images[start : start + IMAGES_AT_ONCE], query.features)]
        found = _pose_of(joined(matches), query, images, structure, config)
        if found is not None and found.pose.num_inliers >= SETTLED * config.min_inliers:
            break
    return found


def _pose_of(
    matches: PointMatches, query: Query, images: Sequence[str], structure: Structure, config: LocateConfig
) -> Located | None:
    pose = camera_pose(matches, query.camera, _max_error_px(query, config))
    if pose is None or pose.num_inliers < max(config.min_inliers, MIN_INLIER_SHARE * len(matches)):
        return None
    return _guided(pose, query, images, structure, GUIDANCE_RADII[0], config)


def locate_by_network(
    query: Query,
    images: Sequence[str],
    structure: Structure,
    reference: Reference,
    views: Mapping[str, View],
    predictions: Predictions,
    config: LocateConfig,
) -> Located | None:
    """The pose from pointmaps of the query with the images; refined by SIFT matches near it where `auto`."""
    matches = dense_matches(query.view, images, reference, views, predictions)
    max_error_px = NETWORK_ERROR_PX / abs(float(query.view.net_from_img[:2, :2].det())) ** 0.5
    if config.method == "relative":
        found = relative_poses(query.view, query.camera, images, reference, views, predictions)
        pose = most_agreed(found, matches, max_error_px)
    else:
        pose = camera_pose(matches, query.camera, max_error_px)
    if pose is None:
        return None
    if config.method == "auto":
        refined = _guided(pose, query, images, structure, GUIDANCE_RADII[1], config)
        if refined is not None:
            return refined
    return Located(pose, "relative" if config.method == "relative" else "pnp") if _enough(pose, config) else None


def _guided(
    pose: CameraPose, query: Query, images: Sequence[str], structure: Structure, radius: float, config: LocateConfig
) -> Located | None:
    """The pose by SIFT matches near one that is given, and that one where these are fewer and it is by SIFT itself.

    What is sought near a pose agrees with it by chance too: most of it has to, within a fraction of the radius.
    """
    max_error_px = _max_error_px(query, config)
    args = (query.camera, structure, images, query.features, radius * max_error_px, max_error_px / 2)
    better = refined_by_guidance(pose, *args)
    is_sparse = radius == GUIDANCE_RADII[0]
    if is_sparse and (better is None or better.num_inliers < pose.num_inliers):
        better = pose
    if better is None or better.num_inliers < max(config.min_inliers, MIN_GUIDED_SHARE * len(better.matches)):
        return None
    return Located(better, "sift")


def _max_error_px(query: Query, config: LocateConfig) -> float:
    return config.max_error_px * max(query.camera.size) / 1024


def _enough(pose: CameraPose, config: LocateConfig) -> bool:
    share = pose.num_inliers / max(len(pose.matches), 1)
    return pose.num_inliers >= config.min_dense_inliers and share >= config.min_dense_share
