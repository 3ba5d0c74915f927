"""What an aligned scene says about keypoints: where they lie in other images, which matches are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree

from dust3r_sfm.geometry.transforms import inverse
from dust3r_sfm.scene import Scene

AGREEMENT = 0.03
"""A pair agrees with the scene where its matches are off, in the median, by at most this share of the longer side."""
MIN_AGREEING_PAIRS = 0.7
"""Share of the verified pairs that have to agree before the scene is believed against single matches."""
MIN_MATCHES = 30
"""Verified matches with a confident prediction that a pair must have to speak for or against the scene."""
BAND_FACTOR = 3.0
"""Matches are sought within so many typical errors of the scene, and refuted beyond as many again."""
MIN_BAND = 0.004
MAX_RATIO = 0.9
"""Best over second-best descriptor angle within the band: milder than the 0.8 of unguided matching."""
MAX_ANGLE = 0.7
"""Largest angle between the descriptors of a match in radians, COLMAP's own."""
OCCLUSION = 0.1
"""A point this share of its depth behind the other image's surface is hidden there."""


@dataclass(frozen=True)
class Prediction:
    """Where the scene puts keypoints of one image in another, in pixels of the stored files."""

    pixels: np.ndarray
    """(n 2)"""
    is_confident: np.ndarray
    """(n) True where the depth is confident and the other camera sees the point."""


@dataclass(frozen=True)
class Trust:
    """Whether the scene may overrule matches, and how far its predictions usually are from verified ones."""

    believed: bool
    band: float
    """As a share of the longer side of the image."""
    num_agreeing: int
    num_pairs: int


def predict(scene: Scene, image0: int, image1: int, keypoints0: np.ndarray) -> Prediction:
    """Keypoints of one image, carried into another through depth and poses; both by index."""
    poses, K = (t.double() for t in (scene.cam_from_world, scene.K))
    net = torch.from_numpy(scene.net_from_stored(image0, keypoints0)).double()
    net = torch.nn.functional.pad(net, (0, 1), value=1.0)
    depth, confidence, inside = _lookup(scene, image0, net[:, :2])
    in_cam0 = (net @ torch.linalg.inv(K[image0]).T) * depth[:, None]
    cam1_from_cam0 = poses[image1] @ inverse(poses[image0])
    in_cam1 = in_cam0 @ cam1_from_cam0[:3, :3].T + cam1_from_cam0[:3, 3]
    net1 = in_cam1 @ K[image1].T
    net1 = net1 / net1[:, 2:].clamp(min=1e-12)
    depth1, confidence1, inside1 = _lookup(scene, image1, net1[:, :2])
    pixels = scene.stored_from_net(image1, net1[:, :2].numpy())
    visible = (
        torch.from_numpy(np.isfinite(pixels).all(axis=1))
        & inside
        & inside1
        & (in_cam1[:, 2] > 0)
        & (depth > 0)
        & (in_cam1[:, 2] < (1 + OCCLUSION) * depth1)
    )
    confident = (confidence >= _usual(scene, image0)) & (confidence1 >= _usual(scene, image1))
    return Prediction(np.where(np.isfinite(pixels), pixels, -1e6), (visible & confident).numpy())


def trust(scene: Scene, verified: Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]) -> Trust:
    """How far a scene can be believed, from the keypoints (m 2 each) of verified matches by pair of image indices.

    Wrong matches of single pairs are outvoted by the others; a scene that most pairs contradict is not believed.
    """
    medians = []
    for (image0, image1), (keypoints0, keypoints1) in verified.items():
        prediction = predict(scene, image0, image1, keypoints0)
        if prediction.is_confident.sum() >= MIN_MATCHES:
            error = np.linalg.norm(prediction.pixels - keypoints1, axis=1)[prediction.is_confident]
            medians.append(np.median(error) / max(scene.original_sizes[image1]))
    agreeing = [error for error in medians if error <= AGREEMENT]
    believed = len(agreeing) > 0 and len(agreeing) >= MIN_AGREEING_PAIRS * len(medians)
    band = max(MIN_BAND, BAND_FACTOR * float(np.median(agreeing))) if agreeing else 0.0
    return Trust(believed, band, len(agreeing), len(medians))


def refuted(prediction: Prediction, keypoints1: np.ndarray, max_error_px: float) -> np.ndarray:
    """(m) True for matches that lie further than `max_error_px` from where a confident scene puts them."""
    return prediction.is_confident & (np.linalg.norm(prediction.pixels - keypoints1, axis=1) > max_error_px)


def guided_matches(
    prediction: Prediction,
    keypoints1: np.ndarray,
    descriptors0: np.ndarray,
    descriptors1: np.ndarray,
    max_error_px: float,
) -> np.ndarray:
    """Matches (m 2, rows of both images' keypoints) that are mutually best among those near the prediction.

    The ratio to the second best is asked for within the neighbourhood alone, so that a structure
    which repeats elsewhere in the image loses nothing.
    """
    rows0 = np.flatnonzero(prediction.is_confident)
    if len(rows0) == 0 or len(keypoints1) == 0:
        return np.zeros((0, 2), dtype=np.int64)
    near = cKDTree(keypoints1).query_ball_point(prediction.pixels[rows0], max_error_px)
    lengths = np.array([len(candidates) for candidates in near])
    row0 = np.repeat(rows0, lengths)
    row1 = np.array([j for candidates in near for j in candidates], dtype=np.int64)
    products = np.einsum("nk,nk->n", descriptors0[row0].astype(np.float32), descriptors1[row1].astype(np.float32))
    angle = np.arccos(np.clip(products / 512**2, -1, 1))
    best0 = _best(row0, row1, angle, len(prediction.is_confident))
    best1 = _best(row1, row0, angle, len(keypoints1))
    found = np.flatnonzero(best0 >= 0)
    mutual = found[best1[best0[found]] == found]
    return np.stack([mutual, best0[mutual]], axis=1)


def _best(rows: np.ndarray, others: np.ndarray, angle: np.ndarray, num_rows: int) -> np.ndarray:
    """For each row its other of smallest angle, -1 where none is near enough or the second is nearly as good."""
    order = np.lexsort((angle, rows))
    rows, others, angle = rows[order], others[order], angle[order]
    first = np.flatnonzero(np.diff(rows, prepend=-1) != 0)
    second = np.minimum(first + 1, max(len(rows) - 1, 0))
    has_second = (rows[second] == rows[first]) & (second != first)
    distinct = ~has_second | (angle[first] < MAX_RATIO * angle[second])
    chosen = first[(angle[first] <= MAX_ANGLE) & distinct]
    best = np.full(num_rows, -1, dtype=np.int64)
    best[rows[chosen]] = others[chosen]
    return best


def merged(matches: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Both sets of matches, each keypoint once: the first set goes before the second."""
    new = ~(np.isin(more[:, 0], matches[:, 0]) | np.isin(more[:, 1], matches[:, 1]))
    return np.concatenate([matches, more[new]])


def _usual(scene: Scene, image: int) -> float:
    confidence = scene.confidence[image]
    return max(float(confidence.median()), 1e-6)


def _lookup(scene: Scene, image: int, net: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Depth and confidence at network pixels (nearest), and whether they lie in the image."""
    height, width = scene.depth[image].shape
    inside = (net >= 0).all(dim=1) & (net[:, 0] < width) & (net[:, 1] < height)
    x, y = torch.where(inside[:, None], net, 0).long().unbind(-1)
    return scene.depth[image][y, x].double(), scene.confidence[image][y, x].double(), inside
