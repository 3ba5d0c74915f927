"""Scenes from COLMAP models: cameras and points go to the network images, depths are scaled to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pycolmap
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.formats.depths import remapped
from dust3r_sfm.geometry.camera import split_rotation, transform_K
from dust3r_sfm.geometry.colmap_types import transform_from_rigid3d
from dust3r_sfm.geometry.depth_fitting import depth_through_points
from dust3r_sfm.geometry.lens import lens_of
from dust3r_sfm.geometry.transforms import inverse
from dust3r_sfm.scene import Scene, Tracks
from dust3r_sfm.views import View

MIN_DEPTHS = 10
"""Points that an image must see for its depth map to be bent to them."""

DepthMaps = Mapping[str, tuple[Float[Tensor, "_h _w"], Float[Tensor, "_h _w"]]]
"""By image name, depth and confidence of the image that the network saw; depths in any unit, one for all or not."""


def scene_from_colmap(reconstruction: pycolmap.Reconstruction, views: Sequence[View], depth_maps: DepthMaps) -> Scene:
    """The registered images of a model as a scene, in the order of `views`.

    Depth maps are bent to the points that their image sees (`depth_through_points`), or scaled by
    the median ratio over all images where it sees too few. Images without one get depth and confidence 0.
    Where the model has found a distortion they go to the pixels of the pinhole behind it.
    """
    ids = {image.name: i for i, image in reconstruction.images.items() if image.has_pose}
    views = [view for view in views if view.name in ids]
    img_from_net = torch.linalg.inv(torch.stack([view.net_from_img.double() for view in views]))
    poses = [transform_from_rigid3d(reconstruction.image(ids[view.name]).cam_from_world()) for view in views]
    cameras = [reconstruction.camera(reconstruction.image(ids[view.name]).camera_id) for view in views]
    K_img = torch.stack([torch.from_numpy(np.array(camera.calibration_matrix())) for camera in cameras])
    eye = torch.eye(3, dtype=torch.float64).expand(len(views), 3, 3)
    _, imgcam_from_netcam = split_rotation(img_from_net, eye)
    net_from_img = torch.linalg.inv(img_from_net)
    scene = Scene(
        names=tuple(view.name for view in views),
        K=transform_K(K_img, net_from_img) @ imgcam_from_netcam[:, :3, :3],
        cam_from_world=inverse(imgcam_from_netcam) @ torch.stack(poses),
        depth=tuple(torch.zeros(view.size) for view in views),
        confidence=tuple(torch.zeros(view.size) for view in views),
        net_from_img=net_from_img,
        original_sizes=tuple(view.original_size for view in views),
        tracks=tracks_of(reconstruction, [ids[view.name] for view in views]),
        lenses=tuple(lens_of(c, view.lens is not None) for c, view in zip(cameras, views, strict=True)),
        views=tuple(views),
    )
    return _with_depth(scene, {name: _straight_maps(scene, i, depth_maps) for i, name in enumerate(scene.names)})


def seen_maps(scene: Scene) -> dict[str, tuple[Float[Tensor, "_h _w"], Float[Tensor, "_h _w"]]]:
    """The depth and confidence of a scene's images on the pixels that the network saw."""
    maps = {}
    for i, name in enumerate(scene.names):
        maps[name] = scene.depth[i], scene.confidence[i]
        if has_found_lens(scene, i):
            maps[name] = remapped(maps[name], partial(scene.net_from_seen, i))
    return maps


def has_found_lens(scene: Scene, index: int) -> bool:
    """Whether an image's distortion was found after the network had seen the image with it."""
    lens = scene.lens(index)
    return lens is not None and not lens.was_known


def _straight_maps(
    scene: Scene, index: int, depth_maps: DepthMaps
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]] | None:
    maps = depth_maps.get(scene.names[index])
    if maps is None or not has_found_lens(scene, index):
        return maps
    return remapped(maps, partial(scene.seen_from_net, index))


def tracks_of(reconstruction: pycolmap.Reconstruction, image_ids: Sequence[int]) -> Tracks:
    """The points of a model as tracks; `image_ids` says which image of the model has which index."""
    return numbered_tracks_of(reconstruction, image_ids)[0]


def numbered_tracks_of(
    reconstruction: pycolmap.Reconstruction, image_ids: Sequence[int]
) -> tuple[Tracks, tuple[int, ...]]:
    """`tracks_of`, and the points' ids, which ascend."""
    index_of = {image_id: index for index, image_id in enumerate(image_ids)}
    point_ids, points, colors, errors, lengths, images, keypoints = [], [], [], [], [], [], []
    pixels = {i: np.array([p.xy for p in reconstruction.image(i).points2D]).reshape(-1, 2) for i in image_ids}
    reconstruction.update_point_3d_errors()
    for point_id in sorted(reconstruction.points3D):
        point = reconstruction.point3D(point_id)
        elements = [(index_of[e.image_id], e) for e in point.track.elements if e.image_id in index_of]
        elements = sorted(dict(reversed(elements)).items(), key=lambda pair: pair[0])
        if len(elements) < 2:
            continue
        point_ids.append(point_id)
        points.append(point.xyz)
        colors.append(point.color)
        errors.append(point.error)
        lengths.append(len(elements))
        images += [index for index, _ in elements]
        keypoints += [pixels[element.image_id][element.point2D_idx] for _, element in elements]
    tracks = Tracks(
        points_in_world=torch.from_numpy(np.array(points).reshape(-1, 3)).float(),
        colors=torch.from_numpy(np.array(colors, dtype=np.uint8).reshape(-1, 3)),
        errors=torch.tensor(errors, dtype=torch.float32),
        point_indices=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long)),
        image_indices=torch.tensor(images, dtype=torch.long),
        keypoints=torch.from_numpy(np.array(keypoints).reshape(-1, 2)).float(),
    )
    return tracks, tuple(point_ids)


def _with_depth(scene: Scene, depth_maps: Mapping[str, tuple[Tensor, Tensor] | None]) -> Scene:
    seen = {
        index: _seen_points(scene, index, *depth_maps[name])
        for index, name in enumerate(scene.names)
        if depth_maps[name] is not None
    }
    ratios = [z / depth_maps[scene.names[i]][0][pixels[:, 1], pixels[:, 0]] for i, (pixels, z) in seen.items()]
    every = torch.cat(ratios) if ratios else torch.zeros(0)
    usual = float(every.median()) if len(every) else 1.0
    depth, confidence = list(scene.depth), list(scene.confidence)
    for index, (pixels, z) in seen.items():
        own, confidence[index] = depth_maps[scene.names[index]]
        depth[index] = depth_through_points(own, pixels, z) if len(z) >= MIN_DEPTHS else own * usual
    return Scene(**{**vars(scene), "depth": tuple(depth), "confidence": tuple(confidence)})


def _seen_points(
    scene: Scene, index: int, depth: Float[Tensor, "h w"], confidence: Float[Tensor, "h w"]
) -> tuple[Int[Tensor, "k 2"], Float[Tensor, " k"]]:
    """The pixels (x, y) where an image with a depth map there sees points, and the depths of these."""
    tracks = scene.tracks
    here = tracks.image_indices == index
    pixels = scene.net_from_stored(index, tracks.keypoints[here].double().numpy())
    x, y = torch.from_numpy(np.where(np.isfinite(pixels), pixels, -1)).floor().long().unbind(-1)
    height, width = depth.shape
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    pose = scene.cam_from_world[index]
    z = tracks.points_in_world[tracks.point_indices[here]].double() @ pose[2, :3] + pose[2, 3]
    x, y, z = x[inside], y[inside], z[inside]
    usable = (depth[y, x] > 0) & (confidence[y, x] > 0) & (z > 0)
    return torch.stack([x, y], -1)[usable], z[usable].float()
