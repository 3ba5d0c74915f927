"""hloc's files of local features and matches, as its dense matchers write them and its reconstruction reads them.

hloc counts pixels from the first one's centre: its (0, 0) is (0.5, 0.5) here.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.formats.keypoints import IndexedMatches, index_matches
from dust3r_sfm.formats.pairs import write_pairs
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.views import View

CELL_PX = 1.0
"""Matches that end in one cell of network pixels share a keypoint, so that tracks go through many images."""
FLOAT16_MAX = float(np.finfo(np.float16).max)


def write_hloc(views: Sequence[View], matches: Mapping[Pair, Matches], folder: Path) -> None:
    """Writes `pairs.txt`, `feats.h5` and `matches.h5`; matches of images that are no views are passed over.

    `feats.h5`: by image `keypoints` (float32 n 2, in stored pixels), `scores`, `image_size` (width, height).
    `matches.h5`: by pair `matches0` (int32, -1 for none) and `matching_scores0` (float16), and
    the matches as they were before keypoints were shared (`keypoints0`, `keypoints1`, `scores`).
    """
    view_of = {view.name: view for view in views}
    matches = {p: m for p, m in matches.items() if p.name0 in view_of and p.name1 in view_of}
    check_keys(list(matches))
    check_names(view_of)
    indexed = index_matches(matches, CELL_PX)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "feats.h5", _features(views, indexed))
    write_bytes(folder / "matches.h5", _matches(view_of, indexed, matches))
    write_pairs(folder / "pairs.txt", matches)


def check_names(names: Iterable[str]) -> None:
    """InputError for names that hloc cannot read back from a pairs file."""
    blank = next((name for name in names if any(character.isspace() for character in name)), None)
    if blank is not None:
        raise InputError(f"hloc splits its pairs at blanks and so cannot use the image name {blank!r}: rename it")


def pair_key(pair: Pair) -> str:
    """The group that hloc keeps a pair in: `a/b.jpg`, `c.jpg` is `a-b.jpg/c.jpg`."""
    return "/".join(name.replace("/", "-") for name in pair)


def check_keys(pairs: Sequence[Pair]) -> None:
    """InputError where hloc would keep two pairs in one place, as it does with `a/b.jpg` and `a-b.jpg`."""
    keys: dict[str, Pair] = {}
    for pair in pairs:
        other = keys.setdefault(pair_key(pair), pair)
        if other != pair:
            raise InputError(f"hloc cannot tell the pairs {tuple(other)} and {tuple(pair)} apart: rename an image")


def _features(views: Sequence[View], indexed: IndexedMatches) -> memoryview:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest") as file:
        for view in views:
            group = file.create_group(view.name)
            xy = indexed.keypoints.get(view.name, np.zeros((0, 2), np.float32))
            keypoints = group.create_dataset("keypoints", data=_hloc_pixels(view, xy))
            keypoints.attrs["uncertainty"] = CELL_PX / abs(np.linalg.det(view.net_from_img.numpy()[:2, :2])) ** 0.5
            scores = indexed.scores.get(view.name, np.zeros(0, np.float32))
            group.create_dataset("scores", data=scores)  # what load_keypoints looks for
            group.create_dataset("score", data=scores)  # what match_dense writes
            group.create_dataset("image_size", data=np.array(view.original_size, dtype=np.int64))
    return buffer.getbuffer()


def _matches(view_of: Mapping[str, View], indexed: IndexedMatches, matches: Mapping[Pair, Matches]) -> memoryview:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest") as file:
        for pair, rows in indexed.indices.items():
            group, found = file.create_group(pair_key(pair)), matches[pair]
            num_keypoints = len(indexed.keypoints[pair.name0])
            matches0 = np.full(num_keypoints, -1, dtype=np.int32)
            matches0[rows[:, 0]] = rows[:, 1]
            scores0 = np.zeros(num_keypoints, dtype=np.float16)
            scores0[rows[:, 0]] = np.minimum(indexed.match_scores[pair], FLOAT16_MAX)
            group.create_dataset("matches0", data=matches0)
            group.create_dataset("matching_scores0", data=scores0)
            for k, xy in enumerate((found.keypoints0, found.keypoints1)):
                group.create_dataset(f"keypoints{k}", data=_hloc_pixels(view_of[pair[k]], xy.cpu().float().numpy()))
            group.create_dataset("scores", data=found.scores.cpu().float().numpy())
    return buffer.getbuffer()


def _hloc_pixels(view: View, xy: Float32[np.ndarray, "n 2"]) -> Float32[np.ndarray, "n 2"]:
    """Network pixels, corner origin, in the stored file and from the first pixel's centre."""
    return (view.stored_from_net(xy) - 0.5).astype(np.float32)
