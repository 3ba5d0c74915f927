"""Small pictures inside pages."""

import pytest
import torch
from browser import decoded

from dust3r_sfm.formats.pictures import colorize, map_uri, nearness, photo_uri


@pytest.mark.parametrize(
    ("shape", "expected"), [((300, 400), (200, 150)), ((400, 300), (150, 200)), ((30, 40), (40, 30))]
)
def test_photos_are_shrunk_and_never_enlarged(shape, expected):
    image = torch.zeros(*shape, 3, dtype=torch.uint8)
    image[..., 0] = 200
    picture = decoded(photo_uri(image, 200))
    assert picture.size == expected
    red, green, blue = picture.getpixel((10, 10))
    assert abs(red - 200) < 8
    assert max(green, blue) < 8


def test_colours_grow_lighter_with_the_value_and_unknown_is_black():
    values = torch.linspace(-0.2, 1.2, 57)
    lightness = colorize(values).double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    assert (lightness.diff() >= 0).all()
    assert torch.equal(colorize(torch.tensor([-1.0, 0.0])), colorize(torch.tensor([0.0, -9.0])))
    assert colorize(torch.tensor([torch.nan, torch.inf])).sum() == 0


def test_the_nearest_pixels_are_the_highest_and_holes_stay_unknown():
    depth = torch.linspace(1, 10, 400).reshape(20, 20)
    depth[3, 4] = 0
    near = nearness(depth)
    assert near[3, 4].isnan()
    assert near[0, 0] == 1
    assert near[-1, -1] == 0
    known = near.flatten()[~near.flatten().isnan()]
    assert (known.diff() <= 0).all()
    assert nearness(torch.zeros(2, 2)).isnan().all()


def test_a_map_is_a_picture_of_its_size():
    assert decoded(map_uri(torch.rand(30, 44, generator=torch.Generator().manual_seed(0)))).size == (44, 30)
