"""Rigid and similarity transforms `target_from_source` as 4x4 matrices, and the forms that rotations take."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def rigid_transform(rotation: Float[Tensor, "*b 3 3"], translation: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4 4"]:
    """The 4x4 matrix that takes x to rotation @ x + translation."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1  # made where it is needed: a copy from the host would wait for the device
    return torch.cat([top, bottom], dim=-2)


def inverse(target_from_source: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 4 4"]:
    """source_from_target of rigid transforms and similarities (a rotation times one scale), not of any matrix."""
    linear, translation = target_from_source[..., :3, :3], target_from_source[..., :3, 3]
    squared_scale = linear.square().sum(dim=(-2, -1), keepdim=True) / 3
    inverse_linear = linear.mT / squared_scale
    return rigid_transform(inverse_linear, -(inverse_linear @ translation[..., None])[..., 0])


def transform_points(
    target_from_source: Float[Tensor, "*#b 4 4"], points: Float[Tensor, "*#b n 3"]
) -> Float[Tensor, "*#b n 3"]:
    """Points of the source frame in the target frame; leading dimensions broadcast."""
    return points @ target_from_source[..., :3, :3].mT + target_from_source[..., None, :3, 3]


def determinant(matrices: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b"]:
    """Of 3x3 matrices, without the decomposition that torch.det makes, which takes long on a GPU."""
    x, y, z = matrices.unbind(dim=-2)
    return (torch.linalg.cross(x, y, dim=-1) * z).sum(dim=-1)


def camera_center(cam_from_world: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 3"]:
    """The camera's centre in the world."""
    return inverse(cam_from_world)[..., :3, 3]


def rotation_angle_deg(
    rotation0: Float[Tensor, "*#b 3 3"], rotation1: Float[Tensor, "*#b 3 3"]
) -> Float[Tensor, "*#b"]:
    """Angle in degrees, 0 to 180, of the rotation between two; exact near 0 and near 180 too. A measure, not a loss."""
    # |R0 - R1| = 2 sqrt(2) sin(a / 2), and 1 + tr(R0^T R1) = 4 cos(a / 2)^2.
    sine = torch.linalg.matrix_norm(rotation0 - rotation1) / math.sqrt(8)
    cosine = ((1 + (rotation0 * rotation1).sum(dim=(-2, -1))) / 4).clamp(min=0).sqrt()
    return torch.rad2deg(2 * torch.atan2(sine, cosine))


def rotation_from_quaternion(wxyz: Float[Tensor, "*b 4"]) -> Float[Tensor, "*b 3 3"]:
    """Rotation of a quaternion of any length but zero (w first); zero gives NaN."""
    w, x, y, z = (wxyz / torch.linalg.vector_norm(wxyz, dim=-1, keepdim=True)).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def quaternion_from_rotation(rotation: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 4"]:
    """Unit quaternion (w first, w >= 0) of a rotation matrix."""
    R = rotation
    # Row i of 4 q q^T: each is the quaternion times 4 q_i, and the one with the largest q_i^2 is well conditioned.
    xx, yy, zz = R.diagonal(dim1=-2, dim2=-1).unbind(-1)
    wx, wy, wz = R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]
    xy, xz, yz = R[..., 0, 1] + R[..., 1, 0], R[..., 0, 2] + R[..., 2, 0], R[..., 1, 2] + R[..., 2, 1]
    outer = torch.stack(
        [
            torch.stack([1 + xx + yy + zz, wx, wy, wz], dim=-1),
            torch.stack([wx, 1 + xx - yy - zz, xy, xz], dim=-1),
            torch.stack([wy, xy, 1 - xx + yy - zz, yz], dim=-1),
            torch.stack([wz, xz, yz, 1 - xx - yy + zz], dim=-1),
        ],
        dim=-2,
    )
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    row = torch.take_along_dim(outer, best[..., None, None], dim=-2)[..., 0, :]
    quaternion = row / torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def rotation_from_rotvec(rotvec: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """Rotation about an axis by its length in radians (Rodrigues); smooth at zero."""
    x, y, z = rotvec.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    squared = rotvec.square().sum(dim=-1)[..., None, None]
    small = squared < 1e-6
    angle = torch.where(small, torch.ones_like(squared), squared).sqrt()
    # sin(a) / a and (1 - cos(a)) / a^2, by their series where the quotients lose digits and their gradients are NaN.
    first = torch.where(small, 1 - squared / 6, torch.sin(angle) / angle)
    second = torch.where(small, 0.5 - squared / 24, 2 * (torch.sin(angle / 2) / angle).square())
    eye = torch.eye(3, dtype=rotvec.dtype, device=rotvec.device)
    return eye + first * cross + second * (cross @ cross)


def rotvec_from_rotation(rotation: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3"]:
    """Axis times angle in radians, 0 to pi."""
    quaternion = quaternion_from_rotation(rotation)
    sine = torch.linalg.vector_norm(quaternion[..., 1:], dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, quaternion[..., :1])
    factor = torch.where(sine > 0, angle / sine.clamp(min=torch.finfo(sine.dtype).tiny), 2 * torch.ones_like(sine))
    return factor * quaternion[..., 1:]
