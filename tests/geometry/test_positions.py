"""Models are put where GPS says their cameras stood, although it errs by metres and sometimes by much more."""

import pytest
import torch

from dust3r_sfm.geometry.positions import place_cameras
from dust3r_sfm.geometry.transforms import rotation_from_rotvec

SIGMAS = torch.tensor([3.0, 3.0, 6.0], dtype=torch.float64)
TURN = rotation_from_rotvec(torch.tensor([0.4, -1.9, 0.8], dtype=torch.float64))
SHIFT = torch.tensor([120.0, -30.0, 9.0], dtype=torch.float64)
UP = TURN.T @ torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def centers_of(positions):
    """Camera centres of a model of unit 1 / 25 metres, of another orientation."""
    return (positions - SHIFT) @ TURN / 25.0


def walk(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, generator=generator, dtype=torch.float64) * torch.tensor([60.0, 40.0, 5.0])


def noise(num, seed=1):
    return torch.randn(num, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * SIGMAS


def test_exact_positions_give_the_exact_similarity():
    truth = walk(6)
    placement = place_cameras(centers_of(truth), truth, SIGMAS.expand(6, 3), UP)
    assert placement.scale == pytest.approx(25.0, rel=1e-9)
    torch.testing.assert_close(placement.move(centers_of(truth)), truth, atol=1e-6, rtol=0)


def test_a_quarter_of_gross_errors_does_not_move_the_model():
    truth = walk(24)
    measured = truth + noise(24)
    measured[::4] += torch.tensor([300.0, -200.0, 0.0], dtype=torch.float64)
    placement = place_cameras(centers_of(truth), measured, SIGMAS.expand(24, 3), UP)
    assert placement.scale == pytest.approx(25.0, rel=0.04)
    assert (placement.move(centers_of(truth)) - truth).norm(dim=1).mean() < 5
    assert not placement.agreeing[::4].any()
    assert placement.agreeing.sum() >= 15


def test_on_a_straight_line_the_cameras_say_what_is_up():
    truth = torch.linspace(0, 200, 9, dtype=torch.float64)[:, None] * torch.tensor([0.8, 0.6, 0.0]).double()
    placement = place_cameras(centers_of(truth), truth + 0.2 * noise(9), SIGMAS.expand(9, 3), UP)
    up = placement.rotation @ UP
    assert up[2] > 0.99
    assert placement.scale == pytest.approx(25.0, rel=0.03)


def test_positions_within_their_own_noise_or_of_two_cameras_tell_nothing():
    still = noise(8)
    assert place_cameras(centers_of(walk(8)), still * 0.3, SIGMAS.expand(8, 3), UP) is None
    assert place_cameras(centers_of(walk(2)), walk(2), SIGMAS.expand(2, 3), UP) is None


def test_positions_that_agree_with_nothing_are_not_believed():
    assert place_cameras(centers_of(walk(12, seed=5)), walk(12, seed=6), SIGMAS.expand(12, 3) / 3, UP) is None
