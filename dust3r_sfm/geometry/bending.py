"""A world cut into groups of points that each move by a similarity, drawn to known positions.

Least squares over all groups by Gauss-Newton steps: neighbours agree on where the points go that both have, and some
points go to positions of known standard deviations, as far as these are not far off (Cauchy's loss).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csc_array
from scipy.sparse.linalg import splu
from torch import Tensor

from dust3r_sfm.geometry.positions import MAX_SIGMAS
from dust3r_sfm.geometry.registration import similarity_matrix
from dust3r_sfm.geometry.transforms import rigid_transform, rotation_from_rotvec, transform_points

NUM_ITERS = 25
SETTLED_SIGMAS = 1e-3
"""Steps end where no known point moves by so many of its standard deviations any more."""
MIN_RAISED = 1.2
"""Factors on standard deviations below are no reason to seek anew."""
DOF = 7
USUAL_SIGMAS = 1.54
"""Median length of a vector of three numbers of unit variance."""
DAMPING = 1e-9
"""Relative; of groups that nothing holds."""


@dataclass(frozen=True, eq=False)
class Joints:
    """Where groups must agree."""

    groups: Int[Tensor, "2 e"]
    points: Float[Tensor, "e k 3"]
    """That both groups of a joint have."""
    sigmas: Float[Tensor, " e"]
    """Root mean square over its points by which a joint's groups usually differ."""


@dataclass(frozen=True, eq=False)
class Anchors:
    """Points whose positions are known."""

    groups: Int[Tensor, " p"]
    points: Float[Tensor, "p 3"]
    positions: Float[Tensor, "p 3"]
    sigmas: Float[Tensor, "p 3"]


def bending_similarities(joints: Joints, anchors: Anchors, num_groups: int) -> Float[Tensor, "m 4 4"]:
    """The groups' similarities; the points should be near their positions already, most of them.

    Where positions that are believed are still off by more than they say, so that the joints contradict them, their
    standard deviations are raised to what they are off by, once, and all is sought anew.
    """
    moved = torch.eye(4, dtype=torch.float64).repeat(num_groups, 1, 1)
    middles = _middles(joints, anchors, num_groups)
    raised = usual = 1.0
    for _ in range(2):
        last = anchors.points + torch.inf
        for _ in range(NUM_ITERS):
            now = transform_points(moved[anchors.groups], anchors.points[:, None])[:, 0]
            if float(((now - last) / anchors.sigmas).abs().max()) < SETTLED_SIGMAS:
                break
            last = now
            off = ((now - anchors.positions) / anchors.sigmas).norm(dim=-1)
            usual = max(float(off.median()) / USUAL_SIGMAS, 1.0)
            believed = 1 / (1 + (off / (usual * MAX_SIGMAS)).square())
            weights = believed[:, None] / (raised * anchors.sigmas).square()
            centers = transform_points(moved, middles[:, None])[:, 0]
            moved = _exponential(_step(joints, anchors, moved, centers, weights), centers) @ moved
        if usual < MIN_RAISED:
            break
        raised = usual
    return moved


def _middles(joints: Joints, anchors: Anchors, num_groups: int) -> Float[Tensor, "m 3"]:
    """The mean of each group's points, about which it turns."""
    groups = torch.cat([*joints.groups.repeat_interleave(joints.points.shape[1], dim=1), anchors.groups])
    points = torch.cat([joints.points.flatten(0, 1), joints.points.flatten(0, 1), anchors.points])
    total = points.new_zeros(num_groups, 3).index_add_(0, groups, points)
    return total / torch.bincount(groups, minlength=num_groups).clamp(min=1)[:, None]


def _step(
    joints: Joints,
    anchors: Anchors,
    moved: Float[Tensor, "m 4 4"],
    centers: Float[Tensor, "m 3"],
    weights: Float[Tensor, "p 3"],
) -> Float[Tensor, "m 7"]:
    """Turns, shifts and logarithms of scales about the groups' centres."""
    m = len(moved)
    points = [transform_points(moved[a], joints.points) for a in joints.groups]
    J = torch.stack([_jacobian(p - centers[a, None]) for p, a in zip(points, joints.groups, strict=True)])
    J[1] *= -1
    weighted = J / (joints.points.shape[1] * joints.sigmas.square())[:, None, None, None]
    J, weighted = J.flatten(2, 3), weighted.flatten(2, 3)
    difference = (points[0] - points[1]).flatten(1, 2)
    at_anchors = transform_points(moved[anchors.groups], anchors.points[:, None])[:, 0]
    J_anchors = _jacobian(at_anchors - centers[anchors.groups])
    weighted_anchors = J_anchors * weights[..., None]
    g = torch.zeros(m, DOF, dtype=torch.float64)
    for side in (0, 1):
        g.index_add_(0, joints.groups[side], (weighted[side].mT @ difference[..., None])[..., 0])
    off = at_anchors - anchors.positions
    g.index_add_(0, anchors.groups, (weighted_anchors.mT @ off[..., None])[..., 0])
    rows, columns = [anchors.groups], [anchors.groups]
    blocks = [weighted_anchors.mT @ J_anchors]
    for a in (0, 1):
        for b in (0, 1):
            rows.append(joints.groups[a])
            columns.append(joints.groups[b])
            blocks.append(weighted[a].mT @ J[b])
    H = _sparse(torch.cat(rows), torch.cat(columns), torch.cat(blocks), m)
    factor = splu(H, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    return -torch.from_numpy(factor.solve(g.flatten().numpy())).view(m, DOF)


def _jacobian(points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 7"]:
    """Of exp(s) exp(w) p + t by w, t, s."""
    x, y, z = points.unbind(dim=-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    rows = [[zero, z, -y, one, zero, zero, x], [-z, zero, x, zero, one, zero, y], [y, -x, zero, zero, zero, one, z]]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _sparse(rows: Int[Tensor, " b"], columns: Int[Tensor, " b"], blocks: Float[Tensor, "b 7 7"], m: int) -> csc_array:
    i = (rows[:, None, None] * DOF + torch.arange(DOF)[:, None]).expand_as(blocks).flatten().numpy()
    j = (columns[:, None, None] * DOF + torch.arange(DOF)).expand_as(blocks).flatten().numpy()
    H = csc_array(coo_array((blocks.flatten().numpy(), (i, j)), shape=(m * DOF, m * DOF)))
    diagonal = H.diagonal()
    H.setdiag(diagonal * (1 + DAMPING) + DAMPING * max(float(np.median(diagonal)), 1e-300))
    return H


def _exponential(step: Float[Tensor, "m 7"], centers: Float[Tensor, "m 3"]) -> Float[Tensor, "m 4 4"]:
    turned = similarity_matrix(step[:, 6].exp(), rotation_from_rotvec(step[:, :3]), centers + step[:, 3:6])
    back = rigid_transform(torch.eye(3, dtype=step.dtype).expand(len(step), 3, 3), -centers)
    return turned @ back
