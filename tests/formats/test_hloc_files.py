"""The files are read here by the documented layout alone, as hloc reads them."""

import dataclasses

import h5py
import numpy as np
import pycolmap
import pytest
import torch
from aligned import true_scene
from procedural import STORED_PER_NET, make_scene

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.formats.hloc import add_queries, list_references, pair_key, write_hloc
from dust3r_sfm.match_dense import match_dense
from dust3r_sfm.pairs import Matches, Pair


@pytest.fixture(scope="module")
def procedural():
    return make_scene(4, (72, 96), seed=3)


@pytest.fixture(scope="module")
def matches(procedural):
    return match_dense(procedural.views, procedural.predictions)


@pytest.fixture(scope="module")
def folder(procedural, matches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hloc")
    write_hloc(procedural.views, matches, folder)
    return folder


def read_keypoints(path, name):
    with h5py.File(str(path), "r", libver="latest") as file:
        return file[name]["keypoints"].__array__(), file[name]["keypoints"].attrs.get("uncertainty")


def read_pair(path, name0, name1):
    """Matches (m 2) and scores, in the order asked for, whichever was stored."""
    with h5py.File(str(path), "r", libver="latest") as file:
        key, turned = "/".join(n.replace("/", "-") for n in (name0, name1)), False
        if key not in file:
            key, turned = "/".join(n.replace("/", "-") for n in (name1, name0)), True
        matches0, scores = file[key]["matches0"].__array__(), file[key]["matching_scores0"].__array__()
    index = np.where(matches0 != -1)[0]
    matched = np.stack([index, matches0[index]], axis=-1)
    return np.flip(matched, -1) if turned else matched, scores[index]


def test_types_and_names_are_hloc_s(folder, procedural):
    with h5py.File(folder / "feats.h5") as file:
        for view in procedural.views:
            group = file[view.name]
            assert group["keypoints"].dtype == np.float32
            assert group["keypoints"].shape == (*group["scores"].shape, 2) == (*group["score"].shape, 2)
            assert group["image_size"].dtype == np.int64
            assert tuple(group["image_size"][:]) == view.original_size
    lines = (folder / "pairs.txt").read_text().split("\n")
    with h5py.File(folder / "matches.h5") as file:
        assert list(file) == ["photos-000.jpg", "photos-001.jpg", "photos-002.jpg"]
        for line in lines:
            group = file["/".join(name.replace("/", "-") for name in line.split())]
            assert (group["matches0"].dtype, group["matching_scores0"].dtype) == (np.int32, np.float16)
            assert group["keypoints0"].shape == group["keypoints1"].shape == (*group["scores"].shape, 2)
            assert {group[f].dtype for f in ("keypoints0", "keypoints1", "scores")} == {np.dtype(np.float32)}
    assert len(lines) == 6


def test_a_keypoint_of_hloc_is_a_pixel_counted_from_the_first_ones_centre(procedural, tmp_path):
    """The first network pixel's centre is the corner between the first four pixels of the stored file: 0.5 in hloc."""
    a, b = procedural.views[:2]
    found = Matches(torch.tensor([[0.5, 0.5], [20.25, 30.0]]), torch.tensor([[10.0, 2.5], [4.0, 4.0]]), torch.ones(2))
    write_hloc([a, b], {Pair(a.name, b.name): found}, tmp_path)
    keypoints, uncertainty = read_keypoints(tmp_path / "feats.h5", a.name)
    assert STORED_PER_NET == uncertainty == 2
    np.testing.assert_allclose(sorted(keypoints.tolist()), [[0.5, 0.5], [40.0, 59.5]], atol=1e-5)


def test_matches_join_pixels_of_one_point_in_both_directions(folder, procedural):
    for i, j in ((0, 1), (3, 1)):
        names = procedural.names[i], procedural.names[j]
        (keypoints0, _), (keypoints1, _) = (read_keypoints(folder / "feats.h5", name) for name in names)
        index, scores = read_pair(folder / "matches.h5", *names)
        assert len(index) > 200
        assert (scores > 0).all()
        assert len(np.unique(index[:, 0])) == len(np.unique(index[:, 1])) == len(index)
        xy0, xy1 = keypoints0[index[:, 0]] + 0.5, keypoints1[index[:, 1]] + 0.5  # corner origin, stored pixels
        column, row = (xy0 / STORED_PER_NET).astype(int).T
        points = procedural.points_in_world[i][row, column] @ procedural.cam_from_world[j, :3, :3].T
        pixels = ((points + procedural.cam_from_world[j, :3, 3]) @ procedural.K[j].T).numpy()
        error = np.linalg.norm(pixels[:, :2] / pixels[:, 2:] * STORED_PER_NET - xy1, axis=-1)
        assert np.median(error) < STORED_PER_NET


def test_gathered_keypoints_are_few_and_make_tracks_through_many_images(folder, procedural, matches):
    num_ends = dict.fromkeys(procedural.names, 0)
    for pair, found in matches.items():
        for name in pair:
            num_ends[name] += len(found.scores)
    parents = {}

    def root(node):
        while parents.setdefault(node, node) != node:
            node = parents[node]
        return node

    for name in procedural.names:
        keypoints, _ = read_keypoints(folder / "feats.h5", name)
        assert len(keypoints) < 0.7 * num_ends[name]
        assert len(np.unique(keypoints, axis=0)) == len(keypoints)
    for pair in matches:
        for i, j in read_pair(folder / "matches.h5", *pair)[0].tolist():
            parents[root((pair.name0, i))] = root((pair.name1, j))
    tracks = {}
    for node in list(parents):
        tracks.setdefault(root(node), set()).add(node[0])
    lengths = np.array([len(images) for images in tracks.values()])
    assert (lengths > 2).mean() > 0.3
    assert (lengths == 4).sum() > 100


def hloc_s_triangulation(model, folder, work):
    """Keypoints plus a half into a database, matches, known poses: of the images of a model, in hloc's order."""
    database = pycolmap.Database.open(str(work / "database.db"))
    for camera in model.cameras.values():
        database.write_camera(camera, use_camera_id=True)
        database.write_rig(model.rigs[camera.camera_id], use_rig_id=True)
    for i, image in model.images.items():
        database.write_frame(model.frames[i], use_frame_id=True)
        bare = pycolmap.Image(name=image.name, camera_id=image.camera_id, image_id=i)
        database.write_image(bare, use_image_id=True)
        database.write_keypoints(i, read_keypoints(folder / "feats.h5", image.name)[0] + 0.5)
    ids = {image.name: i for i, image in model.images.items()}
    for line in (folder / "pairs.txt").read_text().split("\n"):
        index, _ = read_pair(folder / "matches.h5", *line.split())
        geometry = pycolmap.TwoViewGeometry(
            config=pycolmap.TwoViewGeometryConfiguration.CALIBRATED, inlier_matches=index.astype(np.uint32)
        )
        image_ids = [ids[name] for name in line.split()]
        database.write_matches(*image_ids, index.astype(np.uint32))
        database.write_two_view_geometry(*image_ids, geometry)
    database.close()
    pycolmap.logging.minloglevel = 2
    options = pycolmap.IncrementalPipelineOptions({"extract_colors": False})
    return pycolmap.triangulate_points(model, work / "database.db", work, work, options=options)


def test_calibrated_geometries_of_these_files_triangulate_to_the_scene(folder, procedural, tmp_path):
    found = hloc_s_triangulation(colmap_from_scene(true_scene(procedural)), folder, tmp_path)
    assert found.num_points3D() > 500
    assert found.compute_mean_track_length() > 2.5
    assert found.compute_mean_reprojection_error() < 2


def hloc_s_localisation(model, folder, query, images, camera):
    """Pixels of a query that match points of a model, as hloc's localize_sfm gathers them, and the pose that fits."""
    keypoints, found = read_keypoints(folder / "feats.h5", query)[0] + 0.5, {}
    by_name = {image.name: image for image in model.images.values()}
    for name in images:
        ids = np.array([p.point3D_id if p.has_point3D() else -1 for p in by_name[name].points2D])
        index, _ = read_pair(folder / "matches.h5", query, name)
        found |= {(i, ids[j]): None for i, j in index.tolist() if ids[j] != -1}
    pixels = np.array([keypoints[i] for i, _ in found])
    points = np.array([model.points3D[point].xyz for _, point in found])
    options = pycolmap.AbsolutePoseEstimationOptions({"ransac": {"max_error": 12.0, "random_seed": 0}})
    answer = pycolmap.estimate_and_refine_absolute_pose(pixels, points, camera, estimation_options=options)
    return answer["cam_from_world"].matrix(), answer["num_inliers"], len(found)


@pytest.fixture
def with_query(procedural, matches, tmp_path):
    """hloc's files of all photos but the third, a model made of them, and the third and its matches with the others."""
    query, *others = [procedural.views[i] for i in (2, 0, 1, 3)]
    write_hloc(others, matches, tmp_path)
    names = [view.name for view in others]
    tensors = {f: getattr(procedural, f)[[0, 1, 3]] for f in ("K", "cam_from_world")}
    lists = {f: [getattr(procedural, f)[i] for i in (0, 1, 3)] for f in ("depth", "points_in_world")}
    known = colmap_from_scene(true_scene(dataclasses.replace(procedural, views=others, **tensors, **lists)))
    model = hloc_s_triangulation(known, tmp_path, tmp_path)
    found = {Pair(query.name, name): None for name in names}
    for pair, m in matches.items():
        if query.name in pair:
            turned = Matches(m.keypoints1, m.keypoints0, m.scores)
            found[pair if pair.name0 == query.name else pair.reversed()] = m if pair.name0 == query.name else turned
    return query, others, model, found


def test_a_query_added_to_these_files_is_where_hloc_s_localisation_finds_it(procedural, with_query, tmp_path):
    query, others, model, found = with_query
    before = {name: (tmp_path / name).stat().st_size for name in ("feats.h5", "matches.h5")}
    keypoints = read_keypoints(tmp_path / "feats.h5", others[0].name)[0]
    counts = add_queries([query], others, found, tmp_path)
    again = add_queries([query], others, found, tmp_path)
    assert counts == again
    np.testing.assert_array_equal(read_keypoints(tmp_path / "feats.h5", others[0].name)[0], keypoints)
    assert list_references(tmp_path / "feats.h5") == [view.name for view in others]
    assert all((tmp_path / name).stat().st_size > size for name, size in before.items())
    camera = pycolmap.Camera(model="PINHOLE", width=1, height=1, params=[1, 1, 0, 0])
    camera.width, camera.height = query.original_size
    K = STORED_PER_NET * procedural.K[2].double().numpy()
    camera.params = [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]
    pose, inliers, gathered = hloc_s_localisation(model, tmp_path, query.name, [v.name for v in others], camera)
    truth = procedural.cam_from_world[2].double().numpy()
    assert inliers > max(200, 0.8 * gathered)
    np.testing.assert_allclose(pose[:, :3], truth[:3, :3], atol=0.01)
    np.testing.assert_allclose(pose[:, 3], truth[:3, 3], atol=0.03)


def test_a_query_that_is_one_of_the_images_is_refused_and_nothing_changes(with_query, tmp_path):
    query, others, _, found = with_query
    before = [(tmp_path / name).read_bytes() for name in ("feats.h5", "matches.h5")]
    taken = dataclasses.replace(query, name=others[1].name)
    with pytest.raises(InputError, match="is one of the reference's images"):
        add_queries([taken], others[:1], {Pair(taken.name, others[0].name): next(iter(found.values()))}, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("feats.h5", "matches.h5")] == before


def test_a_query_that_is_added_anew_keeps_no_pair_of_before(with_query, tmp_path):
    query, others, _, found = with_query
    add_queries([query], others, found, tmp_path)
    *left, kept = found
    add_queries([query], others, {kept: found[kept]}, tmp_path)
    with h5py.File(tmp_path / "matches.h5") as file:
        assert pair_key(kept) in file
        assert not any(pair_key(pair) in file for pair in left)


def test_a_query_whose_pairs_would_lie_where_another_images_do_is_refused(procedural, tmp_path):
    names = ("a-b.jpg", "c.jpg", "a/b.jpg")
    *views, query = [dataclasses.replace(v, name=n) for v, n in zip(procedural.views, names, strict=False)]
    xy = torch.full((1, 2), 5.0)
    write_hloc(views, {Pair("a-b.jpg", "c.jpg"): Matches(xy, xy, torch.ones(1))}, tmp_path)
    before = (tmp_path / "matches.h5").read_bytes()
    with pytest.raises(InputError, match="cannot tell the images a-b.jpg and a/b.jpg apart"):
        add_queries([query], views[1:], {Pair("a/b.jpg", "c.jpg"): Matches(xy, xy, torch.ones(1))}, tmp_path)
    assert (tmp_path / "matches.h5").read_bytes() == before


def test_files_that_are_none_of_hloc_s_are_one_sentence(with_query, tmp_path):
    query, others, _, found = with_query
    (tmp_path / "matches.h5").write_text("no HDF5")
    with pytest.raises(InputError, match="matches.h5 cannot be read as hloc's matches"):
        add_queries([query], others, found, tmp_path)
    with pytest.raises(InputError, match="matches.h5 cannot be read as hloc's features"):
        list_references(tmp_path / "matches.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["points"] = np.zeros((3, 3))
    with pytest.raises(InputError, match="has no keypoints of any image"):
        list_references(tmp_path / "other.h5")


def test_names_that_hloc_cannot_hold_are_refused(procedural, tmp_path):
    views = [
        dataclasses.replace(view, name=name)
        for view, name in zip(procedural.views, ("a/b.jpg", "a-b.jpg", "c.jpg", "d e.jpg"), strict=True)
    ]
    xy = torch.ones(1, 2)
    found = Matches(xy, xy, torch.ones(1))
    with pytest.raises(InputError, match="cannot tell the pairs"):
        write_hloc(views[:3], {Pair("a/b.jpg", "c.jpg"): found, Pair("a-b.jpg", "c.jpg"): found}, tmp_path)
    with pytest.raises(InputError, match="'d e.jpg'"):
        write_hloc(views, {Pair("c.jpg", "d e.jpg"): found}, tmp_path)
    assert not list(tmp_path.iterdir())
