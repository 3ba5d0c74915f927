"""COLMAP databases of features: written whole, read back, and mapped in a process of their own."""

import numpy as np
import pycolmap
import pytest

from dust3r_sfm.colmap_worker import run_task
from dust3r_sfm.formats.sparse_database import read_database, write_database


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A database that COLMAP made up, and the model behind it."""
    path = tmp_path_factory.mktemp("synthetic") / "database.db"
    pycolmap.set_random_seed(0)
    options = pycolmap.SyntheticDatasetOptions(num_rigs=1, num_frames_per_rig=5, num_points3D=150)
    with pycolmap.Database.open(path) as database:
        model = pycolmap.synthesize_dataset(options, database)
    return path, model


def test_a_database_comes_back_as_it_was_with_images_in_any_order(synthetic, tmp_path):
    sparse = read_database(synthetic[0])
    names = sorted(sparse.keypoints, reverse=True)
    write_database(tmp_path / "new.db", names, [sparse.cameras[name] for name in names], sparse)
    back = read_database(tmp_path / "new.db")
    assert set(back.keypoints) == set(names)
    assert all(np.array_equal(back.keypoints[name], sparse.keypoints[name]) for name in names)
    assert len(back.geometries) == len(sparse.geometries) == 10
    for pair, geometry in sparse.geometries.items():
        other = back.geometries.get(pair)
        matches = back.geometries[pair.reversed()].inlier_matches[:, ::-1] if other is None else other.inlier_matches
        assert sorted(map(tuple, matches.tolist())) == sorted(map(tuple, geometry.inlier_matches.tolist()))
    with pycolmap.Database.open(tmp_path / "new.db") as database:
        assert [database.read_image(i).name for i in range(1, 6)] == names


def test_images_may_share_cameras_and_are_mapped_with_one(synthetic, tmp_path):
    sparse = read_database(synthetic[0])
    names = sorted(sparse.keypoints)
    write_database(tmp_path / "new.db", names, [sparse.cameras[name] for name in names], sparse, [1, 1, 3, 1, 3])
    with pycolmap.Database.open(tmp_path / "new.db") as database:
        assert [camera.camera_id for camera in database.read_all_cameras()] == [1, 3]
        assert [database.read_image(i).camera_id for i in range(1, 6)] == [1, 1, 3, 1, 3]
    paths = {"database": tmp_path / "new.db", "output": tmp_path}
    assert run_task("map_images", **paths, constant_cameras=[], options={"min_model_size": 3})
    assert set(pycolmap.Reconstruction(tmp_path / "0").cameras) == {1, 3}


def test_matches_of_other_images_are_left_out(synthetic, tmp_path):
    sparse = read_database(synthetic[0])
    names = sorted(sparse.keypoints)[:3]
    write_database(tmp_path / "some.db", names, [sparse.cameras[name] for name in names], sparse)
    assert len(read_database(tmp_path / "some.db").geometries) == 3


def test_what_is_written_can_be_mapped_elsewhere_and_failures_are_told(synthetic, tmp_path, caplog):
    sparse = read_database(synthetic[0])
    names = sorted(sparse.keypoints)
    write_database(tmp_path / "new.db", names, [sparse.cameras[name] for name in names], sparse)
    paths = {"database": tmp_path / "new.db", "output": tmp_path}
    assert run_task("map_images", **paths, constant_cameras=[], options={"min_model_size": 3})
    model = pycolmap.Reconstruction(tmp_path / "0")
    assert model.num_reg_images() == 5
    (tmp_path / "text.db").write_text("no database")
    assert not caplog.records
    assert not run_task("map_images", database=tmp_path / "text.db", output=tmp_path, constant_cameras=[], options={})
    assert "COLMAP's map_images failed" in caplog.text
    assert not run_task("triangulate", timeout_s=0.01, database="", model="", output="", options={})
    assert "was stopped" in caplog.text
