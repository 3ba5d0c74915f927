"""Pairs of the user's own scenes: chosen by overlap, cropped so that depth and camera stay true."""

import itertools

import pytest
import torch
from procedural import cast_rays, make_scene

from dust3r_sfm.depth_views import DepthView
from dust3r_sfm.training.batches import Source, make_batch
from dust3r_sfm.training.config import LoopConfig
from dust3r_sfm.training.datasets import _cut_image, make_scene_pairs, pair_overlaps, select_pairs
from dust3r_sfm.training.world import Dice


@pytest.fixture(scope="module")
def procedural():
    return make_scene(6, (96, 128), seed=5, vary_focal=True, mix_orientations=True)


@pytest.fixture(scope="module")
def views(procedural):
    cameras = zip(procedural.views, procedural.depth, procedural.K, procedural.cam_from_world, strict=True)
    return [
        DepthView(name=view.name, image=view.image, depth=depth, K=K, cam_from_world=pose)
        for view, depth, K, pose in cameras
    ]


def test_overlap_is_the_share_of_pixels_that_both_see(procedural, views):
    overlaps = pair_overlaps(views)
    for i, j in itertools.combinations(range(6), 2):
        shares = [(procedural.predictions[pair].confidence0 > 5).float().mean() for pair in pairs_of(procedural, i, j)]
        assert overlaps[i, j] == overlaps[j, i] == pytest.approx(min(shares).item(), abs=0.08)
    assert (overlaps.diagonal() > 0.97).all()


def pairs_of(procedural, i, j):
    names = procedural.names[i], procedural.names[j]
    return [pair for pair in procedural.predictions if set(pair) == set(names)]


def test_pairs_of_every_overlap_are_drawn_equally_often():
    overlaps = torch.zeros(7, 7)
    shares = {(0, 1): 0.05, (0, 2): 0.15, (1, 2): 0.16, (2, 3): 0.17, (3, 4): 0.5, (4, 5): 0.9, (5, 6): 0.99}
    for (i, j), share in shares.items():
        overlaps[i, j] = overlaps[j, i] = share
    pairs, chances = select_pairs(overlaps)
    assert [tuple(pair) for pair in pairs.tolist()] == [(0, 2), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert torch.allclose(chances, torch.tensor([1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 3]))


def test_scenes_without_overlap_give_no_pairs(views):
    assert make_scene_pairs([[views[0], views[0]]], "cpu") is None  # the same photo twice: nothing to learn


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (64, 64), (32, 96)])
def test_crops_see_what_their_cameras_say(procedural, views, size):
    scenes = make_scene_pairs([views[:3], views[3:]], "cpu")
    pairs = scenes.sample(Dice("cpu", 1), 8, size)
    assert pairs.images.shape == (8, 2, 3, *size)
    assert pairs.valid.all()
    K, poses, depth = (x.flatten(0, 1) for x in (pairs.K, pairs.cam_from_world, pairs.depth))
    errors = torch.cat(
        [depth_error(procedural.shapes, *camera).flatten() for camera in zip(K, poses, depth, strict=True)]
    )
    assert errors.median() < 0.01  # the nearest pixel's depth, on slanted walls
    assert errors.quantile(0.95) < 0.1  # but at edges
    # photos keep their colours: a crop's mean is among what is in the photo
    assert pairs.images.min() >= 0
    assert pairs.images.max() <= 1
    assert pairs.images.std((2, 3, 4)).min() > 0.05
    shared = pairs.overlaps()
    assert 0.2 < shared.mean() < 0.9


def depth_error(shapes, K, pose, depth):
    """Relative to the true depth, by casting the crop's own rays into the world."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in depth.shape), indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.linalg.inv(K.double()).T @ pose[:3, :3].double()
    true, _ = cast_rays(shapes, -(pose[:3, :3].T @ pose[:3, 3]).double(), rays)
    return (depth - true).abs() / true


def test_a_coarser_crop_is_the_mean_of_its_pixels():
    image = torch.randint(0, 256, (32, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    cut = _cut_image(image.permute(2, 0, 1)[None], torch.tensor([[8.0, 4.0]]), torch.tensor([2.0]), (12, 20))
    means = image[4:28, 8:48].float().unflatten(0, (12, 2)).unflatten(2, (20, 2)).mean((1, 3)) / 255
    assert torch.allclose(cut[0], means.permute(2, 0, 1), atol=1e-5)


@pytest.mark.usefixtures("fast_render")
def test_a_batch_mixes_scenes_and_worlds_at_the_share(views, textures):
    source = Source(textures, make_scene_pairs([views], "cpu"))
    config = LoopConfig(samples=1, scene_share=0.5, apart_share=1.0)
    batch = make_batch(Dice("cpu", 0), 4, (32, 48), source, config)
    assert batch.images.shape == (4, 2, 3, 32, 48)
    assert batch.apart.tolist() == [True, True, False, False] * 2  # photos of a scene are never taken apart
    assert (batch.targets[batch.apart] == -100).all()
    assert (batch.targets[~batch.apart] >= 0).any()
    alone = make_batch(Dice("cpu", 0), 4, (32, 48), source, LoopConfig(samples=1, scene_share=1.0, apart_share=1.0))
    assert not alone.apart.any()
    assert alone.valid.all()
