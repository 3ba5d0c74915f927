"""Focal lengths that are known with a standard deviation, for COLMAP's bundle adjustment, which has no such residuals.

A prior is an observation there: a camera that is held sees points that are held, where the prior's focal puts them.
Their errors in pixels, which count as standard deviations, are then those of the focal from its prior.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pycolmap
from jaxtyping import Float64

from dust3r_sfm.colmap_versions import add_image

FocalPriors = Mapping[str, tuple[float, float]]
"""By image name a focal length in pixels of the stored file, and its relative standard deviation."""
MAX_TANGENT = 0.02
"""Points lie no farther off the axis, where no distortion is seen."""
MIN_OBSERVATIONS, MAX_OBSERVATIONS = 100, 2000
"""Of a prior: so many share its error that a robust loss takes each as a square."""


class Bundle(NamedTuple):
    """A model and what of it bundle adjustment takes."""

    reconstruction: pycolmap.Reconstruction
    config: pycolmap.BundleAdjustmentConfig
    has_priors: bool


def bundle_with_priors(reconstruction: pycolmap.Reconstruction, priors: FocalPriors) -> Bundle:
    """All images of the model; where there are priors of its cameras of a copy, with an image more for each.

    Photos of one camera have one prior, the mean of theirs: they tell the same number.
    """
    of_camera = _by_camera(reconstruction, priors)
    config = pycolmap.BundleAdjustmentConfig()
    for image_id in sorted(reconstruction.reg_image_ids()):
        config.add_image(image_id)
    if not of_camera:
        return Bundle(reconstruction, config, has_priors=False)
    extended = pycolmap.Reconstruction(reconstruction)
    image_id = max(extended.images.keys())
    for camera_id, (focal, sigma) in of_camera.items():
        image_id += 1
        points, keypoints = _seen(extended.camera(camera_id), focal, sigma)
        twice = np.repeat(keypoints, 2, axis=0)  # points of a single observation take no part
        image = pycolmap.Image(name=f"prior {camera_id}", camera_id=camera_id, image_id=image_id, keypoints=twice)
        add_image(extended, image, pycolmap.Rigid3d())
        config.add_image(image_id)
        config.set_constant_rig_from_world_pose(extended.image(image_id).frame_id)
        for i, point in enumerate(points):
            track = [pycolmap.TrackElement(image_id, 2 * i), pycolmap.TrackElement(image_id, 2 * i + 1)]
            config.add_constant_point(extended.add_point3D(point, pycolmap.Track(track), np.zeros(3, dtype=np.uint8)))
    return Bundle(extended, config, has_priors=True)


def take_over(reconstruction: pycolmap.Reconstruction, adjusted: pycolmap.Reconstruction) -> None:
    """Give a model the cameras, poses and points that one with more images has."""
    if adjusted is reconstruction:
        return
    for camera_id, camera in reconstruction.cameras.items():
        camera.params = adjusted.camera(camera_id).params
    for image_id in reconstruction.reg_image_ids():
        image = reconstruction.image(image_id)
        pose = adjusted.image(image_id).cam_from_world()
        reconstruction.frame(image.frame_id).set_cam_from_world(image.camera_id, pose)
    for point_id, point in reconstruction.points3D.items():
        point.xyz = adjusted.point3D(point_id).xyz


def _by_camera(reconstruction: pycolmap.Reconstruction, priors: FocalPriors) -> dict[int, tuple[float, float]]:
    found: dict[int, list[tuple[float, float]]] = {}
    for image_id in sorted(reconstruction.reg_image_ids()):
        image = reconstruction.image(image_id)
        if image.name in priors:
            found.setdefault(image.camera_id, []).append(priors[image.name])
    means = {i: np.exp(np.log(values).mean(axis=0)) for i, values in found.items()}
    return {i: (float(focal), float(sigma)) for i, (focal, sigma) in means.items()}


def _seen(
    camera: pycolmap.Camera, focal: float, sigma: float
) -> tuple[Float64[np.ndarray, "n 3"], Float64[np.ndarray, "n 2"]]:
    """Points at depth 1, to both sides along each axis that has a focal of its own, and where the prior sees them."""
    margin = sigma * focal
    count = math.ceil(min(max((margin * MAX_TANGENT) ** -2, MIN_OBSERVATIONS), MAX_OBSERVATIONS) / 4)  # seen twice
    offset = 1 / (margin * math.sqrt(4 * count))
    axes = np.eye(3)[: len(camera.focal_length_idxs())]
    points = np.repeat(np.concatenate([offset * axes, -offset * axes]), count, axis=0) + np.array([0.0, 0, 1])
    center = np.array([camera.principal_point_x, camera.principal_point_y])
    return points, center + focal * points[:, :2]
