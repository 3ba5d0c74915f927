"""COLMAP's incremental mapping from photos of known poses on: these stay, the others are added to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dust3r_sfm.alignment.refine import RefineConfig, support
from dust3r_sfm.formats.sparse_database import SparseMatches, write_database
from dust3r_sfm.mapping import RELAXED, Model, camera_guesses, known_of, map_images, triangulate
from dust3r_sfm.reference import Reference
from dust3r_sfm.views import View


def continue_mapping(views: Sequence[View], sparse: SparseMatches, work: Path, config: RefineConfig) -> list[Model]:
    """The photos of known pose and those that verified matches add to them, as one model; none where none are added.

    Known poses, of photos whose intrinsics are known too, stay as they are. Photos of a size that
    the posed ones have begin with the median camera of these, which is then adjusted to each.
    """
    known, cameras = known_of(views), camera_guesses(views, sparse, config.camera_model)
    complete = known.poses & known.intrinsics & set(cameras)
    poses = {view.name: view.known_cam_from_world for view in views if view.name in complete}
    if len(poses) < 2 or not sparse.geometries:
        return []
    posed = Reference(
        {name: cameras[name] for name in poses}, {name: pose[:3].double().numpy() for name, pose in poses.items()}
    )
    for view in views:
        alike = posed.guesses_for(view.original_size)
        if view.name in cameras and view.known_K is None and alike:
            cameras[view.name] = alike[0]
    names = [*poses, *(name for name in cameras if name not in poses)]
    previous = triangulate(posed.model(), posed.names, sparse, work, 1.0, two_views=True)
    (work / "previous").mkdir(exist_ok=True)
    previous.write(work / "previous")
    database = work / "mapping.db"
    write_database(database, names, [cameras[name] for name in names], sparse)
    held = [i for i, name in enumerate(names, start=1) if name in known.intrinsics]
    best: list[Model] = []
    for options in ({}, RELAXED):
        for found in map_images(database, work / "models", held, options, work / "previous"):
            model = Model("extension", found, support(found, config))
            if model.names > set(poses) and (not best or model.support.explains_more_than(best[0].support)):
                best = [model]
        if best and len(best[0].names) == len(names):
            break
    return best
