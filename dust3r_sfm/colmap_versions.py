"""What differs between pycolmap 3.13 and 4.2, in one place: no other module asks which of them is there.

`.ci/run_oldest` runs the tests with the older one (`requirements-oldest.txt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

MAX_ANGLE = 0.7
"""Descriptors of a match differ by no more, in radians (COLMAP's own)."""
MAX_RATIO = 0.8
"""Of the angle to the best descriptor over that to the second best (COLMAP's own)."""


def new_camera(camera_id: int, model: pycolmap.CameraModelId, focal: float, size: tuple[int, int]) -> pycolmap.Camera:
    """A camera of (width, height) pixels, its principal point in the centre and without distortion."""
    create = getattr(pycolmap.Camera, "create_from_model_id", None) or pycolmap.Camera.create
    return create(camera_id, model, focal, *size)


def add_camera(reconstruction: pycolmap.Reconstruction, camera: pycolmap.Camera) -> None:
    """Add a camera and a rig of its own, of the same id."""
    reconstruction.add_camera(camera)
    rig = pycolmap.Rig(rig_id=camera.camera_id)
    rig.add_ref_sensor(camera.sensor_id)
    reconstruction.add_rig(rig)


def add_image(reconstruction: pycolmap.Reconstruction, image: pycolmap.Image, cam_from_world: pycolmap.Rigid3d) -> None:
    """Add an image with its pose and a frame of its own, of the same id; its camera was added before."""
    frame = pycolmap.Frame(frame_id=image.image_id, rig_id=image.camera_id)
    frame.add_data_id(image.data_id)
    frame.rig_from_world = cam_from_world
    reconstruction.add_frame(frame)
    image.frame_id = frame.frame_id
    reconstruction.add_image(image)


def is_valid(reconstruction: pycolmap.Reconstruction) -> bool:
    """Whether the parts of a model fit each other; pycolmap 3.13 cannot say, and tracks and keypoints are looked at."""
    if hasattr(reconstruction, "is_valid"):
        return reconstruction.is_valid()
    seen = {i: [p.point3D_id for p in image.points2D] for i, image in reconstruction.images.items()}
    elements = [(i, e) for i, point in reconstruction.points3D.items() for e in point.track.elements]
    return all(point_id in seen.get(e.image_id, [])[e.point2D_idx : e.point2D_idx + 1] for point_id, e in elements)


def put_back(continued: pycolmap.Reconstruction, previous: pycolmap.Reconstruction) -> None:
    """Move a model in place to where the one that it continues was; pycolmap 3.13 centres and scales all of it."""
    known = sorted(set(previous.reg_image_ids()) & set(continued.reg_image_ids()))
    was, is_now = (np.array([m.image(i).projection_center() for i in known]) for m in (previous, continued))
    if np.array_equal(was, is_now):
        return
    middle, middle_now = was.mean(axis=0), is_now.mean(axis=0)
    scale = np.linalg.norm(was - middle) / max(float(np.linalg.norm(is_now - middle_now)), np.finfo(float).tiny)
    continued.transform(pycolmap.Sim3d(scale, pycolmap.Rotation3d(), middle - scale * middle_now))


def ceres_options(options: pycolmap.BundleAdjustmentOptions) -> Any:
    """The part of bundle adjustment's options that has the loss and the solver's own, to be set in place."""
    return getattr(options, "ceres", options)


def pose_prior_adjuster(
    options: pycolmap.BundleAdjustmentOptions,
    config: pycolmap.BundleAdjustmentConfig,
    priors: Mapping[int, pycolmap.PosePrior],
    reconstruction: pycolmap.Reconstruction,
    loss_scale: float,
) -> pycolmap.BundleAdjuster:
    """Bundle adjustment with priors of positions by image id, under Cauchy's loss of so many standard deviations."""
    prior_options = pycolmap.PosePriorBundleAdjustmentOptions()
    prior_options.alignment_ransac.random_seed = 0
    given: Any = priors
    if hasattr(prior_options, "ceres"):
        prior_options.ceres.prior_position_loss_function_type = pycolmap.LossFunctionType.CAUCHY
        prior_options.ceres.prior_position_loss_scale = loss_scale
        given = list(priors.values())
        for image_id, prior in priors.items():
            prior.corr_data_id = reconstruction.image(image_id).data_id
    else:
        prior_options.use_robust_loss_on_prior_position = True
        prior_options.prior_position_loss_scale = loss_scale
    return pycolmap.create_pose_prior_bundle_adjuster(options, prior_options, config, given, reconstruction)


def solved(adjuster: pycolmap.BundleAdjuster) -> bool:
    """Run a bundle adjustment; whether it found a solution."""
    summary = adjuster.solve()
    return summary.is_solution_usable() if hasattr(summary, "is_solution_usable") else summary.IsSolutionUsable()


def relative_pose(
    cameras: tuple[pycolmap.Camera, pycolmap.Camera],
    pixels: tuple[np.ndarray, np.ndarray],
    options: Mapping[str, float | int],
) -> dict[str, Any] | None:
    """COLMAP's `cam2_from_cam1`, `inlier_mask` and `num_inliers` by RANSAC, refined over the inliers; None without.

    pycolmap 3.13 takes rays in place of pixels, and an error in theirs.
    """
    ransac = pycolmap.RANSACOptions(dict(options))
    if hasattr(pycolmap.Camera, "cam_ray_from_img"):
        ends: tuple[Any, ...] = (cameras[0], pixels[0], cameras[1], pixels[1])
    else:
        ransac.max_error = float(np.mean([camera.cam_from_img_threshold(ransac.max_error) for camera in cameras]))
        in_cam = [camera.cam_from_img(xy) for camera, xy in zip(cameras, pixels, strict=True)]
        ends = tuple(np.pad(xy, ((0, 0), (0, 1)), constant_values=1.0) for xy in in_cam)
    found = pycolmap.estimate_relative_pose(*ends, ransac)
    if found is None:
        return None
    return found | (pycolmap.refine_relative_pose(found["cam2_from_cam1"], *ends, found["inlier_mask"]) or {})


def read_descriptors(database: pycolmap.Database, image_id: int) -> np.ndarray:
    """(n 128), uint8."""
    found = database.read_descriptors(image_id)
    return found if isinstance(found, np.ndarray) else found.data


def match_listed(database: str, pairs_path: Path, verification: Mapping[str, Any]) -> None:
    """Match the pairs of a database that a file lists, two names a line, on the CPU, and verify them.

    pycolmap 3.13 cannot match a list: it verifies what is matched here as COLMAP would.
    """
    if hasattr(pycolmap, "match_image_pairs"):
        pycolmap.match_image_pairs(
            database,
            pairing_options={"match_list_path": pairs_path},
            verification_options=dict(verification),
            device=pycolmap.Device.cpu,
        )
        return
    with pycolmap.Database.open(database) as opened:
        ids = {image.name: image.image_id for image in opened.read_all_images()}
        descriptors = {i: read_descriptors(opened, i) for i in ids.values() if opened.exists_descriptors(i)}
        for line in pairs_path.read_text().splitlines():
            id0, id1 = (ids[name] for name in line.split())
            if id0 in descriptors and id1 in descriptors:
                opened.write_matches(id0, id1, matched(descriptors[id0], descriptors[id1]))
    pycolmap.verify_matches(database, pairs_path, options=dict(verification))


def matched(descriptors0: np.ndarray, descriptors1: np.ndarray) -> np.ndarray:
    """Rows (m 2, uint32) of SIFT descriptors of length 512 that are each other's best, clearly before the second."""
    if min(len(descriptors0), len(descriptors1)) < 2:
        return np.zeros((0, 2), dtype=np.uint32)
    cosine = descriptors0.astype(np.float32) @ descriptors1.astype(np.float32).T / 512**2
    best0, best1 = _best(cosine), _best(cosine.T)
    rows = np.flatnonzero(best0 >= 0)
    rows = rows[best1[best0[rows]] == rows]
    return np.stack([rows, best0[rows]], axis=1).astype(np.uint32)


def _best(cosine: np.ndarray) -> np.ndarray:
    """Of each row the best column, -1 where it is too far or the second is nearly as good."""
    second, first = np.arccos(np.clip(np.partition(cosine, -2, axis=1)[:, -2:], -1, 1)).T
    return np.where((first <= MAX_ANGLE) & (first < MAX_RATIO * second), cosine.argmax(axis=1), -1)
