"""Poses against reference poses, on models whose errors are known."""

import itertools
import json
import math

import numpy as np
import pycolmap
import pytest
import torch
from aligned import true_scene
from PIL import Image
from procedural import make_scene

from dust3r_sfm.colmap_versions import add_camera, add_image
from dust3r_sfm.errors import InputError
from dust3r_sfm.evaluate import evaluate_model, evaluate_poses, main, markdown_table, pose_table, read_model
from dust3r_sfm.formats.scenes import write_scenes


@pytest.fixture(scope="module")
def truth():
    scene = make_scene(6, size=(16, 16), seed=1, pairs=[])
    return dict(zip(scene.names, scene.cam_from_world.double(), strict=True))


def turned(pose, deg):
    """A camera that looks past where it should, turned about its own y axis, its centre unmoved."""
    c, s = math.cos(math.radians(deg)), math.sin(math.radians(deg))
    turn = torch.tensor([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]], dtype=torch.float64)
    return turn @ pose


def moved_world(poses, scale=3.0):
    """The same cameras in another world frame and unit, as a reconstruction has them."""
    rotation = torch.linalg.qr(torch.randn((3, 3), generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    rotation = rotation * torch.det(rotation)
    moved = {}
    for name, pose in poses.items():
        moved[name] = pose.clone()
        moved[name][:3, :3] = pose[:3, :3] @ rotation
        moved[name][:3, 3] = scale * (pose[:3, 3] + pose[:3, :3] @ torch.tensor([1.0, 2, 3], dtype=torch.float64))
    return moved


def write_model(folder, poses):
    folder.mkdir(parents=True)
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera(camera_id=1, model="SIMPLE_PINHOLE", width=32, height=32, params=[30, 16, 16])
    add_camera(model, camera)
    for i, (name, pose) in enumerate(poses.items(), start=1):
        image = pycolmap.Image(name=name, camera_id=1, image_id=i)
        add_image(model, image, pycolmap.Rigid3d(pose[:3].numpy()))
    model.write(folder)
    return folder


def write_cameras_json(folder, poses):
    folder.mkdir(parents=True)
    frames = [
        {"image": f"images/{name}", "width": 32, "height": 32, "cam_from_world": pose.tolist()}
        for name, pose in poses.items()
    ]
    (folder / "cameras.json").write_text(json.dumps({"frames": frames}))
    return folder


def test_a_perfect_model_in_another_world_frame_scores_100(truth):
    report = evaluate_poses(moved_world(truth), truth)
    assert report.num_registered == report.num_images == 6
    assert report.num_pairs == 15
    assert set(report.rra.values()) == set(report.rta.values()) == {1.0}
    assert min(report.auc.values()) > 0.9999


def test_swapped_or_mirrored_conventions_fail(truth):
    inverted = {name: torch.linalg.inv(pose) for name, pose in truth.items()}
    opengl = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
    axes = {name: opengl @ pose for name, pose in truth.items()}
    mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))
    mirrored = {name: mirror @ pose @ mirror for name, pose in truth.items()}
    for wrong in (inverted, axes, mirrored):
        report = evaluate_poses(wrong, truth)
        assert min(report.rra[15], report.rta[15]) < 0.5
        assert report.auc[5] < 0.2


@pytest.mark.parametrize(("deg", "rra"), [(4.0, {5: 1.0, 15: 1.0}), (10.0, {5: 10 / 15, 15: 1.0})])
def test_one_camera_turned_by_a_known_angle_gives_the_known_accuracy(truth, deg, rra):
    estimated = dict(truth)
    last = max(truth)
    estimated[last] = turned(truth[last], deg)
    report = evaluate_poses(estimated, truth)
    assert report.rra == pytest.approx(rra)
    # The last camera is camera 1 of its 5 pairs, and its translations turn with it; the other 10 pairs are exact.
    assert report.auc[30] == pytest.approx((10 + 5 * (1 - deg / 30) + 0.5 * deg / 30) / 15, abs=0.02)


def test_images_that_are_not_registered_fail_all_their_pairs(truth):
    names = sorted(truth)
    report = evaluate_poses({name: truth[name] for name in names[:4]}, truth)
    assert report.num_registered == 4
    assert report.unregistered == tuple(names[4:])
    assert report.rra[15] == report.rta[15] == pytest.approx(6 / 15)
    assert report.auc[30] == pytest.approx(6 / 15, abs=1e-4)
    assert report.median_rotation_deg == math.inf
    assert report.to_dict()["median_rotation_deg"] is None


def test_images_that_the_reference_lacks_count_for_nothing(truth):
    names = sorted(truth)
    report = evaluate_poses(truth, {name: truth[name] for name in names[:3]})
    assert (report.num_registered, report.num_images, report.num_pairs) == (3, 3, 3)


def test_the_largest_of_several_models_counts(truth, tmp_path):
    names = sorted(truth)
    write_model(tmp_path / "0", {name: truth[name] for name in names[:2]})
    write_model(tmp_path / "1", {name: truth[name] for name in names[2:]})
    write_model(tmp_path / "10", {name: truth[name] for name in names[1:5]})
    poses = read_model(tmp_path)
    assert sorted(poses) == names[2:]
    for name in names[2:]:
        assert torch.allclose(poses[name], truth[name], atol=1e-6)


def test_a_model_is_compared_with_a_scene_folder_a_json_file_and_a_model(truth, tmp_path):
    model = write_model(tmp_path / "out/sparse/0", moved_world(truth)).parent
    scene = write_cameras_json(tmp_path / "castle", truth)
    for reference in (scene, scene / "cameras.json", write_model(tmp_path / "castle/sparse/0", truth)):
        report = evaluate_model(model, reference)
        assert report.scene == "castle"
        assert report.num_registered == 6
        assert report.auc[1] > 0.99


def test_a_folder_without_a_model_has_registered_nothing(truth, tmp_path):
    (tmp_path / "sparse").mkdir()
    report = evaluate_model(tmp_path / "sparse", write_cameras_json(tmp_path / "castle", truth))
    assert report.num_registered == 0
    assert report.auc[30] == 0


def test_several_scenes_make_one_table_and_one_file(truth, tmp_path, capsys):
    scenes = [write_cameras_json(tmp_path / name, truth) for name in ("castle", "door")]
    models = [write_model(tmp_path / "full", truth), write_model(tmp_path / "part", dict(list(truth.items())[:4]))]
    main(tuple(models), tuple(scenes), tmp_path / "figures.json")
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells[2:]] == [["castle", "6/6"], ["door", "4/6"], ["mean", ""]]
    assert dict(zip(cells[0], cells[3], strict=True))["RRA@15"] == "40.0"
    assert dict(zip(cells[0], cells[4], strict=True))["RRA@15"] == "70.0"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [figure["num_registered"] for figure in figures] == [6, 4]


def test_a_run_is_compared_before_and_after_refinement_and_with_colmap(truth, tmp_path, capsys):
    """The photos show nothing, so COLMAP finds no model of them; images without a photo there do not count."""
    aligned = make_scene(6, size=(16, 16), seed=1, pairs=[])
    reference = write_cameras_json(tmp_path / "castle", truth)
    names = sorted(truth)[:4]
    for name in names:
        path = tmp_path / "some" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(path)
    write_model(
        tmp_path / "out/sparse/0", {name: turned(pose, 2.0 * (name == names[0])) for name, pose in truth.items()}
    )
    write_scenes(tmp_path / "out/aligned.h5", [true_scene(aligned)])
    main((tmp_path / "out",), (reference,), image_dir=(tmp_path / "some",), with_colmap=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    found = {row[1]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert {row["scene"] for row in found.values()} == {"some"}
    assert [found[m]["registered"] for m in ("aligned", "refined", "COLMAP")] == ["4/4", "4/4", "0/4"]
    assert (found["aligned"]["AUC@1"], found["refined"]["AUC@1"], found["COLMAP"]["AUC@1"]) == ("100.0", "50.0", "0.0")


def test_mistakes_have_their_sentence(truth, tmp_path):
    scene = write_cameras_json(tmp_path / "castle", truth)
    model = write_model(tmp_path / "model", truth)
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    for part in ("cameras", "images", "points3D"):
        (broken / f"{part}.bin").write_bytes(b"no model")
    other = write_model(tmp_path / "other", {"x.jpg": torch.eye(4, dtype=torch.float64)})
    with pytest.raises(InputError, match="got 2 and 1"):
        main((model, model), (scene,))
    with pytest.raises(InputError, match="needs its --image_dir, or none has one: got 1 and 2"):
        main((model,), (scene,), image_dir=(empty, empty))
    with pytest.raises(InputError, match="no photo of .*empty has a pose"):
        main((model,), (scene,), image_dir=(empty,))
    with pytest.raises(InputError, match="there is no folder .*images: name it by --image_dir"):
        main((model,), (scene,), with_colmap=True)
    with pytest.raises(InputError, match="there is no folder"):
        evaluate_model(tmp_path / "nowhere", scene)
    with pytest.raises(InputError, match="no cameras.json and no COLMAP model"):
        evaluate_model(model, empty)
    with pytest.raises(InputError, match="broken"):
        evaluate_model(broken, scene)
    with pytest.raises(InputError, match="share no image name, first x.jpg"):
        evaluate_model(other, scene)
    with pytest.raises(InputError, match="at least 2 images"):
        evaluate_poses({}, {"x.jpg": torch.eye(4, dtype=torch.float64)}, scene="castle")


def test_one_scene_has_no_mean(truth):
    assert "mean" not in pose_table([evaluate_poses(truth, truth, scene="castle")])
    assert markdown_table(["a"], [["bbbb"]]).splitlines() == ["| a    |", "| ---- |", "| bbbb |"]


def test_the_medians_are_those_of_all_pairs(truth):
    estimated = {name: turned(pose, 3.0 * i) for i, (name, pose) in enumerate(sorted(truth.items()))}
    names, angles = sorted(truth), []
    for a, b in itertools.combinations(names, 2):
        error = estimated[b] @ estimated[a].inverse() @ truth[a] @ truth[b].inverse()
        angles.append(math.degrees(math.acos(min(1.0, (float(error[:3, :3].trace()) - 1) / 2))))
    assert evaluate_poses(estimated, truth).median_rotation_deg == pytest.approx(np.median(angles), abs=1e-3)
