"""What is known of photos beforehand goes to their views: GPS, EXIF focals, shared cameras, depth in metres."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.alignment.anchoring import num_agreeing, placed, positions_of
from dust3r_sfm.alignment.attach import moved
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.cameras_json import read_cameras_json, read_depth
from dust3r_sfm.formats.exif import GpsFix, PhotoExif, enu_positions, exif_focal_px, read_exif
from dust3r_sfm.geometry.camera import K_from_focal
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

VERTICAL = 2.0
"""GPS altitudes err so many times more than places."""
MIN_DEPTH_PIXELS = 50
"""Pixels of known depth that an image needs to tell the scene's scale."""

MAX_STRETCH = 0.02
"""Depth maps may be smaller than their photos, but not of another shape."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    share_camera: Literal["auto", "all", "folder", "exif", "none"] = "auto"
    """Photos of one size that share one camera: all, those of a folder, those whose EXIF names the same camera and
    focal length, or none; auto shares where that explains the matches as well."""
    focal: Literal["free", "exif"] = "free"
    """exif: focal lengths are what EXIF says, up to an error of standard deviation focal_sigma, which is estimated."""
    focal_sigma: float = 0.03
    """Relative standard deviation of EXIF's focal lengths."""
    gps: Literal["auto", "ignore"] = "auto"
    """auto: where EXIF or cameras.json tell positions the result is in metres, x east, y north, z up."""
    gps_sigma: float = 5.0
    """Standard deviation of GPS positions in metres where the receiver gives none; twice that for altitudes."""


def with_priors(
    views: Sequence[View], image_dir: Path, config: PriorConfig, cameras: Path | None = None
) -> tuple[list[View], GpsFix | None]:
    """The views with what EXIF and a cameras.json say besides K and pose, and the origin of GPS positions."""
    needs_exif = config.gps == "auto" or config.share_camera == "exif"
    exif = {view.name: read_exif(image_dir / view.name) for view in views} if needs_exif else {}
    views = [_with_group(view, config, exif.get(view.name, PhotoExif())) for view in views]
    if config.focal == "exif":
        views = [_with_exif_focal(view, image_dir / view.name, config.focal_sigma) for view in views]
    if config.gps == "ignore" or any(v.known_cam_from_world is not None or v.known_position is not None for v in views):
        return views, None
    fixes = {name: found.gps for name, found in exif.items() if found.gps is not None}
    fixes |= {name: GpsFix(*gps) for name, gps in _json_gps(cameras).items() if name in exif}
    return _with_positions(views, fixes, config.gps_sigma) if len(fixes) >= 3 else (views, None)


def with_known_depths(views: Sequence[View], folder: Path) -> list[View]:
    """The views with depths in metres: of a cameras.json, or `<image name>.npy` in metres or `.png` in millimetres."""
    maps = _depth_maps(views, folder)
    if not maps:
        raise InputError(f"no depths in {folder}: expected {views[0].name}.npy or .png, or a cameras.json with depths")
    return [dataclasses.replace(v, known_depth=_on_net(v, maps[v.name])) if v.name in maps else v for v in views]


def in_known_frame(
    scenes: Sequence[Scene], views: Sequence[View], anchored: Collection[str] = ()
) -> tuple[list[Scene], list[dict[str, Any]]]:
    """Each scene where its cameras' positions put it, else in the unit of known depths; and what was done to each.

    Known poses have fixed the frame already, as has the adjustment of the `anchored` images to
    their positions. A scene without enough positions or depths stays.
    """
    positions = positions_of(views)
    has_poses = sum(view.known_cam_from_world is not None for view in views) >= 2
    result, lines = [], []
    for scene in scenes:
        found, line = scene, {"frame": "known poses" if has_poses else "arbitrary"}
        if not has_poses:
            in_frame = not set(scene.names).isdisjoint(anchored)
            found, placement = (scene, None) if in_frame else placed(scene, positions)
            if in_frame or placement is not None:
                num_positions = sum(name in positions for name in scene.names)
                line = {"frame": "positions", "positions": num_positions, "agreeing": num_agreeing(found, positions)}
            elif (scale := depth_scale(scene, views)) is not None:
                eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
                found = moved(scene, torch.tensor(scale, dtype=torch.float64), eye, zero)
                line = {"frame": "depth", "scale": scale}
        result.append(found)
        lines.append(line)
    return result, lines


def depth_scale(scene: Scene, views: Sequence[View]) -> float | None:
    """Metres in one unit of the scene: the median over images of the median ratio of depths; None without any."""
    view_of, ratios = {view.name: view for view in views}, []
    for index, name in enumerate(scene.names):
        known, depth = view_of[name].known_depth, scene.depth[index]
        if known is None or known.shape != depth.shape:
            continue
        confident = scene.confidence[index] >= scene.confidence[index].median()
        usable = (known > 0) & (depth > 0) & confident
        if int(usable.sum()) >= MIN_DEPTH_PIXELS:
            ratios.append((known[usable].double() / depth[usable].double()).median())
    return float(torch.stack(ratios).median()) if ratios else None


def origin_line(origin: GpsFix) -> dict[str, Any]:
    """For summary.json."""
    line = {key: value for key, value in asdict(origin).items() if value is not None}
    return line | {"axes": "x east, y north, z up, metres"}


def _with_group(view: View, config: PriorConfig, exif: PhotoExif) -> View:
    folder = PurePosixPath(view.name).parent.as_posix()
    own = f"photo {view.name}"
    by_exif = f"exif {exif.camera}" if exif.camera else own
    groups = {"auto": None, "all": "all", "folder": f"folder {folder}", "exif": by_exif, "none": own}
    return dataclasses.replace(view, camera_group=groups[config.share_camera])


def _with_exif_focal(view: View, path: Path, sigma: float) -> View:
    focal = exif_focal_px(path, view.original_size) if view.known_K is None else None
    if focal is None:
        return view
    width, height = view.original_size
    K = K_from_focal(torch.tensor(focal, dtype=torch.float64), torch.tensor([width / 2, height / 2]))
    return dataclasses.replace(view, known_K=K, focal_sigma=sigma)


def _with_positions(
    views: Sequence[View], fixes: Mapping[str, GpsFix], usual_sigma: float
) -> tuple[list[View], GpsFix]:
    origin, positions = enu_positions(fixes)
    result = []
    for view in views:
        if view.name in fixes:
            sigma = fixes[view.name].error_m or usual_sigma
            sigmas = torch.tensor([sigma, sigma, VERTICAL * sigma], dtype=torch.float64)
            position = torch.from_numpy(positions[view.name])
            view = dataclasses.replace(view, known_position=position, position_sigma=sigmas)  # noqa: PLW2901
        result.append(view)
    logger.info("%d of %d photos have GPS positions.", len(fixes), len(views))
    return result, origin


def _json_gps(cameras: Path | None) -> dict[str, tuple[float, float, float | None]]:
    if cameras is None or not (cameras.is_file() or (cameras / "cameras.json").is_file()):
        return {}
    return {frame.name: frame.gps for frame in read_cameras_json(cameras) if frame.gps is not None}


def _depth_maps(views: Sequence[View], folder: Path) -> dict[str, Float[Tensor, "_h _w"]]:
    if folder.is_file() or (folder / "cameras.json").is_file():
        frames = {frame.name: frame for frame in read_cameras_json(folder) if frame.depth_path is not None}
        return {v.name: read_depth(frames[v.name]) for v in views if v.name in frames}
    maps = {}
    for view in views:
        for suffix, unit in ((".npy", 1.0), (".png", 1e-3)):
            path = folder / f"{view.name}{suffix}"
            if path.is_file():
                maps[view.name] = unit * _read_map(path, view)
    return maps


def _read_map(path: Path, view: View) -> Float[Tensor, "h w"]:
    from PIL import Image

    try:
        values = np.load(path) if path.suffix == ".npy" else np.array(Image.open(path))
    except (OSError, ValueError) as error:
        raise InputError(f"the depth map {path} cannot be read: {error}") from error
    width, height = view.original_size
    if values.ndim != 2 or abs(values.shape[1] * height / (values.shape[0] * width) - 1) > MAX_STRETCH:
        raise InputError(f"{path} is of shape {values.shape}, which is not that of {view.name}, {(height, width)}")
    return torch.from_numpy(values.astype(np.float32))


def _on_net(view: View, depth: Float[Tensor, "h0 w0"]) -> Float[Tensor, "h w"]:
    """The depth at the nearest pixel of the map to each pixel of the view; 0 where there is none."""
    height, width = view.size
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1).reshape(-1, 2)
    stored = view.stored_from_net(grid) * (np.array(depth.shape[::-1]) / view.original_size)
    inside = ((stored >= 0) & (stored < depth.shape[::-1])).all(axis=1)
    x, y = np.where(inside[:, None], stored, 0).astype(int).T
    values = np.where(inside, depth.numpy()[y, x], 0)
    return torch.from_numpy(np.where(np.isfinite(values), values, 0).reshape(height, width).astype(np.float32))
