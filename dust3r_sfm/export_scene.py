"""Stage: aligned scenes become COLMAP models, databases and clouds, and what other tools read."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dust3r_sfm.alignment.tracks import TrackConfig, build_tracks
from dust3r_sfm.errors import InputError, ReconstructionError
from dust3r_sfm.files import LOCK_NAME, holding
from dust3r_sfm.formats.colmap import check_text_names, first_ids, write_colmap
from dust3r_sfm.formats.colmap_files import model_files
from dust3r_sfm.formats.database import write_database
from dust3r_sfm.formats.dense import write_dense
from dust3r_sfm.formats.depths import write_depths
from dust3r_sfm.formats.glb import write_glb
from dust3r_sfm.formats.hloc import check_names, write_hloc
from dust3r_sfm.formats.keypoints import IndexedMatches, index_scenes, keypoints_of_tracks, stored_keypoints
from dust3r_sfm.formats.masks import read_masks, write_masks
from dust3r_sfm.formats.matches import read_matches
from dust3r_sfm.formats.nerfstudio import write_gsplat, write_nerfstudio
from dust3r_sfm.formats.pointclouds import dense_cloud, write_ply
from dust3r_sfm.formats.scene_page import write_scene_page
from dust3r_sfm.formats.scenes import read_scenes
from dust3r_sfm.formats.undistortion import straight_views
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import SQUARE_CROP_SIZE, KnownCamera, View, load_views

logger = logging.getLogger(__name__)


Format = Literal["colmap", "database", "ply", "glb", "html", "dense", "depths", "nerfstudio", "gsplat", "hloc", "masks"]

FOLDERS = {"dense", "depths", "nerfstudio", "gsplat"}
"""Formats that are a folder for each scene."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    formats: tuple[Format, ...] = ("colmap", "database", "ply")
    """What to write: colmap: sparse/0, ...; database: database.db; ply: points.ply; glb: scene.glb, for any 3-D
    viewer; html: scene.html, cloud and cameras in a page that opens offline; dense: COLMAP's dense workspace; depths:
    depth and confidence; nerfstudio, gsplat: folders to train on; hloc: its feature and match files; masks: by
    COLMAP's names."""
    downscale: tuple[int, ...] = ()
    """Factors of the smaller copies in images_2, ... of nerfstudio and gsplat."""
    depth_kind: Literal["npy", "png"] = "npy"
    """float32 in the scene's unit, or 16 bits in the unit that units.json gives."""
    depth_size: Literal["network", "original"] = "network"
    """As fine as the network saw the photos, or as the stored files."""


def main(
    scene: Path,
    image_dir: Path,
    output: Path,
    matches: Path | None = None,
    masks: Path | None = None,
    text: bool = False,
    config: TrackConfig = TrackConfig(),  # noqa: B008  frozen
    export: ExportConfig = ExportConfig(),  # noqa: B008
) -> None:
    """Write aligned scenes in the formats of other tools.

    Args:
        scene: What align_scene or reconstruct wrote, such as scene.h5.
        image_dir: The folder of photos it was made of.
        output: Folder for sparse/0, sparse/1, ..., database.db, points.ply and what else is asked for.
        matches: What match_dense or reconstruct wrote: for database and hloc, and for points of scenes without any.
        masks: Folder with <image name>.png, black where a photo may not be used.
        text: Write the COLMAP models as text too.
        config: How points are made of matches.
        export: What to write and how.
    """
    refuse_foreign_model(output)
    with holding(output):
        scenes = read_scenes(scene)
        if text:
            check_text_names(name for one in scenes for name in one.names)
        views = load_scene_views(scenes, image_dir)
        if masks is not None:
            views = read_masks(masks, views)
        found = None if matches is None else read_matches(matches)
        if found is not None:
            scenes = [one if _num_points(one) else build_tracks(one, found, views, config) for one in scenes]
        export_scenes(scenes, views, output, text, export, image_dir, found)
    num_images, num_points = (sum(map(count, scenes)) for count in (lambda s: len(s.names), _num_points))
    logger.info("%d models of %d images and %d points are in %s.", len(scenes), num_images, num_points, output)


def export_scenes(
    scenes: Sequence[Scene],
    views: Sequence[View],
    output: Path,
    text: bool = False,
    config: ExportConfig = ExportConfig(),  # noqa: B008
    image_dir: Path | None = None,
    matches: Mapping[Pair, Matches] | None = None,
) -> None:
    """Write every format of `config` for each scene; the first is the largest.

    Every scene has a frame of its own, so models, clouds and folders stay apart: `points.ply`,
    `points_1.ply`, ... The database and hloc's files hold all. What an earlier run with more
    scenes left is removed; other files stay. Formats that copy photos need `image_dir`.
    """
    if not scenes:
        raise ReconstructionError("there is no scene to export: no two images could be aligned")
    check_formats(config, [name for scene in scenes for name in scene.names])
    if "hloc" in config.formats and matches is None:
        raise InputError("hloc's files are made of matches: give --matches, what match_dense or reconstruct wrote")
    # write_colmap takes no tracks, but not tracks without a point
    scenes = [scene if _num_points(scene) else dataclasses.replace(scene, tracks=None) for scene in scenes]
    seen_views, views = views, straight_views(views, scenes)
    folders = {
        kind: [_numbered(output / kind, i) for i in range(len(scenes))] for kind in set(config.formats) & FOLDERS
    }
    for folder in (folder for kind in folders for folder in folders[kind]):
        _claim(folder)
    together = _without_shared_images(scenes)
    indexed = index_scenes(together, matches) if "database" in config.formats else None
    if indexed is not None:
        write_database(together, indexed, output / "database.db")
    for index, (scene, first_id) in enumerate(zip(scenes, first_ids(scenes), strict=True)):
        if scene.tracks is None:
            logger.warning("Model %d has no points: give the matches of match_dense.", index)
        if "colmap" in config.formats:
            more = {} if indexed is None or index >= len(together) else _keypoints_without_point(scene, indexed)
            write_colmap(scene, output / "sparse" / str(index), text=text, first_id=first_id, more_keypoints=more)
        _write_clouds(scene, views, output, index, config.formats)
        _write_folders(scene, views, image_dir, {kind: folders[kind][index] for kind in folders}, config)
    if "html" in config.formats:
        write_scene_page(output / "scene.html", scenes, views)
    if "hloc" in config.formats:
        write_hloc(seen_views, matches, output / "hloc")
    if "masks" in config.formats:
        write_masks(views, output / "masks")
    _remove_stale(output, len(scenes))


def check_formats(config: ExportConfig, names: Iterable[str]) -> None:
    """InputError for formats that cannot be written of such images or on this machine, before the work is done."""
    if "hloc" in config.formats:
        check_names(names)
    if any(factor < 1 for factor in config.downscale):
        raise InputError(f"downscale is {' '.join(map(str, config.downscale))}: expected factors of 1 or more")
    if "glb" in config.formats and find_spec("trimesh") is None:
        raise InputError('GLB files need trimesh: pip install "dust3r_sfm[view]"')


def refuse_foreign_model(output: Path) -> None:
    """InputError where `sparse` exists and no run of ours was ever in the folder: it may be someone's only copy."""
    if (output / "sparse").exists() and not (output / LOCK_NAME).exists():
        raise InputError(f"{output / 'sparse'} exists and was not made here: choose another output folder")


def load_scene_views(scenes: Sequence[Scene], image_dir: Path) -> list[View]:
    """The views of the scenes' images, at the size that the scenes were made at."""
    sizes = {name: tuple(depth.shape) for one in scenes for name, depth in zip(one.names, one.depth, strict=True)}
    size = max(max(shape) for shape in sizes.values())
    is_square = size != SQUARE_CROP_SIZE and (size, size) in sizes.values()
    cameras = {name: camera for one in scenes for name, camera in _known_lenses(one).items()}
    views = load_views(image_dir, size, list(sizes), square_ok=is_square, cameras=cameras)
    for view in views:
        if view.size != sizes[view.name]:
            raise InputError(
                f"{view.name} in {image_dir} is {view.size} pixels where the scene has {sizes[view.name]}: "
                "expected the photos that the scene was made of"
            )
    return views


def _known_lenses(scene: Scene) -> dict[str, KnownCamera]:
    """The cameras of the images that the network saw without their distortion."""
    return {
        name: KnownCamera(torch.from_numpy(scene.K_img(i)), lens=lens)
        for i, (name, lens) in enumerate(zip(scene.names, scene.lenses, strict=False))
        if lens is not None and lens.was_known
    }


def _write_clouds(scene: Scene, views: Sequence[View], output: Path, index: int, formats: Sequence[Format]) -> None:
    if {"ply", "glb"} & set(formats):
        points, colors = dense_cloud(scene, views)
        if "ply" in formats:
            write_ply(_numbered(output / "points.ply", index), points, colors)
        if "glb" in formats:
            write_glb(_numbered(output / "scene.glb", index), scene, points, colors)


def _write_folders(
    scene: Scene, views: Sequence[View], image_dir: Path | None, folders: Mapping[str, Path], config: ExportConfig
) -> None:
    masks = {view.name: view.mask for view in views if view.mask is not None}
    if "depths" in folders:
        write_depths(scene, folders["depths"], config.depth_kind, config.depth_size, masks)
    if image_dir is None and len(folders) > ("depths" in folders):
        raise ValueError(f"{', '.join(folders)} hold copies of the photos: image_dir is needed")
    if "dense" in folders:
        write_dense(scene, image_dir, folders["dense"], masks)
    if "gsplat" in folders:
        write_gsplat(scene, image_dir, folders["gsplat"], config.downscale)
    if "nerfstudio" in folders:
        write_nerfstudio(scene, views, image_dir, folders["nerfstudio"], config.downscale)


def _keypoints_without_point(scene: Scene, indexed: IndexedMatches) -> dict[str, np.ndarray]:
    """What follows the tracks' observations in the database, so that model and database have the same keypoints."""
    observed = keypoints_of_tracks(scene)
    return {name: xy[len(observed[name]) :] for name, xy in stored_keypoints(scene, indexed).items()}


def _without_shared_images(scenes: Sequence[Scene]) -> list[Scene]:
    """The leading scenes that share no image: a database holds each image once."""
    taken: set[str] = set()
    for index, scene in enumerate(scenes):
        if taken & set(scene.names):
            logger.warning("The database has no images of model %d on, which shares some with another.", index)
            return list(scenes[:index])
        taken |= set(scene.names)
    return list(scenes)


def _claim(folder: Path) -> None:
    """Make a folder whose other files may be removed; InputError where it holds what no export wrote."""
    marker = folder / LOCK_NAME
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise InputError(f"{folder} exists and was not made here: choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _numbered(path: Path, index: int) -> Path:
    return path.with_stem(f"{path.stem}_{index}") if index else path


def _num_points(scene: Scene) -> int:
    return 0 if scene.tracks is None else len(scene.tracks.errors)


def _remove_stale(output: Path, index: int) -> None:
    """Remove the models, clouds and folders from `index` on; of a model's folder only COLMAP's files."""
    while stale := _written(output, index):
        for path in stale:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder = output / "sparse" / str(index)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        index += 1


def _written(output: Path, index: int) -> list[Path]:
    """What exports of scene `index` wrote."""
    clouds = [_numbered(output / name, index) for name in ("points.ply", "scene.glb")]
    folders = [_numbered(output / kind, index) for kind in sorted(FOLDERS)]
    found = [path for path in clouds if path.is_file()] + [path for path in folders if (path / LOCK_NAME).is_file()]
    return [*model_files(output / "sparse" / str(index)), *found]


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["export-scene", *sys.argv[1:]]))
