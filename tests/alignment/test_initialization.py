"""Starts of pairs, focals, poses and of the frame of known poses."""

from dataclasses import replace

import pytest
import torch
from procedural import make_scene

from dust3r_sfm.alignment.align import sampled_rays
from dust3r_sfm.alignment.cameras import cameras_of_views
from dust3r_sfm.alignment.chaining import register_robustly, start_pairs
from dust3r_sfm.alignment.initialization import align_to_known, start_focals, start_poses
from dust3r_sfm.alignment.observations import SparseGrid, sample_pairs, stack_samples
from dust3r_sfm.geometry.camera import pixel_grid
from dust3r_sfm.geometry.metrics import all_pairs_errors_deg
from dust3r_sfm.geometry.registration import similarity_matrix
from dust3r_sfm.geometry.transforms import inverse, rigid_transform, rotation_from_rotvec, transform_points
from dust3r_sfm.pairs import Pair


@pytest.fixture(scope="module")
def truth():
    return make_scene(4, (48, 64), vary_focal=True, seed=3)


def observe(truth, predictions, max_samples=1000):
    return stack_samples(truth.views, sample_pairs(truth.views, predictions, max_samples), max_samples)


def started(truth, predictions):
    observations, cameras = observe(truth, predictions), cameras_of_views(truth.views)
    rays, start = sampled_rays(observations, cameras), start_pairs(observations)
    focals = start_focals(observations, cameras, rays, start)
    return focals * cameras.base_focal_px, start_poses(observations, cameras, rays, focals, start)


def chain(truth, *links):
    pairs = [Pair(truth.names[i], truth.names[j]) for i, j in links]
    return {pair: truth.predictions[pair] for pair in pairs}


@pytest.mark.parametrize(
    "links",
    [
        ((0, 1), (1, 2), (2, 3), (3, 2)),
        ((3, 0), (2, 0), (1, 0), (0, 2)),
        ((0, 1), (0, 2), (0, 3)),  # three images have no pair of their own
    ],
    ids=["chain", "one reference seen by all", "one reference that sees all"],
)
def test_each_images_focal_comes_from_its_own_pairs(truth, links):
    focals, _ = started(truth, chain(truth, *links))
    torch.testing.assert_close(focals.float(), truth.K[:, 0, 0], rtol=5e-3, atol=0)


@pytest.mark.parametrize("links", [((0, 1), (1, 2), (2, 3)), ((0, 1), (0, 2), (0, 3)), ((3, 2), (2, 1), (0, 1))])
def test_poses_are_chained_along_pairs_of_either_direction(truth, links):
    _, world_from_cam = started(truth, chain(truth, *links))
    rotation, _ = all_pairs_errors_deg(inverse(world_from_cam), truth.cam_from_world.double())
    assert rotation.max() < 0.5


def test_a_wrong_pair_is_not_part_of_the_tree_however_sure_it_is(truth):
    wrong = Pair(truth.names[0], truth.names[3])
    other = make_scene(4, (48, 64), seed=8).predictions[wrong]
    sure = replace(other, confidence0=other.confidence0 * 5, confidence1=other.confidence1 * 5)
    observations = observe(truth, {**truth.predictions, wrong: sure})
    start = start_pairs(observations)
    is_wrong = torch.tensor([pair == wrong for pair in observations.pairs])
    assert start.distances[~is_wrong].max() < 0.01
    assert start.distances[is_wrong] > 0.1


def test_one_fifth_of_outliers_does_not_move_a_registration():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(500, 3, generator=generator)
    rotation = rotation_from_rotvec(torch.tensor([0.5, 1.0, -0.7]))
    expected = similarity_matrix(torch.tensor(1.7), rotation, torch.tensor([1.0, 2.0, 3.0]))
    target = transform_points(expected, source)
    target[:100] += 3 * torch.randn(100, 3, generator=generator)
    found = register_robustly(source, target, torch.ones(500))
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0)


def test_points_that_tell_no_similarity_give_the_identity():
    target = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0))
    found = register_robustly(torch.ones(2, 10, 3), target, torch.linspace(0.1, 1, 20).view(2, 10))
    assert torch.equal(found, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


@pytest.mark.parametrize("num_known", [1, 2, 5])
def test_the_frame_of_known_poses_is_found(num_known):
    generator = torch.Generator().manual_seed(1)
    rotvecs, centers = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    world_from_cam = rigid_transform(rotation_from_rotvec(rotvecs), centers)
    rotation = rotation_from_rotvec(torch.tensor([0.4, 0.3, -2.0], dtype=torch.float64))
    expected = similarity_matrix(torch.tensor(3.0).double(), rotation, torch.tensor([5.0, 6.0, 7.0]).double())
    known_from_cam = expected @ world_from_cam
    known_from_cam[:, :3, :3] /= 3
    frame = align_to_known(world_from_cam, known_from_cam, torch.arange(5) < num_known)
    assert frame.is_scale_known == (num_known > 1)
    if frame.is_scale_known:
        torch.testing.assert_close(frame.known_from_world, expected)
    else:
        torch.testing.assert_close((frame.known_from_world @ world_from_cam)[0], known_from_cam[0])


@pytest.mark.parametrize("size", [(48, 64), (192, 256), (384, 512), (33, 500), (512, 160)])
def test_a_sparse_grid_is_as_fine_as_the_number_of_samples_allows(size):
    grid = SparseGrid.of(size, 1500)
    assert 500 <= grid.shape[0] * grid.shape[1] <= 1650
    pixels = grid.sample(pixel_grid(*size))
    assert pixels.shape == (grid.shape[0] * grid.shape[1], 2)
    seen_as_pixels = torch.stack([grid.to_grid(pixel) for pixel in pixels[:: grid.shape[1] + 1][: min(grid.shape)]])
    torch.testing.assert_close(seen_as_pixels, torch.arange(len(seen_as_pixels))[:, None].expand(-1, 2) + 0.5)
