import dataclasses
import json
import struct

import numpy as np
import pytest
import torch
from aligned import true_scene
from PIL import Image
from procedural import STORED_PER_NET, make_scene

from dust3r_sfm.alignment.tracks import build_tracks
from dust3r_sfm.formats.colmap import read_colmap
from dust3r_sfm.formats.glb import write_glb
from dust3r_sfm.formats.images import copy_images, flat_names
from dust3r_sfm.formats.nerfstudio import write_gsplat, write_nerfstudio
from dust3r_sfm.match_dense import match_dense

NUM_VIEWS = 3
SIZE = (48, 64)


@pytest.fixture(scope="module")
def procedural():
    return make_scene(NUM_VIEWS, SIZE, seed=3, vary_focal=True)


@pytest.fixture(scope="module")
def scene(procedural):
    matches = match_dense(procedural.views, procedural.predictions)
    return build_tracks(true_scene(procedural), matches, procedural.views)


@pytest.fixture(scope="module")
def image_dir(procedural, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "photos").mkdir()
    for view in procedural.views:
        Image.fromarray(view.image.numpy()).resize(view.original_size, 0).save(folder / view.name)
    return folder


@pytest.fixture(scope="module")
def folder(scene, procedural, image_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nerfstudio")
    mask = torch.ones(SIZE, dtype=torch.bool)
    mask[:, :10] = False
    views = [dataclasses.replace(procedural.views[0], mask=mask), *procedural.views[1:]]
    write_nerfstudio(scene, views, image_dir, folder, downscale=(2,))
    return folder


def read_ply(path):
    header, data = path.read_bytes().split(b"end_header\n", 1)
    count = int(header.split(b"element vertex ")[1].split()[0])
    rows = np.frombuffer(data, dtype=np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))
    assert len(rows) == count
    return rows["xyz"], rows["rgb"]


def size_of(path):
    with Image.open(path) as image:
        return image.size


def project_by_documented_rules(frame, points):
    """nerfstudio's: camera to world with x right, y up, z back; pixels from the image's corner."""
    in_cam = (points - np.array(frame["transform_matrix"])[:3, 3]) @ np.array(frame["transform_matrix"])[:3, :3]
    x, y, z = in_cam.T
    return np.stack([frame["cx"] + frame["fl_x"] * x / -z, frame["cy"] - frame["fl_y"] * y / -z], axis=-1), -z


def test_pixels_project_where_they_are_by_the_written_file_alone(folder, procedural):
    content = json.loads((folder / "transforms.json").read_text())
    applied = np.array(content["applied_transform"])
    assert applied.shape == (3, 4)
    assert np.linalg.det(applied[:, :3]) == pytest.approx(1)
    for i, frame in enumerate(content["frames"]):
        assert frame["colmap_im_id"] == i + 1
        points = procedural.points_in_world[i].numpy()[::7, ::5].reshape(-1, 3) @ applied[:, :3].T + applied[:, 3]
        rows, columns = np.meshgrid(np.arange(0, SIZE[0], 7), np.arange(0, SIZE[1], 5), indexing="ij")
        expected = STORED_PER_NET * (np.stack([columns, rows], axis=-1).reshape(-1, 2) + 0.5)
        pixels, depth = project_by_documented_rules(frame, points)
        np.testing.assert_allclose(pixels, expected, atol=0.01)
        assert (frame["w"], frame["h"]) == procedural.views[i].original_size
        assert [frame[k] for k in ("k1", "k2", "p1", "p2")] == [0] * 4
        stored = 1e-3 * np.load(folder / frame["depth_file_path"])[::7, ::5].reshape(-1)
        np.testing.assert_allclose(stored[stored > 0], depth[stored > 0], rtol=1e-4)
        assert (stored > 0).mean() > 0.8


def test_up_is_up(folder, procedural):
    """The procedural world's y points down; nerfstudio's z up."""
    content = json.loads((folder / "transforms.json").read_text())
    heights = [frame["transform_matrix"][2][3] for frame in content["frames"]]
    np.testing.assert_allclose(heights, -procedural.centers[:, 1], atol=1e-5)


def test_the_cloud_to_start_from_lies_in_the_turned_world(folder, procedural):
    content = json.loads((folder / "transforms.json").read_text())
    points, colors = read_ply(folder / content["ply_file_path"])
    for i, frame in enumerate(content["frames"]):
        image = np.asarray(Image.open(folder / frame["file_path"]).convert("RGB"))
        pixels, depth = project_by_documented_rules(frame, points)
        inside = (depth > 0) & (pixels > 0).all(axis=1) & (pixels < [frame["w"], frame["h"]]).all(axis=1)
        column, row = pixels[inside].astype(int).T
        error = np.abs(image[row, column].astype(int) - colors[inside]).mean(axis=1)
        assert np.median(error) < 25
        assert i < NUM_VIEWS


def test_every_frame_has_its_files_and_smaller_copies(folder):
    content = json.loads((folder / "transforms.json").read_text())
    names = [frame["file_path"] for frame in content["frames"]]
    assert names == [f"images/photos__00{i}.jpg" for i in range(NUM_VIEWS)]
    for frame in content["frames"]:
        for field, small in (("file_path", "images_2"), ("mask_path", "masks_2"), ("depth_file_path", "depths_2")):
            assert (folder / frame[field]).is_file()
            assert (folder / small / frame[field].split("/")[-1]).is_file()
        sizes = [size_of(folder / path) for path in (frame["file_path"], frame["mask_path"])]
        small_sizes = [
            size_of(folder / f"{part}_2" / frame[field].split("/")[-1])
            for part, field in (("images", "file_path"), ("masks", "mask_path"))
        ]
        assert sizes == [(frame["w"], frame["h"])] * 2
        assert small_sizes == [(frame["w"] // 2, frame["h"] // 2)] * 2
    masks = [np.asarray(Image.open(folder / frame["mask_path"])) for frame in content["frames"]]
    assert (masks[0][:, :20] == 0).all()
    assert (masks[0][:, 20:] == 255).all()
    assert (masks[1] == 255).all()


def test_without_masks_no_frame_names_one(scene, procedural, image_dir, tmp_path):
    write_nerfstudio(scene, procedural.views, image_dir, tmp_path)
    assert "mask_path" not in (tmp_path / "transforms.json").read_text()
    assert not (tmp_path / "masks").exists()


def test_splatting_folders_pair_images_and_model_by_sorted_names(scene, image_dir, procedural, tmp_path):
    """As gsplat's reader does: sorted files of images_2 are zipped with those of images, sizes give the scale."""
    write_gsplat(scene, image_dir, tmp_path, downscale=(2,))
    model = read_colmap(tmp_path / "sparse" / "0")
    files, small = (
        sorted(p.name for p in (tmp_path / part).rglob("*") if p.is_file()) for part in ("images", "images_2")
    )
    assert files == small == sorted(image.name for image in model.images.values())
    assert {camera.model.name for camera in model.cameras.values()} <= {"SIMPLE_PINHOLE", "PINHOLE"}
    assert model.num_points3D() > 100
    image = model.images[1]
    point = procedural.points_in_world[0][20, 30].double().numpy()
    scale = size_of(tmp_path / "images_2" / image.name)[0] / image.camera.width
    np.testing.assert_allclose(scale * image.project_point(point), [30.5, 20.5], atol=1e-2)


def test_a_second_export_leaves_no_stray_image_and_keeps_copies(scene, image_dir, tmp_path):
    write_gsplat(scene, image_dir, tmp_path)
    before = (tmp_path / "images" / "photos__000.jpg").stat().st_ino
    (tmp_path / "images" / "photos__099.jpg").write_bytes(b"of an earlier scene")
    write_gsplat(scene, image_dir, tmp_path)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        f"photos__00{i}.jpg" for i in range(NUM_VIEWS)
    ]
    assert (tmp_path / "images" / "photos__000.jpg").stat().st_ino == before


def test_flat_names_are_different_even_without_suffix_or_case():
    names = ["a/b.jpg", "a__b.jpg", "a/b.png", "A__B.jpg", "c.HEIC", "c/d/e.jpg"]
    flat = flat_names(names)
    assert list(flat) == names
    stems = [name.rsplit(".", 1)[0].lower() for name in flat.values()]
    assert len(set(stems)) == len(names)
    assert not any("/" in name for name in flat.values())
    assert flat["a__b.jpg"] == "a__b.jpg" or flat["A__B.jpg"] == "A__B.jpg"
    assert flat["c.HEIC"] == "c.png"
    assert flat["c/d/e.jpg"] == "c__d__e.jpg"


def test_photos_are_copied_bit_for_bit(image_dir, tmp_path):
    copy_images({"photos/000.jpg": "x.jpg"}, image_dir, tmp_path / "to")
    assert (tmp_path / "to" / "x.jpg").read_bytes() == (image_dir / "photos" / "000.jpg").read_bytes()


def test_glb_holds_the_cloud_and_the_cameras_with_y_up(scene, procedural, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    points = procedural.points_in_world[0].reshape(-1, 3)
    colors = procedural.views[0].image.reshape(-1, 3)
    write_glb(tmp_path / "scene.glb", scene, points, colors)
    data = (tmp_path / "scene.glb").read_bytes()
    assert struct.unpack("<4sII", data[:12]) == (b"glTF", 2, len(data))
    loaded = trimesh.load(tmp_path / "scene.glb", force="scene")
    cloud = next(g for g in loaded.geometry.values() if isinstance(g, trimesh.PointCloud))
    flipped = loaded.dump(concatenate=False)
    vertices = next(np.asarray(g.vertices) for g in flipped if isinstance(g, trimesh.PointCloud))
    np.testing.assert_allclose(vertices, points.numpy() * [1, -1, -1], atol=1e-4)
    np.testing.assert_array_equal(cloud.colors[:, :3], colors)
    lines = [np.asarray(g.vertices) for g in flipped if isinstance(g, trimesh.path.Path3D)]
    corners = np.concatenate(lines)
    nearest = np.linalg.norm(corners[:, None] - procedural.centers.numpy() * [1, -1, -1], axis=-1)
    assert (nearest.min(axis=0) < 1e-4).all()
