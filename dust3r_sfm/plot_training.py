"""Stage: the curves of a run of training as a picture.

    dust3r-sfm plot-training --history run/history.json

Needs matplotlib: `pip install "dust3r_sfm[train]"`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import replacing, writing

logger = logging.getLogger(__name__)

PANELS = {
    "mean normalised error": ("error0", "error1"),
    "log confidence; matching loss": ("log_confidence", "log_confidence_apart", "matching"),
    "dev pairs, both K known": (
        *("both_rra15", "both_rta15", "both_maa30"),
        *("both_ways_rra15", "both_ways_rta15", "both_ways_maa30"),
    ),
    "dev pairs, own focal": (
        *("own_rra15", "own_rta15", "own_maa30"),
        *("own_both_ways_rra15", "own_both_ways_rta15", "own_both_ways_maa30"),
    ),
    "focal and depth error": ("focal_error", "depth_error"),
    "true pairs against photos of two scenes": ("separation", "separation_weaker_image"),
    "pairs a second": ("pairs_per_second",),
    "norm of the gradient": ("gradient",),
}
"""What is drawn together, by name in the history."""


def main(history: Path, output: Path | None = None) -> None:
    """Draw the errors, confidences, speed and dev figures of a run over the pairs it saw.

    Args:
        history: history.json of a run of train, or its folder.
        output: PNG, SVG or PDF to write; history.png beside the history where not given.
    """
    history = history / "history.json" if history.is_dir() else history
    rows = _read(history)
    output = output or history.with_suffix(".png")
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{output} must end in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('curves are drawn by matplotlib: pip install "dust3r_sfm[train]"') from None
    figure = Figure(figsize=(17, 7), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 4).flat, PANELS.items(), strict=True):
        _draw(axes, title, {name: points for name in names if (points := _points(rows, name))})
    with writing(output), replacing(output) as temporary:
        figure.savefig(temporary, format=output.suffix[1:], dpi=110)
    logger.info("%d rows of %s drawn in %s.", len(rows), history, output)


def _read(history: Path) -> list[dict[str, float]]:
    try:
        rows = json.loads(history.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no {history}: expected the history.json of a run of train") from None
    except ValueError as error:
        raise InputError(f"{history} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "pairs" in row for row in rows):
        raise InputError(f"{history} is not the history of a run of train, or of one that was too short for a line")
    return rows


def _points(rows: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    return [(row["pairs"] / 1e6, row[name]) for row in rows if name in row]


def _draw(axes: Any, title: str, curves: dict[str, list[tuple[float, float]]]) -> None:
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
    axes.set_title(title)
    axes.set_xlabel("million pairs")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(fontsize=8)
