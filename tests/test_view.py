"""view: one file of a run, or a server of it; and what it says where it cannot."""

import json
import urllib.request

import numpy as np
import pytest
import torch
from aligned import true_scene
from browser import Document
from PIL import Image
from procedural import make_scene

from dust3r_sfm import view
from dust3r_sfm.__main__ import main as command_line
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.scenes import write_scenes
from dust3r_sfm.formats.viewing import Edge
from dust3r_sfm.view import load_run, serve


@pytest.fixture(scope="module")
def procedural():
    return make_scene(3, (48, 64), seed=2)


@pytest.fixture
def run(procedural, tmp_path):
    """The files of a run that viewing takes."""
    for one in procedural.views:
        path = tmp_path / "images" / one.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one.image.numpy()).save(path, quality=95)
    write_scenes(tmp_path / "scene.h5", [true_scene(procedural)])
    a, b, c = procedural.names
    pairs = [(a, b, True), (b, a, False), (b, c, False), (c, b, False)]
    lines = [{"name0": x, "name1": y, "kept": kept, "score": 1.5, "reason": "so"} for x, y, kept in pairs]
    summary = {"image_dir": str(tmp_path / "images"), "pairs": lines}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_a_run_is_exported_to_one_file(run, procedural):
    out = run / "shared" / "scene.html"
    assert command_line(["view", str(run), "--export", str(out), "--max_points", "500"]) == 0
    (content,) = Document(out.read_text()).raw["script", "application/json"]
    (scene,) = json.loads(content)["scenes"]
    assert [camera["name"] for camera in scene["cameras"]] == procedural.names
    assert scene["edges"] == [[0, 1, 1], [1, 2, 0]], "kept where a direction of it was"
    assert 300 < scene["points"]["count"] <= 500


def test_a_run_without_a_summary_is_shown_too(run, procedural):
    (run / "summary.json").unlink()
    scenes, views, edges = load_run(run, run / "images")
    assert [len(scenes), len(views), edges] == [1, 3, []]


def test_mistakes_are_told_in_a_sentence(run, capsys):
    (run / "empty").mkdir()
    for arguments, sentence in [
        ([str(run / "empty")], "there is no scene.h5 in"),
        ([str(run), "--image_dir", "nowhere"], "the photos are not in nowhere: say where they are with --image_dir"),
        ([str(run), "--export", str(run)], "is a folder: name the file to write"),
        ([str(run), "--max_points", "0"], "at least one point must be drawn"),
    ]:
        assert command_line(["view", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    (run / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="are not known: say where they are with --image_dir"):
        load_run(run)
    (run / "summary.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_run(run)


@pytest.fixture
def server(procedural):
    pytest.importorskip("viser")
    a, b, c = procedural.names
    edges = [Edge(a, b, True), Edge(b, c, False), Edge(a, "of another model.jpg", True)]
    made = serve([true_scene(procedural)], procedural.views, edges, 10**6, "127.0.0.1", 0)
    yield made
    made.stop()


def test_the_server_gives_its_page(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.get_port()}/", timeout=60) as answer:
        assert answer.status == 200
        assert b"<html" in answer.read().lower()


def test_the_viewer_has_cameras_cloud_and_pairs_where_they_are(procedural, monkeypatch):
    viser = pytest.importorskip("viser")
    server = viser.ViserServer(host="127.0.0.1", port=0, verbose=False)
    a, b, c = procedural.names
    edges = [Edge(a, b, True), Edge(b, c, False), Edge(a, "of another model.jpg", True)]
    try:
        shown = view._Shown(server, true_scene(procedural), procedural.views, edges, 10**6)
        for frustum, center, K in zip(shown.frustums, procedural.centers, procedural.K, strict=True):
            assert np.allclose(frustum.position, center, atol=1e-4)
            assert frustum.fov == pytest.approx(2 * np.arctan(24 / float(K[1, 1])), rel=1e-4)
        assert np.allclose(shown.lines[True].points, procedural.centers[None, :2], atol=1e-4)
        assert shown.lines[False].points.shape == (1, 2, 3)
        total = len(shown.cloud.points)
        assert len(shown.points.points) == round(0.7 * total)
        shown.share.value, shown.only.value, shown.image.value = 100, True, b
        shown._draw_cloud()
        assert len(shown.points.points) == int((shown.cloud.image_indices == 1).sum())
        pictures = []
        for kind in view.PICTURES:
            shown.kind.value = kind
            pictures.append(shown._picture())
        assert all(picture.shape == (48, 64, 3) for picture in pictures)
        assert torch.equal(torch.from_numpy(pictures[0]), procedural.views[1].image)
        shown.remove()
    finally:
        server.stop()
