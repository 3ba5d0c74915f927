"""Queries and the reference images that they are compared with: read, described, and given to the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pycolmap
import torch

from dust3r_sfm.alignment.localization import Features, QueryCamera
from dust3r_sfm.extract_descriptors import describe_views
from dust3r_sfm.formats.localization import read_queries
from dust3r_sfm.formats.pairs import read_pairs
from dust3r_sfm.formats.pointmaps import hash_of
from dust3r_sfm.formats.sparse_database import SparseMatches, read_database
from dust3r_sfm.geometry.lens import lens_of
from dust3r_sfm.graph import symmetrize
from dust3r_sfm.infer_pairs import InferConfig, infer_pairs
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.pairs import Pair, Predictions
from dust3r_sfm.pairs_from_retrieval import pair_graph
from dust3r_sfm.query_poses import QUERY, Query
from dust3r_sfm.reference import (
    Reference,
)
from dust3r_sfm.retrieval.exact import exact_top_k
from dust3r_sfm.sparse_features import extract_sift
from dust3r_sfm.views import SUFFIXES, KnownCamera, View, list_images, load_views

MAX_EXHAUSTIVE = 40
"""Up to so many reference images every one is matched with every other, and above with those that look alike."""
NUM_ALIKE = 20


def make_query(view: View, camera: pycolmap.Camera | None, reference: Reference, sparse: SparseMatches) -> Query:
    """A query with its features, and the cameras that it may have been taken with."""
    features = Features(
        sparse.keypoints.get(view.name, np.zeros((0, 2))),
        sparse.descriptors.get(view.name, np.zeros((0, 128), np.uint8)),
    )
    guesses = list(reference.guesses_for(view.original_size))
    if view.name in sparse.cameras and sparse.cameras[view.name].has_prior_focal_length:
        guesses.append(sparse.cameras[view.name])  # from EXIF
    named = dataclasses.replace(view, name=QUERY + view.name)
    return Query(named, QueryCamera(view.original_size, camera, tuple(guesses)), features)


def predict(
    network: Dust3r,
    queries: Sequence[Query],
    neighbors: Mapping[str, Sequence[str]],
    views: Sequence[View],
    output: Path | None,
    config: InferConfig,
) -> Predictions:
    """Predictions of the queries' views with those of their images, both directions."""
    pairs = [Pair(name, query.view.name) for query in queries for name in neighbors[query.name]]
    return infer_pairs(network, [*views, *(query.view for query in queries)], symmetrize(pairs), output, config)


def nearest_images(
    network: Dust3r, queries: Sequence[View], views: Sequence[View], num_matched: int
) -> dict[str, list[str]]:
    """For each query the names of the images that look most like it, best first."""
    rows = describe_views(network, [*queries, *views])
    found = exact_top_k(rows[: len(queries)], rows[len(queries) :], min(num_matched, len(views)))
    return {
        q.name: [views[i].name for i in row if i >= 0] for q, row in zip(queries, found.indices.tolist(), strict=True)
    }


def list_queries(queries: Path, folder: Path) -> tuple[Path, dict[str, pycolmap.Camera | None]]:
    """The folder that the names of queries are below, and the cameras that are known of them."""
    if queries.is_dir():
        return queries, dict.fromkeys(list_images(queries))
    if queries.suffix.lower() in SUFFIXES:
        return queries.parent, {queries.name: None}
    return folder, read_queries(queries)


def load_queries(
    folder: Path, cameras: Mapping[str, pycolmap.Camera | None], network: Dust3r, on_bad_image: str
) -> list[View]:
    known = {name: known_camera(camera) for name, camera in cameras.items() if camera is not None}
    size, square_ok = network.config.image_size, network.config.square_ok
    return load_views(folder, size, list(cameras), on_bad_image, square_ok=square_ok, cameras=known)


def known_camera(camera: pycolmap.Camera) -> KnownCamera:
    K = torch.from_numpy(np.array(camera.calibration_matrix()))
    return KnownCamera(K, None, lens_of(camera, was_known=True), (camera.width, camera.height))


def load_neighbors(
    network: Dust3r,
    queries: Sequence[View],
    reference: Reference,
    image_dir: Path,
    pairs_file: Path | None,
    num_matched: int,
) -> tuple[dict[str, list[str]], list[View]]:
    """The reference images that each query is compared with, and the views of all of these."""
    size, square_ok = network.config.image_size, network.config.square_ok
    names, found = reference.names, {}
    if pairs_file is not None:
        found = {query.name: [] for query in queries}
        for pair in read_pairs(pairs_file, {*names, *found}):
            if pair.name0 in found and pair.name1 in reference.cameras:
                found[pair.name0].append(pair.name1)
        names = [name for name in names if any(name in images for images in found.values())]
    cameras = {name: known_camera(reference.cameras[name]) for name in names}
    views = load_views(image_dir, size, names, square_ok=square_ok, cameras=cameras)
    if pairs_file is None:
        found = nearest_images(network, queries, views, num_matched)
        needed = {name for images in found.values() for name in images}
        views = [view for view in views if view.name in needed]
    return found, views


def reference_features(
    reference: Path, image_dir: Path, network: Dust3r, views: Sequence[View], work: Path
) -> SparseMatches:
    """SIFT matches between the reference images that are needed: those of our own run where there is one."""
    names = [view.name for view in views]
    if (reference / "features.db").is_file():
        sparse = read_database(reference / "features.db")
        if set(names) <= set(sparse.keypoints):
            return sparse
    pairs = None
    if len(names) > MAX_EXHAUSTIVE:
        pairs = pair_graph(names, describe_views(network, views), NUM_ALIKE)
    return extract_sift(image_dir, names, pairs, work / f"reference-{photos_key(image_dir, views)}.db")


def photos_key(folder: Path, views: Sequence[View]) -> str:
    """What tells the photos of some views from others."""
    stats = [(view.name, (folder / view.name).stat()) for view in views]
    return hash_of(str(folder.absolute()), *(repr((n, s.st_size, s.st_mtime_ns)) for n, s in stats))[:16]
