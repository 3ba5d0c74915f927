"""HTML pages of one file: data, styles and scripts inside, nothing loaded from anywhere."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dust3r_sfm.files import write_bytes

WEB = Path(__file__).parent / "web"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What the browser is told: even a mistake of ours loads nothing."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main><noscript>{title}: this page is drawn by its script, which the browser was told not to run.</noscript></main>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def write_page(path: Path, title: str, data: Mapping[str, Any], scripts: Sequence[str]) -> None:
    """Writes a page drawn by some of the scripts in web/, whole or not at all.

    `data` is what JSON can hold, null for numbers that are not finite; the scripts find it in the element `data`.
    """
    # within a script element only "<" could end the data
    content = json.dumps(_finite(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    names = ("page.js", *scripts)
    page = PAGE.format(
        policy=POLICY,
        title=html.escape(title),
        style=(WEB / "page.css").read_text(),
        data=content,
        script="\n".join((WEB / name).read_text() for name in names),
    )
    write_bytes(path, page.encode())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
