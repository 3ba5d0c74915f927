"""Similarities of many frames from those between pairs of them: rotations, scales and places, averaged robustly.

Each pair says `target_from_source` of two frames, with a scale of its own. Rotations are averaged by
iterated linear least squares over the graph of pairs (Chatterjee and Govindu, ICCV 2013), logarithms
of scales and origins linearly; pairs that disagree with the others lose their weight (Geman-McClure).
Also the mean of two relative poses of one pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csc_array
from scipy.sparse.linalg import splu
from torch import Tensor

from dust3r_sfm.geometry.registration import similarity_matrix
from dust3r_sfm.geometry.transforms import (
    camera_center,
    inverse,
    rigid_transform,
    rotation_from_rotvec,
    rotvec_from_rotation,
)

NUM_ITERS = 10
DAMPING = 1e-9
"""Of the graph's normal equations, relative to their diagonal: the frames of a part may move together."""
CORNERS = ((0.0, 0.0, 0.0), (0.5, 0.0, 1.0), (-0.25, 0.43, 1.0), (-0.25, -0.43, 1.0))
"""Points near an image, in units of what it sees, that stand for that."""


@dataclass(frozen=True, eq=False)
class Disagreement:
    """How far pairs are from what all pairs together say."""

    rotation: Float[Tensor, " e"]
    """Radians."""
    scale: Float[Tensor, " e"]
    """Absolute logarithm of the ratio."""
    offset: Float[Tensor, " e"]
    """Distance of the source's origin from where it should be, in units of the target frame."""

    def relative_to(self, rotation: float, scale: float, offset: float) -> Float[Tensor, " e"]:
        """The largest of the three in units of their tolerances."""
        return torch.stack([self.rotation / rotation, self.scale / scale, self.offset / offset]).amax(dim=0)


def disagreement(target_from_source: Float[Tensor, "e 4 4"], expected: Float[Tensor, "e 4 4"]) -> Disagreement:
    """How far similarities are from those that are expected."""
    difference = target_from_source @ inverse(expected)
    scale = torch.det(difference[:, :3, :3]).clamp(min=1e-30) ** (1 / 3)
    rotation = difference[:, :3, :3] / scale[:, None, None]
    return Disagreement(
        rotvec_from_rotation(rotation).norm(dim=-1),
        scale.log().abs(),
        (target_from_source[:, :3, 3] - expected[:, :3, 3]).norm(dim=-1),
    )


def relation_distances(first: Float[Tensor, "e 4 4"], second: Float[Tensor, "e 4 4"]) -> Float[Tensor, " e"]:
    """How far two similarities differ, in units of where they lead: mean distance of some points near the first image.

    Relative to the smaller scale, so that what shrinks everything to a point agrees with nothing.
    """
    points = torch.nn.functional.pad(torch.tensor(CORNERS), (0, 1), value=1.0)
    difference = (first - second) @ points.to(first).T
    scales = torch.minimum(*(x[:, :3, :3].square().sum(dim=(-2, -1)) / 3 for x in (first, second))).sqrt()
    return difference[:, :3].norm(dim=1).mean(dim=-1) / scales.clamp(min=1e-9, max=1)


def relative_to_frames(world_from_frame: Float[Tensor, "n 4 4"], images: Int[Tensor, "2 e"]) -> Float[Tensor, "e 4 4"]:
    """target_from_source of pairs (source, target) of frames."""
    return inverse(world_from_frame[images[1]]) @ world_from_frame[images[0]]


def mean_relative_pose(first: Float[Tensor, "*b 4 4"], second: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 4 4"]:
    """Half-way between two estimates of cam1_from_cam0 whose scales are unknown, as of both directions of a pair.

    The rotation is the mean of both, the place of camera 1 in camera 0's frame the mean of the two unit directions.
    The other one, as it is, where one is not finite; a translation of zero where the two places are opposite.
    """
    rotation0, rotation1 = first[..., :3, :3], second[..., :3, :3]
    # for two rotations the same as their mean projected to SO(3)
    rotation = rotation_from_rotvec(rotvec_from_rotation(rotation1 @ rotation0.mT) / 2) @ rotation0
    direction0, direction1 = (torch.nn.functional.normalize(camera_center(pose), dim=-1) for pose in (first, second))
    place = (direction0 + direction1)[..., None] / 2
    mean = rigid_transform(rotation, -(rotation @ place)[..., 0])
    has_first, has_second = (pose.isfinite().all(dim=-1).all(dim=-1)[..., None, None] for pose in (first, second))
    return torch.where(has_first & has_second, mean, torch.where(has_first, first, second))


def average_similarities(
    images: Int[Tensor, "2 e"],
    target_from_source: Float[Tensor, "e 4 4"],
    weights: Float[Tensor, " e"],
    start: Float[Tensor, "n 4 4"],
    tolerances: tuple[float, float, float],
    num_iters: int = NUM_ITERS,
) -> Float[Tensor, "n 4 4"]:
    """world_from_frame of all frames, from a start: a world for each connected part.

    `tolerances` (radians, logarithm of scale, units of the target frame) are the disagreements at which a pair has
    a quarter of its weight left.
    """
    world_from_frame = start
    for _ in range(num_iters):
        found = disagreement(target_from_source, relative_to_frames(world_from_frame, images))
        believed = weights / (1 + found.relative_to(*tolerances).square()).square()
        world_from_frame = _step(images, target_from_source, believed, world_from_frame)
    return world_from_frame


def _step(
    images: Int[Tensor, "2 e"],
    target_from_source: Float[Tensor, "e 4 4"],
    weights: Float[Tensor, " e"],
    world_from_frame: Float[Tensor, "n 4 4"],
) -> Float[Tensor, "n 4 4"]:
    """Weighted least squares: rotations about where they are, then scales, then origins."""
    source, target = images
    solve = _Laplacian(images, weights, len(world_from_frame))
    scales, rotations = split_similarity(world_from_frame)
    pair_scales, pair_rotations = split_similarity(target_from_source)
    # in the world's axes: R_source should be R_target @ R_pair
    residuals = rotvec_from_rotation(rotations[target] @ pair_rotations @ rotations[source].mT)
    rotations = rotation_from_rotvec(solve(residuals)) @ rotations
    residuals = scales[target].log() + pair_scales.log() - scales[source].log()
    scales = scales * solve(residuals[:, None])[:, 0].exp()
    origins = world_from_frame[:, :3, 3]
    offsets = scales[target, None] * (rotations[target] @ target_from_source[:, :3, 3:])[..., 0]
    # a unit of a frame counts alike in all frames
    solve = _Laplacian(images, weights / scales[target].square(), len(world_from_frame))
    origins = origins + solve(origins[target] + offsets - origins[source])
    return similarity_matrix(scales, rotations, origins)


def split_similarity(
    similarity: Float[Tensor, "*b 4 4"],
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b 3 3"]]:
    """Scale and rotation of similarities."""
    scale = torch.det(similarity[..., :3, :3]).clamp(min=1e-30) ** (1 / 3)
    return scale, similarity[..., :3, :3] / scale[..., None, None]


class _Laplacian:
    """Solves for x in the weighted least squares x_source - x_target = residual; smallest x in each part."""

    def __init__(self, images: Int[Tensor, "2 e"], weights: Float[Tensor, " e"], n: int) -> None:
        e = np.arange(images.shape[1])
        rows, columns = np.concatenate([e, e]), images.flatten().numpy()
        values = np.concatenate([np.ones(len(e)), -np.ones(len(e))])
        incidence = coo_array((values, (rows, columns)), shape=(len(e), n)).tocsr()
        self._right = csc_array(incidence.T * weights.numpy())
        normal = csc_array(self._right @ incidence)
        diagonal = normal.diagonal()
        normal.setdiag(diagonal * (1 + DAMPING) + 1e-12 * max(float(diagonal.max(initial=0.0)), 1e-12))
        self._factor = splu(normal)

    def __call__(self, residuals: Float[Tensor, "e k"]) -> Float[Tensor, "n k"]:
        return torch.from_numpy(self._factor.solve(self._right @ residuals.numpy()))
