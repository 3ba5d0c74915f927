"""From a head's raw numbers to points and confidences, in each mode."""

import math

import pytest
import torch

from dust3r_sfm.models.heads import LinearHead, confidence_of, pointmap_of

INFINITY = float("inf")


@pytest.mark.parametrize(("mode", "distance"), [("exp", math.expm1(5)), ("linear", 5), ("square", 25)])
def test_points_keep_their_direction_and_stretch_with_the_mode(mode, distance):
    point = pointmap_of(torch.tensor([0.0, 3.0, -4.0]), mode)
    torch.testing.assert_close(point, distance * torch.tensor([0.0, 0.6, -0.8]))


def test_the_origin_stays_and_has_a_finite_gradient():
    xyz = torch.zeros(2, 3, requires_grad=True)
    point = pointmap_of(xyz, "exp")
    point.sum().backward()
    assert (point == 0).all()
    assert xyz.grad.isfinite().all()


@pytest.mark.parametrize(
    ("mode", "limits", "expected"),
    [("exp", (1.0, INFINITY), [1 + math.exp(-2), 2, 1 + math.exp(2)]), ("exp", (0.0, 3.0), [math.exp(-2), 1, 3]),
     ("sigmoid", (1.0, 5.0), [1 + 4 / (1 + math.exp(2)), 3, 1 + 4 / (1 + math.exp(-2))])],
)  # fmt: skip
def test_confidence_stays_within_its_limits(mode, limits, expected):
    torch.testing.assert_close(confidence_of(torch.tensor([-2.0, 0.0, 2.0]), mode, limits), torch.tensor(expected))


def test_the_linear_head_puts_a_token_on_the_pixels_of_its_patch():
    head = LinearHead(dim=6, dec_depth=1, patch_size=2)
    with torch.no_grad():
        head.proj.weight.zero_()
        head.proj.weight[:, 0] = 1
        head.proj.bias.copy_(torch.arange(16) * 100.0)
    tokens = torch.zeros(1, 6, 6)
    tokens[0, :, 0] = torch.arange(6)
    out = head([tokens], (2, 3))
    assert out.shape == (1, 4, 6, 4)
    assert out[0, 3, 4].tolist() == [205, 605, 1005, 1405]  # token 5, its pixel (1, 0), channels 4 apart
