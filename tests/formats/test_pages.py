"""Pages of one file: whole, harmless whatever the data say, and in need of no network."""

import json
import shutil
import subprocess

import pytest
from browser import Document, needs_browser, outside_references, shown

from dust3r_sfm.formats.pages import WEB, write_page

SCRIPTS = sorted(path.name for path in WEB.glob("*.js"))
MEAN = {"text": "</script><script>document.body.dataset.hurt = 1</script>", "& <b>": [1.5, None, "\u2028 \udc80"]}


@pytest.mark.parametrize("last", ["report.js", "pair_graph.js", "scene.js"])
def test_a_page_holds_all_that_it_needs(last, tmp_path):
    write_page(tmp_path / "page.html", "a title & more", MEAN, ["graph.js", "scene_gl.js", last])
    page = (tmp_path / "page.html").read_text()
    assert not outside_references(page)
    assert "<title>a title &amp; more</title>" in page
    assert (WEB / last).read_text() in page
    policies = [a["content"] for tag, a in Document(page).elements if tag == "meta" and "content" in a]
    assert any("default-src 'none'" in policy for policy in policies)


def test_data_come_back_and_cannot_end_their_element(tmp_path):
    write_page(tmp_path / "page.html", "page", MEAN, [])
    document = Document((tmp_path / "page.html").read_text())
    (data,) = document.raw["script", "application/json"]
    assert json.loads(data) == MEAN
    assert [tag for tag, _ in document.elements].count("script") == 2


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    write_page(tmp_path / "page.html", "page", {"x": [float("nan"), 1.0, float("-inf")]}, [])
    (data,) = Document((tmp_path / "page.html").read_text()).raw["script", "application/json"]
    assert json.loads(data) == {"x": [None, 1.0, None]}


def test_the_check_sees_references():
    assert outside_references('<img src="photo.jpg">')
    assert outside_references("<script>fetch('x')</script>")
    assert outside_references("<style>a { background: url(x.png) }</style>")
    assert outside_references('<script>const far = "https://example.org"</script>')
    assert not outside_references('<img src="data:image/png;base64,AA=="><script>const a = 1;</script>')


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_scripts_are_javascript():
    check = (
        "for (const f of process.argv.slice(1)) new (require('vm').Script)(require('fs').readFileSync(f, 'utf8'), f)"
    )
    run = subprocess.run(
        ["node", "-e", check, *(WEB / s for s in SCRIPTS)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@needs_browser
def test_a_browser_runs_no_script_that_the_data_hold(tmp_path):
    write_page(tmp_path / "page.html", "page", MEAN, [])
    document, _ = shown(tmp_path / "page.html", tmp_path)
    assert "data-hurt" not in document.body
    assert "data-errors" not in document.body
