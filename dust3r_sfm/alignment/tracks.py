"""Matches merged into tracks: points with one pixel an image that sees them, triangulated and cleaned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dust3r_sfm.alignment.triangulation import Observations, reprojection_residuals, triangulate_tracks
from dust3r_sfm.geometry.transforms import inverse
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.scene import Scene, Tracks
from dust3r_sfm.views import View

KEYPOINTS_PER_PX = 64
"""Keypoints of one image that round to the same 64th of a pixel are the same."""
NUM_ROUNDS = 3
"""Times that points are found and what misses them is dropped."""


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    max_error_px: float = 4.0
    """Observations that miss their point by more are dropped; in network pixels, so it grows with the stored file."""
    min_length: int = 2
    """Images that have to see a point."""


def build_tracks(
    scene: Scene, matches: Mapping[Pair, Matches], views: Sequence[View], config: TrackConfig = TrackConfig()
) -> Scene:
    """The scene with tracks: matches that share a keypoint are joined, over all pairs.

    Where a track holds several keypoints of an image, the one of highest score stays. Its
    point is found robustly from the depths and rays of its observations; those that miss it
    by more than `max_error_px`, or have it behind them, are dropped, and tracks left too
    short go. Matches of images outside the scene are passed over; a point's colour is the
    mean of what its images show. No matches, or none that hold: tracks without points.
    """
    observations = _merge(scene, matches, config.min_length)
    points = torch.zeros(0, 3, dtype=torch.float64)
    for _ in range(NUM_ROUNDS):
        points = triangulate_tracks(scene, observations, config.max_error_px)
        error = torch.linalg.vector_norm(reprojection_residuals(scene, observations, points), dim=-1)
        observations, former = observations.select(error <= config.max_error_px, config.min_length)
        points = points[former]
    return dataclasses.replace(scene, tracks=_tracks(scene, observations, points, views))


def triangulation_angles_deg(scene: Scene) -> Float[Tensor, " p"]:
    """For each point of the scene's tracks the widest angle between two of its rays (to within a few per cent)."""
    tracks = scene.tracks
    if tracks is None:
        raise ValueError("the scene has no tracks: run build_tracks first")
    centers = inverse(scene.cam_from_world.double())[:, :3, 3]
    rays = tracks.points_in_world.double()[tracks.point_indices] - centers[tracks.image_indices]
    rays = torch.nn.functional.normalize(rays, dim=-1)
    reference, widest = torch.zeros(len(tracks.errors), 3, dtype=torch.float64), None
    reference[tracks.point_indices] = rays
    for _ in range(2):  # from any ray to the farthest from it, then to the farthest from that
        angle = 2 * torch.asin((rays - reference[tracks.point_indices]).norm(dim=-1).clamp(max=2) / 2)
        widest = torch.zeros(len(reference), dtype=torch.float64)
        widest.scatter_reduce_(0, tracks.point_indices, angle, "amax")
        farthest = angle == widest[tracks.point_indices]
        reference[tracks.point_indices[farthest]] = rays[farthest]
    return torch.rad2deg(widest)


def _merge(scene: Scene, matches: Mapping[Pair, Matches], min_length: int) -> Observations:
    """Connected components of matched keypoints, with one keypoint an image: that of highest score."""
    index_of = {name: i for i, name in enumerate(scene.names)}
    inside = [(pair, m) for pair, m in matches.items() if pair.name0 in index_of and pair.name1 in index_of]
    keypoints = [m.keypoints0 for _, m in inside] + [m.keypoints1 for _, m in inside]
    keypoints = torch.cat([torch.zeros(0, 2), *keypoints]).cpu().double().numpy()
    images = [index_of[pair.name0] for pair, _ in inside] + [index_of[pair.name1] for pair, _ in inside]
    images = np.repeat(np.array(images, dtype=np.int64), [len(m.scores) for _, m in inside] * 2)
    edge_scores = torch.cat([torch.zeros(0), *(m.scores for _, m in inside)]).cpu().double().numpy()

    x, y = np.round(keypoints * KEYPOINTS_PER_PX).astype(np.int64).T
    _, first, node = np.unique((images << 44) + (y << 22) + x, return_index=True, return_inverse=True)
    num_nodes, (node0, node1) = len(first), node.reshape(2, -1)
    edges = coo_array((np.ones(len(node0), dtype=bool), (node0, node1)), shape=(num_nodes, num_nodes))
    track = connected_components(edges, directed=False)[1] if num_nodes else np.zeros(0, dtype=np.int64)
    scores = np.bincount(node, weights=np.tile(edge_scores, 2), minlength=num_nodes).astype(np.float64)
    image, keypoints = images[first], keypoints[first]

    order = np.lexsort((-scores, image, track))
    chosen = order[np.diff(track[order] * len(scene.names) + image[order], prepend=-1) != 0]
    arrays = [a[chosen] for a in (track.astype(np.int64), image, keypoints, scores)]
    arrays[2] = _by_image(scene.net_from_seen, arrays[1], arrays[2])
    merged = Observations(*map(torch.from_numpy, arrays))
    return merged.select(merged.keypoints.isfinite().all(dim=1), min_length)[0]


def _by_image(
    function: Callable[[int, np.ndarray], np.ndarray], image: np.ndarray, keypoints: np.ndarray
) -> Float64[np.ndarray, "n 2"]:
    """The result of a function of an image's index and pixels, for pixels of many images."""
    result = np.zeros((len(keypoints), 2))
    for index in np.unique(image):
        result[image == index] = function(int(index), keypoints[image == index])
    return result


def _tracks(scene: Scene, observations: Observations, points: Float[Tensor, "t 3"], views: Sequence[View]) -> Tracks:
    """Observations in pixels of the stored files, with the points' mean errors there and their colours."""
    img_from_net = torch.linalg.inv(scene.net_from_img.cpu().double())[observations.image]
    linear = img_from_net[:, :2, :2]
    stored = _by_image(scene.stored_from_net, observations.image.numpy(), observations.keypoints.numpy())
    residuals = reprojection_residuals(scene, observations, points)
    errors = torch.linalg.vector_norm((linear @ residuals[..., None])[..., 0], dim=-1)
    return Tracks(
        points_in_world=points.float(),
        colors=observations.mean(_colors(scene, observations, views)).round().to(torch.uint8),
        errors=observations.mean(errors).float(),
        point_indices=observations.track,
        image_indices=observations.image,
        keypoints=torch.from_numpy(stored).float(),
    )


def with_colors(scene: Scene, views: Sequence[View]) -> Scene:
    """The scene with each point of its tracks in the mean colour of what its images show."""
    tracks, view_of = scene.tracks, {view.name: view for view in views}
    if tracks is None:
        return scene
    sums = torch.zeros(len(tracks.errors), 3, dtype=torch.float64)
    for index, name in enumerate(scene.names):
        here = (tracks.image_indices == index).nonzero()[:, 0]
        seen = scene.seen_from_net(index, scene.net_from_stored(index, tracks.keypoints[here].double().numpy()))
        sums.index_add_(0, tracks.point_indices[here], _sampled(view_of[name], seen))
    counts = tracks.point_indices.bincount(minlength=len(sums)).clamp(min=1)
    colors = (sums / counts[:, None]).round().to(torch.uint8)
    return dataclasses.replace(scene, tracks=dataclasses.replace(tracks, colors=colors))


def _colors(scene: Scene, observations: Observations, views: Sequence[View]) -> Float[Tensor, "n 3"]:
    """RGB, 0 to 255, that each observation's image shows."""
    view_of = {view.name: view for view in views}
    colors = torch.zeros(len(observations.image), 3, dtype=torch.float64)
    for index, name in enumerate(scene.names):
        here = (observations.image == index).nonzero()[:, 0]
        colors[here] = _sampled(view_of[name], scene.seen_from_net(index, observations.keypoints[here].numpy()))
    return colors


def _sampled(view: View, pixels: Float[np.ndarray, "n 2"]) -> Float64[Tensor, "n 3"]:
    """RGB, 0 to 255, interpolated between pixels of `view.image`."""
    image = view.image.cpu().double().permute(2, 0, 1)
    # grid_sample's corner convention (align_corners=False) is that of our pixels.
    grid = torch.from_numpy(pixels).nan_to_num() / torch.tensor([image.shape[2], image.shape[1]]) * 2 - 1
    sampled = torch.nn.functional.grid_sample(image[None], grid[None, None], padding_mode="border", align_corners=False)
    return sampled[0, :, 0].T
