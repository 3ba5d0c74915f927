"""The files are read here by the documented layout alone, as hloc reads them."""

import dataclasses

import h5py
import numpy as np
import pytest
import torch
from aligned import true_scene
from procedural import STORED_PER_NET, make_scene

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.hloc import write_hloc
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


def test_calibrated_geometries_of_these_files_triangulate_to_the_scene(folder, procedural, tmp_path):
    """What hloc's triangulation does: keypoints plus a half into a database, matches, known poses."""
    import pycolmap

    from dust3r_sfm.formats.colmap import colmap_from_scene

    model = colmap_from_scene(true_scene(procedural))
    database = pycolmap.Database.open(str(tmp_path / "database.db"))
    for camera in model.cameras.values():
        database.write_camera(camera, use_camera_id=True)
        database.write_rig(model.rigs[camera.camera_id], use_rig_id=True)
    for i, image in model.images.items():
        database.write_frame(model.frames[i], use_frame_id=True)
        database.write_image(pycolmap.Image(name=image.name, camera_id=i, image_id=i), use_image_id=True)
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
    found = pycolmap.triangulate_points(model, tmp_path / "database.db", tmp_path, tmp_path, options=options)
    assert found.num_points3D() > 500
    assert found.compute_mean_track_length() > 2.5
    assert found.compute_mean_reprojection_error() < 2


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
