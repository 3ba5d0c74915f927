"""Pages: what is in them, and how a real browser shows them where Chromium is installed."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed")

OFFLINE = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update"]
SOFTWARE = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


def shown(page, folder, action=""):
    """The document after its scripts and an action have run, and a screenshot of 1200 x 800 pixels; offline."""
    copy, screenshot = folder / page.name, folder / f"{page.stem}.png"
    copy.write_text(page.read_text().replace("</body>", f"<script>{action}</script></body>"))
    quiet = [
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command = [CHROMIUM, *quiet, *OFFLINE, *SOFTWARE, "--window-size=1200,800", copy.as_uri()]
    command += ["--dump-dom", f"--screenshot={screenshot}"]
    try:
        dom = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    except subprocess.TimeoutExpired:
        pytest.skip("the browser did not answer in time on this machine")
    return Document(dom), screenshot


class Document(HTMLParser):
    """A page's elements as (tag, attributes), its texts, and the content of its scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.raw = [], [], {}
        self._open = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open = [tag, dict(attributes)] if tag in ("script", "style") else []

    def handle_endtag(self, tag):
        self._open = []

    def handle_data(self, data):
        if self._open:
            self.raw.setdefault((self._open[0], self._open[1].get("type")), []).append(data)
        else:
            self.texts.append(data)

    def of_class(self, name):
        return [element for element in self.elements if name in element[1].get("class", "").split()]

    @property
    def text(self):
        return " ".join(self.texts)

    @property
    def body(self):
        return next(attributes for tag, attributes in self.elements if tag == "body")


def outside_references(page):
    """Whatever a browser could want to load from elsewhere."""
    document = Document(page)
    links = [v for _, attributes in document.elements for k, v in attributes.items() if k in ("src", "href", "action")]
    found = [link for link in links if not link.startswith("data:")]
    found += [tag for tag, _ in document.elements if tag in ("link", "iframe", "object", "embed", "base")]
    code = "".join(text for kind, texts in document.raw.items() if kind[1] is None for text in texts)
    namespaces = code.replace("http://www.w3.org/2000/svg", "")
    return found + re.findall(r"https?:|url\(|@import|\bimport\b|fetch\(|XMLHttpRequest|WebSocket|//\w+\.", namespaces)


def decoded(uri):
    """The picture of a data URI."""
    kind, content = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))
