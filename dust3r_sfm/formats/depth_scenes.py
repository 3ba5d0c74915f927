"""Photos with poses and depth maps, as others lay them out in a folder.

RGB-D:   a `cameras.json` whose frames have `depth`, see `cameras_json`;
TUM:     `rgb.txt`, `depth.txt`, `groundtruth.txt`, and `calibration.txt` with fx, fy, cx, cy in one line;
COLMAP:  a dense workspace as its undistorter and patch-match stereo leave it, or as export-scene writes `dense`:
         `images/`, `sparse/`, `stereo/depth_maps/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dust3r_sfm.depth_views import DepthView
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.cameras_json import IMAGE_FOLDER, read_cameras_json, read_depth
from dust3r_sfm.geometry.transforms import inverse, rigid_transform, rotation_from_quaternion

TUM_SCALE = 5000.0
"""Values of TUM's depth maps in one metre."""
TUM_MAX_SECONDS = 0.02
"""Photos, depth maps and poses that are farther apart in time do not belong together."""
PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE")


@dataclass(frozen=True, eq=False)
class _Frame:
    """A photo on disk; K is of the stored file."""

    path: Path
    K: Float[Tensor, "3 3"]
    cam_from_world: Float[Tensor, "4 4"]
    read_depth: Callable[[], Float[Tensor, "h w"] | None]


def read_depth_scene(folder: Path, long_side: int) -> list[DepthView]:
    """The photos with depth of a folder of one of the three forms, at most `long_side` pixels long.

    InputError where it is of none, or what it names is missing or broken.
    """
    folder = Path(folder)
    if (folder / "cameras.json").is_file():
        frames = _rgbd_frames(folder)
    elif (folder / "groundtruth.txt").is_file():
        frames = _tum_frames(folder)
    elif (folder / "stereo" / "depth_maps").is_dir():
        frames = _colmap_frames(folder)
    else:
        raise InputError(
            f"{folder} is no scene to train on: expected a cameras.json with depth maps, TUM's groundtruth.txt, "
            f"or COLMAP's dense workspace with stereo/depth_maps"
        )
    views = [view for frame in frames if (view := _load(frame, long_side)) is not None]
    if len(views) < 2:
        raise InputError(f"{folder} has {len(views)} photos with a pose and a depth map: expected at least 2")
    return views


def _load(frame: _Frame, long_side: int) -> DepthView | None:
    """The photo and its depth on one grid; None where there is no depth."""
    depth = frame.read_depth()
    if depth is None:
        return None
    try:
        with Image.open(frame.path) as image:
            image = image.convert("RGB")
    except OSError as error:
        raise InputError(f"{frame.path} cannot be read as a photo: {error}") from error
    scale = min(1.0, long_side / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    K = torch.diag(torch.tensor([width / image.width, height / image.height, 1.0])) @ frame.K.float()
    pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS))
    return DepthView(
        name=frame.path.name,
        image=torch.from_numpy(pixels),
        depth=_at_cells(depth, height, width),
        K=K,
        cam_from_world=frame.cam_from_world.float(),
    )


def _at_cells(depth: Float[Tensor, "h0 w0"], height: int, width: int) -> Float[Tensor, "h w"]:
    """The depth at the middle of each cell of a grid over the same photo: no blending over edges."""
    y, x = (((torch.arange(n) + 0.5) * side / n).long() for n, side in zip((height, width), depth.shape, strict=True))
    return depth[y][:, x].float()


def _rgbd_frames(folder: Path) -> list[_Frame]:
    frames = []
    for frame in read_cameras_json(folder):
        if frame.K is None or frame.cam_from_world is None or frame.depth_path is None:
            continue
        if frame.lens is not None:
            raise InputError(f"{folder}: {frame.name} has lens distortion: undistort the photos and their depth first")
        path = folder / IMAGE_FOLDER / frame.name
        frames.append(_Frame(path, frame.K, frame.cam_from_world, lambda frame=frame: read_depth(frame)))
    return frames


def _colmap_frames(folder: Path) -> list[_Frame]:
    from dust3r_sfm.formats.colmap import read_colmap

    sparse = folder / "sparse"
    model = read_colmap(sparse / "0" if (sparse / "0").is_dir() else sparse)
    frames = []
    for image in model.images.values():
        camera = model.cameras[image.camera_id]
        if not image.has_pose:
            continue
        if camera.model.name not in PINHOLES:
            raise InputError(
                f"{folder}: the camera of {image.name} is {camera.model.name}: expected PINHOLE, as COLMAP's "
                f"image_undistorter writes a dense workspace"
            )
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3] = torch.from_numpy(image.cam_from_world().matrix())
        K = torch.from_numpy(camera.calibration_matrix())
        read = lambda name=image.name: _stereo_depth(folder, name)  # noqa: E731
        frames.append(_Frame(folder / IMAGE_FOLDER / image.name, K, pose, read))
    return frames


def _stereo_depth(folder: Path, name: str) -> Float[Tensor, "h w"] | None:
    """The geometric depth map of an image, else the photometric one."""
    from dust3r_sfm.formats.dense import read_array

    for kind in ("geometric", "photometric"):
        path = folder / "stereo" / "depth_maps" / f"{name}.{kind}.bin"
        if path.is_file():
            try:
                return torch.from_numpy(read_array(path).copy())
            except ValueError as error:
                raise InputError(f"{path} is not a depth map of COLMAP: {error}") from error
    return None


def _tum_frames(folder: Path) -> list[_Frame]:
    if not (folder / "calibration.txt").is_file():
        raise InputError(f"there is no calibration.txt in {folder}: expected fx, fy, cx and cy in one line")
    (fx, fy, cx, cy), *_ = _table(folder / "calibration.txt", 4)
    K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    depths, poses = _listed(folder / "depth.txt"), _table(folder / "groundtruth.txt", 8)
    times = np.array([row[0] for row in poses]), np.array([time for time, _ in depths])
    frames = []
    for time, name in _listed(folder / "rgb.txt"):
        pose, depth = (int(np.abs(t - time).argmin()) for t in times)
        if max(abs(times[0][pose] - time), abs(times[1][depth] - time)) > TUM_MAX_SECONDS:
            continue
        x, y, z, qx, qy, qz, qw = poses[pose][1:]
        rotation = rotation_from_quaternion(torch.tensor([qw, qx, qy, qz], dtype=torch.float64))
        cam_from_world = inverse(rigid_transform(rotation, torch.tensor([x, y, z], dtype=torch.float64)))
        path = folder / depths[depth][1]
        frames.append(_Frame(folder / name, K, cam_from_world, lambda path=path: _tum_depth(path)))
    return frames


def _tum_depth(path: Path) -> Float[Tensor, "h w"]:
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image).astype(np.float32)) / TUM_SCALE
    except OSError as error:
        raise InputError(f"the depth map {path} cannot be read: {error}") from error


def _lines(path: Path) -> list[list[str]]:
    if not path.is_file():
        raise InputError(f"there is no {path.name} in {path.parent}: expected TUM's files beside groundtruth.txt")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.split() for line in lines if line.strip() and not line.startswith("#")]


def _listed(path: Path) -> list[tuple[float, str]]:
    """Times and file names."""
    try:
        found = [(float(time), name) for time, name in _lines(path)]
    except ValueError as error:
        raise InputError(f"{path} is not a list of times and files: {error}") from error
    if not found:
        raise InputError(f"{path} lists no files")
    return found


def _table(path: Path, columns: int) -> list[list[float]]:
    try:
        rows = [[float(value) for value in line[:columns]] for line in _lines(path)]
    except ValueError as error:
        raise InputError(f"{path} is not a table of numbers: {error}") from error
    if not rows or any(len(row) < columns for row in rows):
        raise InputError(f"{path} must have {columns} numbers a line")
    return rows
