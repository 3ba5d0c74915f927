"""Alignment of graphs with wrong pairs, and of scenes that say little, against the truth."""

import math
from itertools import permutations

import pytest
import torch
from procedural import _cast_view, make_scene

from dust3r_sfm.alignment.align import align, align_components
from dust3r_sfm.alignment.consistency import best_tree_poses, confirmed_shares
from dust3r_sfm.geometry.averaging import relation_distances
from dust3r_sfm.geometry.metrics import all_pairs_errors_deg
from dust3r_sfm.geometry.registration import register_similarity, similarity_matrix
from dust3r_sfm.geometry.transforms import (
    camera_center,
    inverse,
    rigid_transform,
    rotation_angle_deg,
    rotation_from_rotvec,
    transform_points,
)
from dust3r_sfm.pairs import Pair, PairPrediction

SIZE = (24, 32)


@pytest.fixture(scope="module")
def truth():
    return make_scene(8, SIZE, noise=0.01)


def worst_errors(scene, truth):
    """Degrees over all pairs of images, and centres relative to the scene's size after the best similarity."""
    order = [truth.names.index(name) for name in scene.names]
    rotation, _ = all_pairs_errors_deg(scene.cam_from_world.double(), truth.cam_from_world[order].double())
    centers, expected = camera_center(scene.cam_from_world).double(), truth.centers[order].double()
    scale, turn, shift = register_similarity(centers, expected)
    return float(rotation.max()), float((scale * centers @ turn.mT + shift - expected).norm(dim=-1).max()) / truth.size


def random_similarity(generator):
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    scale = (torch.rand((), generator=generator) * 2 - 1).exp()
    return similarity_matrix(scale, rotation * torch.det(rotation), torch.randn(3, generator=generator))


def led_astray(prediction, similarity):
    """A fully confident prediction whose second image lies elsewhere, by a similarity in units of the distance."""
    unit = prediction.pointmap0_in_cam0.norm(dim=-1).median()
    moved = unit * transform_points(similarity, (prediction.pointmap1_in_cam0 / unit).flatten(0, 1)).view(*SIZE, 3)
    sure = torch.full(SIZE, 10.0)
    return PairPrediction(prediction.pointmap0_in_cam0, sure, moved, sure)


def with_wrong_pairs(truth, edges, generator):
    """The predictions with some pairs wrong, both directions of each in the same way."""
    predictions, wrong = dict(truth.predictions), set()
    for edge in edges:
        pair, similarity = Pair(*edge), random_similarity(generator)
        predictions[pair] = led_astray(predictions[pair], similarity)
        predictions[pair.reversed()] = led_astray(predictions[pair.reversed()], inverse(similarity))
        wrong |= {pair, pair.reversed()}
    return predictions, wrong


@pytest.mark.parametrize("share", [0.05, 0.3, 0.4])
def test_wrong_pairs_are_named_and_bend_nothing(truth, share):
    generator = torch.Generator().manual_seed(1)
    edges = sorted({tuple(sorted(pair)) for pair in truth.predictions})
    chosen = torch.randperm(len(edges), generator=generator)[: math.ceil(share * len(edges))].tolist()
    predictions, wrong = with_wrong_pairs(truth, [edges[i] for i in chosen], generator)
    scene = align(truth.views, predictions)
    rotation, center = worst_errors(scene, truth)
    assert rotation < 1
    assert center < 0.01
    assert set(scene.names) == set(truth.names)
    assert set(scene.doubts) == wrong


def test_an_image_whose_pairs_all_lead_elsewhere_is_left_out_with_the_reason(truth):
    lone, others = truth.names[5], set(truth.names) - {truth.names[5]}
    edges = [(lone, name) for name in sorted(others)]
    predictions, wrong = with_wrong_pairs(truth, edges, torch.Generator().manual_seed(2))
    (scene,) = align_components(truth.views, predictions)
    assert set(scene.names) == others
    assert set(scene.doubts) == wrong
    assert f"a place of {lone} that 1 of its 7 partners agree on" in "".join(scene.doubts.values())
    assert max(worst_errors(scene, truth)) < 0.5


def test_ends_that_look_alike_do_not_fold_a_sequence():
    """The last two of ten images are taken for the first two: those pairs agree with one another."""
    near = [(i, j) for i, j in permutations(range(10), 2) if abs(i - j) <= 3]
    truth = make_scene(10, SIZE, noise=0.01, seed=4, pairs=near)
    predictions, wrong = dict(truth.predictions), set()
    points = [
        transform_points(pose, p.flatten(0, 1))
        for pose, p in zip(truth.cam_from_world, truth.points_in_world, strict=True)
    ]
    for i, j in permutations((0, 1, 8, 9), 2):
        if abs(i - j) > 3:
            twins = truth.cam_from_world[[i % 8, j % 8]]
            seen = transform_points(twins[0] @ inverse(twins[1]), points[j])
            pair = Pair(truth.names[i], truth.names[j])
            sure = torch.full(SIZE, 10.0)
            predictions[pair] = PairPrediction(points[i].view(*SIZE, 3), sure, seen.view(*SIZE, 3), sure)
            wrong.add(pair)
    scene = align(truth.views, predictions)
    assert max(worst_errors(scene, truth)) < 1
    assert set(scene.doubts) == wrong


def test_triangles_confirm_right_pairs_alone():
    generator = torch.Generator().manual_seed(0)
    world_from_image = torch.stack([random_similarity(generator).double() for _ in range(6)])
    images = torch.tensor(list(permutations(range(6), 2))).T
    relations = inverse(world_from_image[images[1]]) @ world_from_image[images[0]]
    relations[[3, 11]] = random_similarity(generator).double()
    shares, _ = confirmed_shares(images, relations)
    is_wrong = torch.zeros(30, dtype=torch.bool)
    is_wrong[[3, 11]] = True
    assert shares[~is_wrong].min() > 0.8
    assert shares[is_wrong].max() < 0.2
    assert (confirmed_shares(images[:, :1], relations[:1])[0] == 0.5).all()


def test_the_same_photo_several_times_stands_in_one_place(truth):
    photo = truth.predictions[Pair(*truth.names[:2])]
    same = PairPrediction(photo.pointmap0_in_cam0, photo.confidence0, photo.pointmap0_in_cam0, photo.confidence0)
    predictions = {Pair(truth.names[i], truth.names[j]): same for i, j in permutations(range(3), 2)}
    scene = align(truth.views, predictions)
    assert camera_center(scene.cam_from_world).norm(dim=-1).max() < 1e-3
    assert all(float((depth / scene.depth[0] - 1).abs().median()) < 1e-3 for depth in scene.depth)


def cast_from(truth, poses, cast):
    """Exact predictions of cameras elsewhere, that see `cast(pose)`: points in the world, (h w 3)."""
    points = [cast(pose.double()).float() for pose in poses]
    sure = torch.full(SIZE, 10.0)
    return {
        Pair(truth.names[i], truth.names[j]): PairPrediction(
            *(x for k in (i, j) for x in (transform_points(poses[i], points[k].flatten(0, 1)).view(*SIZE, 3), sure))
        )
        for i, j in permutations(range(len(poses)), 2)
    }


def test_a_camera_that_only_turns_stays_in_its_place(truth):
    turns = rotation_from_rotvec(torch.tensor([[0.0, a, 0.0] for a in (-0.3, -0.1, 0.1, 0.3)]))
    poses = rigid_transform(turns, torch.zeros(4, 3))
    predictions = cast_from(truth, poses, lambda pose: _cast_view(truth.shapes, truth.K[0].double(), pose, SIZE)[1])
    scene = align(truth.views, predictions)
    relative = scene.cam_from_world[:, :3, :3] @ scene.cam_from_world[0, :3, :3].T
    assert rotation_angle_deg(relative, turns @ turns[0].T).max() < 0.1
    assert camera_center(scene.cam_from_world).norm(dim=-1).max() < 2e-3
    torch.testing.assert_close(scene.K[:, 0, 0], truth.K[:4, 0, 0], rtol=5e-3, atol=0)


def test_a_plane_is_enough(truth):
    def wall(pose):
        rays = (_rays(truth.K[0].double()) @ pose[:3, :3]).view(*SIZE, 3)
        center = camera_center(pose)
        return center + rays * ((2 - center[2]) / rays[..., 2])[..., None]

    predictions = cast_from(truth, truth.cam_from_world[2:6], wall)
    scene = align(truth.views, predictions)
    rotation, direction = all_pairs_errors_deg(scene.cam_from_world.double(), truth.cam_from_world[2:6].double())
    assert rotation.max() < 0.2
    assert direction.max() < 0.5


def _rays(K):
    y, x = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) + 0.5 for s in SIZE), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(-1, 3)
    return pixels @ torch.linalg.inv(K).T


@pytest.mark.parametrize(("n", "near", "share", "lost"), [(8, 8, 0.4, 0), (16, 16, 0.4, 0), (20, 5, 0.3, 1)])
def test_images_start_right_while_groups_of_them_outvote_wrong_pairs(n, near, share, lost):
    """Relations of images alone, where every image meets every other and in a sequence, whose ends have few pairs."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.stack([random_similarity(generator).double() for _ in range(n)])
    edges = [(i, j) for i in range(n) for j in range(i + 1, min(n, i + near + 1))]
    both = torch.tensor(edges + [edge[::-1] for edge in edges]).T
    exact = inverse(truth[both[1]]) @ truth[both[0]]
    for seed in range(3):
        generator.manual_seed(seed)
        relations = exact.clone()
        for e in torch.randperm(len(edges), generator=generator)[: math.ceil(share * len(edges))].tolist():
            relations[e] = random_similarity(generator).double() @ relations[e]
            relations[e + len(edges)] = inverse(relations[e])
        found = best_tree_poses(both, relations, torch.ones(len(relations)), n)
        placed = truth[n // 2] @ inverse(found[n // 2]) @ found
        assert int((relation_distances(placed, truth) > 0.01).sum()) <= lost
