import pytest
import torch

from dust3r_sfm.geometry.depth_fitting import depth_through_points


@pytest.fixture
def surface():
    """A slope with a box in front of its middle."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    depth = 4 + 0.02 * x + 0.03 * y
    depth[16:32, 20:44] = 2
    return depth


def points_on(depth, count=300):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(depth.shape[1], (count,), generator=generator)
    y = torch.randint(depth.shape[0], (count,), generator=generator)
    return torch.stack([x, y], -1), depth[y, x]


def error(depth, truth):
    return (depth / truth).log().abs()


def test_true_depth_stays_as_it_is(surface):
    assert torch.allclose(depth_through_points(surface, *points_on(surface)), surface)


def test_a_wrong_unit_is_mended_everywhere(surface):
    assert torch.allclose(depth_through_points(3 * surface, *points_on(surface, 20)), surface, rtol=1e-5)


def test_a_bent_map_is_straightened_between_its_points(surface):
    bend = torch.linspace(-0.3, 0.3, 64).exp()
    found = depth_through_points(surface * bend, *points_on(surface))
    assert error(surface * bend, surface).median() > 0.1
    assert error(found, surface).median() < 0.02
    assert error(found, surface).max() < 0.12


def test_a_thing_and_its_background_are_scaled_apart(surface):
    bent = torch.where(surface == 2, 1.2 * surface, 0.9 * surface)
    found = depth_through_points(bent, *points_on(surface))
    assert error(found, surface).quantile(0.95) < 0.02


def test_one_wrong_point_in_five_does_little(surface):
    pixels, depth = points_on(surface)
    depth[::5] *= 3
    assert error(depth_through_points(2 * surface, pixels, depth), surface).max() < 0.02


def test_no_depth_stays_none(surface):
    pixels, depth = points_on(surface)
    surface[:16] = 0
    here = pixels[:, 1] >= 16
    found = depth_through_points(surface, pixels[here], depth[here])
    assert (found[:16] == 0).all()
    assert (found[16:] > 0).all()
