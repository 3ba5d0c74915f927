import dataclasses
import logging
from typing import get_args

import numpy as np
import pycolmap
import pytest
import torch
from aligned import true_scene
from PIL import Image
from procedural import make_scene

from dust3r_sfm import export_scene
from dust3r_sfm.__main__ import main as command_line
from dust3r_sfm.alignment.tracks import build_tracks
from dust3r_sfm.errors import InputError, ReconstructionError
from dust3r_sfm.export_scene import ExportConfig, export_scenes, main
from dust3r_sfm.formats.colmap import read_colmap
from dust3r_sfm.formats.matches import write_matches
from dust3r_sfm.formats.scenes import write_scenes
from dust3r_sfm.match_dense import match_dense

SIZE = (48, 64)


@pytest.fixture(scope="module")
def procedural():
    return make_scene(3, SIZE, seed=3)


@pytest.fixture(scope="module")
def matches(procedural):
    return match_dense(procedural.views, procedural.predictions)


@pytest.fixture(scope="module")
def scene(procedural, matches):
    return build_tracks(true_scene(procedural), matches, procedural.views)


@pytest.fixture
def run(procedural, scene, matches, tmp_path):
    """The files of a run: photos at the network's size, an aligned scene, matches."""
    for view in procedural.views:
        path = tmp_path / "images" / view.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(view.image.numpy()).save(path.with_suffix(".png"))
    renamed = tuple(name.replace(".jpg", ".png") for name in scene.names)
    write_scenes(tmp_path / "scene.h5", [dataclasses.replace(scene, names=renamed, tracks=None)])
    pairs = {type(p)(*(n.replace(".jpg", ".png") for n in p)): found for p, found in matches.items()}
    write_matches(tmp_path / "matches.h5", pairs)
    return tmp_path


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_scene_becomes_a_model_and_a_cloud(scene, procedural, tmp_path):
    bare = dataclasses.replace(scene, tracks=None)
    names = [f"other/{name}" for name in scene.names]
    bare = dataclasses.replace(bare, names=tuple(names))
    views = [dataclasses.replace(v, name=name) for v, name in zip(procedural.views, names, strict=True)]
    export_scenes([scene, bare], [*procedural.views, *views], tmp_path, text=True)
    parts = ("cameras", "frames", "images", "points3D", "rigs")
    models = [f"sparse/{i}/{part}{suffix}" for i in (0, 1) for part in parts for suffix in (".bin", ".txt")]
    assert files_below(tmp_path) == sorted(["database.db", "points.ply", "points_1.ply", *models])
    assert read_colmap(tmp_path / "sparse" / "0").num_points3D() == len(scene.tracks.errors)
    assert read_colmap(tmp_path / "sparse" / "1").num_points3D() == 0


def test_models_that_an_earlier_run_left_are_removed_and_nothing_else(scene, procedural, tmp_path):
    export_scenes([scene] * 3, procedural.views, tmp_path)
    (tmp_path / "sparse" / "1" / "notes.txt").write_text("mine")
    export_scenes([scene], procedural.views, tmp_path)
    assert not (tmp_path / "sparse" / "2").exists()
    assert [path for path in files_below(tmp_path) if "0/" not in path] == [
        *("database.db", "points.ply", "sparse/1/notes.txt")
    ]


def test_a_model_without_points_is_told(scene, procedural, tmp_path, caplog):
    export_scenes([dataclasses.replace(scene, tracks=None)], procedural.views, tmp_path)
    assert "Model 0 has no points" in caplog.text


def test_no_scene_is_an_error(tmp_path):
    with pytest.raises(ReconstructionError, match="no scene to export"):
        export_scenes([], [], tmp_path)


def test_the_stage_makes_points_of_matches(run, scene, caplog):
    caplog.set_level(logging.INFO)
    main(run / "scene.h5", run / "images", run / "out", matches=run / "matches.h5")
    model = read_colmap(run / "out" / "sparse" / "0")
    assert model.num_points3D() == len(scene.tracks.errors)
    assert model.images[1].name == "photos/000.png"
    assert "1 models of 3 images and" in caplog.text
    cloud = (run / "out" / "points.ply").read_bytes()
    assert cloud.count(b"\n", 0, 200) >= 9
    assert f"element vertex {3 * SIZE[0] * SIZE[1]}".encode() in cloud


def test_photos_of_another_size_are_refused(run):
    path = run / "images" / "photos" / "001.png"
    Image.fromarray(np.zeros((64, 48, 3), dtype=np.uint8)).save(path)
    with pytest.raises(InputError, match=r"001\.png in .* is \(64, 48\) pixels"):
        main(run / "scene.h5", run / "images", run / "out")


def test_blanks_in_names_stop_a_text_export_before_it_starts(run, scene):
    spaced = dataclasses.replace(scene, names=("a b.png", "c.png", "d.png"))
    write_scenes(run / "scene.h5", [spaced])
    with pytest.raises(InputError, match="blanks"):
        main(run / "scene.h5", run / "images", run / "out", text=True)
    assert not (run / "out").exists()


def test_square_scenes_find_their_views(tmp_path):
    procedural = make_scene(2, (64, 64), seed=1, pairs=[(0, 1)])
    scene = true_scene(procedural)
    for view in procedural.views:
        path = tmp_path / "images" / view.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(view.image.numpy()).save(path, quality=95)
    write_scenes(tmp_path / "scene.h5", [scene])
    main(tmp_path / "scene.h5", tmp_path / "images", tmp_path / "out")
    model = read_colmap(tmp_path / "out" / "sparse" / "0")
    assert torch.allclose(torch.tensor(model.images[2].cam_from_world().matrix()).float(), scene.cam_from_world[1, :3])


EVERY_FORMAT = get_args(export_scene.Format)


def test_every_format_is_written_from_the_command_line_and_reads_the_same_model(run, scene):
    mask = np.full((48, 64), 255, dtype=np.uint8)
    mask[:, :8] = 0
    (run / "masks" / "photos").mkdir(parents=True)
    Image.fromarray(mask).save(run / "masks" / "photos" / "000.png.png")
    paths = {"scene": run / "scene.h5", "image_dir": run / "images", "output": run / "out"}
    paths |= {"matches": run / "matches.h5", "masks": run / "masks"}
    options = [f"--{name}={path}" for name, path in paths.items()]
    pytest.importorskip("trimesh")
    assert command_line(["export-scene", *options, "--formats", *EVERY_FORMAT, "--downscale", "2"]) == 0
    files = files_below(run / "out")
    names = ["000", "001", "002"]
    assert set(files) >= {
        *("sparse/0/cameras.bin", "database.db", "points.ply", "scene.glb", "scene.html", "dense/sparse/cameras.bin"),
        *("dense/stereo/fusion.cfg", "depths/units.json", "nerfstudio/transforms.json", "nerfstudio/sparse_pc.ply"),
        *("gsplat/sparse/0/points3D.bin", "hloc/pairs.txt", "hloc/feats.h5", "hloc/matches.h5"),
        *(f"dense/images/photos/{n}.png" for n in names),
        *(f"dense/stereo/depth_maps/photos/{n}.png.geometric.bin" for n in names),
        *(f"depths/{part}/photos/{n}.png.npy" for n in names for part in ("depth", "confidence")),
        *(f"{tool}/{part}/photos__{n}.png" for n in names for tool in ("gsplat", "nerfstudio") for part in IMAGES),
        "masks/photos/000.png.png",
    }
    models = [read_colmap(run / "out" / part) for part in ("sparse/0", "dense/sparse", "gsplat/sparse/0")]
    assert {model.num_points3D() for model in models} == {len(scene.tracks.errors)}
    depth = np.load(run / "out" / "depths" / "depth" / "photos" / "000.png.npy")
    assert (depth[:, :8] == 0).all()
    assert (depth[:, 8:] > 0).all()


IMAGES = ("images", "images_2")


def test_formats_that_are_not_asked_for_are_not_written(scene, procedural, tmp_path):
    export_scenes([scene], procedural.views, tmp_path, config=ExportConfig(formats=("depths",)))
    assert {path.split("/")[0] for path in files_below(tmp_path)} == {"depths"}


def test_model_and_database_have_the_same_keypoints(scene, matches, procedural, tmp_path):
    export_scenes([scene], procedural.views, tmp_path, matches=matches)
    model = read_colmap(tmp_path / "sparse" / "0")
    database = pycolmap.Database.open(str(tmp_path / "database.db"))
    for image_id, image in model.images.items():
        assert database.num_keypoints_for_image(image_id) == len(image.points2D)
    assert model.num_points3D() == len(scene.tracks.errors)
    database.close()


def test_folders_of_others_are_left_alone_and_those_of_earlier_runs_replaced(scene, procedural, tmp_path):
    config = ExportConfig(formats=("depths",))
    names = [f"other/{name}" for name in scene.names]
    views = [dataclasses.replace(v, name=name) for v, name in zip(procedural.views, names, strict=True)]
    other = dataclasses.replace(scene, names=tuple(names))
    export_scenes([scene, other], [*procedural.views, *views], tmp_path, config=config)
    assert (tmp_path / "depths_1" / "units.json").is_file()
    export_scenes([scene], procedural.views, tmp_path, config=config)
    assert not (tmp_path / "depths_1").exists()
    (tmp_path / "theirs" / "depths").mkdir(parents=True)
    (tmp_path / "theirs" / "depths" / "a.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="depths exists and was not made here"):
        export_scenes([scene], procedural.views, tmp_path / "theirs", config=config)
    assert (tmp_path / "theirs" / "depths" / "a.png").read_bytes() == b"mine"


def test_an_image_of_two_models_is_in_the_database_once(scene, procedural, tmp_path, caplog):
    export_scenes([scene, scene], procedural.views, tmp_path)
    assert "shares some with another" in caplog.text
    database = pycolmap.Database.open(str(tmp_path / "database.db"))
    assert database.num_images() == 3
    database.close()


def test_names_that_a_format_cannot_hold_are_refused_before_anything_is_written(scene, procedural, matches, tmp_path):
    spaced = dataclasses.replace(scene, names=("a b.png", "c.png", "d.png"))
    with pytest.raises(InputError, match="'a b.png'"):
        export_scenes(
            [spaced], procedural.views, tmp_path, config=ExportConfig(formats=("ply", "hloc")), matches=matches
        )
    assert not files_below(tmp_path)


def test_photos_are_made_smaller_not_larger_and_told_before_anything_is_written(scene, procedural, tmp_path):
    with pytest.raises(InputError, match="downscale is 2 0: expected factors of 1 or more"):
        export_scenes([scene], procedural.views, tmp_path / "out", config=ExportConfig(downscale=(2, 0)))
    assert not (tmp_path / "out").exists()


def test_hloc_s_files_need_matches(scene, procedural, tmp_path):
    with pytest.raises(InputError, match="give --matches, what match_dense or reconstruct wrote"):
        export_scenes([scene], procedural.views, tmp_path, config=ExportConfig(formats=("hloc",)))
