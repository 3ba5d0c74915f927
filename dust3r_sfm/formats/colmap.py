"""COLMAP models: scenes written in pixels of the stored files, and models read back with their faults named."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pycolmap
import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.colmap_versions import add_camera, add_image, is_valid
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.colmap_files import PARTS, check_binary_model, model_files
from dust3r_sfm.geometry.camera import split_rotation
from dust3r_sfm.geometry.lens import Lens, camera_with_lens
from dust3r_sfm.scene import Scene, Tracks


def write_colmap(
    scene: Scene,
    folder: Path | str,
    text: bool = False,
    shared_camera: bool = False,
    first_id: int = 1,
    more_keypoints: Mapping[str, Float[np.ndarray, "_k 2"]] | None = None,
) -> None:
    """Writes a scene as a COLMAP model in pixels of the stored files; as .bin, and as .txt too with `text`.

    The files are complete before they replace those of an earlier model in `folder`; other files
    there stay. Images of equal intrinsics share one camera; with `shared_camera` all of one stored
    size do, of the median intrinsics. Ids begin at `first_id`. `more_keypoints` of an image, which
    see no point, follow those of its tracks. Names with blanks cannot stand in a .txt model: InputError.
    """
    if text:
        check_text_names(scene.names)
    write_model(colmap_from_scene(scene, shared_camera, first_id, more_keypoints, equal_share=True), Path(folder), text)


def write_model(reconstruction: pycolmap.Reconstruction, folder: Path, text: bool = False) -> None:
    """Writes a model, complete before it replaces the files of an earlier one; other files in `folder` stay."""
    folder = Path(folder).absolute()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    temporary.mkdir(parents=True)
    try:
        reconstruction.write(temporary)
        if text:
            reconstruction.write_text(temporary)
        _check_written(temporary)
        folder.mkdir(exist_ok=True)
        written = {file.name for file in temporary.iterdir()}
        for stale in model_files(folder):
            if stale.name not in written:
                stale.unlink()
        for name in sorted(written):
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_text_names(names: Iterable[str]) -> None:
    """InputError for names that a .txt model cannot hold: COLMAP reads them back cut at the first blank."""
    blank = next((name for name in names if any(character.isspace() for character in name)), None)
    if blank is not None:
        raise InputError(f"a text model cannot hold image names with blanks, such as {blank!r}: rename, or omit text")


def read_colmap(folder: Path | str) -> pycolmap.Reconstruction:
    """The COLMAP model in a folder, .bin or .txt; InputError where there is none, or names the file that is broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no COLMAP model at {folder}: there is no such folder")
    suffixes = [s for s in (".bin", ".txt") if all((folder / f"{part}{s}").is_file() for part in PARTS[:3])]
    if not suffixes:
        raise InputError(f"no COLMAP model in {folder}: expected cameras, images and points3D as .bin or .txt")
    if suffixes[0] == ".bin":
        check_binary_model(folder)
    try:
        reconstruction = pycolmap.Reconstruction(folder)
        valid = is_valid(reconstruction) and all(camera.verify_params() for camera in reconstruction.cameras.values())
    except (ValueError, IndexError, RuntimeError) as error:
        raise InputError(f"the COLMAP model in {folder} is broken: {error}") from error
    if not valid:
        raise InputError(
            f"the COLMAP model in {folder} is broken: its cameras, images and points contradict each other"
        )
    return reconstruction


def first_ids(scenes: Sequence[Scene]) -> list[int]:
    """The first camera and image id of each model of one run: numbered through, as in one database."""
    return list(itertools.accumulate((len(scene.names) for scene in scenes[:-1]), initial=1))


def colmap_from_scene(
    scene: Scene,
    shared_camera: bool = False,
    first_id: int = 1,
    more_keypoints: Mapping[str, Float[np.ndarray, "_k 2"]] | None = None,
    equal_share: bool = False,
) -> pycolmap.Reconstruction:
    """The scene in COLMAP's types: image i of the scene has id first_id + i, its points are numbered from 1.

    With `equal_share` images of equal intrinsics share one camera. A scene with ids of its own has those.
    """
    img_from_net = torch.linalg.inv(scene.net_from_img.detach().cpu().double())
    K, imgcam_from_netcam = split_rotation(img_from_net, scene.K.detach().cpu().double())
    cam_from_world = imgcam_from_netcam @ scene.cam_from_world.detach().cpu().double()
    if not (K.isfinite().all() and cam_from_world.isfinite().all()):
        raise ValueError("a scene with cameras that are not finite has no COLMAP model")
    reconstruction = pycolmap.Reconstruction()
    camera_ids = _add_cameras(reconstruction, K, scene, shared_camera, equal_share, first_id)
    keypoints = _keypoints_by_image(scene)
    image_ids = [first_id + i for i in range(len(scene.names))] if scene.ids is None else scene.ids.images
    for index, (name, camera_id) in enumerate(zip(scene.names, camera_ids, strict=True)):
        xy = np.concatenate([keypoints[index], (more_keypoints or {}).get(name, np.zeros((0, 2)))])
        image = pycolmap.Image(name=name, camera_id=camera_id, image_id=image_ids[index], keypoints=xy)
        add_image(reconstruction, image, pycolmap.Rigid3d(cam_from_world[index, :3].numpy()))
    if scene.tracks is not None:
        _add_points(reconstruction, scene.tracks, np.array(image_ids), _point_ids(scene))
    reconstruction.update_point_3d_errors()
    assert is_valid(reconstruction)
    return reconstruction


def _add_cameras(
    reconstruction: pycolmap.Reconstruction,
    K: Float[Tensor, "n 3 3"],
    scene: Scene,
    shared_camera: bool,
    equal_share: bool,
    first_id: int,
) -> list[int]:
    """Ids of the images' cameras, from `first_id` in the order of first use."""
    groups: dict[object, list[int]] = {}
    for index, size in enumerate(scene.original_sizes):
        lens = scene.lens(index)
        own = (size, *K[index].flatten().tolist(), lens) if equal_share else index
        groups.setdefault((size, lens and lens.model) if shared_camera else own, []).append(index)
    camera_ids = [0] * len(scene.names)
    numbered = dict(enumerate(groups.values(), start=first_id))
    if scene.ids is not None:
        numbered = {c: [i for i, own in enumerate(scene.ids.cameras) if own == c] for c in scene.ids.cameras}
    for camera_id, members in numbered.items():
        # The mean of the middle two: torch's median would take the lower.
        middle = K[members].quantile(0.5, dim=0).numpy()
        lens = _middle_lens([scene.lens(i) for i in members])
        camera = camera_with_lens(middle, scene.original_sizes[members[0]], lens, camera_id)
        assert camera.verify_params()
        add_camera(reconstruction, camera)
        for index in members:
            camera_ids[index] = camera_id
    return camera_ids


def _middle_lens(lenses: Sequence[Lens | None]) -> Lens | None:
    """The median coefficients of lenses of one model."""
    if lenses[0] is None:
        return None
    coefficients = np.median([lens.coefficients for lens in lenses], axis=0)
    return dataclasses.replace(lenses[0], coefficients=tuple(coefficients.tolist()))


def _order_by_image(tracks: Tracks) -> np.ndarray:
    return np.argsort(tracks.image_indices.cpu().numpy(), kind="stable")


def _keypoints_by_image(scene: Scene) -> list[np.ndarray]:
    if scene.tracks is None:
        return [np.zeros((0, 2))] * len(scene.names)
    order = _order_by_image(scene.tracks)
    counts = np.bincount(scene.tracks.image_indices.cpu().numpy(), minlength=len(scene.names))
    return np.split(scene.tracks.keypoints.cpu().double().numpy()[order], np.cumsum(counts)[:-1])


def _point_ids(scene: Scene) -> list[int]:
    ids, count = scene.ids, len(scene.tracks.errors)
    if ids is None:
        return list(range(1, count + 1))
    return [*ids.points[:count], *range(ids.next_point, ids.next_point + count - len(ids.points))]


def _add_points(
    reconstruction: pycolmap.Reconstruction, tracks: Tracks, image_ids: np.ndarray, point_ids: Sequence[int]
) -> None:
    """Points whose ids ascend."""
    image_indices, point_indices = tracks.image_indices.cpu().numpy(), tracks.point_indices.cpu().numpy()
    order = _order_by_image(tracks)
    starts = np.searchsorted(image_indices[order], image_indices[order])
    point2d = np.empty(len(order), dtype=np.int64)
    point2d[order] = np.arange(len(order)) - starts

    by_point = np.argsort(point_indices, kind="stable")
    elements = [
        pycolmap.TrackElement(image_id, index)
        for image_id, index in zip(image_ids[image_indices[by_point]].tolist(), point2d[by_point].tolist(), strict=True)
    ]
    ends = np.cumsum(np.bincount(point_indices, minlength=len(tracks.errors))).tolist()
    points, colors = tracks.points_in_world.cpu().double().numpy(), tracks.colors.cpu().numpy()
    before = 0
    for point_id, point, color, start, end in zip(point_ids, points, colors, [0, *ends][:-1], ends, strict=True):
        for _ in range(before + 1, point_id):  # COLMAP numbers on from the last that it has had
            reconstruction.delete_point3D(reconstruction.add_point3D(point, pycolmap.Track()))
        before = reconstruction.add_point3D(point, pycolmap.Track(elements[start:end]), color)


def _check_written(folder: Path) -> None:
    # A full disk does not stop COLMAP's writer: the files are cut short.
    try:
        check_binary_model(folder)
    except InputError as error:
        raise OSError(f"the COLMAP model could not be written whole ({error}): is the disk full?") from error
    for path in model_files(folder):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            if path.suffix == ".txt" and not file.read().endswith(b"\n"):
                raise OSError(f"the COLMAP model could not be written whole ({path} is cut short): is the disk full?")
