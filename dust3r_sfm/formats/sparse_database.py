"""COLMAP databases: keypoints, descriptors and verified matches of images, read and written whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycolmap

from dust3r_sfm.colmap_versions import read_descriptors
from dust3r_sfm.pairs import Pair


@dataclass(frozen=True, eq=False)
class SparseMatches:
    """Keypoints of images and the matches between them that one epipolar geometry explains."""

    keypoints: Mapping[str, np.ndarray]
    """By name (n 2): pixels of the stored file, corner origin."""
    geometries: Mapping[Pair, pycolmap.TwoViewGeometry]
    """By pair, each in one direction; `inlier_matches` (m 2) are rows of the keypoints."""
    cameras: Mapping[str, pycolmap.Camera]
    """COLMAP's first guess of each image's camera, from EXIF or the size alone."""
    descriptors: Mapping[str, np.ndarray]
    """By name (n 128), uint8, of length 512; empty where the keypoints came from elsewhere."""


def read_database(path: Path) -> SparseMatches:
    """All images of a database that have keypoints, and all pairs with verified matches."""
    with pycolmap.Database.open(path) as database:
        images = {image.image_id: image for image in database.read_all_images()}
        cameras = {camera.camera_id: camera for camera in database.read_all_cameras()}
        found = sorted((i for i in images if database.exists_keypoints(i)), key=lambda i: images[i].name)
        names = {i: images[i].name for i in found}
        keypoints = {names[i]: np.asarray(database.read_keypoints(i), dtype=np.float64)[:, :2] for i in found}
        descriptors = {names[i]: read_descriptors(database, i) for i in found if database.exists_descriptors(i)}
        geometries = {}
        pair_ids, two_view = database.read_two_view_geometries()
        for pair_id, geometry in zip(pair_ids, two_view, strict=True):
            i, j = pycolmap.pair_id_to_image_pair(pair_id)
            if len(geometry.inlier_matches):
                geometries[Pair(names[i], names[j])] = geometry
    geometries = dict(sorted(geometries.items()))
    return SparseMatches(keypoints, geometries, {names[i]: cameras[images[i].camera_id] for i in found}, descriptors)


def write_database(
    path: Path,
    names: Sequence[str],
    cameras: Sequence[pycolmap.Camera],
    sparse: SparseMatches,
    camera_ids: Sequence[int] | None = None,
) -> None:
    """A new database of the named images, each with its own camera; image i and its camera have id i + 1.

    With `camera_ids` images share cameras, that of the image of the same id. Matches of other
    images are left out. An earlier database at the path is replaced.
    """
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    ids = {name: i for i, name in enumerate(names, start=1)}
    with pycolmap.Database.open(path) as database, pycolmap.DatabaseTransaction(database):
        for (name, i), camera, camera_id in zip(ids.items(), cameras, camera_ids or ids.values(), strict=True):
            if camera_id == i:
                _write_camera(database, i, camera)
            _write_image(database, i, name, camera_id, sparse.keypoints.get(name, np.zeros((0, 2))))
        for pair, geometry in sparse.geometries.items():
            if pair.name0 in ids and pair.name1 in ids:
                i, j = ids[pair.name0], ids[pair.name1]
                database.write_matches(i, j, geometry.inlier_matches)
                database.write_two_view_geometry(i, j, geometry)


def _write_camera(database: pycolmap.Database, index: int, camera: pycolmap.Camera) -> None:
    own = pycolmap.Camera(
        camera_id=index, model=camera.model, width=camera.width, height=camera.height, params=camera.params
    )
    own.has_prior_focal_length = camera.has_prior_focal_length
    database.write_camera(own, use_camera_id=True)
    rig = pycolmap.Rig(rig_id=index)
    rig.add_ref_sensor(own.sensor_id)
    database.write_rig(rig, use_rig_id=True)


def _write_image(database: pycolmap.Database, index: int, name: str, camera_id: int, keypoints: np.ndarray) -> None:
    """The camera of an image comes before it."""
    image = pycolmap.Image(name=name, camera_id=camera_id, image_id=index)
    frame = pycolmap.Frame(frame_id=index, rig_id=camera_id)
    frame.add_data_id(image.data_id)
    database.write_frame(frame, use_frame_id=True)
    database.write_image(image, use_image_id=True)
    database.write_keypoints(index, keypoints.astype(np.float32))
