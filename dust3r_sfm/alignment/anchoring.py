"""Models and scenes put where their cameras were measured to stand, and bent only as far as their points agree."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import pycolmap
import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.alignment.attach import moved
from dust3r_sfm.alignment.focal_priors import FocalPriors, bundle_with_priors, take_over
from dust3r_sfm.alignment.refine import RefineConfig, solver_options, support
from dust3r_sfm.colmap_versions import pose_prior_adjuster, solved
from dust3r_sfm.geometry.bending import USUAL_SIGMAS
from dust3r_sfm.geometry.positions import MAX_SIGMAS, Placement, place_cameras
from dust3r_sfm.geometry.transforms import camera_center
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View

UNBENT = 0.995
"""Share of a model's score that must be left when its cameras follow their positions."""
MAX_ROUNDS = 4
FEWER_SIGMAS = 0.8
"""Positions are believed anew where what they are off by fell to this share."""
MAX_DRIFT = 0.2
"""Of the extent of positions, by which cameras may be off theirs before positions correct them."""
PRIOR_LOSS_SIGMAS = 3.0

Positions = Mapping[str, tuple[Float[Tensor, "3"], Float[Tensor, "3"]]]
"""By image name a position, z up, and the standard deviation of each coordinate."""


def placed(scene: Scene, positions: Positions) -> tuple[Scene, Placement | None]:
    """The scene in the frame of its cameras' positions; as it is where they tell none."""
    placement = _placement(scene.names, scene.cam_from_world.double(), positions)
    if placement is None:
        return scene, None
    scale = torch.tensor(placement.scale, dtype=torch.float64)
    return moved(scene, scale, placement.rotation, placement.translation), placement


def anchored(
    reconstruction: pycolmap.Reconstruction,
    positions: Positions,
    config: RefineConfig,
    constant_intrinsics: Collection[str] = (),
    focal_priors: FocalPriors | None = None,
) -> pycolmap.Reconstruction | None:
    """The model in the frame of its cameras' positions, adjusted to them and its points by their standard deviations.

    It is not adjusted where the points then explain less: noise of positions does not bend a model.
    Again where the positions agree far better then: what they were off by was the model's drift.
    None where the positions tell no frame.
    """
    images = {reconstruction.image(i).name: reconstruction.image(i) for i in sorted(reconstruction.reg_image_ids())}
    poses = torch.eye(4, dtype=torch.float64).repeat(len(images), 1, 1)
    poses[:, :3] = torch.from_numpy(np.stack([image.cam_from_world().matrix() for image in images.values()]))
    placement = _placement(list(images), poses, positions)
    if placement is None:
        return None
    result = pycolmap.Reconstruction(reconstruction)
    rotation = pycolmap.Rotation3d(placement.rotation.numpy())
    result.transform(pycolmap.Sim3d(placement.scale, rotation, placement.translation.numpy()))
    measured, last = {name: positions[name] for name in images if name in positions}, math.inf
    before = support(result, config)
    for _ in range(MAX_ROUNDS):
        believed, raised = _believed(result, measured)
        if raised > FEWER_SIGMAS * last:
            break
        adjusted, last = _adjusted_to(result, believed, config, constant_intrinsics, focal_priors or {}), raised
        if adjusted is None:
            break
        after = support(adjusted, config)
        if after.images < before.images or after.score < UNBENT * before.score:
            break
        result = adjusted
    return result


def num_agreeing(scene: Scene, positions: Positions) -> int:
    """How many cameras stand within `MAX_SIGMAS` standard deviations of their position."""
    centers = camera_center(scene.cam_from_world.double())
    known = [(centers[i], *positions[name]) for i, name in enumerate(scene.names) if name in positions]
    return sum(bool(((center - position) / sigma).norm() <= MAX_SIGMAS) for center, position, sigma in known)


def positions_of(views: Iterable[View]) -> Positions:
    """The positions of the views that have one."""
    known = ((view.name, view.known_position, view.position_sigma) for view in views)
    return {n: (position, sigma) for n, position, sigma in known if position is not None and sigma is not None}


def _believed(reconstruction: pycolmap.Reconstruction, positions: Positions) -> tuple[Positions, float]:
    """The positions that agree with the rest, with standard deviations raised to what they are off by on the whole.

    And the factor by which these are raised, 1 or more.
    """
    center_of = {image.name: image.projection_center() for image in reconstruction.images.values()}
    off = [((torch.from_numpy(center_of[n]) - p) / sigma).norm() for n, (p, sigma) in positions.items()]
    raised = max(float(torch.stack(off).median()) / USUAL_SIGMAS, 1.0)
    agreeing = [name for name, by in zip(positions, off, strict=True) if by <= MAX_SIGMAS * raised]
    return {name: (positions[name][0], positions[name][1] * raised) for name in agreeing}, raised


def _placement(names: Sequence[str], cam_from_world: Float[Tensor, "n 4 4"], positions: Positions) -> Placement | None:
    rows = [i for i, name in enumerate(names) if name in positions]
    if len(rows) < 3:
        return None
    measured, sigmas = (torch.stack([positions[names[i]][k].double() for i in rows]) for k in (0, 1))
    up = -cam_from_world[:, 1, :3].mean(dim=0)  # y points down
    spread = float(((measured - measured.median(dim=0).values) / sigmas).norm(dim=1).quantile(0.75))
    placement, allowed = place_cameras(camera_center(cam_from_world[rows]), measured, sigmas, up), 2.0
    while placement is None and MAX_SIGMAS * allowed < MAX_DRIFT * spread:  # positions more exact than the cameras
        placement = place_cameras(camera_center(cam_from_world[rows]), measured, allowed * sigmas, up)
        allowed *= 2
    return placement


def _adjusted_to(
    reconstruction: pycolmap.Reconstruction,
    positions: Positions,
    config: RefineConfig,
    constant_intrinsics: Collection[str],
    focal_priors: FocalPriors,
) -> pycolmap.Reconstruction | None:
    """The model adjusted with the positions as priors; None where the solver finds no solution."""
    adjusted, priors = pycolmap.Reconstruction(reconstruction), {}
    bundle = bundle_with_priors(adjusted, focal_priors)
    for image_id in sorted(adjusted.reg_image_ids()):
        image = adjusted.image(image_id)
        if image.name in constant_intrinsics:
            bundle.config.set_constant_cam_intrinsics(image.camera_id)
        if image.name in positions:
            position, sigma = (t.double().numpy() for t in positions[image.name])
            prior = pycolmap.PosePrior(position=position, position_covariance=np.diag(sigma**2))
            prior.coordinate_system = pycolmap.PosePriorCoordinateSystem.CARTESIAN
            priors[image_id] = prior
    adjuster = pose_prior_adjuster(
        solver_options(config), bundle.config, priors, bundle.reconstruction, PRIOR_LOSS_SIGMAS
    )
    if not solved(adjuster):
        return None
    take_over(adjusted, bundle.reconstruction)
    return adjusted
