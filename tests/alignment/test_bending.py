"""Scenes aligned and bent to where their cameras were measured to stand."""

from dataclasses import replace

import pytest
import torch
from aligned import true_scene
from procedural import make_scene

from dust3r_sfm.alignment import bending
from dust3r_sfm.alignment.align import AlignConfig, align
from dust3r_sfm.geometry.transforms import camera_center
from dust3r_sfm.pairs import Pair

METRES = 10.0


@pytest.fixture(scope="module")
def truth():
    near = [(i, j) for i in range(10) for j in range(10) if i != j and abs(i - j) <= 2]
    return make_scene(10, (16, 20), noise=0.05, pairs=near)


def positions_of(truth, sigma):
    generator = torch.Generator().manual_seed(0)
    return METRES * truth.centers.double() + sigma * torch.randn(10, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("max_cluster", [200, 8])
def test_positions_make_an_aligned_scene_metric_and_a_wrong_one_does_no_harm(truth, max_cluster):
    sigma, positions = 0.2, positions_of(truth, 0.2)
    positions[5] += 40.0
    sigmas = torch.full((3,), sigma, dtype=torch.float64)
    views = [
        replace(view, known_position=position, position_sigma=sigmas)
        for view, position in zip(truth.views, positions, strict=True)
    ]
    scene = align(views, truth.predictions, AlignConfig(max_cluster=max_cluster))
    order = [truth.names.index(name) for name in scene.names]
    off = (camera_center(scene.cam_from_world.double()) - METRES * truth.centers[order].double()).norm(dim=1)
    assert len(order) == 10
    assert off.median() < 3 * sigma
    assert off.max() < 8 * sigma
    ratios = torch.stack([(depth / truth.depth[i]).median() for depth, i in zip(scene.depth, order, strict=True)])
    torch.testing.assert_close(ratios, torch.full_like(ratios, METRES), rtol=0.1, atol=0)


@pytest.mark.parametrize("max_groups", [1000, 4])
def test_images_of_one_group_are_drawn_together(truth, monkeypatch, max_groups):
    monkeypatch.setattr(bending, "MAX_GROUPS", max_groups)
    scene = true_scene(truth)
    pairs = [Pair(*pair) for pair in truth.predictions]
    swelling = 1 + 0.05 * torch.linspace(0, 1, 10, dtype=torch.float64)[:, None]  # positions of another shape
    wanted = truth.centers.double() * swelling
    sigmas = torch.full((3,), 1e-3, dtype=torch.float64)
    known = {name: (position, sigmas) for name, position in zip(truth.names, wanted, strict=True)}
    before = (truth.centers.double() - wanted).norm(dim=1).mean()
    after = (camera_center(bending.bent(scene, pairs, known, 0.01).cam_from_world.double()) - wanted).norm(dim=1).mean()
    assert after < 0.5 * before


def test_pairs_of_a_true_scene_are_as_exact_as_their_noise(truth):
    exact = make_scene(5, (32, 48))
    for made, low, high in ((exact, 0, 0.0021), (truth, 0.003, 0.05)):
        assert low < bending.pair_tolerance(true_scene(made), made.predictions, list(made.predictions)) < high
