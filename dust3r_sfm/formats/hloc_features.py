"""Local features and matches as hloc's extractors and matchers write them, read for SIFT's place.

hloc counts pixels from the first one's centre: its (0, 0) is (0.5, 0.5) here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32, Float64, Int64

from dust3r_sfm.errors import InputError
from dust3r_sfm.pairs import Pair

DESCRIPTOR_LENGTH = 512.0
"""Of descriptors here, as COLMAP's SIFT has it."""


@dataclass(frozen=True, eq=False)
class LocalFeatures:
    keypoints: dict[str, Float64[np.ndarray, "_n 2"]]
    """By image name, in pixels of the stored file, corner origin."""
    descriptors: dict[str, Float32[np.ndarray, "_n _d"]]
    """Of length 512; of the images that have them."""


def read_features(path: Path, sizes: Mapping[str, tuple[int, int]]) -> LocalFeatures:
    """The features of images of known (width, height); InputError where there are none, or of files of other sizes."""
    features = LocalFeatures({}, {})
    with opened(path, "features") as file:
        for name, size in sizes.items():
            if name not in file:
                continue
            group = file[name]
            if not isinstance(group, h5py.Group) or "keypoints" not in group:
                raise InputError(f"{path} has no keypoints of {name}: expected a file of hloc's local features")
            stored = tuple(group["image_size"][()].tolist()) if "image_size" in group else size
            if stored != size:
                raise InputError(
                    f"the features of {name} in {path} are of a file of {stored} pixels, but it has {size}"
                )
            keypoints = group["keypoints"][()].astype(np.float64)
            if keypoints.ndim != 2 or keypoints.shape[1] < 2 or not np.isfinite(keypoints).all():
                raise InputError(f"the keypoints of {name} in {path} are no finite (n, 2), but {keypoints.shape}")
            features.keypoints[name] = keypoints[:, :2] + 0.5
            descriptors = group["descriptors"][()].T.astype(np.float32) if "descriptors" in group else np.zeros((0, 0))
            if len(descriptors) == len(keypoints) > 0:
                lengths = np.linalg.norm(descriptors, axis=1, keepdims=True)
                features.descriptors[name] = DESCRIPTOR_LENGTH * descriptors / np.maximum(lengths, 1e-12)
    if not features.keypoints:
        raise InputError(f"{path} has no features of any of the {len(sizes)} photos (such as {min(sizes)})")
    return features


def read_feature_matches(
    path: Path, keypoints: Mapping[str, Float64[np.ndarray, "_n 2"]]
) -> dict[Pair, Int64[np.ndarray, "_m 2"]]:
    """Matches, rows of both images' keypoints, of the pairs of images that have keypoints; each pair in one direction.

    InputError where the file has none, or names keypoints that there are not.
    """
    found: dict[Pair, Int64[np.ndarray, "_m 2"]] = {}
    with opened(path, "matches") as file:
        for pair, group in _pairs(file, keypoints):
            matches0 = group["matches0"][()].astype(np.int64)
            rows = np.stack([np.flatnonzero(matches0 > -1), matches0[matches0 > -1]], axis=1)
            if len(rows) and (rows.max(axis=0) >= [len(keypoints[name]) for name in pair]).any():
                raise InputError(f"the matches of {' and '.join(pair)} in {path} belong to other features")
            if pair.reversed() not in found:
                found[pair] = rows
    if not found:
        raise InputError(f"{path} has no matches of pairs of the {len(keypoints)} photos that have features")
    return found


def _pairs(file: h5py.File, names: Collection[str]) -> Iterator[tuple[Pair, h5py.Group]]:
    """The file's groups of pairs of the names: `a-b.jpg/c.jpg` for `a/b.jpg` and `c.jpg`, or `a-b.jpg_c.jpg` of old."""
    named: dict[str, str] = {}
    for name in names:
        other = named.setdefault(name.replace("/", "-"), name)
        if other != name:
            raise InputError(f"hloc cannot tell the images {other} and {name} apart: rename one and match again")
    groups = [(key, group) for key, group in file.items() if isinstance(group, h5py.Group)]
    for key0, group in groups:
        if "matches0" in group:
            ends = ((key0[:i], key0[i + 1 :]) for i, character in enumerate(key0) if character == "_")
            known = [(a, b) for a, b in ends if a in named and b in named]
            yield from ((Pair(named[a], named[b]), group) for a, b in known[:1])
        elif key0 in named:
            for key1, inner in group.items():
                if key1 in named and "matches0" in inner:
                    yield Pair(named[key0], named[key1]), inner


def opened(path: Path, what: str) -> h5py.File:
    if not Path(path).is_file():
        raise InputError(f"there are no {what} at {path}: expected a file of hloc")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} cannot be read as hloc's {what}: {error}") from error
