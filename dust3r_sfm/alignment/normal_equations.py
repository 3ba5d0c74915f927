"""Gauss-Newton steps of the alignment objective in all of its unknowns: cameras, pairs, and the depth of every pixel.

With a camera's unknowns x_i, a pair's x_e and depths x_d the equations are

    [H_i   H_ie  C_i] [x_i]     [g_i]
    [H_ie' H_e   C_e] [x_e] = - [g_e]
    [C_i'  C_e'  D  ] [x_d]     [g_d]

D is diagonal, H_i and H_e are block-diagonal. Depths couple all pairs of an image, so they are eliminated without
forming what is left: conjugate gradients, preconditioned with the equations at fixed depths, whose Schur complement
over the pairs is small and dense. Pairs and images may be thousands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dust3r_sfm.alignment.objective import (
    CAMERA_DOF,
    FOCAL_INDEX,
    PAIR_DOF,
    Evaluation,
    Problem,
    State,
    focal_weights,
    focused_rays,
)

POINTS_AT_ONCE = 200_000
"""Of both sides of pairs, whose derivatives are in memory in one go: 360 bytes each."""
MAX_CG_ITERS = 40
CG_TOLERANCE = 1e-2
"""Relative residual, in the preconditioner's norm, at which a step is exact enough."""
CHECK_EVERY = 8
"""Iterations between looks at the residual on a device that would have to be waited for."""


class Step(NamedTuple):
    """A change of a state; in `cameras` the logs of factors stand last: on depths, on the focal."""

    cameras: Float[Tensor, "n 8"]
    pairs: Float[Tensor, "e 7"]
    depth: Float[Tensor, "n m"]


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """The equations at a state; per side of each pair where an image meets a pair."""

    images: Int[Tensor, "2 e"]
    is_free: Bool[Tensor, "n 8"]
    H_i: Float[Tensor, "n 8 8"]
    H_ie: Float[Tensor, "2 e 8 7"]
    H_e: Float[Tensor, "e 7 7"]
    g_i: Float[Tensor, "n 8"]
    g_e: Float[Tensor, "e 7"]
    C: Float[Tensor, "2 e m 15"]
    """Camera's unknowns first; summed over the pairs of an image, these are C_i."""
    D: Float[Tensor, "n m"]
    g_d: Float[Tensor, "n m"]

    def solve(self, damping: float) -> Step:
        """The damped step; not finite where the equations are singular."""
        at_fixed_depth = _FixedDepthSolver(self, damping)
        D = (self.D * (1 + damping)).clamp(min=1e-12)
        eliminated_i, eliminated_e = self._from_depth(self.g_d / D)
        r_i, r_e = (eliminated_i - self.g_i) * self.is_free, eliminated_e - self.g_e
        x_i, x_e = torch.zeros_like(r_i), torch.zeros_like(r_e)
        z_i, z_e = at_fixed_depth.solve(r_i, r_e)
        p_i, p_e = z_i, z_e
        rho = first_rho = _dot(r_i, z_i) + _dot(r_e, z_e)
        check_every = 1 if rho.device.type == "cpu" else CHECK_EVERY
        for i in range(MAX_CG_ITERS):
            if i % check_every == 0 and not bool(rho > CG_TOLERANCE**2 * first_rho):
                break
            Ap_i, Ap_e = at_fixed_depth.multiply(p_i, p_e)
            lost_i, lost_e = self._from_depth(self._to_depth(p_i, p_e) / D)
            Ap_i, Ap_e = (Ap_i - lost_i) * self.is_free, Ap_e - lost_e
            alpha = rho / (_dot(p_i, Ap_i) + _dot(p_e, Ap_e)).clamp(min=1e-300)
            x_i, x_e = x_i + alpha * p_i, x_e + alpha * p_e
            r_i, r_e = r_i - alpha * Ap_i, r_e - alpha * Ap_e
            z_i, z_e = at_fixed_depth.solve(r_i, r_e)
            rho, last = _dot(r_i, z_i) + _dot(r_e, z_e), rho
            beta = rho / last.clamp(min=1e-300)
            p_i, p_e = z_i + beta * p_i, z_e + beta * p_e
        return Step(x_i, x_e, -(self.g_d + self._to_depth(x_i, x_e)) / D)

    def _to_depth(self, x_i: Float[Tensor, "n 8"], x_e: Float[Tensor, "e 7"]) -> Float[Tensor, "n m"]:
        """C' x."""
        x = torch.cat([x_i[self.images], x_e.expand(2, -1, -1)], dim=-1).to(self.C.dtype)
        product = (self.C @ x[..., None])[..., 0]
        return torch.zeros_like(self.D).index_add_(0, self.images.flatten(), product.flatten(0, 1))

    def _from_depth(self, x_d: Float[Tensor, "n m"]) -> tuple[Float[Tensor, "n 8"], Float[Tensor, "e 7"]]:
        """C x_d."""
        product = (x_d[self.images][..., None, :] @ self.C)[..., 0, :].double()
        of_images = torch.zeros_like(self.g_i)
        of_images.index_add_(0, self.images.flatten(), product[..., :CAMERA_DOF].flatten(0, 1))
        return of_images, product[..., CAMERA_DOF:].sum(dim=0)


class _FixedDepthSolver:
    """The damped equations of cameras and pairs alone."""

    def __init__(self, equations: NormalEquations, damping: float) -> None:
        self.images, self.H_ie, self.is_free = equations.images, equations.H_ie, equations.is_free
        self.H_i, self.H_e = _damped(equations.H_i, damping), _damped(equations.H_e, damping)
        self.inverse_H_e = torch.linalg.inv_ex(self.H_e).inverse
        self.back = self.H_ie @ self.inverse_H_e
        n = len(self.H_i)
        S = self.H_i.new_zeros(n, n, CAMERA_DOF, CAMERA_DOF)
        S.diagonal(dim1=0, dim2=1).copy_(self.H_i.movedim(0, -1))
        for a in (0, 1):
            for b in (0, 1):
                S.index_put_((self.images[a], self.images[b]), -self.back[a] @ self.H_ie[b].mT, accumulate=True)
        self.free = self.is_free.flatten().nonzero()[:, 0]
        S = S.transpose(1, 2).reshape(n * CAMERA_DOF, n * CAMERA_DOF)[self.free][:, self.free]
        self.LU, self.pivots, _ = torch.linalg.lu_factor_ex(S)

    def multiply(
        self, x_i: Float[Tensor, "n 8"], x_e: Float[Tensor, "e 7"]
    ) -> tuple[Float[Tensor, "n 8"], Float[Tensor, "e 7"]]:
        y_i, y_e = _apply(self.H_i, x_i), _apply(self.H_e, x_e)
        for a in (0, 1):
            y_i.index_add_(0, self.images[a], _apply(self.H_ie[a], x_e))
            y_e = y_e + _apply(self.H_ie[a].mT, x_i[self.images[a]])
        return y_i, y_e

    def solve(
        self, b_i: Float[Tensor, "n 8"], b_e: Float[Tensor, "e 7"]
    ) -> tuple[Float[Tensor, "n 8"], Float[Tensor, "e 7"]]:
        b_i = b_i.clone()
        for a in (0, 1):
            b_i.index_add_(0, self.images[a], -_apply(self.back[a], b_e))
        x_i = torch.zeros_like(b_i).flatten()
        if len(self.free):
            x_i[self.free] = torch.linalg.lu_solve(self.LU, self.pivots, b_i.flatten()[self.free, None])[:, 0]
        x_i = x_i.view_as(b_i)
        for a in (0, 1):
            b_e = b_e - _apply(self.H_ie[a].mT, x_i[self.images[a]])
        return x_i, _apply(self.inverse_H_e, b_e)


def normal_equations(problem: Problem, state: State, evaluation: Evaluation) -> NormalEquations:
    """J' W J and J' W r of the residuals, with the weights that stand for the robust cost at the state."""
    images = problem.observations.images
    cam_linear, centers = state.world_from_cam[:, :3, :3].float(), state.world_from_cam[:, :3, 3].float()
    rays = focused_rays(problem, state) @ cam_linear.mT
    origins = state.world_from_pair[:, :3, 3].float()
    H, g, C = [], [], rays.new_empty(*evaluation.irls_weights.shape, CAMERA_DOF + PAIR_DOF)
    D, g_d = torch.zeros_like(state.depth), torch.zeros_like(state.depth)
    at_once = max(1, POINTS_AT_ONCE // (2 * state.depth.shape[1]))
    for e in (slice(first, first + at_once) for first in range(0, images.shape[1], at_once)):
        i = images[:, e]
        points, weights = evaluation.points_in_world[i], evaluation.irls_weights[:, e]
        residuals = points - evaluation.pair_points_in_world[:, e]
        J = _jacobian(points, centers[i], cam_linear[i][..., 2], origins[e])
        weighted = (J * weights[..., None, None]).flatten(2, 3)
        H.append((weighted.mT @ J.flatten(2, 3)).double())
        g.append((weighted.mT @ residuals.flatten(2, 3)[..., None])[..., 0].double())
        weighted_rays = rays[i] * weights[..., None]
        C[:, e] = (weighted_rays[..., None, :] @ J)[..., 0, :]
        D.index_add_(0, i.flatten(), (weighted_rays * rays[i]).sum(dim=-1).flatten(0, 1))
        g_d.index_add_(0, i.flatten(), (weighted_rays * residuals).sum(dim=-1).flatten(0, 1))
    H, g, n = torch.cat(H, dim=1), torch.cat(g, dim=1), len(state.depth)
    of_cameras = H[..., :CAMERA_DOF, :CAMERA_DOF].flatten(0, 1)
    H_i = H.new_zeros(n, CAMERA_DOF, CAMERA_DOF).index_add_(0, images.flatten(), of_cameras)
    g_i = g.new_zeros(n, CAMERA_DOF).index_add_(0, images.flatten(), g[..., :CAMERA_DOF].flatten(0, 1))
    prior = focal_weights(problem)
    H_i[:, FOCAL_INDEX, FOCAL_INDEX] += prior
    g_i[:, FOCAL_INDEX] += prior * state.focal.log()
    return NormalEquations(
        images=images,
        is_free=problem.is_free,
        H_i=H_i,
        H_ie=H[..., :CAMERA_DOF, CAMERA_DOF:],
        H_e=H[..., CAMERA_DOF:, CAMERA_DOF:].sum(dim=0),
        g_i=g_i,
        g_e=g[..., CAMERA_DOF:].sum(dim=0),
        C=C,
        D=D,
        g_d=g_d,
    )


def _jacobian(
    points: Float[Tensor, "2 e m 3"],
    centers: Float[Tensor, "2 e 3"],
    axes: Float[Tensor, "2 e 3"],
    origins: Float[Tensor, "e 3"],
) -> Float[Tensor, "2 e m 3 15"]:
    """Of residuals by the camera's and the pair's unknowns, in the world's unit and axes."""
    # In the pair's frame the pair's motion moves the image's points: hence q is of these.
    p, q = points - centers[:, :, None], points - origins[:, None]
    J = p.new_zeros(*p.shape, CAMERA_DOF + PAIR_DOF)
    _write_similarity_jacobian(J[..., : CAMERA_DOF - 1], p)
    # By the log focal the part of p across the optical axis shrinks.
    axes = axes[:, :, None]
    J[..., CAMERA_DOF - 1] = axes * (p * axes).sum(dim=-1, keepdim=True) - p
    _write_similarity_jacobian(J[..., CAMERA_DOF:], q)
    J[..., CAMERA_DOF:].neg_()
    return J


def _write_similarity_jacobian(J: Float[Tensor, "*b 3 7"], p: Float[Tensor, "*b 3"]) -> None:
    """Derivatives of exp(s) exp(w) p + t by w, t, s into zeros."""
    x, y, z = p.unbind(dim=-1)
    J[..., 1, 0], J[..., 2, 0] = -z, y
    J[..., 0, 1], J[..., 2, 1] = z, -x
    J[..., 0, 2], J[..., 1, 2] = -y, x
    J[..., 0, 3] = J[..., 1, 4] = J[..., 2, 5] = 1
    J[..., 6] = p


def _damped(hessian: Float[Tensor, "b k k"], damping: float) -> Float[Tensor, "b k k"]:
    """With a relative increase of the diagonal, and a trace of the largest for unknowns that change nothing."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    trace = 1e-6 * diagonal.amax(dim=-1, keepdim=True) + 1e-9
    return hessian + torch.diag_embed(damping * (diagonal + trace) + 1e-12)


def _apply(A: Float[Tensor, "b k l"], x: Float[Tensor, "b l"]) -> Float[Tensor, "b k"]:
    return (A @ x[..., None])[..., 0]


def _dot(a: Float[Tensor, "b k"], b: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    return (a * b).sum()
