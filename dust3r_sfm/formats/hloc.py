"""hloc's files of local features and matches, as its dense matchers write them and its reconstruction reads them.

hloc counts pixels from the first one's centre: its (0, 0) is (0.5, 0.5) here.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32, Float64

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import replacing, write_bytes
from dust3r_sfm.formats.hloc_features import opened, read_features
from dust3r_sfm.formats.keypoints import IndexedMatches, index_matches, index_onto
from dust3r_sfm.formats.pairs import write_pairs
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.views import View

CELL_PX = 1.0
"""Matches that end in one cell of network pixels share a keypoint, so that tracks go through many images."""
IS_QUERY = "dust3r_sfm_query"
"""Attribute of what `add_queries` adds to a file of features."""
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


def add_queries(
    queries: Sequence[View], views: Sequence[View], matches: Mapping[Pair, Matches], folder: Path
) -> dict[str, int]:
    """Adds queries to the `feats.h5` and `matches.h5` of a folder, whose other images and keypoints stay as they are.

    `matches` are of pairs (query, image of `views`), and end in keypoints that the image has: what hloc's localisation
    looks up in a model made of these files. Each file is replaced as a whole; queries of an earlier
    call are written anew. Returns the number of matches of each query.
    """
    view_of = {view.name: view for view in (*views, *queries)}
    check_names(view_of)
    features, pairs = folder / "feats.h5", folder / "matches.h5"
    opened(pairs, "matches").close()
    _check_keys_of_queries([query.name for query in queries], list_references(features))
    fixed = _net_keypoints(features, views, [query.name for query in queries])
    indexed = index_onto(matches, fixed, CELL_PX)
    with _changed(pairs) as file:
        for query in queries:
            file.pop(_key(query.name), None)
            for group in list(file.values()):
                group.pop(_key(query.name), None)
        for pair in indexed.indices:
            _write_matches(file.create_group(pair_key(pair)), pair, view_of, indexed, matches[pair])
    with _changed(features) as file:
        for query in queries:
            file.pop(query.name, None)
            group = file.create_group(query.name)
            group.attrs[IS_QUERY] = True
            _write_features(group, query, indexed)
    counts = dict.fromkeys((query.name for query in queries), 0)
    for pair, rows in indexed.indices.items():
        counts[pair.name0] += len(rows)
    return counts


def list_references(path: Path) -> list[str]:
    """The images that a file of hloc's features is of, without the queries that `add_queries` put there."""
    names: list[str] = []

    def note(name: str, group: object) -> None:
        if isinstance(group, h5py.Group) and "keypoints" in group and IS_QUERY not in group.attrs:
            names.append(name)

    with opened(path, "features") as file:
        file.visititems(note)
    if not names:
        raise InputError(f"{path} has no keypoints of any image: expected feats.h5, which export-scene writes for hloc")
    return sorted(names)


def _net_keypoints(path: Path, views: Sequence[View], queries: Sequence[str]) -> dict[str, Float64[np.ndarray, "_n 2"]]:
    """Network pixels of the images' keypoints; InputError where one has none, or a query is one of the images."""
    keypoints = read_features(path, {view.name: view.original_size for view in views}).keypoints
    missing = [view.name for view in views if view.name not in keypoints]
    if missing:
        raise InputError(f"{path} has no keypoints of {missing[0]}: expected the features of the reference's images")
    with h5py.File(path, "r") as file:
        for name in queries:
            if name in file and IS_QUERY not in file[name].attrs:
                raise InputError(f"{name} in {path} is one of the reference's images: rename the query")
    return {view.name: view.net_from_stored(keypoints[view.name]) for view in views}


@contextmanager
def _changed(path: Path) -> Iterator[h5py.File]:
    """A copy of an HDF5 file to change, which then replaces it."""
    with replacing(path) as temporary:
        shutil.copyfile(path, temporary)
        with h5py.File(temporary, "r+", libver="latest") as file:
            yield file


def check_names(names: Iterable[str]) -> None:
    """InputError for names that hloc cannot read back from a pairs file."""
    blank = next((name for name in names if any(character.isspace() for character in name)), None)
    if blank is not None:
        raise InputError(f"hloc splits its pairs at blanks and so cannot use the image name {blank!r}: rename it")


def pair_key(pair: Pair) -> str:
    """The group that hloc keeps a pair in: `a/b.jpg`, `c.jpg` is `a-b.jpg/c.jpg`."""
    return "/".join(map(_key, pair))


def _key(name: str) -> str:
    return name.replace("/", "-")


def check_keys(pairs: Sequence[Pair]) -> None:
    """InputError where hloc would keep two pairs in one place, as it does with `a/b.jpg` and `a-b.jpg`."""
    keys: dict[str, Pair] = {}
    for pair in pairs:
        other = keys.setdefault(pair_key(pair), pair)
        if other != pair:
            raise InputError(f"hloc cannot tell the pairs {tuple(other)} and {tuple(pair)} apart: rename an image")


def _check_keys_of_queries(queries: Iterable[str], references: Iterable[str]) -> None:
    """InputError where hloc would keep the pairs of a query where those of another image are."""
    named = {_key(name): name for name in references}
    for name in queries:
        other = named.setdefault(_key(name), name)
        if other != name:
            raise InputError(f"hloc cannot tell the images {other} and {name} apart: rename the query")


def _features(views: Sequence[View], indexed: IndexedMatches) -> memoryview:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest") as file:
        for view in views:
            _write_features(file.create_group(view.name), view, indexed)
    return buffer.getbuffer()


def _write_features(group: h5py.Group, view: View, indexed: IndexedMatches) -> None:
    xy = indexed.keypoints.get(view.name, np.zeros((0, 2), np.float32))
    keypoints = group.create_dataset("keypoints", data=_hloc_pixels(view, xy))
    keypoints.attrs["uncertainty"] = CELL_PX / abs(np.linalg.det(view.net_from_img.numpy()[:2, :2])) ** 0.5
    scores = indexed.scores.get(view.name, np.zeros(0, np.float32))
    group.create_dataset("scores", data=scores)  # what load_keypoints looks for
    group.create_dataset("score", data=scores)  # what match_dense writes
    group.create_dataset("image_size", data=np.array(view.original_size, dtype=np.int64))


def _matches(view_of: Mapping[str, View], indexed: IndexedMatches, matches: Mapping[Pair, Matches]) -> memoryview:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest") as file:
        for pair in indexed.indices:
            _write_matches(file.create_group(pair_key(pair)), pair, view_of, indexed, matches[pair])
    return buffer.getbuffer()


def _write_matches(
    group: h5py.Group, pair: Pair, view_of: Mapping[str, View], indexed: IndexedMatches, found: Matches
) -> None:
    num_keypoints, rows = len(indexed.keypoints[pair.name0]), indexed.indices[pair]
    matches0 = np.full(num_keypoints, -1, dtype=np.int32)
    matches0[rows[:, 0]] = rows[:, 1]
    scores0 = np.zeros(num_keypoints, dtype=np.float16)
    scores0[rows[:, 0]] = np.minimum(indexed.match_scores[pair], FLOAT16_MAX)
    group.create_dataset("matches0", data=matches0)
    group.create_dataset("matching_scores0", data=scores0)
    for k, xy in enumerate((found.keypoints0, found.keypoints1)):
        group.create_dataset(f"keypoints{k}", data=_hloc_pixels(view_of[pair[k]], xy.cpu().float().numpy()))
    group.create_dataset("scores", data=found.scores.cpu().float().numpy())


def _hloc_pixels(view: View, xy: Float32[np.ndarray, "n 2"]) -> Float32[np.ndarray, "n 2"]:
    """Network pixels, corner origin, in the stored file and from the first pixel's centre."""
    return (view.stored_from_net(xy) - 0.5).astype(np.float32)
