"""Stage: SIFT keypoints of the stored photos and their verified matches, helped by an aligned scene where there is one.

python -m dust3r_sfm.sparse_features --image_dir photos --output out/features.db
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import torch
from tqdm import tqdm

from dust3r_sfm.alignment.guidance import Trust, guided_matches, merged, predict, refuted, trust
from dust3r_sfm.colmap_worker import run_task
from dust3r_sfm.errors import InputError
from dust3r_sfm.files import replacing, writing
from dust3r_sfm.formats.hloc_features import read_feature_matches, read_features
from dust3r_sfm.formats.sparse_database import SparseMatches, read_database, write_database
from dust3r_sfm.geometry.camera import K_from_focal
from dust3r_sfm.geometry.lens import camera_with_lens
from dust3r_sfm.pairs import Pair
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View, list_images, load_views

logger = logging.getLogger(__name__)

MIN_INLIERS = 15
"""Matches that one epipolar geometry must explain for a pair to count, as in COLMAP."""
MAX_UNGUIDED = 200
"""Pairs with more verified matches are not searched again: they have enough, and searching takes long."""
PREVIEW_SIZE = 64
"""Long side of views that are asked for the sizes of their photos alone."""
EMPTY = SparseMatches({}, {}, {}, {})


def main(
    image_dir: Path,
    output: Path,
    features: Path | None = None,
    matches: Path | None = None,
) -> None:
    """Extract and match SIFT features of a folder of photos, every one with every other.

    Args:
        image_dir: Folder of photos, sub-folders included.
        output: The COLMAP database to write.
        features: Keypoints in SIFT's place: a feature file of hloc.
        matches: The match file of hloc that goes with the features.
    """
    check_both(features, matches)
    with writing(output):
        names = list_images(image_dir)
        if features is not None and matches is not None:
            sparse = import_features(image_dir, load_views(image_dir, PREVIEW_SIZE), features, matches)
            cameras = list(sparse.cameras.values())
            with replacing(output) as temporary:
                write_database(temporary, list(sparse.cameras), cameras, sparse)
        else:
            sparse = extract_sift(image_dir, names, None, output)
    logger.info("%d pairs of %d photos share verified matches: %s.", len(sparse.geometries), len(names), output)


def check_both(features: Path | None, matches: Path | None) -> None:
    """InputError where one of hloc's two files is given without the other."""
    if (features is None) != (matches is None):
        given, lacking = ("features", "matches") if matches is None else ("matches", "features")
        raise InputError(f"--{given} is given without --{lacking}: hloc's two files belong together")


def extract_sift(
    image_dir: Path,
    names: Sequence[str],
    pairs: Iterable[Pair] | None,
    database: Path,
    cameras: Mapping[str, pycolmap.Camera] | None = None,
) -> SparseMatches:
    """SIFT features of the named photos and the verified matches of pairs (all where None), kept in `database`.

    Matches are verified with the known `cameras`, and with COLMAP's guesses where there is none.
    A database of an earlier run with the same photos and pairs is read as it is: remove it to
    match again. Photos that COLMAP cannot read have no keypoints; no result at all where it fails.
    """
    listed = None if pairs is None else sorted({tuple(sorted(pair)) for pair in pairs})
    if not database.is_file():
        with replacing(database) as temporary:
            temporary.unlink(missing_ok=True)  # of a killed run
            done = run_task(
                "sift",
                database=temporary.absolute(),
                image_dir=image_dir.absolute(),
                names=list(names),
                pairs=listed,
                cameras={name: _plain(camera) for name, camera in (cameras or {}).items()},
            )
            if not done:
                temporary.touch()
        if not done:
            database.unlink()
            return EMPTY
    return read_database(database)


def known_cameras(views: Iterable[View]) -> dict[str, pycolmap.Camera]:
    """The cameras of the stored photos of views whose K is known."""
    known = [view for view in views if view.known_K is not None]
    return {v.name: camera_with_lens(v.known_K.double().numpy(), v.original_size, v.lens) for v in known}


def _plain(camera: pycolmap.Camera) -> dict[str, Any]:
    return {
        **{"model": camera.model.name, "width": camera.width, "height": camera.height},
        "params": list(map(float, camera.params)),
    }


def import_features(image_dir: Path, views: Sequence[View], features: Path, matches: Path) -> SparseMatches:
    """Keypoints and matches of hloc's files, verified as SIFT's are; descriptors help guided matching where there are.

    InputError where the files are not of these photos.
    """
    sizes = {view.name: view.original_size for view in views}
    found = read_features(features, sizes)
    paired = read_feature_matches(matches, found.keypoints)
    known = known_cameras(views)
    cameras = {n: known[n] if n in known else _guessed_camera(image_dir / n, sizes[n]) for n in found.keypoints}
    for camera_id, (name, camera) in enumerate(cameras.items(), start=1):
        camera.camera_id = camera_id  # COLMAP takes photos of equal ids for those of one camera
        camera.has_prior_focal_length |= name in known
    geometries = {}
    for pair, rows in tqdm(sorted(paired.items()), desc="Verify", unit="pair", disable=None):
        geometry = _verified(cameras, found.keypoints, pair, rows)
        if geometry is not None:
            geometries[pair] = geometry
    logger.info("%d of %d pairs of %s are verified.", len(geometries), len(paired), matches)
    return SparseMatches(found.keypoints, geometries, cameras, found.descriptors)


def _guessed_camera(path: Path, size: tuple[int, int]) -> pycolmap.Camera:
    """COLMAP's guess from EXIF, or of the size alone where it cannot read the photo."""
    try:
        return pycolmap.infer_camera_from_image(path)
    except (RuntimeError, ValueError):  # of formats that it does not know
        K = K_from_focal(torch.tensor(1.2 * max(size)), torch.tensor(size) / 2)
        return camera_with_lens(K.double().numpy(), size)


def _verified(
    cameras: Mapping[str, pycolmap.Camera], keypoints: Mapping[str, np.ndarray], pair: Pair, matches: np.ndarray
) -> pycolmap.TwoViewGeometry | None:
    """The epipolar geometry that explains most matches; None where they are too few."""
    if len(matches) < MIN_INLIERS:
        return None
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.random_seed = 0
    ends = [(cameras[name], keypoints[name]) for name in pair]
    geometry = pycolmap.estimate_two_view_geometry(*ends[0], *ends[1], matches.astype(np.uint32), options)
    return geometry if len(geometry.inlier_matches) >= MIN_INLIERS else None


def within_masks(sparse: SparseMatches, views: Sequence[View]) -> SparseMatches:
    """Without the matches of keypoints that a view's mask covers."""
    usable = {}
    for view in views:
        if view.mask is not None and view.name in sparse.keypoints:
            net = view.net_from_stored(sparse.keypoints[view.name])
            x, y = np.where(np.isfinite(net), net, 0).T.astype(int)
            height, width = view.size
            usable[view.name] = view.mask.numpy()[y.clip(0, height - 1), x.clip(0, width - 1)]
    geometries = {}
    for pair, geometry in sparse.geometries.items() if usable else ():
        kept = np.ones(len(geometry.inlier_matches), dtype=bool)
        for side, name in enumerate(pair):
            if name in usable:
                kept &= usable[name][geometry.inlier_matches[:, side]]
        if kept.sum() >= MIN_INLIERS:
            geometries[pair] = with_inliers(geometry, geometry.inlier_matches[kept])
    return dataclasses.replace(sparse, geometries=geometries) if usable else sparse


def with_inliers(geometry: pycolmap.TwoViewGeometry, matches: np.ndarray) -> pycolmap.TwoViewGeometry:
    """The same geometry with other matches."""
    new = copy.copy(geometry)
    new.inlier_matches = matches.astype(np.uint32)
    return new


def guide(sparse: SparseMatches, scene: Scene, pairs: Iterable[Pair]) -> tuple[SparseMatches, Trust]:
    """Matches near where an aligned scene puts them are added, those that it refutes dropped.

    The scene is asked only where most of the verified pairs agree with it; pairs of the given
    ones that had too few matches to be verified may become so.
    """
    index_of = {name: i for i, name in enumerate(scene.names) if name in sparse.keypoints}
    inside = {pair: g for pair, g in sparse.geometries.items() if pair.name0 in index_of and pair.name1 in index_of}
    verified = {
        (index_of[pair.name0], index_of[pair.name1]): tuple(
            sparse.keypoints[name][g.inlier_matches[:, side]] for side, name in enumerate(pair)
        )
        for pair, g in inside.items()
    }
    found = trust(scene, verified)
    if not found.believed:
        return sparse, found
    geometries = dict(sparse.geometries)
    candidates = {pair if pair in inside or pair.reversed() not in inside else pair.reversed() for pair in pairs}
    candidates = {pair for pair in candidates if pair.name0 in index_of and pair.name1 in index_of} | set(inside)
    for pair in sorted({pair if pair in inside else Pair(*sorted(pair)) for pair in candidates}):
        geometry = _guided_pair(sparse, scene, pair, index_of[pair.name0], index_of[pair.name1], found.band)
        geometries.pop(pair, None)
        if geometry is not None:
            geometries[pair] = geometry
    return dataclasses.replace(sparse, geometries=dict(sorted(geometries.items()))), found


def _guided_pair(
    sparse: SparseMatches, scene: Scene, pair: Pair, image0: int, image1: int, band: float
) -> pycolmap.TwoViewGeometry | None:
    """The geometry of a pair with guided matches; None where too few remain."""
    keypoints0, keypoints1 = (sparse.keypoints[name] for name in pair)
    max_error_px = band * max(scene.original_sizes[image1])
    prediction = predict(scene, image0, image1, keypoints0)
    old = sparse.geometries.get(pair)
    matches = np.zeros((0, 2), dtype=np.int64)
    if old is not None:
        rows = old.inlier_matches.astype(np.int64)
        here = dataclasses.replace(
            prediction, pixels=prediction.pixels[rows[:, 0]], is_confident=prediction.is_confident[rows[:, 0]]
        )
        matches = rows[~refuted(here, keypoints1[rows[:, 1]], 2 * max_error_px)]
        if len(matches) > MAX_UNGUIDED:
            return with_inliers(old, matches)
    if all(name in sparse.descriptors for name in pair):
        descriptors0, descriptors1 = (sparse.descriptors[name] for name in pair)
        more = guided_matches(prediction, keypoints1, descriptors0, descriptors1, max_error_px)
        matches = merged(matches, more)
    return _verified(sparse.cameras, sparse.keypoints, pair, matches)


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["sparse-features", *sys.argv[1:]]))
