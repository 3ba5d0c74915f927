"""What viewers draw of a scene: a cloud ordered by confidence, cameras with their photos, pairs between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import pad

from dust3r_sfm.geometry.camera import unproject
from dust3r_sfm.geometry.transforms import camera_center, inverse, transform_points
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View

MAX_COTANGENT = 7.0
"""Points of surfaces that are seen under a smaller angle (8 degrees) mostly hang between a thing and its background."""
SPREAD = 2
"""Pixels to either side over which that angle is taken."""
FAR = 8.0
"""Points farther from the middle, in units of the distance of half of them, are not drawn."""
MAX_GAPS = 1000
"""Cameras whose distances from one another say how large cameras are drawn."""
COVER = 1.5
"""Diameter of a drawn point over the distance of neighbouring points of an image."""


@dataclass(frozen=True, eq=False)
class ViewedCloud:
    """Points in the world, the most confident first."""

    points: Float[Tensor, "n 3"]
    colors: UInt8[Tensor, "n 3"]
    confidence: Float[Tensor, " n"]
    image_indices: Int[Tensor, " n"]
    """The image that each point is of: an index into the scene's names."""
    spacing: Float[Tensor, " n"]
    """Distance of each point from the next one of its image."""

    def certainty(self) -> Float[Tensor, " n"]:
        """Confidence on a logarithmic scale of 0 to 1, outliers aside."""
        return certainty(self.confidence, self.confidence)


class Edge(NamedTuple):
    """A pair of image names, and whether any of its directions was kept."""

    name0: str
    name1: str
    kept: bool


@dataclass(frozen=True, eq=False)
class Outlook:
    """From where a scene is looked at first."""

    target: Float[Tensor, "3"]
    eye: Float[Tensor, "3"]
    up: Float[Tensor, "3"]
    camera_size: float
    """Depth of a drawn camera."""
    point_size: float
    """Diameter of a drawn point."""


def certainty(confidence: Float[Tensor, "*shape"], reference: Float[Tensor, "*other"]) -> Float[Tensor, "*shape"]:
    """Logarithms of confidences between those of the 2nd and 98th percentile of others, from 0 to 1."""
    samples = reference.flatten()
    samples = samples[:: max(1, len(samples) // 10_000)].log()
    if len(samples) == 0:
        return torch.zeros_like(confidence)
    low, high = samples.quantile(torch.tensor([0.02, 0.98])).tolist()
    return ((confidence.log() - low) / max(high - low, 1e-6)).clamp(0, 1)


def viewed_cloud(scene: Scene, views: Sequence[View], max_points: int) -> ViewedCloud:
    """The pixels of all depth maps, but for grazed, masked and far ones.

    Each map gives evenly spread ones, as many as its share of `max_points`.
    """
    view_of = {view.name: view for view in views}
    num_pixels = sum(depth.numel() for depth in scene.depth)
    clouds = []
    for index, name in enumerate(scene.names):
        quota = max_points * scene.depth[index].numel() // num_pixels
        clouds.append(_pixels_of(scene, index, view_of[name], quota))
    columns = [torch.cat(column) for column in zip(*clouds, strict=True)]
    near = _near(columns[0])
    order = columns[2][near].argsort(descending=True, stable=True)
    return ViewedCloud(*(column[near][order] for column in columns))


def _pixels_of(scene: Scene, index: int, view: View, quota: int) -> tuple[Tensor, ...]:
    """A cloud's columns for one image."""
    depth, K = scene.depth[index].cpu().float(), scene.K[index].cpu().float()
    usable = depth.isfinite() & (depth > 0) & ~_is_grazed(depth, float(K[0, 0]))
    if view.mask is not None:
        usable &= view.mask.cpu()
    found = usable.flatten().nonzero()[:, 0]
    number = min(quota, len(found))
    kept = found[torch.arange(number) * len(found) // max(1, number)]
    in_cam = unproject(K, depth).flatten(0, 1)[kept]
    in_world = transform_points(inverse(scene.cam_from_world[index].cpu().float()), in_cam)
    confidence = scene.confidence[index].cpu().float().flatten()[kept].clamp(min=1)
    spacing = in_cam[:, 2] / K[0, 0] * (len(found) / max(1, number)) ** 0.5
    return in_world, view.image.cpu().flatten(0, 1)[kept], confidence, torch.full((number,), index), spacing


def outlook(scene: Scene, cloud: ViewedCloud) -> Outlook:
    """From behind the cameras and above them, towards the middle of the more confident points."""
    poses = scene.cam_from_world.detach().cpu().float()
    centers = camera_center(poses)
    up = -poses[:, 1, :3].mean(0)
    up = up / up.norm().clamp(min=1e-9)
    points = cloud.points[: max(1, len(cloud.points) // 2)] if len(cloud.points) else centers
    target = points.median(0).values
    reach = (points - target).norm(dim=-1).quantile(0.5).clamp(min=1e-6) if len(points) < 1e6 else target.norm()
    back = centers.mean(0) - target
    back = back / back.norm() if back.norm() > 0.05 * reach else -poses[0, 2, :3]
    distance = max(2.4 * float(reach), 1.6 * float((centers - target).norm(dim=-1).median()))
    eye = target + distance * (back + 0.45 * up)
    target = target + 0.15 * (centers.mean(0) - target)  # so that the cameras are in the picture too
    some = centers[:MAX_GAPS]
    gaps = torch.cdist(some, some).fill_diagonal_(torch.inf).amin(1)
    size = 0.3 * float(gaps[gaps.isfinite()].median()) if len(centers) > 1 else float(reach)
    size = min(max(size, 0.03 * float(reach)), 0.2 * float(reach))
    return Outlook(target, eye, up, size, COVER * float(cloud.spacing.median()) if len(cloud.points) else 0.0)


def _is_grazed(depth: Float[Tensor, "h w"], focal: float) -> Bool[Tensor, "h w"]:
    """Where the surface is seen under a small angle: the cotangent is the change of log depth over the ray's turn."""
    logs = depth.clamp(min=1e-9).log()
    padded = pad(logs[None, None], (SPREAD,) * 4, mode="replicate")[0, 0]
    inner, whole = slice(SPREAD, -SPREAD), 2 * SPREAD
    down = padded[whole:, inner] - padded[:-whole, inner]
    right = padded[inner, whole:] - padded[inner, :-whole]
    return torch.hypot(down, right) * focal / whole > MAX_COTANGENT


def _near(points: Float[Tensor, "n 3"]) -> Bool[Tensor, " n"]:
    if len(points) == 0:
        return torch.zeros(0, dtype=torch.bool)
    middle = points.median(0).values
    distances = (points - middle).norm(dim=-1)
    return distances <= FAR * distances.median()
