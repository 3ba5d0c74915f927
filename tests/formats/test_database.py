import dataclasses
import time

import numpy as np
import pycolmap
import pytest
import torch
from aligned import true_scene
from procedural import STORED_PER_NET, make_scene

from dust3r_sfm.alignment.tracks import build_tracks
from dust3r_sfm.formats.colmap import first_ids, read_colmap, write_colmap
from dust3r_sfm.formats.database import write_database
from dust3r_sfm.formats.keypoints import index_matches, index_scenes, keypoints_of_tracks, stored_keypoints
from dust3r_sfm.match_dense import match_dense
from dust3r_sfm.pairs import Matches, Pair

NUM_VIEWS = 4


@pytest.fixture(scope="module")
def procedural():
    return make_scene(NUM_VIEWS, (72, 96), seed=3)


@pytest.fixture(scope="module")
def matches(procedural):
    return match_dense(procedural.views, procedural.predictions)


@pytest.fixture(scope="module")
def scene(procedural, matches):
    return build_tracks(true_scene(procedural), matches, procedural.views)


@pytest.fixture(scope="module")
def folder(scene, matches, tmp_path_factory):
    """A model and its database, as a run writes them."""
    folder = tmp_path_factory.mktemp("run")
    indexed = index_scenes([scene], matches)
    observed = keypoints_of_tracks(scene)
    more = {name: xy[len(observed[name]) :] for name, xy in stored_keypoints(scene, indexed).items()}
    (folder / "images").mkdir()
    write_colmap(scene, folder / "sparse" / "0", more_keypoints=more)
    write_database(scene, matches, folder / "database.db")
    pycolmap.logging.minloglevel = 2
    return folder


@pytest.fixture
def database(folder):
    opened = pycolmap.Database.open(str(folder / "database.db"))
    yield opened
    opened.close()


def pose_errors(model, procedural):
    """The largest errors of relative rotations (degrees) and directions of baselines against the procedural poses."""
    by_name = {image.name: image.cam_from_world() for image in model.images.values() if image.has_pose}
    assert sorted(by_name) == sorted(procedural.names)
    truth = dict(zip(procedural.names, procedural.cam_from_world.double().numpy(), strict=True))
    angles = []
    for name0 in procedural.names:
        for name1 in procedural.names:
            if name0 != name1:
                found = np.vstack([(by_name[name1] * by_name[name0].inverse()).matrix(), [0, 0, 0, 1]])
                true = truth[name1] @ np.linalg.inv(truth[name0])
                cosine = (np.trace(found[:3, :3].T @ true[:3, :3]) - 1) / 2
                direction = found[:3, 3] @ true[:3, 3] / np.linalg.norm(found[:3, 3]) / np.linalg.norm(true[:3, 3])
                angles.append(np.rad2deg(np.arccos(np.clip([cosine, direction], -1, 1))))
    return np.max(angles, axis=0)


def test_ids_and_keypoints_are_the_model_s(folder, database, scene):
    model = read_colmap(folder / "sparse" / "0")
    cameras = {camera.camera_id: camera for camera in database.read_all_cameras()}
    assert cameras.keys() == set(model.cameras)
    for camera_id, camera in cameras.items():
        assert camera.has_prior_focal_length
        assert camera.params.tolist() == model.cameras[camera_id].params.tolist()
    assert {rig.rig_id for rig in database.read_all_rigs()} == set(model.rigs)
    frames = {frame.frame_id: [data.id for data in frame.data_ids] for frame in database.read_all_frames()}
    assert frames == {frame_id: [data.id for data in frame.data_ids] for frame_id, frame in model.frames.items()}
    images = {image.image_id: image for image in database.read_all_images()}
    assert images.keys() == set(model.images)
    for image_id, image in images.items():
        expected = model.images[image_id]
        assert (image.name, image.camera_id) == (expected.name, expected.camera_id)
        in_model = np.array([point.xy for point in expected.points2D])
        np.testing.assert_allclose(database.read_keypoints(image_id), in_model, atol=1e-3)


def test_keypoints_are_pixels_of_the_stored_files_and_matches_join_what_sees_one_point(database, procedural, matches):
    """A matched anchor's point, known to the ray caster, projects onto the other keypoint."""
    ids = {image.name: image.image_id for image in database.read_all_images()}
    pair, found = next(iter(matches.items()))
    keypoints0, keypoints1 = (database.read_keypoints(ids[name]) for name in pair)
    index = database.read_matches(ids[pair.name0], ids[pair.name1])
    assert len(index) >= len(found.scores)  # then those that two matches through a third image imply
    index = index[: len(found.scores)]
    np.testing.assert_allclose(keypoints0[index[:, 0]] / STORED_PER_NET, found.keypoints0, atol=0.02)
    xy = keypoints0[index[:, 0]] / STORED_PER_NET
    is_centre = np.abs(xy % 1 - 0.5).max(axis=1) < 1e-3
    column, row = xy[is_centre].astype(int).T
    i, j = (procedural.names.index(name) for name in pair)
    points = procedural.points_in_world[i][row, column] @ procedural.cam_from_world[j, :3, :3].T
    pixels = (points + procedural.cam_from_world[j, :3, 3]) @ procedural.K[j].T
    error = pixels[:, :2] / pixels[:, 2:] * STORED_PER_NET - torch.from_numpy(keypoints1[index[is_centre, 1]])
    assert is_centre.sum() > 100
    assert error.norm(dim=-1).median() < 0.3


def test_pairs_are_calibrated_with_the_relative_pose_and_the_matches_that_agree(scene, matches, procedural, tmp_path):
    scene = dataclasses.replace(scene, tracks=None)
    pair = next(iter(matches))
    wrong = matches[pair].keypoints1.clone()
    wrong[::4] += torch.tensor([0.0, 25.0])
    write_database(scene, matches | {pair: dataclasses.replace(matches[pair], keypoints1=wrong)}, tmp_path / "d.db")
    database = pycolmap.Database.open(str(tmp_path / "d.db"))
    found = database.read_two_view_geometry(1, 2)
    num_matches = len(database.read_matches(1, 2))
    database.close()
    assert pair == Pair(*procedural.names[:2])
    assert found.config == pycolmap.TwoViewGeometryConfiguration.CALIBRATED
    expected = procedural.cam_from_world[1].double() @ torch.linalg.inv(procedural.cam_from_world[0].double())
    np.testing.assert_allclose(found.cam2_from_cam1.matrix(), expected[:3], atol=1e-5)
    assert num_matches == len(wrong)
    assert len(found.inlier_matches) == pytest.approx(0.75 * len(wrong), rel=0.02)


@pytest.mark.parametrize("mapping", ["incremental_mapping", "global_mapping"])
def test_mappers_find_the_poses(mapping, folder, procedural, tmp_path):
    if not hasattr(pycolmap, mapping):
        pytest.skip("this pycolmap has no such mapper")
    models = getattr(pycolmap, mapping)(folder / "database.db", folder / "images", tmp_path)
    rotation_deg, direction_deg = pose_errors(models[0], procedural)
    assert len(models) == 1
    assert rotation_deg < 0.5
    assert direction_deg < 1.0


def test_mapping_continues_from_the_model(folder, procedural, tmp_path):
    models = pycolmap.incremental_mapping(
        *(folder / "database.db", folder / "images", tmp_path),
        input_path=folder / "sparse" / "0",
        options={"fix_existing_frames": True},
    )
    rotation_deg, _ = pose_errors(models[0], procedural)
    assert rotation_deg < 0.05


def test_triangulation_and_bundle_adjustment_run_on_model_and_database(folder, procedural, tmp_path):
    options = pycolmap.IncrementalPipelineOptions({"extract_colors": False})
    model = read_colmap(folder / "sparse" / "0")
    model = pycolmap.triangulate_points(model, folder / "database.db", folder / "images", tmp_path, options=options)
    assert model.num_points3D() > 500
    assert model.compute_mean_reprojection_error() < 0.5
    assert model.compute_mean_track_length() > 2.5
    pycolmap.bundle_adjustment(model, pycolmap.BundleAdjustmentOptions({"print_summary": False}))
    rotation_deg, direction_deg = pose_errors(model, procedural)
    assert rotation_deg < 0.5
    assert direction_deg < 1.0


def test_without_matches_those_of_the_tracks_are_written(scene, tmp_path):
    write_database(scene, None, tmp_path / "d.db")
    database = pycolmap.Database.open(str(tmp_path / "d.db"))
    for i, name in enumerate(scene.names):
        assert database.num_keypoints_for_image(i + 1) == (scene.tracks.image_indices == scene.names.index(name)).sum()
    seen = [set(scene.tracks.point_indices[scene.tracks.image_indices == i].tolist()) for i in (0, 2)]
    assert len(database.read_matches(1, 3)) == len(seen[0] & seen[1])
    assert database.num_verified_image_pairs() == NUM_VIEWS * (NUM_VIEWS - 1) // 2
    database.close()


def test_matches_that_only_the_tracks_know_are_written_too(scene, matches, tmp_path):
    """As after refinement, whose tracks hold keypoints of other detectors."""
    pair = Pair(*scene.names[:2])
    reversed_only = {pair.reversed(): Matches(matches[pair].keypoints1, matches[pair].keypoints0, matches[pair].scores)}
    for i, known in enumerate(({}, reversed_only)):
        write_database(scene, known, tmp_path / f"{i}.db")
    counts = []
    for i in (0, 1):
        database = pycolmap.Database.open(str(tmp_path / f"{i}.db"))
        rows = database.read_matches(1, 2)
        assert len(np.unique(rows, axis=0)) == len(rows)
        counts.append(len(rows))
        assert database.num_matched_image_pairs() == NUM_VIEWS * (NUM_VIEWS - 1) // 2
        database.close()
    seen = [set(scene.tracks.point_indices[scene.tracks.image_indices == k].tolist()) for k in (0, 1)]
    assert counts[0] == len(seen[0] & seen[1])
    assert len(matches[pair].scores) <= counts[1] < counts[0] + len(matches[pair].scores)


def test_scenes_of_one_run_share_a_database_and_are_mapped_apart(scene, matches, procedural, tmp_path):
    renamed = {name: f"other/{name}" for name in scene.names}
    other = dataclasses.replace(scene, names=tuple(renamed.values()))
    found = {Pair(renamed[p.name0], renamed[p.name1]): m for p, m in matches.items()}
    write_database([scene, other], matches | found, tmp_path / "d.db")
    assert first_ids([scene, other]) == [1, 1 + NUM_VIEWS]
    write_colmap(other, tmp_path / "1", first_id=1 + NUM_VIEWS)
    model = read_colmap(tmp_path / "1")
    database = pycolmap.Database.open(str(tmp_path / "d.db"))
    names = {image.image_id: image.name for image in database.read_all_images()}
    database.close()
    assert len(names) == 2 * NUM_VIEWS
    assert {image_id: names[image_id] for image_id in model.images} == {i: m.name for i, m in model.images.items()}
    assert model.num_points3D() == len(scene.tracks.errors)


def test_a_scene_without_matches_is_a_database_without_pairs_and_a_second_write_replaces_the_first(
    procedural, scene, matches, tmp_path
):
    write_database(scene, matches, tmp_path / "d.db")
    write_database(true_scene(procedural), {}, tmp_path / "d.db")
    database = pycolmap.Database.open(str(tmp_path / "d.db"))
    assert (database.num_images(), database.num_matches(), database.num_keypoints()) == (NUM_VIEWS, 0, 0)
    database.close()
    assert {path.name for path in tmp_path.iterdir()} <= {"d.db", "d.db-shm", "d.db-wal"}


def test_keypoints_of_one_cell_become_their_mean_weighted_by_score():
    a, b, c = "a.jpg", "b.jpg", "c.jpg"
    ab = Matches(
        torch.tensor([[10.0, 10.0], [30.0, 5.0]]), torch.tensor([[1.0, 1.0], [7.0, 7.0]]), torch.tensor([3.0, 1.0])
    )
    ac = Matches(
        torch.tensor([[10.4, 10.0], [10.2, 10.2]]), torch.tensor([[2.0, 2.0], [9.0, 9.0]]), torch.tensor([1.0, 4.0])
    )
    found = index_matches({Pair(a, b): ab, Pair(a, c): ac}, cell_px=2.0)
    assert found.indices[Pair(a, b)].shape == (2, 2)
    assert found.indices[Pair(a, c)].shape == (1, 2)  # two of one keypoint: the surer one stays
    shared = found.indices[Pair(a, b)][0, 0]
    assert shared == found.indices[Pair(a, c)][0, 0]
    np.testing.assert_allclose(found.keypoints[a][shared], [(30 + 10.4 + 40.8) / 8, (30 + 10 + 40.8) / 8], rtol=1e-6)
    np.testing.assert_allclose(found.keypoints[c][found.indices[Pair(a, c)][0, 1]], [9, 9])
    assert found.scores[a][shared] == 4
    exact = index_matches({Pair(a, b): ab, Pair(a, c): ac})
    assert [len(exact.keypoints[name]) for name in (a, b, c)] == [4, 2, 2]


def test_a_thousand_pairs_are_written_fast(tmp_path, record_property, capsys):
    """The figure is printed (pytest -s), not judged: machines differ. Two seconds are the aim."""
    num_views, num_pairs, generator = 50, 1000, torch.Generator().manual_seed(0)
    pairs = [(i, (i + step) % num_views) for step in range(1, 21) for i in range(num_views)][:num_pairs]
    template = true_scene(make_scene(2, (48, 64), pairs=[(0, 1)]))
    fields = {f: getattr(template, f)[:1].repeat(num_views, 1, 1) for f in ("K", "cam_from_world", "net_from_img")}
    lists = {f: getattr(template, f)[:1] * num_views for f in ("depth", "confidence", "original_sizes")}
    scene = dataclasses.replace(template, names=tuple(f"{i}.jpg" for i in range(num_views)), **fields, **lists)
    scene.cam_from_world[:, 0, 3] += torch.arange(num_views) * 0.1
    xy = torch.rand(5000, 2, generator=generator) * torch.tensor([512.0, 384.0])
    found = Matches(xy, xy + torch.tensor([1.0, 0.0]), torch.ones(5000))
    matches = {Pair(scene.names[i], scene.names[j]): found for i, j in pairs}
    start = time.perf_counter()
    write_database(scene, matches, tmp_path / "d.db")
    with capsys.disabled():
        print(f"\n{num_pairs} pairs of 5,000 matches: {time.perf_counter() - start:.2f} s")
    database = pycolmap.Database.open(str(tmp_path / "d.db"))
    assert database.num_matches() == num_pairs * 5000
    database.close()
