"""report.html and pair_graph.html: what they tell of a run, whatever became of it."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from aligned import true_scene
from browser import Document, decoded, needs_browser, outside_references, shown
from procedural import make_scene

from dust3r_sfm import report
from dust3r_sfm.alignment.tracks import build_tracks
from dust3r_sfm.filter_pairs import PairDecision, decide_pairs
from dust3r_sfm.geometry.camera import unproject
from dust3r_sfm.geometry.transforms import transform_points
from dust3r_sfm.match_dense import match_dense
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.report import write_reports
from dust3r_sfm.summary import Summary

NUM_VIEWS = 5


@pytest.fixture(scope="module")
def procedural():
    return make_scene(NUM_VIEWS, (48, 64))


@pytest.fixture(scope="module")
def summary(procedural):
    """A run whose last photo found no partner, and one that could not be read."""
    names = procedural.names
    decisions = [
        PairDecision(d.pair, names[-1] not in d.pair, f"reason of {d.pair.name0}", d.score)
        for d in decide_pairs(procedural.predictions, names)
    ]
    kept = {d.pair: procedural.predictions[d.pair] for d in decisions if d.kept}
    matches = match_dense(procedural.views, kept)
    whole = true_scene(procedural)
    per_image = {
        f.name: getattr(whole, f.name)[:-1]
        for f in dataclasses.fields(whole)
        if f.name in ("names", "K", "cam_from_world", "depth", "confidence", "net_from_img", "original_sizes")
    }
    scene = build_tracks(dataclasses.replace(whole, **per_image), matches, procedural.views)
    return Summary(
        rejected={"<b>broken</b>.jpg": "cannot be decoded: it ends early"},
        names=names,
        views=procedural.views,
        decisions=decisions,
        matches=matches,
        scenes=[scene],
        timings_s={"load": 0.5, "infer_pairs": 2.0},
    )


@pytest.fixture(scope="module")
def pages(summary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_reports(folder, summary)
    return folder


def data_of(page):
    (content,) = Document(page.read_text()).raw["script", "application/json"]
    return json.loads(content)


@pytest.mark.parametrize("name", ["report.html", "pair_graph.html"])
def test_the_pages_need_no_other_file_and_no_network(pages, name):
    assert not outside_references((pages / name).read_text())


def test_every_image_has_its_state_its_reason_and_its_pictures(pages, summary, procedural):
    images = {image["name"]: image for image in data_of(pages / "report.html")["images"]}
    assert set(images) == {*procedural.names, "<b>broken</b>.jpg"}
    assert images["<b>broken</b>.jpg"]["reason"].endswith("it ends early")
    assert images["<b>broken</b>.jpg"]["photo"] is None
    lost = images[procedural.names[-1]]
    assert lost["model"] is None
    assert "all of its 8 directed pairs were dropped" in lost["reason"]
    tracks = summary.scenes[0].tracks
    for index, name in enumerate(procedural.names[:-1]):
        image = images[name]
        assert image["model"] == 0
        assert all(decoded(image[kind]).size == (64, 48) for kind in ("photo", "depth", "confidence"))
        assert image["observations"] == tracks.image_indices.tolist().count(index)
        assert image["near"] >= float(procedural.depth[index].min())
        assert image["far"] <= float(procedural.depth[index].max())
        assert image["focal_px"] == pytest.approx(2 * float(procedural.K[index, 0, 0]), abs=0.1)  # of the stored file


def test_every_pair_is_an_edge_with_its_decisions(pages, summary):
    data = data_of(pages / "pair_graph.html")
    names = [image["name"] for image in data["images"]]
    told = {}
    for i, j, forth, back in data["graph"]["edges"]:
        assert i < j
        told |= {Pair(names[i], names[j]): forth, Pair(names[j], names[i]): back}
    expected = {d.pair: [int(d.kept), pytest.approx(d.score, abs=1e-3), d.reason] for d in summary.decisions}
    assert told == expected
    assert all(max(map(abs, place)) <= 1 for place in data["graph"]["places"])


def test_drawn_matches_join_pixels_that_see_the_same_point(pages, procedural):
    """Also where a pair was matched in the other order than its edge has."""
    data = data_of(pages / "report.html")
    names = [image["name"] for image in data["images"]]
    assert len(data["matches"]) == 6  # of four images
    errors = []
    for key, found in data["matches"].items():
        i, j = (procedural.names.index(names[int(index)]) for index in key.split("-"))
        assert found["count"] >= len(found["drawn"]) > 0
        for x0, y0, x1, y1 in found["drawn"]:
            pixel = torch.tensor([x0 * 0.064, y0 * 0.048]), torch.tensor([x1 * 0.064, y1 * 0.048])
            row, column = int(pixel[0][1].clamp(max=47)), int(pixel[0][0].clamp(max=63))
            in_cam = unproject(procedural.K[i], procedural.depth[i])[row, column]
            in_world = transform_points(torch.linalg.inv(procedural.cam_from_world[i]), in_cam[None])
            seen = procedural.K[j] @ transform_points(procedural.cam_from_world[j], in_world)[0]
            errors.append((seen[:2] / seen[2] - pixel[1]).norm())
    assert torch.stack(errors).median() < 1
    assert torch.stack(errors).quantile(0.9) < 3


def test_matches_of_the_reversed_pair_are_turned(procedural):
    views = {view.name: view for view in procedural.views}
    a, b = procedural.names[:2]
    some = Matches(torch.tensor([[32.0, 12.0]]), torch.tensor([[16.0, 36.0]]), torch.ones(1))
    for pair, expected in ((Pair(a, b), [500, 250, 250, 750]), (Pair(b, a), [250, 750, 500, 250])):
        found = report._drawn_matches({pair: some}, [a, b], views, [[0, 1, None, None]])
        assert found == {"0-1": {"count": 1, "drawn": [expected]}}


def test_the_histograms_count_every_point(pages, summary):
    (statistics,) = data_of(pages / "report.html")["tracks"]
    tracks = summary.scenes[0].tracks
    seen = Counter(tracks.point_indices.tolist())
    lengths = [seen[i] for i in range(len(tracks.errors))]
    assert statistics["lengths"] == [[n, lengths.count(n)] for n in sorted(set(lengths))]
    assert statistics["observations"] == len(tracks.point_indices)
    below = [0, *(int((tracks.errors <= edge).sum()) for edge in statistics["bins_px"]), len(lengths)]
    assert statistics["errors"] == [b - a for a, b in zip(below, below[1:], strict=False)]


def test_a_run_that_found_nothing_is_told_too(procedural, tmp_path):
    decisions = [PairDecision(pair, False, "too weak", 1.0) for pair in procedural.predictions]
    write_reports(tmp_path, Summary(names=procedural.names, views=procedural.views, decisions=decisions))
    data = data_of(tmp_path / "report.html")
    assert [image["model"] for image in data["images"]] == [None] * NUM_VIEWS
    assert len(data["graph"]["edges"]) == 10
    write_reports(tmp_path, Summary())
    assert data_of(tmp_path / "report.html")["images"] == []


def test_of_many_images_a_part_is_drawn_and_the_page_says_so(summary, procedural, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_IMAGES", 4)
    monkeypatch.setattr(report, "MAX_EDGES", 2)
    monkeypatch.setattr(report, "MAX_MATCHED_PAIRS", 1)
    write_reports(tmp_path, summary)
    data = data_of(tmp_path / "report.html")
    drawn = [image["name"] for image in data["images"]]
    assert len(drawn) == 4
    assert {"<b>broken</b>.jpg", procedural.names[-1]} <= set(drawn), "those in no model come first"
    assert len(data["graph"]["edges"]) == 2
    assert len(data["matches"]) == 1
    assert data["notes"][0].startswith("4 of 6 images are drawn")
    assert data["notes"][1].startswith("2 of the 3 pairs between them are drawn")


@needs_browser
def test_a_browser_draws_the_report(pages, tmp_path):
    click = "[...document.querySelectorAll('button')].find((b) => b.textContent === 'depth').click()"
    document, screenshot = shown(pages / "report.html", tmp_path, click)
    assert document.body.get("data-ready") == "true"
    assert "data-errors" not in document.body
    assert len(document.of_class("card")) == 6
    assert len(document.of_class("node")) == 6
    assert "<b>broken</b>.jpg cannot be decoded: it ends early" in document.text
    assert "infer pairs" in document.text
    depths = [a for tag, a in document.elements if tag == "img" and a["alt"].startswith("depth of")]
    assert len(depths) == 4, "of the images that are registered"
    assert screenshot.stat().st_size > 5000


@needs_browser
def test_a_browser_draws_the_pair_graph(pages, tmp_path):
    document, _ = shown(pages / "pair_graph.html", tmp_path)
    assert document.body.get("data-ready") == "true"
    assert "data-errors" not in document.body
    kinds = [len(document.of_class(kind)) for kind in ("kept", "half", "dropped")]
    assert kinds == [6, 0, 4]
    assert "kept, reason of photos/" in document.text, "the chosen pair tells why it was kept"


@needs_browser
def test_an_edge_that_is_clicked_tells_why_it_was_dropped(pages, tmp_path):
    click = "document.querySelector('.edge.dropped').parentNode.dispatchEvent(new MouseEvent('click'))"
    document, _ = shown(pages / "pair_graph.html", tmp_path, click)
    assert "data-errors" not in document.body
    assert "not matched, as it was dropped" in document.text
    assert "dropped, reason of photos/" in document.text
