"""Thousands of images: clusters that share images are aligned alone, merged over these, and settled at the seams.

The similarity between two clusters is that of the frames of the images that both have. All clusters are averaged
robustly over these similarities; then all images, over what the clusters say of every pair of images: so what two
clusters disagree on is spread over the images around their seam.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.alignment.chaining import register_robustly
from dust3r_sfm.alignment.consistency import best_tree_poses
from dust3r_sfm.errors import ReconstructionError
from dust3r_sfm.geometry.averaging import average_similarities, split_similarity
from dust3r_sfm.geometry.registration import similarity_matrix
from dust3r_sfm.geometry.transforms import inverse, transform_points
from dust3r_sfm.graph import DisjointSets, connected_components
from dust3r_sfm.pairs import Pair, Predictions
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View

OVERLAP = 0.35
"""Images that a cluster shares with those around it, as a share of its own."""
MIN_SHARED = 3
"""Images that two clusters must share to say how they lie to one another."""
SEAM_TOLERANCES = (0.03, 0.05, 0.1)
"""Radians, logarithms of scales and image units by which single statements may be off and keep a quarter of a say."""
SEAM_ITERS = 5


class Cluster(NamedTuple):
    """Images that are aligned as one problem."""

    views: list[View]
    pairs: list[Pair]
    """All of these images."""


AlignClusters = Callable[[Sequence[Cluster]], Iterable[tuple[int, Sequence[Scene]]]]
"""Index and scenes (without views) of each cluster, largest scene first, in any order."""


def align_in_clusters(
    views: Sequence[View], predictions: Predictions, max_size: int, align_clusters: AlignClusters
) -> Iterator[Scene]:
    """Scenes of more images than fit into one problem; pairs of other images are passed over.

    The world is the first cluster's, scaled so that the median depth is 1.
    """
    by_name = {view.name: view for view in views}
    pairs_of: dict[str, list[Pair]] = defaultdict(list)
    for pair in predictions:
        if set(pair) <= by_name.keys():
            pairs_of[pair.name0].append(pair)
    num_scenes = 0
    for names in connected_components(list(by_name), chain.from_iterable(pairs_of.values())):
        pairs, clusters = [pair for name in names for pair in pairs_of[name]], []
        for group in overlapping_clusters(names, pairs, max_size):
            inside = set(group)
            chosen = [pair for name in group for pair in pairs_of[name] if pair.name1 in inside]
            clusters.append(Cluster([by_name[name] for name in group], chosen))
        scenes = dict(align_clusters(clusters))
        for joined in _joined_parts([scene for index in sorted(scenes) for scene in scenes[index]]):
            num_scenes += 1
            scene = merged_scene(joined, pairs)
            yield replace(scene, views=tuple(by_name[name] for name in scene.names))
    if not num_scenes:
        raise ReconstructionError(
            f"none of the clusters of {len(views)} images can be aligned: match more images or lower min_confidence"
        )


def overlapping_clusters(names: Sequence[str], pairs: Collection[Pair], max_size: int) -> list[list[str]]:
    """Groups of connected images, each with images of the groups around it; a small graph is one group."""
    if len(names) <= max_size:
        return [list(names)] if len(names) > 1 else []
    neighbors: dict[str, set[str]] = defaultdict(set)
    for name0, name1 in pairs:
        neighbors[name0].add(name1)
        neighbors[name1].add(name0)
    core_size = int(max_size / (1 + OVERLAP))
    left, cores = dict.fromkeys(names), []
    border: dict[str, int] = {}
    while left:
        # next to what is taken, where most of its neighbours are taken: no small groups are left between others
        seed = max(border, key=lambda name: (border[name], name), default=None)
        core = _grown(seed or next(iter(left)), left, neighbors, core_size)
        for name in core:
            left.pop(name)
            border.pop(name, None)
            for other in neighbors[name]:
                if other in left:
                    border[other] = border.get(other, 0) + 1
        cores.append(core)
    return [core + _surroundings(core, neighbors, max(int(OVERLAP * core_size), MIN_SHARED)) for core in cores]


def _grown(seed: str, left: Collection[str], neighbors: dict[str, set[str]], size: int) -> list[str]:
    """Images that are left, each with the most neighbours among those before it."""
    core, taken, links = [seed], {seed}, {name: 1 for name in neighbors[seed] if name in left}
    while links and len(core) < size:
        best = max(links, key=lambda name: (links[name], name))
        core.append(best)
        taken.add(best)
        links.pop(best)
        for name in neighbors[best]:
            if name in left and name not in taken:
                links[name] = links.get(name, 0) + 1
    return core


def _surroundings(core: Sequence[str], neighbors: dict[str, set[str]], count: int) -> list[str]:
    inside, links = set(core), defaultdict(int)
    for name in core:
        for other in neighbors[name] - inside:
            links[other] += 1
    return sorted(links, key=lambda name: (-links[name], name))[:count]


def _joined_parts(parts: Sequence[Scene]) -> list[list[Scene]]:
    """Parts that share enough images, over others where need be."""
    trees = DisjointSets(map(str, range(len(parts))))
    for a, b in _sharing(parts):
        trees.join(str(a), str(b))
    groups: dict[str, list[Scene]] = defaultdict(list)
    for i, part in enumerate(parts):
        groups[trees.root(str(i))].append(part)
    return sorted(groups.values(), key=lambda group: -len({name for part in group for name in part.names}))


def _sharing(parts: Sequence[Scene]) -> dict[tuple[int, int], list[str]]:
    """The images that two parts share, where they are enough."""
    parts_of: dict[str, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        for name in part.names:
            parts_of[name].append(i)
    shared: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, holders in parts_of.items():
        for k, a in enumerate(holders):
            for b in holders[k + 1 :]:
                shared[a, b].append(name)
    return {pair: names for pair, names in shared.items() if len(names) >= MIN_SHARED}


def merged_scene(parts: Sequence[Scene], pairs: Sequence[Pair]) -> Scene:
    """One scene of parts that share images; `pairs` are those that tie images together."""
    if len(parts) == 1:
        return parts[0]
    frames = [_frames(part) for part in parts]
    world_from_part = _placed_parts(parts, frames)
    index: dict[str, int] = {}
    start, home = [], []
    for k, part in enumerate(parts):
        for i, name in enumerate(part.names):
            if name not in index:  # first in the cluster that it is in the middle of, or one before
                index[name] = len(index)
                home.append((k, i))
                start.append(world_from_part[k] @ frames[k][i])
    images, relations = _statements(parts, frames, index, pairs)
    ones = torch.ones(len(relations), dtype=torch.float64)
    settled = average_similarities(images, relations, ones, torch.stack(start), SEAM_TOLERANCES, SEAM_ITERS)
    return _assembled(parts, frames, list(index), home, settled)


def _frames(part: Scene) -> Float[Tensor, "n 4 4"]:
    """world_from_image: the camera's frame, its unit the image's median depth."""
    units = [
        d[c > 0].median() if (c > 0).any() else d.new_ones(()) for d, c in zip(part.depth, part.confidence, strict=True)
    ]
    world_from_cam = inverse(part.cam_from_world.double())
    units = torch.stack(units).double().clamp(min=1e-9)
    return similarity_matrix(units, world_from_cam[:, :3, :3], world_from_cam[:, :3, 3])


def _placed_parts(parts: Sequence[Scene], frames: Sequence[Float[Tensor, "_n 4 4"]]) -> Float[Tensor, "k 4 4"]:
    """world_from_part, by the images that parts share; the world is the first one's."""
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 1], [-0.5, 0.87, 1], [-0.5, -0.87, 1]], dtype=torch.float64)
    shared = _sharing(parts)
    relations = []
    for (a, b), names in shared.items():
        source, target = (
            transform_points(frames[k][[parts[k].names.index(name) for name in names]], corners).flatten(0, 1)
            for k in (a, b)
        )
        relations.append(register_robustly(source.float(), target.float(), torch.ones(len(source))))
    images, scores = torch.tensor(list(shared)).T, torch.tensor([float(len(names)) for names in shared.values()])
    start = best_tree_poses(images, torch.stack(relations), scores, len(parts))
    placed = average_similarities(images, torch.stack(relations), scores.double(), start, SEAM_TOLERANCES)
    return inverse(placed[0]) @ placed


def _statements(
    parts: Sequence[Scene], frames: Sequence[Float[Tensor, "_n 4 4"]], index: Mapping[str, int], pairs: Sequence[Pair]
) -> tuple[Int[Tensor, "2 e"], Float[Tensor, "e 4 4"]]:
    """What each part says of each pair in it: the two images, and image1_from_image0."""
    edges = {
        pair if index[pair.name0] < index[pair.name1] else pair.reversed()
        for pair in pairs
        if set(pair) <= index.keys()
    }
    edges_of: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(edges):
        edges_of[pair.name0].append(pair)
    images, relations = [], []
    for part, own in zip(parts, frames, strict=True):
        row = {name: i for i, name in enumerate(part.names)}
        inside = [pair for name in part.names for pair in edges_of[name] if pair.name1 in row]
        first, second = ([row[pair[side]] for pair in inside] for side in (0, 1))
        images.append(torch.tensor([[index[pair[side]] for pair in inside] for side in (0, 1)]))
        relations.append(inverse(own[second]) @ own[first])
    return torch.cat(images, dim=1), torch.cat(relations)


def _assembled(
    parts: Sequence[Scene],
    frames: Sequence[Float[Tensor, "_n 4 4"]],
    names: Sequence[str],
    home: Sequence[tuple[int, int]],
    world_from_image: Float[Tensor, "n 4 4"],
) -> Scene:
    """The scene of settled frames; depths and intrinsics are those of each image's part in `home`."""
    scales, _ = split_similarity(world_from_image)
    own_scales, _ = split_similarity(torch.stack([frames[k][i] for k, i in home]))
    depth = [parts[k].depth[i] * float(s) for (k, i), s in zip(home, scales / own_scales, strict=True)]
    factor = 1 / float(scales.median())  # frames' units are median depths
    poses = similarity_matrix(
        torch.ones_like(scales), split_similarity(world_from_image)[1], factor * world_from_image[:, :3, 3]
    )
    return Scene(
        names=tuple(names),
        K=torch.stack([parts[k].K[i] for k, i in home]),
        cam_from_world=inverse(poses).float(),
        depth=tuple(d * factor for d in depth),
        confidence=tuple(parts[k].confidence[i] for k, i in home),
        net_from_img=torch.stack([parts[k].net_from_img[i] for k, i in home]),
        lenses=tuple(parts[k].lens(i) for k, i in home),
        original_sizes=tuple(parts[k].original_sizes[i] for k, i in home),
        doubts={pair: reason for part in parts for pair, reason in part.doubts.items()},
    )
