"""The objective of global alignment as it was published (DUSt3R, eq. 5), over all pixels: of our states and under Adam.

sum_e sum_sides sum_px  log(confidence) |chi - s_e P_e X_e| / number,   geometric mean of the s_e = 0.5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.alignment.align import fuse_depths
from dust3r_sfm.alignment.cameras import cameras_of_views
from dust3r_sfm.alignment.objective import State, pair_scales
from dust3r_sfm.alignment.observations import Observations
from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.registration import register_similarity, similarity_matrix
from dust3r_sfm.geometry.transforms import inverse, quaternion_from_rotation, rotation_from_quaternion, transform_points
from dust3r_sfm.pairs import Pair, PairPrediction
from dust3r_sfm.views import View

BASE_SCALE = 0.5
"""Geometric mean of the pairs' scales."""
FOCAL_BREAK = 20.0
"""Factor on logarithms of focals as Adam sees them."""
PAIRS_AT_ONCE = 16
NUM_REWEIGHTINGS = 2


class Published:
    """The objective of some predictions."""

    def __init__(
        self, views: Sequence[View], predictions: dict[Pair, PairPrediction], observations: Observations
    ) -> None:
        self.views, self.predictions, self.observations = views, predictions, observations
        height, width = views[0].size
        grid = pixel_grid(height, width, device=observations.points.device)
        self.pixels = (grid - torch.tensor([width / 2, height / 2], device=grid.device)).flatten(0, 1)
        self.images, self.pairs = observations.images.cpu(), observations.pairs

    def value(self, state: State) -> float:
        """With the depths and similarities, over all pixels, that suit cameras and focals best."""
        with torch.no_grad():
            return float(self._loss(self._parameters(self._registered(state))))

    def descend(self, start: State, num_iters: int) -> float:
        """The value after steps of Adam with the published rate (0.01, falling to 1e-6 along a cosine)."""
        parameters = self._parameters(start)
        parameters = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        adam = torch.optim.Adam(list(parameters.values()), lr=0.01, betas=(0.9, 0.9))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_iters, eta_min=1e-6)
        for _ in range(num_iters):
            adam.zero_grad()
            self._loss(parameters, backward=True)
            adam.step()
            schedule.step()
        with torch.no_grad():
            return float(self._loss(parameters))

    def _registered(self, state: State) -> State:
        """With similarities that fit the depths that fit those before; in the direction in which they do not shrink."""
        K = intrinsics(self.views, state).to(state.depth.device)
        depths = torch.stack(self._depths(state)).flatten(1)
        rays = torch.nn.functional.pad(self.pixels / K[:, 0, 0].float()[:, None, None], (0, 1), value=1.0)
        chi = transform_points(state.world_from_cam.float(), depths[..., None] * rays)
        world_from_pair = state.world_from_pair.clone()
        for some in torch.arange(len(self.pairs)).split(PAIRS_AT_ONCE):
            sides = [self._predicted(some, side) for side in (0, 1)]
            points, confidences = (torch.cat(values, dim=1) for values in zip(*sides, strict=True))
            e = some.to(points.device)
            points = points.float() / self.observations.units[e, None, None]
            seen = torch.cat([chi[n] for n in self.images[:, some].to(e.device)], dim=1)
            for _ in range(NUM_REWEIGHTINGS):
                distance = (seen - transform_points(world_from_pair[e].float(), points)).norm(dim=-1)
                weights = confidences.float().log() / distance.clamp(min=1e-6)
                pair_from_world = similarity_matrix(*register_similarity(seen, points, weights))
                world_from_pair[e] = inverse(pair_from_world.double())
        return replace(state, world_from_pair=world_from_pair)

    def _depths(self, state: State) -> list[Tensor]:
        equal = torch.ones_like(self.observations.units)  # as the published objective has it
        K = intrinsics(self.views, state)
        return fuse_depths(self.views, self.predictions, self.observations, state, equal, K)[0]

    def _predicted(self, edges: Int[Tensor, " k"], side: int) -> tuple[Float[Tensor, "k m 3"], Float[Tensor, "k m"]]:
        """Pointmaps and confidences of one side."""
        found = [self.predictions[self.pairs[e]] for e in edges.tolist()]
        names = ("pointmap0_in_cam0", "confidence0") if side == 0 else ("pointmap1_in_cam0", "confidence1")
        pointmaps, confidences = (torch.stack([getattr(x, name) for x in found]).flatten(1, 2) for name in names)
        return pointmaps, confidences

    def _parameters(self, state: State) -> dict[str, Tensor]:
        """As published: quaternions, logarithms of focals, depths, scales, and of signed translations."""
        K = intrinsics(self.views, state)
        depths = self._depths(state)
        from_raw = state.world_from_pair.clone()
        from_raw[:, :3, :3] /= self.observations.units[:, None, None]
        scale = pair_scales(from_raw)
        unit = BASE_SCALE / scale.log().mean().exp()  # the world's, in which the pairs' scales are as asked for
        rotations = [state.world_from_cam[:, :3, :3], from_raw[:, :3, :3] / scale[:, None, None]]
        centers = unit * state.world_from_cam[:, :3, 3]
        shifts = from_raw[:, :3, 3] / scale[:, None]
        return {
            "cam_quaternion": quaternion_from_rotation(rotations[0]).float(),
            "cam_translation": _signed_log1p(centers).float(),
            "pair_quaternion": quaternion_from_rotation(rotations[1]).float(),
            "pair_translation": _signed_log1p(shifts).float(),
            "pair_scale": scale.log().float(),
            "focal": (FOCAL_BREAK * K[:, 0, 0].log()).float().to(scale.device),
            "depth": (torch.stack(depths).flatten(1) * float(unit)).clamp(min=1e-6).log(),
        }

    def _loss(self, p: dict[str, Tensor], backward: bool = False) -> Float[Tensor, ""]:
        """With `backward` gradients are added up image by image, so that few pairs' pixels are in memory at a time."""
        total = p["depth"].new_zeros(())
        area = len(self.pairs) * len(self.pixels)
        for n in range(len(self.views)):
            edges = (self.images[0] == n).nonzero()[:, 0]
            for some in edges.split(PAIRS_AT_ONCE) if len(edges) else ():
                loss = sum(self._side(p, some, side) for side in (0, 1)) / area
                if backward:
                    loss.backward()
                total = total + loss.detach()
        return total

    def _side(self, p: dict[str, Tensor], edges: Int[Tensor, " k"], side: int) -> Float[Tensor, ""]:
        pointmaps, confidences = self._predicted(edges, side)
        edges = edges.to(pointmaps.device)
        n = self.images[side].to(edges.device)[edges]
        n = n[:1] if side == 0 else n  # the same for all
        depth, focal = p["depth"][n].exp()[..., None], (p["focal"][n] / FOCAL_BREAK).exp()[:, None, None]
        in_cam = torch.cat([depth * self.pixels / focal, depth], dim=-1)
        cam = rotation_from_quaternion(torch.nn.functional.normalize(p["cam_quaternion"][n], dim=-1))
        chi = in_cam @ cam.mT + _signed_expm1(p["cam_translation"][n])[:, None]
        scale = (p["pair_scale"][edges] - p["pair_scale"].mean()).exp() * BASE_SCALE
        rotation = rotation_from_quaternion(torch.nn.functional.normalize(p["pair_quaternion"][edges], dim=-1))
        target = pointmaps.float() @ rotation.mT + _signed_expm1(p["pair_translation"][edges])[:, None]
        distance = (chi - scale[:, None, None] * target).square().sum(dim=-1).clamp(min=1e-20).sqrt()
        return (confidences.float().log() * distance).sum()


def intrinsics(views: Sequence[View], state: State) -> Float[Tensor, "n 3 3"]:
    K = cameras_of_views(views).base_K.clone()
    K[:, :2, :2] *= state.focal.cpu()[:, None, None]
    return K


def _signed_log1p(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


def _signed_expm1(x: Tensor) -> Tensor:
    return x.sign() * x.abs().expm1()
