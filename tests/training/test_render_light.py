"""Light, shadow and texture against the geometry that says how bright each pixel is."""

import math

import pytest
import torch
from primitives import camera, from_above, light, pixel_rays, primitive, shoot

from dust3r_sfm.training import render as r
from dust3r_sfm.training.textures import LEVELS, SIDE, TEXELS

SIZE = (33, 41)
DOWN = camera(from_above(20.0), 60.0, *SIZE)
SUN = (0.6, 0.0, 0.8)


def ground_points():
    """Where the pixels' rays meet z = 0."""
    origin, directions = pixel_rays(DOWN, *SIZE)
    return origin + directions * (-origin[2] / directions[..., 2])[..., None]


def ground(**numbers):
    return primitive(r.BOX, center=(0, 0, -1), half=(100, 100, 1), **numbers)


def distance_to_line(points, direction, center):
    to = torch.tensor(center, dtype=torch.float64) - points
    direction = torch.as_tensor(direction, dtype=torch.float64).expand_as(to)
    along = (to * direction).sum(-1, keepdim=True) / (direction * direction).sum(-1, keepdim=True)
    return (to - along * direction).norm(dim=-1)


def test_a_surface_is_as_bright_as_the_cosine_of_the_light_that_falls_on_it():
    ball = primitive(r.ELLIPSOID, half=(5, 5, 5), tint=(1.0, 0.5, 0.25))
    color, depth = shoot([ball], DOWN, *SIZE, light(ambient=0.0, lamp0=(SUN, False, 1)))
    origin, directions = pixel_rays(DOWN, *SIZE)
    normal = (origin + directions * depth[..., None]) / 5
    cosine = (normal @ torch.tensor(SUN, dtype=torch.float64)).clamp(min=0)
    hit = depth > 0
    assert torch.allclose(color[hit][:, 0].double(), cosine[hit], atol=5e-3)
    assert torch.allclose(color[hit], color[hit][:, :1] * torch.tensor([1.0, 0.5, 0.25]), atol=1e-6)


def test_hills_are_as_bright_as_their_slope_says():
    numbers = torch.zeros(22)
    numbers[1:5] = torch.tensor([0.4, 3.0, 2.0, 0.5])  # height 0.4 sin(3 x + 2 y + 0.5), of 1.5 m
    hills = primitive(r.RELIEF, half=(12, 10, 1.5), relief_parameters=numbers)
    color, depth = shoot([hills], DOWN, *SIZE, light(ambient=0.0, lamp1=(SUN, False, 1)))
    origin, directions = pixel_rays(DOWN, *SIZE)
    place = origin + directions * depth[..., None]
    slope = 0.4 * 1.5 * (3 * place[..., 0] / 12 + 2 * place[..., 1] / 10 + 0.5).cos()
    normal = torch.stack([-slope * 3 / 12, -slope * 2 / 10, torch.ones_like(slope)], -1)
    cosine = torch.nn.functional.normalize(normal, dim=-1) @ torch.tensor(SUN, dtype=torch.float64)
    assert torch.allclose(color[..., 0].double(), cosine, atol=5e-3)
    assert cosine.std() > 0.02


@pytest.mark.parametrize("kind", [r.ELLIPSOID, r.BOX, r.CYLINDER])
def test_the_sun_throws_a_shadow_along_its_rays(kind):
    center = (-1.0, 0.5, 4.0)
    thing = primitive(kind, center, half=(1, 1, 1))
    color, depth = shoot([ground(), thing], DOWN, *SIZE, light(ambient=0.0, lamp0=(SUN, False, 1)))
    on_ground = (depth - 20).abs() < 1e-3
    away = distance_to_line(ground_points(), SUN, center)
    lit, dark = on_ground & (away > 1.8), on_ground & (away < 0.97)
    assert dark.sum() > 20
    assert not color[dark].any()
    assert torch.allclose(color[lit], torch.tensor(0.8), atol=1e-5)


def test_the_shadow_of_a_ball_ends_at_its_outline():
    ball = primitive(r.ELLIPSOID, (-1.0, 0.5, 4.0), half=(1.5, 1.5, 1.5))
    color, depth = shoot([ground(), ball], DOWN, *SIZE, light(ambient=0.0, lamp0=(SUN, False, 1)))
    away = distance_to_line(ground_points(), SUN, (-1.0, 0.5, 4.0))
    sure = ((depth - 20).abs() < 1e-3) & ((away - 1.5).abs() > 0.05)  # rays start a little above the ground
    assert torch.equal(color[sure][:, 0] == 0, away[sure] < 1.5)


def test_a_lamp_is_shaded_by_what_is_before_it_only():
    lamp = ((0.0, 0.0, 5.0), True, 1e6)
    below = primitive(r.BOX, (1.0, 0, 2.5), half=(1, 1, 0.1))  # half way: its shadow is twice its size
    above = primitive(r.BOX, (-1.8, 0, 8.0), half=(1, 1, 0.1))  # a ray that went on behind the lamp would meet it
    color, depth = shoot([ground(), below, above], DOWN, *SIZE, light(ambient=0.0, lamp0=lamp))
    points, seen = ground_points(), (depth - 20).abs() < 1e-3
    x, y = (points[..., 0] - 2.0).abs(), points[..., 1].abs()
    shaded, lit = (x < 1.9) & (y < 1.9), (x > 2.2) | (y > 2.2)
    beyond = ((points[..., 0] - 3).abs() < 1.5) & (y < 1.5)
    assert (seen & shaded).sum() > 20
    assert not color[seen & shaded].any()
    cosine = 5 / (points.square().sum(-1) + 25).sqrt()
    assert torch.allclose(color[seen & lit][:, 0].double(), cosine[seen & lit], atol=5e-3)
    color, depth = shoot([ground(), above], DOWN, *SIZE, light(ambient=0.0, lamp0=lamp))
    beyond &= (depth - 20).abs() < 1e-3
    assert beyond.sum() > 20
    assert torch.allclose(color[beyond][:, 0].double(), cosine[beyond], atol=5e-3)


def test_a_lamp_fades_with_distance():
    color, _ = shoot([ground()], DOWN, *SIZE, light(ambient=0.0, lamp0=((0.0, 0.0, 6.0), True, 3.0)))
    assert float(color[16, 20, 0]) == pytest.approx(1 / (1 + (6 / 3) ** 2), rel=0.02)  # a ray starts 4 cm above


def test_a_room_does_not_shade_what_is_in_it():
    room = primitive(r.ROOM, half=(30, 30, 30))
    open_, closed = (
        shoot(shapes, DOWN, *SIZE, light(ambient=0.1, lamp0=(SUN, False, 1)))[0]
        for shapes in ([ground()], [room, ground()])
    )
    assert torch.equal(open_, closed)


def test_the_fill_light_has_no_shadow():
    thing = primitive(r.BOX, (-1.0, 0.5, 4.0))
    color, depth = shoot([ground(), thing], DOWN, *SIZE, light(ambient=0.0, lamp1=(SUN, False, 1)))
    assert torch.allclose(color[(depth - 20).abs() < 1e-3], torch.tensor(0.8), atol=1e-5)


def level_numbered():
    """A texture whose mip level k is of the value 10 (k + 1) throughout."""
    texels = [torch.full(((SIDE >> k) ** 2, 4), 10 * (k + 1)) for k in range(LEVELS)]
    return torch.cat(texels)[None].to(torch.uint8)


@pytest.mark.parametrize("texels_a_pixel", [0.01, 0.9, 1.2, 2.1, 3.7, 9.0, 30.0, 1000.0])
def test_the_mip_level_is_that_of_the_pixels_size_on_the_surface(texels_a_pixel):
    height, focal = 20.0, 60.0
    density = texels_a_pixel / SIDE / (height / focal)
    shape = ground(texture0=0, density0=density, contrast=1.0, tint=(0.5, 0.5, 0.5))
    color, _ = shoot([shape], DOWN, *SIZE, textures=level_numbered())
    level = min(max(round(math.log2(texels_a_pixel)), 0), LEVELS - 1)
    assert float(color[16, 20, 0]) * 255 == pytest.approx(10 * (level + 1), abs=1e-3)


def test_a_texture_repeats_by_its_density_and_is_interpolated():
    ramp = torch.arange(SIDE).expand(SIDE, SIDE)[..., None].expand(-1, -1, 4)  # value = column
    texels = torch.cat([ramp.reshape(-1, 4), torch.zeros((TEXELS - SIDE * SIDE, 4))])[None].to(torch.uint8)
    shape = ground(texture0=0, density0=0.01, contrast=1.0, tint=(0.5, 0.5, 0.5), extent=(100, 100, 1))
    row = camera(from_above(10.0), 160.0, *SIZE)
    color, _ = shoot([shape], row, *SIZE, textures=texels)
    x = (torch.arange(41) + 0.5 - 20.5) / 160 * 10
    column = (0.01 * x) % 1 * SIDE - 0.5
    inner = (column > 0) & (column < 255)  # between the last and the first column it wraps
    assert inner.sum() > 30
    assert torch.allclose(color[5, :, 0][inner] * 255, column[inner], atol=0.02)


def test_samples_average_the_colour_and_leave_depth_at_the_pixels_middle():
    dark = primitive(r.BOX, (-50, 0, -1), half=(50, 100, 1), tint=(0.0, 0.0, 0.0))
    bright = primitive(r.BOX, (50, 0, -1), half=(50, 100, 1))
    one, depth_of_one = shoot([dark, bright], DOWN, *SIZE, samples=1)
    four, depth_of_four = shoot([dark, bright], DOWN, *SIZE, samples=4)
    assert torch.equal(depth_of_one, depth_of_four)
    assert set(one[:, :20, 0].unique().tolist()) == {0.0}
    assert torch.allclose(four[:, 20], torch.tensor(0.5))  # the edge runs through the middle column
    assert torch.equal(four[:, :20], one[:, :20])
    assert torch.equal(four[:, 21:], one[:, 21:])
