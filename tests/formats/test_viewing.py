"""What viewers draw of a scene, and scene.html that holds it."""

import base64
import dataclasses
import json

import numpy as np
import pytest
import torch
from aligned import true_scene
from browser import Document, decoded, needs_browser, outside_references, shown
from PIL import Image
from procedural import make_scene

from dust3r_sfm.formats.scene_page import write_scene_page
from dust3r_sfm.formats.viewing import Edge, certainty, outlook, viewed_cloud
from dust3r_sfm.geometry.transforms import transform_points


@pytest.fixture(scope="module")
def procedural():
    return make_scene(3, (48, 64), seed=2)


@pytest.fixture(scope="module")
def scene(procedural):
    """The truth, of which the left half of each image is more certain than the right."""
    ramp = torch.linspace(9, 1, 64).expand(48, 64)
    return dataclasses.replace(true_scene(procedural), confidence=tuple(ramp + i for i in range(3)))


@pytest.fixture(scope="module")
def page(scene, procedural, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "scene.html"
    names = procedural.names
    edges = [Edge(names[0], names[1], True), Edge(names[1], names[2], False), Edge(names[0], "elsewhere.jpg", True)]
    write_scene_page(path, [scene], procedural.views, edges)
    return path


def content_of(page):
    (content,) = Document(page.read_text()).raw["script", "application/json"]
    (scene,) = json.loads(content)["scenes"]
    return scene


def column(text, kind):
    return np.frombuffer(base64.b64decode(text), dtype=kind)


def distance_to(points, others):
    return torch.cdist(points.double(), others.double()).amin(1)


def test_the_cloud_is_of_true_points_most_confident_first(scene, procedural):
    cloud = viewed_cloud(scene, procedural.views, 10**9)
    truth = torch.cat([points.reshape(-1, 3) for points in procedural.points_in_world])
    assert 0.5 * len(truth) < len(cloud.points) < len(truth), "pixels on edges are left out"
    assert distance_to(cloud.points, truth).max() < 1e-4
    assert (cloud.confidence.diff() <= 0).all()
    for index in range(3):
        mine = cloud.image_indices == index
        assert distance_to(cloud.points[mine], procedural.points_in_world[index].reshape(-1, 3)).max() < 1e-4
    assert 0 <= cloud.certainty().min() <= cloud.certainty().max() <= 1


def test_points_between_a_thing_and_what_is_behind_it_are_left_out(scene, procedural):
    """A depth map with a step, whose pixels along the step hang in the air."""
    depth = torch.full((48, 64), 2.0)
    depth[:, 32:] = 4.0
    depth[:, 32] = 3.0
    stepped = dataclasses.replace(scene, depth=(depth,) * 3)
    cloud = viewed_cloud(stepped, procedural.views, 10**9)
    seen = transform_points(scene.cam_from_world[0], cloud.points[cloud.image_indices == 0])[:, 2]
    assert ((seen - 2).abs() < 1e-3).sum() == 31 * 48
    assert ((seen - 3).abs() < 0.5).sum() == 0


def test_a_large_cloud_is_thinned_over_all_images(scene, procedural):
    whole = viewed_cloud(scene, procedural.views, 10**9)
    thin = viewed_cloud(scene, procedural.views, 900)
    assert 700 < len(thin.points) <= 900
    counts = torch.bincount(thin.image_indices, minlength=3) / len(thin.points)
    expected = torch.bincount(whole.image_indices, minlength=3) / len(whole.points)
    assert (counts - expected).abs().max() < 0.05
    ratio = thin.spacing.median() / whole.spacing.median()
    assert float(ratio) == pytest.approx((len(whole.points) / len(thin.points)) ** 0.5, rel=0.1)


def test_masked_and_missing_pixels_are_not_drawn(scene, procedural):
    mask = torch.zeros(48, 64, dtype=torch.bool)
    views = [dataclasses.replace(view, mask=mask) for view in procedural.views]
    empty = viewed_cloud(scene, views, 1000)
    assert len(empty.points) == 0
    assert outlook(scene, empty).eye.isfinite().all()
    holes = dataclasses.replace(scene, depth=tuple(torch.zeros(48, 64) for _ in range(3)))
    assert len(viewed_cloud(holes, procedural.views, 1000).points) == 0


def test_the_first_look_is_from_above_the_cameras_towards_the_scene(scene, procedural):
    look = outlook(scene, viewed_cloud(scene, procedural.views, 10**9))
    world_up = torch.tensor([0.0, -1.0, 0.0])  # the room's y points down
    assert torch.dot(look.up, world_up) > 0.9
    assert torch.dot(look.eye - look.target, world_up) > 0
    centers = procedural.centers
    assert (look.eye - look.target).norm() > (centers - look.target).norm(dim=-1).max()
    assert torch.nn.functional.cosine_similarity(look.eye - look.target, centers.mean(0) - look.target, dim=0) > 0.6


def test_certainty_is_the_same_for_a_confidence_whatever_is_asked_for():
    reference = torch.linspace(1, 20, 500)
    some = torch.tensor([1.0, 5.0, 20.0])
    assert torch.equal(certainty(some, reference)[1], certainty(some[1], reference))
    assert certainty(some, reference).tolist() == sorted(certainty(some, reference).tolist())
    assert torch.equal(certainty(torch.ones(3), torch.ones(9)), torch.zeros(3))


def test_the_page_holds_the_cloud_to_a_thousandth_of_its_size(page, scene, procedural):
    assert not outside_references(page.read_text())
    points = content_of(page)["points"]
    cloud = viewed_cloud(scene, procedural.views, 10**9)
    positions = column(points["positions"], "<u2").reshape(-1, 3) * points["step"] + np.array(points["origin"])
    assert points["count"] == len(cloud.points) == len(positions)
    assert np.abs(positions - cloud.points.numpy()).max() < procedural.size / 1000
    assert (column(points["colors"], "u1").reshape(-1, 3) == cloud.colors.numpy()).all()
    assert (column(points["images"], "<u2") == cloud.image_indices.numpy()).all()
    spacing = points["finest"] * 2 ** (column(points["spacing"], "u1") * (8 / 255))
    assert np.abs(spacing / cloud.spacing.numpy() - 1).max() < 0.02
    assert points["levels"] == sorted(points["levels"], reverse=True)
    assert len(points["levels"]) == 101


def test_the_page_holds_the_cameras_with_their_pictures_and_pairs(page, scene, procedural):
    content = content_of(page)
    assert [camera["name"] for camera in content["cameras"]] == procedural.names
    for index, camera in enumerate(content["cameras"]):
        world_from_cam = torch.tensor(camera["world_from_cam"], dtype=torch.float64).reshape(3, 4)
        assert torch.allclose(world_from_cam[:, 3].float(), procedural.centers[index], atol=1e-4)
        assert torch.allclose(world_from_cam[:, :3].float(), procedural.cam_from_world[index, :3, :3].T, atol=1e-5)
        K = (procedural.K[index] / torch.tensor([[64.0], [48.0], [1.0]])).tolist()
        assert camera["K"] == pytest.approx([K[0][0], K[1][1], K[0][2], K[1][2]])
        assert all(decoded(camera[kind]).size == (64, 48) for kind in ("photo", "depth", "confidence"))
    assert content["edges"] == [[0, 1, 1], [1, 2, 0]], "pairs with images of other models are left out"


def test_points_are_shared_among_models_and_photos_of_many_are_few(scene, procedural, tmp_path, monkeypatch):
    monkeypatch.setattr("dust3r_sfm.formats.scene_page.MAX_PICTURED", 2)
    write_scene_page(tmp_path / "s.html", [scene, scene], procedural.views, max_points=1000)
    (content,) = Document((tmp_path / "s.html").read_text()).raw["script", "application/json"]
    scenes = json.loads(content)["scenes"]
    assert all(300 < one["points"]["count"] <= 500 for one in scenes)
    assert ["photo" in camera for camera in scenes[0]["cameras"]] == [True, True, False]


@needs_browser
def test_a_browser_draws_the_cloud(page, tmp_path):
    document, screenshot = shown(page, tmp_path, "document.querySelectorAll('.strip button')[1].click()")
    assert document.body.get("data-ready") == "true"
    assert "data-errors" not in document.body
    assert "3 cameras" in document.text
    assert document.text.count("photos/001.jpg") == 1, "the image that was clicked"
    with Image.open(screenshot) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)[100:700, 350:1150]
    assert (np.ptp(pixels, axis=-1) > 30).mean() > 0.05, "the background is gray, the room is coloured"
