"""Pairs and photos of procedural worlds with their truth: exact to what a ray meets, whichever camera sends it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dust3r_sfm.training import render as r
from dust3r_sfm.training.losses import token_targets
from dust3r_sfm.training.synthetic import (
    auto_exposure,
    camera_matrices,
    camera_rows,
    demo_views,
    develop,
    rigid_inverse,
    sample_pairs,
)
from dust3r_sfm.training.viewpoints import sample_cameras
from dust3r_sfm.training.world import Dice, sample_world

SIZE = (24, 32)
pytestmark = pytest.mark.usefixtures("fast_render")


@pytest.fixture(scope="module")
def pairs(fast_render, textures):
    return sample_pairs(Dice("cpu", 1), 12, *SIZE, textures)


def in_camera(pairs, view, frame):
    """Points of a view in a camera's frame, computed pixel by pixel in float64; (b, h, w, 3)."""
    y, x = np.meshgrid(np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5, indexing="ij")
    pixels = np.stack([x, y, np.ones_like(x)], -1)
    K, depth = pairs.K[:, view].double().numpy(), pairs.depth[:, view].double().numpy()
    T = pairs.cam_from_world.double().numpy()
    T = T[:, frame] @ np.linalg.inv(T[:, view])
    local = np.einsum("bij,hwj->bhwi", np.linalg.inv(K), pixels) * depth[..., None]
    return np.einsum("bij,bhwj->bhwi", T[:, :3, :3], local) + T[:, None, None, :3, 3]


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("frame", [0, 1])
def test_pointmaps_are_the_pixels_at_their_depth(pairs, view, frame):
    valid, expected = pairs.valid[:, view].numpy(), in_camera(pairs, view, frame)
    error = np.linalg.norm(pairs.pointmaps(frame)[:, view].numpy() - expected, axis=-1)
    assert (error[valid] < 1e-4 * (1 + np.linalg.norm(expected, axis=-1)[valid])).all()


def test_a_ray_to_a_point_of_the_other_view_ends_there_or_before(kernel, textures):
    """Every point of view 0 is on a surface: camera 1 sees it, or something nearer, and never through it."""
    if kernel is None:
        pytest.skip("no g++")
    dice = Dice("cpu", 2)
    world = sample_world(dice, 12, len(textures))

    def render_depth(primitives, lights, cameras, h, w):
        return r.render_fused(kernel, primitives, lights, cameras, textures, h, w, with_color=False)[1]

    rows = sample_cameras(dice, world, render_depth, *SIZE)
    depth = render_depth(world.primitives, world.lights, rows, *SIZE)
    K, cam_from_world = camera_matrices(rows)
    pairs = SimpleNamespace(depth=depth, K=K, cam_from_world=cam_from_world)
    points = torch.from_numpy(in_camera(pairs, 0, 1)).flatten(1, 2).float()
    z = points[..., 2]
    ahead = (depth[:, 0].flatten(1) > 0) & (z > 1e-3)
    # a camera of one pixel for each point, whose middle is the point's place in image 1
    single = rows[:, 1:].expand(-1, points.shape[1], -1).clone()
    single[..., 14:] = 0.5 - points[..., :2] / z[..., None].clamp(min=1e-3) * single[..., 12:14]
    seen = render_depth(world.primitives, world.lights, single, 1, 1)[..., 0, 0]
    through = ahead & ((seen == 0) | (seen > 1.01 * z + 1e-3))
    assert ahead.float().mean() > 0.5
    assert through.sum() < 0.003 * ahead.sum()
    assert ((seen - z).abs() < 0.01 * z)[ahead].float().mean() > 0.3


def test_cameras_are_rigid_and_look_through_the_image(pairs):
    R, b = pairs.cam_from_world[..., :3, :3], len(pairs.K)
    assert torch.allclose(R @ R.mT, torch.eye(3).expand(b, 2, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(R), torch.ones(b, 2), atol=1e-5)
    assert torch.equal(pairs.cam_from_world[..., 3, :], torch.tensor([0.0, 0, 0, 1]).expand(b, 2, 4))
    assert torch.equal(pairs.K[..., 0, 0], pairs.K[..., 1, 1])
    fov = 2 * torch.atan(16 / pairs.K[..., 0, 0])
    assert fov.min() > 0.26
    assert fov.max() < 1.96
    center = pairs.K[..., :2, 2] / torch.tensor([32.0, 24.0])
    assert ((center > 0.1) & (center < 0.9)).all()
    assert torch.equal(pairs.K[..., 2, :], torch.tensor([0.0, 0, 1]).expand(b, 2, 3))


def test_images_are_photos_of_something(pairs):
    assert pairs.images.shape == (12, 2, 3, *SIZE)
    assert pairs.images.min() >= 0
    assert pairs.images.max() <= 1
    assert 0.2 < pairs.images.mean() < 0.8
    assert pairs.images.std((2, 3, 4)).min() > 0.01
    assert pairs.valid.float().mean() > 0.7
    assert (pairs.depth >= 0).all()


def test_the_renderers_cameras_and_matrices_are_the_same(pairs):
    rows = camera_rows(pairs.K, pairs.cam_from_world)
    K, cam_from_world = camera_matrices(rows)
    assert torch.allclose(K, pairs.K)
    assert torch.allclose(cam_from_world, pairs.cam_from_world, atol=1e-5)
    world_from_cam = torch.linalg.inv(pairs.cam_from_world.double())
    assert torch.allclose(rigid_inverse(pairs.cam_from_world).double(), world_from_cam, atol=1e-4)
    assert torch.allclose(rows[..., :12].double(), world_from_cam[..., :3, :].flatten(-2), atol=1e-4)


def seen_by_the_other(pairs, k):
    """Pixels of view 0 of pair k that view 1 sees, one at a time."""
    points, depth0 = in_camera(pairs, 0, 1)[k], pairs.depth[k, 0].numpy()
    depth1, K = pairs.depth[k, 1].double().numpy(), pairs.K[k, 1].double().numpy()
    seen, valid = 0, 0
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            valid += depth0[row, column] > 0
            x, y, z = points[row, column]
            if depth0[row, column] == 0 or z <= 0:
                continue
            u, v = K[0, 0] * x / z + K[0, 2], K[1, 1] * y / z + K[1, 2]
            if 0 <= u < SIZE[1] and 0 <= v < SIZE[0]:
                there = depth1[int(v), int(u)]
                seen += abs(there - z) < 0.05 * there + 0.1 * there / K[0, 0]
    return seen / max(valid, 1)


def test_overlap_is_the_share_of_pixels_that_the_other_view_sees(pairs):
    overlaps = pairs.overlaps()
    for k in range(len(overlaps)):
        assert float(overlaps[k]) == pytest.approx(seen_by_the_other(pairs, k), abs=3 / (24 * 32))


def test_a_view_overlaps_itself_wholly(pairs):
    same = type(pairs)(
        *(x[:, :1].expand(-1, 2, *x.shape[2:]) for x in (pairs.images, pairs.depth, pairs.K, pairs.cam_from_world))
    )
    assert (same.overlaps() > 0.98).all()


def test_pairs_overlap_by_little_and_by_much(fast_render, textures):
    overlaps = sample_pairs(Dice("cpu", 9), 80, 16, 24, textures).overlaps()
    assert ((overlaps > 0.05) & (overlaps <= 1)).float().mean() > 0.85
    quantiles = overlaps.quantile(torch.tensor([0.2, 0.8]))
    assert quantiles[0] < 0.35
    assert quantiles[1] > 0.5
    assert 0.3 < overlaps.mean() < 0.7


def test_wide_pairs_stand_farther_apart_and_still_overlap(fast_render, textures):
    usual, wide = (sample_pairs(Dice("cpu", 3), 64, *SIZE, textures, wide_share=share) for share in (0.0, 1.0))

    def baselines(pairs):
        cam0_from_cam1 = pairs.cam_from_world[:, 0] @ rigid_inverse(pairs.cam_from_world[:, 1])
        distance = pairs.pointmaps(0)[:, 0].norm(dim=-1).flatten(1).median(1).values
        return (cam0_from_cam1[:, :3, 3].norm(dim=-1) / distance.clamp(min=1e-6)).median()

    assert torch.equal(usual.cam_from_world[:, 0], wide.cam_from_world[:, 0])
    assert baselines(wide) > 1.5 * baselines(usual)
    assert (wide.overlaps() > 0.08).float().mean() > 0.85


def test_the_seed_decides_the_batch(pairs, textures):
    again = sample_pairs(Dice("cpu", 1), 12, *SIZE, textures)
    other = sample_pairs(Dice("cpu", 2), 12, *SIZE, textures)
    for name in ("images", "depth", "K", "cam_from_world"):
        assert torch.equal(getattr(again, name), getattr(pairs, name))
        assert not torch.equal(getattr(other, name), getattr(pairs, name))


def test_one_dice_gives_ever_new_worlds(textures):
    dice = Dice("cpu", 1)
    first, second = (sample_pairs(dice, 2, *SIZE, textures) for _ in range(2))
    assert not torch.equal(first.depth, second.depth)


def test_without_the_kernel_the_worlds_are_the_same(kernel, textures):
    """The choice of cameras and the truth do not depend on which renderer is there."""
    fused = sample_pairs(Dice("cpu", 3), 2, *SIZE, textures)
    with pytest.MonkeyPatch.context() as patch:
        from dust3r_sfm.training import synthetic

        def depth(primitives, lights, cameras, h, w, textures):
            return r.render_reference(primitives, lights, cameras, textures, h, w)[1]

        patch.setattr(r, "render", r.render_reference)
        patch.setattr(synthetic, "_render_depth", depth)
        plain = sample_pairs(Dice("cpu", 3), 2, *SIZE, textures)
    assert torch.equal(plain.cam_from_world, fused.cam_from_world)
    assert ((plain.depth - fused.depth).abs() > 1e-3 * fused.depth).float().mean() < 1e-3


def test_partners_of_tokens_are_where_their_points_project(fast_render, textures):
    pairs = sample_pairs(Dice("cpu", 5), 6, 48, 64, textures)
    points = pairs.pointmaps(1)[:, 0].double().numpy()
    targets = token_targets(pairs.pointmaps(1)[:, 0], pairs.K[:, 1], pairs.depth[:, 1], pairs.valid[:, 0])
    assert targets.shape == (6, 12)
    K, depth1 = pairs.K[:, 1].double().numpy(), pairs.depth[:, 1].double().numpy()
    found = 0
    for k in range(6):
        for token in range(12):
            row, column = token // 4 * 16 + 8, token % 4 * 16 + 8
            x, y, z = points[k, row, column]
            u, v = (K[k] @ [x, y, z])[:2] / z
            inside = bool(pairs.valid[k, 0, row, column]) and z > 0 and 0 <= u < 64 and 0 <= v < 48
            visible = inside and abs(depth1[k, int(v), int(u)] - z) < 0.03 * z
            partner = int(v) // 16 * 4 + int(u) // 16 if visible else -100
            assert int(targets[k, token]) == partner
            found += visible
    assert 10 < found < 72


def test_exposure_brings_a_scene_to_a_middle_gray_for_all_its_views():
    color = (
        torch.rand((3, 2, 8, 8, 3), generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.3, 1, 2])[:, None, None, None, None]
    )
    exposure = auto_exposure(color)
    assert torch.allclose((color * exposure).mean((1, 2, 3, 4)), torch.tensor(0.32), rtol=1e-4)
    assert torch.equal(exposure[:, 0], exposure[:, 1])
    assert auto_exposure(torch.zeros_like(color)).max() == 6


def test_developed_light_rises_to_white():
    light = torch.linspace(-1, 8, 100)[:, None, None].expand(100, 1, 3)
    out = develop(light, torch.ones(1, 1, 1))
    assert out.min() == 0
    assert out.max() == 1
    assert (out.diff(dim=0) >= 0).all()


@pytest.fixture(scope="module")
def walks(fast_render):
    return {seed: demo_views(6, (60, 80), seed) for seed in (0, 5)}


def share_seen(views, i, j):
    """Share of view i's pixels that view j sees too."""
    h, w = views.depth.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.linalg.inv(views.K[i]).mT
    camj_from_cami = views.cam_from_world[j] @ torch.linalg.inv(views.cam_from_world[i])
    points = (rays * views.depth[i, ..., None]) @ camj_from_cami[:3, :3].mT + camj_from_cami[:3, 3]
    pixels = points @ views.K[j].mT
    u, v = (pixels[..., :2] / pixels[..., 2:]).long().unbind(-1)
    valid = views.depth[i] > 0
    inside = (u >= 0) & (u < w) & (v >= 0) & (v < h) & (points[..., 2] > 0) & valid
    there = views.depth[j][v.clamp(0, h - 1), u.clamp(0, w - 1)]
    return float((inside & ((there - points[..., 2]).abs() < 0.05 * there)).sum() / valid.sum())


@pytest.mark.parametrize("seed", [0, 5])
def test_the_views_of_a_demo_see_the_same_things(walks, seed):
    walk = walks[seed]
    assert walk.images.shape == (6, 60, 80, 3)
    assert walk.images.dtype == torch.uint8
    assert 50 < walk.images.float().mean() < 200
    assert walk.images.float().std((1, 2, 3)).min() > 10
    assert (walk.depth > 0).float().mean() > 0.9
    shares = torch.tensor([[share_seen(walk, i, j) for j in range(6)] for i in range(6)])
    assert shares.diagonal().min() > 0.98
    assert shares.diagonal(1).min() > 0.5  # neighbours
    assert shares.min() > 0.15  # the ends of the walk


def test_a_demo_is_the_same_for_the_same_seed(walks):
    again = demo_views(6, (60, 80), seed=5)
    assert torch.equal(again.images, walks[5].images)
    assert torch.equal(again.cam_from_world, walks[5].cam_from_world)
    assert not torch.equal(again.images, walks[0].images)
