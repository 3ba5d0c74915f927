"""Clusters that share images: how they are chosen, and how their scenes become one."""

import pickle
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from aligned import true_scene
from procedural import make_scene

from dust3r_sfm.alignment.align import AlignConfig, align_cluster, align_components, iterate_components
from dust3r_sfm.alignment.clusters import merged_scene, overlapping_clusters
from dust3r_sfm.engine import packed
from dust3r_sfm.errors import ReconstructionError
from dust3r_sfm.geometry.metrics import all_pairs_errors_deg
from dust3r_sfm.geometry.transforms import camera_center, inverse, rotation_from_rotvec
from dust3r_sfm.pairs import Pair
from dust3r_sfm.scene import Scene


def grid_pairs(side):
    """Images on a grid, each paired with those up to one row and column away."""
    cells = [(x, y) for x in range(side) for y in range(side)]
    near = [(a, b) for a, b in permutations(cells, 2) if max(abs(a[0] - b[0]), abs(a[1] - b[1])) == 1]
    return [f"{x}-{y}" for x, y in cells], [Pair("{}-{}".format(*a), "{}-{}".format(*b)) for a, b in near]


def test_clusters_have_every_image_share_some_and_are_no_larger_than_asked_for():
    names, pairs = grid_pairs(12)
    clusters = overlapping_clusters(names, pairs, 40)
    assert set().union(*clusters) == set(names)
    assert max(map(len, clusters)) <= 40
    assert len(clusters) <= 8
    assert all(len(set(cluster)) == len(cluster) for cluster in clusters)
    for cluster in clusters:
        assert max(len(set(cluster) & set(other)) for other in clusters if other is not cluster) >= 3
    assert overlapping_clusters(names, pairs, 144) == [names]


def part_of(scene, images, scale, seed):
    """Some images of a scene, in a frame of their own."""
    generator = torch.Generator().manual_seed(seed)
    rotation = rotation_from_rotvec(torch.randn(3, generator=generator)).double()
    world_from_cam = inverse(scene.cam_from_world.double())[images]
    world_from_cam[:, :3, :3] = rotation @ world_from_cam[:, :3, :3]
    world_from_cam[:, :3, 3] = scale * world_from_cam[:, :3, 3] @ rotation.T + torch.randn(3, generator=generator)
    fields = {
        field: tuple(getattr(scene, field)[i] for i in images) for field in ("names", "confidence", "original_sizes")
    }
    fields |= {field: getattr(scene, field)[images] for field in ("K", "net_from_img")}
    depth = tuple(scale * scene.depth[i] for i in images)
    return Scene(**fields, depth=depth, cam_from_world=inverse(world_from_cam).float())


def test_exact_parts_are_one_exact_scene_and_a_wrong_image_in_one_of_them_harms_no_other():
    truth = true_scene(make_scene(9, (16, 20), pairs=[]))
    pairs = [Pair(*p) for p in permutations(truth.names, 2)]
    parts = [
        part_of(truth, images, scale, seed)
        for seed, (images, scale) in enumerate([([*range(6)], 1.0), ([3, 4, 5, 6, 7, 8, 0], 0.3)])
    ]
    for spoiled in (None, 4):
        if spoiled is not None:
            poses = parts[1].cam_from_world.clone()
            poses[1, :3, 3] += 2.0  # of an image that both parts have
            parts[1] = replace(parts[1], cam_from_world=poses)
        scene = merged_scene(parts, pairs)
        order = [truth.names.index(name) for name in scene.names]
        assert sorted(order) == list(range(9))
        others = [k for k, i in enumerate(order) if i != spoiled]
        rotation, direction = all_pairs_errors_deg(
            scene.cam_from_world[others].double(), truth.cam_from_world[[order[k] for k in others]].double()
        )
        assert rotation.max() < 0.05
        assert direction.max() < 0.2
        ratios = torch.stack([(scene.depth[k] / truth.depth[order[k]]).median() for k in others])
        torch.testing.assert_close(ratios / ratios[0], torch.ones(len(others)), rtol=1e-3, atol=0)


def test_a_component_larger_than_a_cluster_becomes_one_scene():
    near = [(i, j) for i, j in permutations(range(12), 2) if abs(i - j) <= 3]
    truth = make_scene(12, (16, 20), noise=0.01, pairs=near)
    (scene,) = align_components(truth.views, truth.predictions, AlignConfig(max_cluster=8))
    assert set(scene.names) == set(truth.names)
    order = [truth.names.index(name) for name in scene.names]
    rotation, _ = all_pairs_errors_deg(scene.cam_from_world.double(), truth.cam_from_world[order].double())
    assert rotation.max() < 1
    assert camera_center(scene.cam_from_world).isfinite().all()


def test_pairs_of_images_that_are_not_given_are_passed_over():
    near = [(i, j) for i, j in permutations(range(9), 2) if abs(i - j) <= 3]
    truth = make_scene(9, (16, 20), noise=0.01, pairs=near)
    (scene,) = align_components(truth.views[:8], truth.predictions, AlignConfig(max_cluster=6))
    assert set(scene.names) == set(truth.names[:8])


def test_clusters_without_a_usable_pair_are_a_sentence():
    truth = make_scene(4, (16, 20))
    nothing = {
        pair: replace(p, pointmap0_in_cam0=torch.full_like(p.pointmap0_in_cam0, torch.nan))
        for pair, p in truth.predictions.items()
    }
    with pytest.raises(ReconstructionError, match="none of the clusters of 4 images"):
        align_components(truth.views, nothing, AlignConfig(max_cluster=3))


def test_clusters_of_another_process_are_the_same_scene_with_the_views_again():
    near = [(i, j) for i, j in permutations(range(8), 2) if abs(i - j) <= 3]
    truth = make_scene(8, (16, 20), noise=0.01, pairs=near)
    config = AlignConfig(max_cluster=6)

    def elsewhere(clusters):
        for index in reversed(range(len(clusters))):  # workers end in any order
            held, cluster = pickle.loads(packed((truth.predictions, clusters[index])))
            yield index, pickle.loads(packed(align_cluster(held, config, cluster)))

    (here,), (there,) = (list(iterate_components(truth.views, truth.predictions, config, f)) for f in (None, elsewhere))
    assert here.names == there.names
    assert torch.equal(here.cam_from_world, there.cam_from_world)
    assert [view.name for view in there.views] == list(there.names)
    assert there.views[0] in truth.views
