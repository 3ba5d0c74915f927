"""Benchmark: what bundle adjustment costs beside the alignment before it: both, and tracks, for more and more images.

The cameras are those of `benchmark scale`, over waves of ground with 300 points seen in each photo of 640x480 by half a
pixel of noise. Alignment is of their reduced predictions; tracks are merged from the matches of the same pairs and
triangulated; adjustment is the refinement of all cameras and points by COLMAP's solver, in its usual rounds, from poses
that are 0.2 degrees and 1 cm off. NOTES.md beside the aligner has figures.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.alignment.align import AlignConfig
from dust3r_sfm.alignment.refine import refine
from dust3r_sfm.alignment.tracks import build_tracks
from dust3r_sfm.benchmarks.scale import SPACING_M, Survey, measure
from dust3r_sfm.engine import EngineConfig
from dust3r_sfm.evaluate import markdown_table
from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.geometry.camera import pixel_grid, project
from dust3r_sfm.geometry.metrics import all_pairs_errors_deg
from dust3r_sfm.geometry.transforms import camera_center, rigid_transform, rotation_from_rotvec, transform_points
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

NET_SIZE = (60, 80)
STORED_PER_NET = 8
NOISE_PX = 0.5
POINTS_PER_M2 = 144
"""About 300 in a photo."""
POSE_NOISE = (0.0035, 0.01)
"""Radians and metres."""


class AdjustmentFigures(NamedTuple):
    num_images: int
    num_points: int
    num_observations: int
    align_s: float
    tracks_s: float
    adjust_s: float
    before_deg: float
    """Median error of relative rotations as the adjustment finds them."""
    after_deg: float


def main(
    sizes: tuple[int, ...] = (10, 50, 200),
    num_neighbors: int = 20,
    config: AlignConfig = AlignConfig(),  # noqa: B008  frozen
) -> list[AdjustmentFigures]:
    """Time alignment, tracks and bundle adjustment side by side and print a table.

    Args:
        sizes: Numbers of images.
        num_neighbors: Partners of an image.
        config: How the alignment is sought.
    """
    figures = [_measure(n, num_neighbors, config) for n in sizes]
    header = ["images", "points", "observations", "alignment s", "tracks s", "adjustment s", "before deg", "after deg"]
    rows = [[*map(str, f[:3]), *(f"{x:.2f}" for x in f[3:6]), *(f"{x:.4f}" for x in f[6:])] for f in figures]
    print(markdown_table(header, rows))
    return figures


def _measure(n: int, num_neighbors: int, config: AlignConfig) -> AdjustmentFigures:
    aligned = measure(n, num_neighbors, config, EngineConfig())
    survey = Survey(n, num_neighbors, torch.device("cpu"))
    views, matches = _photos(survey), _matches(survey)
    start = time.perf_counter()
    scene = build_tracks(_perturbed_scene(survey, views), matches, views)
    tracked = time.perf_counter()
    adjusted = refine(colmap_from_scene(scene))
    end = time.perf_counter()
    poses = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    for i in range(n):
        poses[i, :3] = torch.from_numpy(adjusted.reconstruction.image(i + 1).cam_from_world().matrix())
    before, after = (
        float(all_pairs_errors_deg(x.double(), survey.cam_from_world)[0].median())
        for x in (scene.cam_from_world, poses)
    )
    counts = len(scene.tracks.errors), len(scene.tracks.point_indices)
    return AdjustmentFigures(n, *counts, aligned.seconds, tracked - start, end - tracked, before, after)


def _ground(xy: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b"]:
    """Its height in metres."""
    return 0.25 * (3 * xy[..., 0]).sin() * (2.5 * xy[..., 1]).cos()


def _intrinsics() -> Float[Tensor, "3 3"]:
    height, width = NET_SIZE
    return torch.tensor([[0.9 * width, 0, width / 2], [0, 0.9 * width, height / 2], [0, 0, 1]], dtype=torch.float64)


def _photos(survey: Survey) -> list[View]:
    height, width = NET_SIZE
    blank = torch.zeros(height, width, 3, dtype=torch.uint8)
    net_from_img = torch.diag(torch.tensor([1 / STORED_PER_NET, 1 / STORED_PER_NET, 1.0], dtype=torch.float64))
    size = (width * STORED_PER_NET, height * STORED_PER_NET)
    return [View(name=v.name, image=blank, original_size=size, net_from_img=net_from_img) for v in survey.views]


def _perturbed_scene(survey: Survey, views: list[View]) -> Scene:
    """The truth with its poses a little off; depths are those of the ground."""
    generator = torch.Generator().manual_seed(1)
    n, poses = len(views), survey.cam_from_world
    turns, shifts = (size * torch.randn(n, 3, generator=generator).double() for size in POSE_NOISE)
    rotation = rotation_from_rotvec(turns) @ poses[:, :3, :3]
    centers = camera_center(poses) + shifts
    rays = torch.nn.functional.pad(pixel_grid(*NET_SIZE, dtype=torch.float64), (0, 1), value=1.0)
    rays = (rays @ torch.linalg.inv(_intrinsics()).T).flatten(0, 1) @ poses[:, :3, :3]
    heights = camera_center(poses)[:, None, 2]
    depth = -heights / rays[..., 2]
    for _ in range(20):  # the ray's next point at the height of the ground below the last one
        at = camera_center(poses)[:, None] + depth[..., None] * rays
        depth = 0.5 * depth + 0.5 * (_ground(at[..., :2]) - heights) / rays[..., 2]
    depth = depth.float().view(n, *NET_SIZE)
    return Scene(
        names=tuple(view.name for view in views),
        K=_intrinsics().float().expand(n, 3, 3),
        cam_from_world=rigid_transform(rotation, -(rotation @ centers[..., None])[..., 0]).float(),
        depth=tuple(depth),
        confidence=tuple(torch.full_like(depth, 5.0)),
        net_from_img=torch.stack([view.net_from_img for view in views]),
        original_sizes=tuple(view.original_size for view in views),
    )


def _matches(survey: Survey) -> dict[Pair, Matches]:
    """Pixels of all pairs that see the same points of the ground."""
    generator = torch.Generator().manual_seed(2)
    centers = camera_center(survey.cam_from_world)[:, :2]
    low, high = centers.amin(dim=0) - 2 * SPACING_M, centers.amax(dim=0) + 2 * SPACING_M
    count = int(POINTS_PER_M2 * float((high - low).prod()))
    ground = low + (high - low) * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    points = torch.cat([ground, _ground(ground)[:, None]], dim=-1)
    keypoints, seen = [], []
    limits = torch.tensor(NET_SIZE[::-1])
    for pose in survey.cam_from_world:
        pixels = project(_intrinsics(), transform_points(pose, points))
        inside = ((pixels > 1) & (pixels < limits - 1)).all(dim=-1)
        noise = NOISE_PX / STORED_PER_NET * torch.randn(pixels.shape, generator=generator)
        keypoints.append((pixels + noise).float())
        seen.append(inside)
    index = {view.name: i for i, view in enumerate(survey.views)}
    matches = {}
    for pair in survey:
        i, j = index[pair.name0], index[pair.name1]
        both = (seen[i] & seen[j]).nonzero()[:, 0]
        if i < j and len(both):
            matches[pair] = Matches(keypoints[i][both], keypoints[j][both], torch.ones(len(both)))
    return matches
