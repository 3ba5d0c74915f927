"""What a run did, to look at: report.html and pair_graph.html, each one file that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.formats.pages import write_page
from dust3r_sfm.formats.pictures import map_uri, nearness, photo_uri
from dust3r_sfm.geometry.layout import spring_layout
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.scene import Scene, Tracks
from dust3r_sfm.summary import Summary
from dust3r_sfm.views import View

MAX_IMAGES = 300
MAX_PROBLEMS = 100
"""Of the images drawn, those that are in no model come first, up to so many."""
MAX_EDGES = 4000
MAX_MATCHED_PAIRS = 400
MATCHES_PER_PAIR = 48
PHOTO_SIDE, MAP_SIDE = 320, 192
GRID = 1000
"""Places in a photo are given in thousandths of its sides."""
ERROR_BINS_PX = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class _Located:
    """Where an image is among the scenes, how many points it sees and their mean error, NaN where there are none."""

    scene: Scene
    index: int
    observations: int
    mean_error_px: float


def write_reports(output: Path, summary: Summary) -> None:
    """Writes report.html and pair_graph.html of a run, finished or not.

    Large collections are drawn in part, and the pages say so; `summary.json` has everything.
    """
    content = summary.content()
    drawn = _choose_images(content)
    graph, graph_notes = _graph(content, drawn)
    located = {name: at for scene in summary.scenes for name, at in _locate(scene).items()}
    notes = _image_notes(content, drawn) + graph_notes
    views = {view.name: view for view in summary.views}
    cards = _cards(content, drawn, views, located)
    matches = _drawn_matches(summary.matches, drawn, views, graph["edges"])
    report = {
        "closing": summary.closing_line(),
        **{key: content[key] for key in ("counts", "models", "refinement", "network", "timings_s", "versions")},
        "images": cards,
        "graph": graph,
        "matches": matches,
        "tracks": [_track_statistics(scene.tracks) for scene in summary.scenes],
        "notes": notes,
    }
    write_page(output / "report.html", "dust3r_sfm report", report, ["graph.js", "report.js"])
    few = ("name", "model", "reason", "photo", "aspect")
    images = [{key: card[key] for key in few} for card in cards]
    alone = {"counts": content["counts"], "images": images, "graph": graph, "matches": matches, "notes": notes}
    write_page(output / "pair_graph.html", "dust3r_sfm pair graph", alone, ["graph.js", "pair_graph.js"])


def _locate(scene: Scene) -> dict[str, _Located]:
    counts, sums = torch.zeros(len(scene.names)), torch.zeros(len(scene.names))
    if scene.tracks is not None:
        images, errors = scene.tracks.image_indices, scene.tracks.errors[scene.tracks.point_indices]
        counts = torch.bincount(images, minlength=len(scene.names))
        sums = torch.bincount(images, errors.double(), minlength=len(scene.names))
    figures = zip(scene.names, counts.tolist(), (sums / counts).tolist(), strict=True)
    return {name: _Located(scene, i, int(number), mean) for i, (name, number, mean) in enumerate(figures)}


def _choose_images(content: Mapping[str, Any]) -> list[str]:
    """Names of the images that are drawn: of many, those in no model with their best partners, then the first."""
    images = content["images"]
    if len(images) <= MAX_IMAGES:
        return list(images)
    problems = [name for name, image in images.items() if not image["registered"]][:MAX_PROBLEMS]
    best: dict[str, tuple[float, str]] = {}
    for pair in content["pairs"]:
        for name, other in ((pair["name0"], pair["name1"]), (pair["name1"], pair["name0"])):
            best[name] = max(best.get(name, (-1.0, "")), (pair["score"], other))
    partners = [best[name][1] for name in problems if name in best]
    return sorted(list(dict.fromkeys([*problems, *partners, *images]))[:MAX_IMAGES])


def _image_notes(content: Mapping[str, Any], drawn: Sequence[str]) -> list[str]:
    total = len(content["images"])
    if len(drawn) == total:
        return []
    return [
        f"{len(drawn):,} of {total:,} images are drawn: those in no model with their best partners, up to "
        f"{MAX_PROBLEMS}, then the first by name. summary.json has all."
    ]


def _graph(content: Mapping[str, Any], drawn: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Edges [i, j, direction, direction] of the drawn images, a direction being [kept, score, reason] or None."""
    number = {name: i for i, name in enumerate(drawn)}
    edges: dict[tuple[int, int], list[Any]] = {}
    for pair in content["pairs"]:
        i, j = number.get(pair["name0"]), number.get(pair["name1"])
        if i is not None and j is not None:
            edge = edges.setdefault((min(i, j), max(i, j)), [None, None])
            edge[int(i > j)] = [int(pair["kept"]), pair["score"], pair["reason"]]
    ranked = sorted(edges, key=lambda ij: _rank(edges[ij]), reverse=True)
    notes = []
    if len(ranked) > MAX_EDGES:
        notes.append(f"{MAX_EDGES:,} of the {len(ranked):,} pairs between them are drawn: kept ones, strongest first.")
    shown = [[*ij, *edges[ij]] for ij in ranked[:MAX_EDGES]]
    return {"edges": shown, "places": _places(len(drawn), shown)}, notes


def _places(num_images: int, edges: Sequence[Sequence[Any]]) -> list[list[float]]:
    """Where images are drawn, -1 to 1: joined ones by the springs of kept pairs, those without any in a row below."""
    kept = [(*edge[:2], _rank(edge[2:])[1]) for edge in edges if _rank(edge[2:])[0]]
    joined = sorted({i for edge in kept for i in edge[:2]})
    lone = sorted(set(range(num_images)) - set(joined))
    number = {i: k for k, i in enumerate(joined)}
    ends = torch.tensor([[number[i], number[j]] for i, j, _ in kept], dtype=torch.long).reshape(-1, 2)
    weights = torch.tensor([score for *_, score in kept]).clamp(min=1.01).log()
    places = spring_layout(len(joined), ends, weights / weights.max() if kept else weights)
    if lone and joined:
        places[:, 1] = places[:, 1] * 0.85 - 0.15
    found = dict(zip(joined, places.tolist(), strict=True))
    found |= {i: [2 * (k + 0.5) / len(lone) - 1, 1.0 if joined else 0.0] for k, i in enumerate(lone)}
    return [[round(x, 3) for x in found[i]] for i in range(num_images)]


def _rank(directions: Sequence[Any]) -> tuple[int, float]:
    """In how many directions a pair was kept, and its better score."""
    known = [direction for direction in directions if direction is not None]
    return sum(d[0] for d in known), max(d[1] for d in known)


def _cards(
    content: Mapping[str, Any], drawn: Sequence[str], views: Mapping[str, View], located: Mapping[str, _Located]
) -> list[dict[str, Any]]:
    """What is told of each image."""
    top = _top_confidence(list(located.values()))
    cards = []
    for name in drawn:
        image, view, at = content["images"][name], views.get(name), located.get(name)
        card = {"name": name, "model": image.get("model"), "reason": image.get("reason"), "photo": None, "aspect": 1.5}
        if view is not None:
            card |= {"photo": photo_uri(view.image, PHOTO_SIDE), "aspect": round(view.size[1] / view.size[0], 4)}
        if at is not None:
            card |= _registered_card(at, top)
        cards.append(card)
    return cards


def _registered_card(at: _Located, top_confidence: float) -> dict[str, Any]:
    depth, confidence = (_shrunk(field[at.index]) for field in (at.scene.depth, at.scene.confidence))
    known = depth[depth.isfinite() & (depth > 0)]
    near, far = known.quantile(torch.tensor([0.02, 0.98])).tolist() if len(known) else (0.0, 0.0)
    stored_per_net = 1 / float(torch.linalg.det(at.scene.net_from_img[at.index, :2, :2].double()).abs().sqrt())
    return {
        "depth": map_uri(nearness(depth)),
        "confidence": map_uri(confidence.clamp(min=1).log() / top_confidence),
        "near": round(near, 3),
        "far": round(far, 3),
        "median_confidence": round(float(confidence.median()), 2),
        "focal_px": round(float(at.scene.K[at.index, 0, 0]) * stored_per_net, 1),
        "size": list(at.scene.original_sizes[at.index]),
        "observations": at.observations,
        "mean_error_px": round(at.mean_error_px, 2),
    }


def _shrunk(values: Float[Tensor, "h w"]) -> Float[Tensor, "small_h small_w"]:
    """Every few pixels of a map: as many as are drawn."""
    stride = -(-max(values.shape) // MAP_SIDE)
    return values[::stride, ::stride].detach().cpu().float()


def _top_confidence(located: Sequence[_Located]) -> float:
    """The logarithm of confidence that is drawn as the highest, the same for all images."""
    samples = [_shrunk(at.scene.confidence[at.index])[::8, ::8].flatten() for at in located]
    if not samples:
        return 1.0
    return max(float(torch.cat(samples)[:: max(1, len(samples) // 100)].clamp(min=1).log().quantile(0.95)), 1e-3)


def _drawn_matches(
    matches: Mapping[Pair, Matches], drawn: Sequence[str], views: Mapping[str, View], edges: Sequence[Sequence[Any]]
) -> dict[str, dict[str, Any]]:
    """Matches of the strongest pairs, by "i-j": their number, and of some [x_i, y_i, x_j, y_j] in thousandths."""
    found = {}
    for i, j, *_ in edges:
        pair = Pair(drawn[i], drawn[j])
        some = matches.get(pair)
        if some is None and pair.reversed() in matches:
            other = matches[pair.reversed()]
            some = Matches(other.keypoints1, other.keypoints0, other.scores)
        if some is not None:
            sizes = (torch.tensor(views[name].size[::-1]) for name in pair)
            ends = [x.detach().cpu() / size for x, size in zip((some.keypoints0, some.keypoints1), sizes, strict=True)]
            found[f"{i}-{j}"] = {"count": len(some.scores), "drawn": _spread(torch.cat(ends, 1))}
        if len(found) == MAX_MATCHED_PAIRS:
            break
    return found


def _spread(ends: Float[Tensor, "m 4"]) -> list[list[int]]:
    """A few of the matches, evenly over their places in the first image."""
    order = ((ends[:, 1] * 8).floor() * 2 + ends[:, 0]).argsort(stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(MATCHES_PER_PAIR, len(order))).long()] if len(order) else order
    return (ends[chosen] * GRID).round().long().tolist()


def _track_statistics(tracks: Tracks | None) -> dict[str, Any]:
    """Histograms of how many images see a point and of the points' reprojection errors."""
    if tracks is None or len(tracks.errors) == 0:
        return {"lengths": [], "errors": [], "bins_px": list(ERROR_BINS_PX), "observations": 0}
    lengths = torch.bincount(tracks.point_indices, minlength=len(tracks.errors))
    numbers, counts = torch.unique(lengths, return_counts=True)
    bins = torch.bucketize(tracks.errors.double(), torch.tensor(ERROR_BINS_PX, dtype=torch.float64))
    return {
        "lengths": [[int(n), int(c)] for n, c in zip(numbers, counts, strict=True)],
        "errors": torch.bincount(bins, minlength=len(ERROR_BINS_PX) + 1).tolist(),
        "bins_px": list(ERROR_BINS_PX),
        "observations": len(tracks.point_indices),
    }
