"""What queries are localised against: images with cameras and poses, and the points that their keypoints see."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pycolmap
import torch
from jaxtyping import Float64

from dust3r_sfm.alignment.localization import Features, Structure
from dust3r_sfm.colmap_versions import add_camera, add_image
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.cameras_json import read_cameras_json
from dust3r_sfm.formats.colmap import read_colmap
from dust3r_sfm.formats.sparse_database import SparseMatches
from dust3r_sfm.geometry.camera import split_rotation
from dust3r_sfm.geometry.lens import camera_with_lens
from dust3r_sfm.mapping import triangulate
from dust3r_sfm.scene import Scene

logger = logging.getLogger(__name__)

DEPTH_STEP = 4
"""Every so many pixels of a depth map, in x and y, are enough to scale another by."""
MODELS_BELOW = ("sparse/0", "sparse")
"""Where a folder that holds no model itself may have one: as reconstruct, COLMAP and hloc leave it."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Images whose cameras and poses are known; in pixels of the stored files, in the model's frame and unit."""

    cameras: dict[str, pycolmap.Camera]
    """By image name, with their distortion."""
    cam_from_world: dict[str, Float64[np.ndarray, "3 4"]]
    seen: dict[str, Float64[np.ndarray, "_k 3"]] = field(default_factory=dict)
    """By image name, pixel (x, y) and depth of the points that the model says it sees."""

    @property
    def names(self) -> list[str]:
        return list(self.cameras)

    def only(self, names: Collection[str]) -> Reference:
        """The reference less the images that are not named."""
        kept = {
            f.name: {name: value for name, value in getattr(self, f.name).items() if name in names}
            for f in dataclasses.fields(self)
        }
        return Reference(**kept)

    def model(self) -> pycolmap.Reconstruction:
        """The images in COLMAP's types, numbered from 1, each with a camera of its own, without points."""
        model = pycolmap.Reconstruction()
        for i, (name, camera) in enumerate(self.cameras.items(), start=1):
            own = copy.deepcopy(camera)
            own.camera_id = i
            add_camera(model, own)
            image = pycolmap.Image(name=name, camera_id=i, image_id=i)
            add_image(model, image, pycolmap.Rigid3d(self.cam_from_world[name]))
        return model

    def guesses_for(self, size: tuple[int, int]) -> tuple[pycolmap.Camera, ...]:
        """A camera of each kind that took images of this size: the one of median focal length, with its distortion."""
        kinds: dict[object, list[pycolmap.Camera]] = {}
        for camera in self.cameras.values():
            if (camera.width, camera.height) == size:
                kinds.setdefault(camera.model, []).append(camera)
        ranked = (sorted(same, key=lambda camera: camera.mean_focal_length()) for same in kinds.values())
        return tuple(same[len(same) // 2] for same in ranked)


def read_reference(path: Path) -> Reference:
    """A folder of reconstruct, a COLMAP or hloc model, or a `cameras.json` (or its folder); InputError for others."""
    if path.is_file() or (path / "cameras.json").is_file():
        return _from_json(path)
    folder = model_folder(path)
    reference = reference_of_model(read_colmap(folder))
    if not reference.cameras:
        raise InputError(f"the model in {folder} has no image with a pose: nothing can be localised in it")
    if (path / "sparse" / "1").is_dir() and folder != path:
        logger.warning("%s holds several models: the first is the reference.", path / "sparse")
    return reference


def model_folder(path: Path) -> Path:
    """Where the COLMAP model of a folder lies: in it, or below as reconstruct, COLMAP and hloc leave it."""
    return next((path / sub for sub in MODELS_BELOW if _is_model(path / sub)), path)


def warn_of_missing(model: Path, names: Collection[str]) -> None:
    """Says which images of a previous model are not among the photos: they leave it."""
    missing = sorted({image.name for image in read_colmap(model).images.values()} - set(names))
    if missing:
        logger.warning(
            "%d images of %s are not among the photos and leave it, first %s.", len(missing), model, missing[0]
        )


def reference_of_model(model: pycolmap.Reconstruction) -> Reference:
    """The posed images of a COLMAP model, in the order of their names."""
    images = sorted((image for image in model.images.values() if image.has_pose), key=lambda image: image.name)
    poses = {image.name: np.array(image.cam_from_world().matrix()) for image in images}
    seen = {}
    for image in images:
        observed = [p for p in image.points2D if p.has_point3D()]
        points = np.array([model.points3D[p.point3D_id].xyz for p in observed]).reshape(-1, 3)
        seen[image.name] = _with_depth(np.array([p.xy for p in observed]).reshape(-1, 2), points, poses[image.name])
    return Reference({image.name: model.cameras[image.camera_id] for image in images}, poses, seen)


def reference_of_scene(scene: Scene) -> Reference:
    """An aligned scene; its depth maps, thinned, say what its images see."""
    img_from_net = torch.linalg.inv(scene.net_from_img.detach().cpu().double())
    _, turn = split_rotation(img_from_net, torch.eye(3, dtype=torch.float64).expand_as(img_from_net))
    poses = (turn @ scene.cam_from_world.detach().cpu().double()).numpy()
    cameras, seen = {}, {}
    for i, name in enumerate(scene.names):
        cameras[name] = camera_with_lens(scene.K_img(i), scene.original_sizes[i], scene.lens(i))
        depth = scene.depth[i].detach().cpu().double().numpy()[::DEPTH_STEP, ::DEPTH_STEP]
        y, x = np.nonzero((depth > 0) & (scene.confidence[i].cpu().numpy()[::DEPTH_STEP, ::DEPTH_STEP] > 0))
        stored = scene.stored_from_net(i, DEPTH_STEP * np.stack([x, y], axis=1) + 0.5)
        seen[name] = np.concatenate([stored, depth[y, x][:, None]], axis=1)[np.isfinite(stored).all(axis=1)]
    return Reference(cameras, {name: poses[i, :3] for i, name in enumerate(scene.names)}, seen)


def image_folder_of(path: Path) -> Path | None:
    """The folder `images` beside a model, as COLMAP's and our own layouts have it; None where there is none."""
    folder = (path.parent if path.is_file() else path).absolute()
    places = [folder, *folder.parents][:3]
    return next((place / "images" for place in places if (place / "images").is_dir()), None)


def structure_of(reference: Reference, sparse: SparseMatches, work: Path) -> Structure:
    """The points that verified matches between reference images give under their poses; `work` is scratch space."""
    names = [name for name in reference.names if name in sparse.keypoints]
    features = {
        name: Features(sparse.keypoints[name], sparse.descriptors.get(name, np.zeros((0, 128), np.uint8)))
        for name in names
    }
    unseen = {name: np.full(len(features[name].keypoints), -1) for name in names}
    if len(names) < 2:
        return Structure(np.zeros((0, 3)), features, unseen)
    model = triangulate(reference.only(names).model(), names, sparse, work, 1.0, two_views=True)
    number = {point_id: i for i, point_id in enumerate(sorted(model.points3D))}
    points = np.array([model.points3D[point_id].xyz for point_id in number]).reshape(-1, 3)
    point_of = {
        model.image(i).name: np.array(
            [number[p.point3D_id] if p.has_point3D() else -1 for p in model.image(i).points2D], dtype=np.int64
        )
        for i in model.reg_image_ids()
    }
    return Structure(points, features, unseen | point_of)


def with_seen(reference: Reference, structure: Structure) -> Reference:
    """The reference where its images see the points of a structure too."""
    seen = dict(reference.seen)
    for name in set(structure.features) & set(reference.cameras):
        rows = np.flatnonzero(structure.point_of[name] >= 0)
        points = structure.points_in_world[structure.point_of[name][rows]]
        more = _with_depth(structure.features[name].keypoints[rows], points, reference.cam_from_world[name])
        seen[name] = np.concatenate([seen.get(name, more[:0]), more])
    return dataclasses.replace(reference, seen=seen)


def without_image(sparse: SparseMatches, name: str) -> SparseMatches:
    """The matches between the other images."""

    def less(values: Mapping) -> dict:
        return {key: value for key, value in values.items() if key != name}

    geometries = {pair: g for pair, g in sparse.geometries.items() if name not in pair}
    return SparseMatches(less(sparse.keypoints), geometries, less(sparse.cameras), less(sparse.descriptors))


def _with_depth(
    pixels: Float64[np.ndarray, "k 2"], points: Float64[np.ndarray, "k 3"], pose: Float64[np.ndarray, "3 4"]
) -> Float64[np.ndarray, "_j 3"]:
    """Pixels and depths of the points that are in front of a camera."""
    depth = points @ pose[2, :3] + pose[2, 3]
    return np.concatenate([pixels, depth[:, None]], axis=1)[depth > 0]


def _from_json(path: Path) -> Reference:
    frames = [f for f in read_cameras_json(path) if f.K is not None and f.cam_from_world is not None]
    if not frames:
        raise InputError(f"{path} has no image with K and cam_from_world: nothing can be localised in it")
    frames.sort(key=lambda frame: frame.name)
    cameras = {f.name: camera_with_lens(f.K.numpy(), f.size, f.lens) for f in frames}
    return Reference(cameras, {frame.name: frame.cam_from_world[:3].numpy() for frame in frames})


def _is_model(folder: Path) -> bool:
    return any((folder / f"images{suffix}").is_file() for suffix in (".bin", ".txt"))
