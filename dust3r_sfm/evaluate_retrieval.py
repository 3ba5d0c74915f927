"""Stage: how well descriptors find photos of the same scene, and those that overlap, among the photos of many scenes.

Precision@5: of the 5 nearest photos, the share of the same scene. Recall@10: of the photos that overlap a photo (10 of
them where there are more), the share among its 10 nearest. Two photos overlap if each camera sees at least 0.3 of the
other's image, at the depth where its optical axis meets those of its scene's other cameras, from less than 60 degrees
aside (`geometry.covisibility`): a statement of the reference poses alone, blind to what stands between.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.extract_descriptors import describe_views
from dust3r_sfm.files import write_bytes
from dust3r_sfm.formats.cameras_json import IMAGE_FOLDER, read_cameras_json
from dust3r_sfm.formats.descriptors import DescriptorFile
from dust3r_sfm.geometry.covisibility import focus_depths, frustum_overlaps
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.retrieval.exact import exact_top_k, without_self
from dust3r_sfm.views import list_images, load_views

logger = logging.getLogger(__name__)

MIN_OVERLAP = 0.3


@dataclass(frozen=True)
class RetrievalQuality:
    """Of one scene or of all; None where nothing can be said."""

    num_images: int
    precision_at_5: float
    recall_at_10: float | None


def main(
    scenes_dir: Path, model: str | None = None, descriptors: Path | None = None, json: Path | None = None
) -> dict[str, RetrievalQuality]:
    """Find the neighbours of each photo among the photos of all scenes thrown together, and compare with the truth.

    Args:
        scenes_dir: Folder of scenes, each with images and a cameras.json.
        model: Checkpoint file, folder or hub name whose encoder describes; the shipped weights where not given.
        descriptors: Descriptors to judge instead, of photos named scene/images/name below the folder.
        json: File to write the figures to.
    """
    scenes = sorted(path.name for path in scenes_dir.glob("*") if (path / IMAGE_FOLDER).is_dir())
    if len(scenes) < 2:
        raise InputError(f"{scenes_dir} has {len(scenes)} folders with {IMAGE_FOLDER}: at least two scenes are needed")
    names = {scene: list_images(scenes_dir / scene / IMAGE_FOLDER) for scene in scenes}
    if descriptors is None:
        rows = _describe(scenes_dir, names, Dust3r.from_pretrained(model))
    else:
        with DescriptorFile(descriptors) as file:
            rows = file.read([f"{scene}/{IMAGE_FOLDER}/{name}" for scene in scenes for name in names[scene]])
    scene_of = [scene for scene in scenes for _ in names[scene]]
    overlap = torch.block_diag(*(_overlaps(scenes_dir / scene, names[scene]) for scene in scenes)) >= MIN_OVERLAP
    figures = evaluate_retrieval(rows, scene_of, overlap)
    _print(figures)
    if json is not None:
        write_bytes(json, dumps({scene: asdict(figure) for scene, figure in figures.items()}, indent=1).encode())
    return figures


def evaluate_retrieval(
    rows: Float[np.ndarray, "n d"], scene_of: Sequence[str], overlap: Bool[Tensor, "n n"]
) -> dict[str, RetrievalQuality]:
    """Figures of each scene, and of all images under `all`; scenes without overlapping photos have no recall."""
    own = torch.arange(len(rows))
    nearest = without_self(exact_top_k(rows, rows, 11), own, 10).indices
    index = {scene: i for i, scene in enumerate(dict.fromkeys(scene_of))}
    place = torch.tensor([index[scene] for scene in scene_of])
    is_same = (place[nearest[:, :5]] == place[:, None]) & (nearest[:, :5] >= 0)
    precisions = is_same.float().mean(dim=1)
    overlap = overlap & (own[:, None] != own)
    possible = overlap.sum(dim=1).clamp(max=10)
    recalls = (overlap.gather(1, nearest.clamp(min=0)) & (nearest >= 0)).sum(dim=1) / possible  # NaN: nothing to find

    def figure(chosen: Bool[Tensor, " n"]) -> RetrievalQuality:
        recall = float(recalls[chosen].nanmean())
        return RetrievalQuality(
            int(chosen.sum()), float(precisions[chosen].mean()), None if np.isnan(recall) else recall
        )

    figures = {scene: figure(place == i) for scene, i in index.items()}
    return figures | {"all": figure(torch.ones(len(rows), dtype=torch.bool))}


def _describe(scenes_dir: Path, names: dict[str, list[str]], model: Dust3r) -> Float[np.ndarray, "n d"]:
    size, square_ok = model.config.image_size, model.config.square_ok
    folders = ((scenes_dir / scene / IMAGE_FOLDER, found) for scene, found in names.items())
    views = [view for folder, found in folders for view in load_views(folder, size, found, square_ok=square_ok)]
    return describe_views(model, views)


def _overlaps(folder: Path, names: Sequence[str]) -> Float[Tensor, "n n"]:
    """Smaller of the shares that two cameras see of each other's images; 0 for images whose camera is not known."""
    overlaps = torch.zeros(len(names), len(names), dtype=torch.float64)
    frames = {frame.name: frame for frame in read_cameras_json(folder)}
    known = [(i, frames[name]) for i, name in enumerate(names) if name in frames]
    known = [(i, frame) for i, frame in known if frame.K is not None and frame.cam_from_world is not None]
    if len(known) < 2:
        return overlaps
    K, poses = torch.stack([frame.K for _, frame in known]), torch.stack([frame.cam_from_world for _, frame in known])
    sizes = torch.tensor([frame.size for _, frame in known], dtype=torch.float64)
    seen = frustum_overlaps(K, sizes, poses, focus_depths(poses))
    index = torch.tensor([i for i, _ in known])
    overlaps[index[:, None], index] = torch.minimum(seen, seen.mT)
    return overlaps


def _print(figures: dict[str, RetrievalQuality]) -> None:
    width = max(map(len, figures))
    print(f"{'scene':{width}}  images  precision@5  recall@10")
    for scene, figure in figures.items():
        recall = "" if figure.recall_at_10 is None else f"{figure.recall_at_10:.3f}"
        print(f"{scene:{width}}  {figure.num_images:6}  {figure.precision_at_5:11.3f}  {recall:>9}")


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["evaluate-retrieval", *sys.argv[1:]]))
