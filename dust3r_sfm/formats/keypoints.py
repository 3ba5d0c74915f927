"""Matches as COLMAP and hloc hold them: a list of keypoints an image, and pairs of indices into the lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt32
from scipy.spatial import cKDTree

from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.scene import Scene

SAME_PX = 1 / 64
"""Keypoints of one image that round to the same 64th of a pixel are the same, as in tracks."""


@dataclass(frozen=True, eq=False)
class IndexedMatches:
    """Keypoints in network pixels, corner origin, by image, and matches as indices into them by pair."""

    keypoints: dict[str, Float32[np.ndarray, "_k 2"]]
    scores: dict[str, Float32[np.ndarray, " _k"]]
    """The highest score of the matches that each keypoint is in."""
    indices: dict[Pair, UInt32[np.ndarray, "_m 2"]]
    match_scores: dict[Pair, Float32[np.ndarray, " _m"]]


def index_matches(
    matches: Mapping[Pair, Matches],
    cell_px: float = SAME_PX,
    given: Mapping[str, Float[np.ndarray, "_k 2"]] | None = None,
) -> IndexedMatches:
    """Matches whose keypoints fall into one cell of an image share one keypoint there: their mean, weighted by score.

    Cells of a pixel or so make keypoints that repeat from pair to pair, and so tracks through
    many images, at the price of half a cell of precision. Keypoints that are `given` for an
    image come first in its list and keep their places; those of a cell that holds one become it.
    In cells coarser than the default, a keypoint has at most one match a pair: its best.
    """
    pairs = list(matches)
    arrays = [[a.detach().cpu().numpy() for a in (m.keypoints0, m.keypoints1, m.scores)] for m in matches.values()]
    uses: dict[str, list[tuple[int, int]]] = {name: [] for name in given or {}}
    for i, pair in enumerate(pairs):
        for side, name in enumerate(pair):
            uses.setdefault(name, []).append((i, side))
    indices = [np.empty((len(scores), 2), np.uint32) for _, _, scores in arrays]
    keypoints, keypoint_scores = {}, {}
    for name, members in uses.items():
        first = np.zeros((0, 2)) if given is None else given.get(name, np.zeros((0, 2)))
        xy = np.concatenate([first, *(arrays[i][side] for i, side in members)], dtype=np.float32, casting="same_kind")
        scores = np.concatenate([np.zeros(len(first)), *(arrays[i][2] for i, _ in members)], dtype=np.float32)
        keypoints[name], keypoint_scores[name], index = _gather(xy, scores, len(first), cell_px)
        ends = np.cumsum([len(arrays[i][2]) for i, _ in members])
        for (i, side), part in zip(members, np.split(index[len(first) :], ends[:-1]) if members else [], strict=True):
            indices[i][:, side] = part
    match_scores = [scores.astype(np.float32, copy=False) for _, _, scores in arrays]
    if cell_px > SAME_PX:
        kept = [_best_of_each(*found) for found in zip(indices, match_scores, strict=True)]
        indices, match_scores = (
            [values[k] for values, k in zip(v, kept, strict=True)] for v in (indices, match_scores)
        )
    return IndexedMatches(
        keypoints, keypoint_scores, dict(zip(pairs, indices, strict=True)), dict(zip(pairs, match_scores, strict=True))
    )


def index_onto(
    matches: Mapping[Pair, Matches], fixed: Mapping[str, Float[np.ndarray, "_k 2"]], cell_px: float
) -> IndexedMatches:
    """Matches of new images, each pair's first, with images whose keypoints are `fixed`, which have no others.

    A match ends in the nearest fixed keypoint, at most `cell_px` away, else it is left out. New images
    share keypoints by cells, as in `index_matches`. The keypoints are those of the new images alone.
    """
    trees = {name: cKDTree(xy) for name, xy in fixed.items() if len(xy)}
    new: dict[str, list[tuple[Pair, np.ndarray, np.ndarray, np.ndarray]]] = {}
    for pair, found in matches.items():
        xy0, xy1, scores = (a.detach().cpu().numpy() for a in (found.keypoints0, found.keypoints1, found.scores))
        distance, nearest = np.full(len(xy1), np.inf), np.zeros(len(xy1), np.int64)
        if pair.name1 in trees and len(xy1):
            distance, nearest = trees[pair.name1].query(xy1)
        near = distance <= cell_px
        new.setdefault(pair.name0, []).append((pair, xy0[near], nearest[near], scores[near].astype(np.float32)))
    result = IndexedMatches({}, {}, {}, {})
    for name, members in new.items():
        xy, scores = (np.concatenate([m[k] for m in members]).astype(np.float32) for k in (1, 3))
        result.keypoints[name], result.scores[name], index = _gather(xy, scores, 0, cell_px)
        ends = np.cumsum([len(m[3]) for m in members])[:-1]
        for (pair, _, nearest, own), part in zip(members, np.split(index, ends), strict=True):
            rows = np.stack([part, nearest], axis=1).astype(np.uint32)
            kept = _best_of_each(rows, own)
            result.indices[pair], result.match_scores[pair] = rows[kept], own[kept]
    return result


def index_scenes(scenes: Sequence[Scene], matches: Mapping[Pair, Matches] | None) -> IndexedMatches:
    """The matches between images of scenes and those that their tracks imply; the tracks' observations come first."""
    given = {name: xy for scene in scenes for name, xy in keypoints_of_tracks(scene).items()}
    inside = {p: m for p, m in (matches or {}).items() if p.name0 in given and p.name1 in given}
    inside = straight_matches(scenes, inside)
    indexed = index_matches(inside, given=given)
    indices, scores = indexed.indices, indexed.match_scores
    for pair, rows in ((p, r) for scene in scenes for p, r in matches_of_tracks(scene).items()):
        if pair.reversed() in indices:
            pair, rows = pair.reversed(), rows[:, ::-1]  # noqa: PLW2901
        if pair in indices:
            rows = _new_rows(rows, indices[pair])  # noqa: PLW2901
        indices[pair] = np.concatenate([indices.get(pair, rows[:0]), rows])
        ones = np.ones(len(rows), np.float32)  # a confidence is 1 or more
        scores[pair] = np.concatenate([scores.get(pair, ones[:0]), ones])
    return indexed


def straight_matches(scenes: Sequence[Scene], matches: Mapping[Pair, Matches]) -> dict[Pair, Matches]:
    """Matches between images of scenes in the scenes' pinhole pixels: as they are but under a lens found since."""
    scene_of = {name: (scene, i) for scene in scenes for i, name in enumerate(scene.names)}
    found = dict(matches)
    for pair, match in matches.items():
        lenses = [scene_of[name][0].lens(scene_of[name][1]) for name in pair]
        if all(lens is None or lens.was_known for lens in lenses):
            continue
        keypoints = []
        for name, seen in zip(pair, (match.keypoints0, match.keypoints1), strict=True):
            scene, index = scene_of[name]
            keypoints.append(torch.from_numpy(scene.net_from_seen(index, seen.cpu().numpy())).to(seen.dtype))
        kept = torch.cat(keypoints, dim=1).isfinite().all(dim=1)
        found[pair] = Matches(keypoints[0][kept], keypoints[1][kept], match.scores.cpu()[kept])
    return found


def _new_rows(rows: UInt32[np.ndarray, "m 2"], known: UInt32[np.ndarray, "n 2"]) -> UInt32[np.ndarray, "k 2"]:
    """The rows that are not among the known ones."""
    keys = [(r[:, 0].astype(np.int64) << 32) | r[:, 1] for r in (rows, known)]
    return rows[~np.isin(*keys)]


def stored_keypoints(scene: Scene, indexed: IndexedMatches) -> dict[str, Float32[np.ndarray, "_k 2"]]:
    """The keypoints of a scene's images in pixels of the stored files."""
    return {
        name: scene.stored_from_net(i, indexed.keypoints[name]).astype(np.float32) for i, name in enumerate(scene.names)
    }


def keypoints_of_tracks(scene: Scene) -> dict[str, Float[np.ndarray, "_k 2"]]:
    """The observations of a scene's tracks in each image, in network pixels and in the order of its COLMAP model."""
    if scene.tracks is None:
        return {name: np.zeros((0, 2)) for name in scene.names}
    order, starts = _by_image(scene)
    xy = scene.tracks.keypoints.cpu().double().numpy()[order]
    parts = np.split(xy, starts[1:])
    return {n: scene.net_from_stored(i, p) for i, (n, p) in enumerate(zip(scene.names, parts, strict=True))}


def matches_of_tracks(scene: Scene) -> dict[Pair, UInt32[np.ndarray, "_m 2"]]:
    """For every two images, the observations (in `keypoints_of_tracks`) of points that both see."""
    if scene.tracks is None:
        return {}
    order, starts = _by_image(scene)
    image, point = (t.cpu().numpy()[order] for t in (scene.tracks.image_indices, scene.tracks.point_indices))
    place = np.arange(len(image)) - starts[image]
    by_point = np.lexsort((image, point))
    image, point, place = image[by_point], point[by_point], place[by_point]
    found = []
    for step in range(1, int(np.bincount(point).max(initial=0))):
        same = np.flatnonzero(point[step:] == point[:-step])
        found.append(np.stack([image[same], image[same + step], place[same], place[same + step]], axis=1))
    rows = np.concatenate([np.zeros((0, 4), np.int64), *found])
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    cuts = np.flatnonzero(np.diff(rows[:, 0] * len(scene.names) + rows[:, 1])) + 1
    parts: Iterable[np.ndarray] = np.split(rows, cuts) if len(rows) else []
    return {Pair(scene.names[part[0, 0]], scene.names[part[0, 1]]): part[:, 2:].astype(np.uint32) for part in parts}


def _by_image(scene: Scene) -> tuple[Int64[np.ndarray, " o"], Int64[np.ndarray, " n"]]:
    """The order of a COLMAP model's observations, and where each image's begin."""
    image = scene.tracks.image_indices.cpu().numpy()
    counts = np.bincount(image, minlength=len(scene.names))
    return np.argsort(image, kind="stable"), np.cumsum(counts) - counts


def _gather(
    xy: Float32[np.ndarray, "n 2"], scores: Float32[np.ndarray, " n"], num_given: int, cell_px: float
) -> tuple[Float32[np.ndarray, "k 2"], Float32[np.ndarray, " k"], Int64[np.ndarray, " n"]]:
    """Keypoints of one image, their scores, and the keypoint of each row; the first `num_given` rows stay."""
    cells = np.floor(xy * (1 / cell_px) + 0.5).astype(np.int64)
    cells -= cells.min(axis=0, initial=0)
    first, group = _unique(cells[:, 1] * (cells[:, 0].max(initial=0) + 1) + cells[:, 0])
    is_new = first >= num_given
    place = np.where(is_new, num_given - 1 + np.cumsum(is_new), first)
    index = place[group]
    size = num_given + int(is_new.sum())
    weight = np.maximum(scores, np.finfo(np.float32).tiny)
    total = np.bincount(index, weights=weight, minlength=size)
    mean = np.stack([np.bincount(index, weights=weight * xy[:, k], minlength=size) for k in (0, 1)], axis=-1)
    mean = (mean / np.maximum(total, np.finfo(np.float32).tiny)[:, None]).astype(np.float32)
    mean[:num_given] = xy[:num_given]
    best = np.zeros(size, np.float32)
    np.maximum.at(best, index, scores)
    return mean, best, index


def _unique(keys: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " u"], Int64[np.ndarray, " n"]]:
    """For each different key its first row, in the keys' order, and for each row the number of its key.

    Key and row are sorted as one number, which takes a third of the time of an argsort.
    """
    bits = max(1, (len(keys) - 1).bit_length())
    packed = (keys << bits) | np.arange(len(keys))
    packed.sort()
    rows = packed & ((1 << bits) - 1)
    is_first = np.diff(packed >> bits, prepend=-1) != 0
    group = np.empty_like(rows)
    group[rows] = np.cumsum(is_first) - 1
    return rows[is_first], group


def _best_of_each(indices: UInt32[np.ndarray, "m 2"], scores: Float32[np.ndarray, " m"]) -> Int64[np.ndarray, " k"]:
    """Rows of a pair, in their order, so that no keypoint of either image is in two: the best ones first."""
    rows = np.argsort(-scores, kind="stable")
    for side in (0, 1):
        _, first = np.unique(indices[rows, side], return_index=True)
        rows = rows[np.sort(first)]
    return np.sort(rows)
