"""Bundle adjustment on matches that are no better than the poses: taken where points it has not seen agree."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pycolmap

from dust3r_sfm.alignment.refine import Adjustment, RefineConfig, refine, solver_options, support, thinned

MAX_POINTS = 600
"""Points of an image that take part in the comparison."""
MIN_GAIN = 1.02
"""How much more of the points that were left out the adjusted cameras have to explain."""


def refine_validated(
    reconstruction: pycolmap.Reconstruction, config: RefineConfig, adjust: Callable[..., Adjustment] = refine
) -> Adjustment:
    """The model adjusted, or as it is where cameras adjusted to half of the points explain the other half no better.

    Noise of matches always lets adjusted cameras explain the points that they were adjusted to;
    of points that were left out they explain more only where they have come nearer to the truth.
    """
    before = support(reconstruction, config)
    few = thinned(reconstruction, MAX_POINTS)
    halves = [_with_points(few, parity) for parity in (0, 1)]
    scores = [0.0, 0.0]
    for own, other in (halves, halves[::-1]):
        adjusted = adjust(own, config)
        if adjusted.kept_input:
            return Adjustment(reconstruction, before, before, adjusted.reason)
        scores[0] += support(_fitted_points(other, other, config), config).score
        scores[1] += support(_fitted_points(other, adjusted.reconstruction, config), config).score
    if scores[1] < MIN_GAIN * scores[0]:
        reason = f"points that took no part were explained by {scores[1]:.0f} afterwards, {scores[0]:.0f} before"
        return Adjustment(reconstruction, before, before, reason)
    return adjust(reconstruction, config)


def _with_points(reconstruction: pycolmap.Reconstruction, parity: int) -> pycolmap.Reconstruction:
    """A copy with every second point."""
    half = pycolmap.Reconstruction(reconstruction)
    for point_id in _every_second(sorted(reconstruction.points3D), 1 - parity):
        half.delete_point3D(point_id)
    return half


def _every_second(ids: Collection[int], parity: int) -> list[int]:
    return [point_id for rank, point_id in enumerate(ids) if rank % 2 == parity]


def _fitted_points(
    points: pycolmap.Reconstruction, cameras: pycolmap.Reconstruction, config: RefineConfig
) -> pycolmap.Reconstruction:
    """The points of one model, adjusted alone under the cameras of another of the same images."""
    fitted = pycolmap.Reconstruction(points)
    for frame_id, frame in cameras.frames.items():
        fitted.frame(frame_id).rig_from_world = frame.rig_from_world
    for camera_id, camera in cameras.cameras.items():
        fitted.camera(camera_id).params = camera.params
    bundle = pycolmap.BundleAdjustmentConfig()
    for image_id in fitted.reg_image_ids():
        bundle.add_image(image_id)
        bundle.set_constant_rig_from_world_pose(fitted.image(image_id).frame_id)
    for camera_id in fitted.cameras:
        bundle.set_constant_cam_intrinsics(camera_id)
    pycolmap.create_default_bundle_adjuster(solver_options(config), bundle, fitted).solve()
    return fitted
