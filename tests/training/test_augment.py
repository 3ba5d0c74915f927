"""Photos are changed in tone, sharpness and noise, never in geometry."""

import pytest
import torch

from dust3r_sfm.training.augment import _blur, _jpeg, _tone, _vignette, augment
from dust3r_sfm.training.world import Dice


class Loaded(Dice):
    """Dice that always fall as told where they are asked for a range or a chance."""

    def __init__(self, uniform=None, chance=None):
        super().__init__("cpu", 0)
        self.fixed_uniform, self.fixed_chance = uniform, chance

    def uniform(self, *shape, low=0.0, high=1.0):
        drawn = super().uniform(*shape, low=low, high=high)
        return drawn if self.fixed_uniform is None else torch.full_like(drawn, self.fixed_uniform)

    def chance(self, probability, *shape):
        drawn = super().chance(probability, *shape)
        return drawn if self.fixed_chance is None else torch.full_like(drawn, self.fixed_chance)


@pytest.fixture(scope="module")
def images(textures):
    """Four pairs, of crops of textures."""
    texels = textures[:, : 256 * 256, :3].unflatten(1, (256, 256)).float() / 255
    return texels[:, :48, :64].permute(0, 3, 1, 2).unflatten(0, (4, 2)).contiguous()


def test_values_stay_in_range_and_images_in_shape(images):
    for seed in range(8):
        out = augment(Dice("cpu", seed), images)
        assert out.shape == images.shape
        assert out.min() >= 0
        assert out.max() <= 1
        assert out.std((2, 3, 4)).min() > 0.01


def test_the_same_dice_give_the_same_photos_and_views_differ(images):
    out = augment(Dice("cpu", 4), images)
    assert torch.equal(out, augment(Dice("cpu", 4), images))
    assert not torch.equal(out, augment(Dice("cpu", 5), images))
    twins = images[:, :1].expand(-1, 2, -1, -1, -1)
    out = augment(Dice("cpu", 4), twins)
    assert (out[:, 0] - out[:, 1]).abs().mean((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("edge", [20, 24, 37])
def test_an_edge_stays_where_it_is(edge):
    image = torch.full((60, 1, 3, 48, 64), 0.25)
    image[..., edge:] = 0.7
    for turned in (image, image.transpose(3, 4)):
        out = augment(Dice("cpu", edge), turned)[:, 0].mean(1)
        profile = out.mean(1) if turned is image else out.mean(2)
        found = profile.diff(dim=1).abs().argmax(1) + 1
        assert (found == edge).float().mean() > 0.9
        assert ((found - edge).abs() <= 1).all()


def test_brighter_stays_brighter_without_noise_and_compression():
    ramp = torch.linspace(0.05, 0.95, 64).expand(40, 3, 48, 64)
    luminance = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    for step in (_tone, _blur):
        out = (step(Dice("cpu", 1), ramp) * luminance).sum(1)
        assert (out.diff(dim=-1) >= -1e-5).all(), step.__name__


def test_a_vignette_darkens_the_corners_and_not_the_middle():
    white = torch.ones((200, 3, 49, 65))
    out = _vignette(Dice("cpu", 2), white)
    assert torch.allclose(out[:, :, 24, 32], torch.ones(200, 3))
    assert torch.equal(out, out.flip(2))
    assert torch.allclose(out, out.flip(3), atol=1e-6)
    darkened = out[:, 0, 0, 0] < 0.999
    assert 0.15 < darkened.float().mean() < 0.45
    assert out.min() >= 0.5 - 1e-6


def test_blur_keeps_the_mean_and_lowers_the_detail(images):
    x = images.flatten(0, 1)
    padded = torch.nn.functional.pad(x, (8, 8, 8, 8), mode="circular")
    out = _blur(Loaded(uniform=1.3, chance=True), padded)
    assert torch.allclose(out.mean((2, 3)), padded.mean((2, 3)), atol=0.02)
    assert (out.diff(dim=-1).abs().mean((1, 2, 3)) < padded.diff(dim=-1).abs().mean((1, 2, 3))).all()
    assert torch.allclose(_blur(Loaded(chance=False), padded), padded, atol=1e-6)


def test_jpeg_of_high_quality_is_nearly_the_image(images):
    x = images.flatten(0, 1)
    fine, coarse = (_jpeg(Loaded(uniform=q, chance=True), x) for q in (95.0, 20.0))
    assert (fine - x).abs().mean() < 0.012
    assert (coarse - x).abs().mean() > 2 * (fine - x).abs().mean()
    assert (coarse.mean((2, 3)) - x.mean((2, 3))).abs().max() < 0.03
    assert torch.equal(_jpeg(Loaded(chance=False), x), x)


def test_jpeg_keeps_plain_images():
    plain = torch.tensor([[0.2, 0.5, 0.8], [0.9, 0.1, 0.3]])[:, :, None, None].expand(2, 3, 16, 24)
    out = _jpeg(Loaded(uniform=95.0, chance=True), plain)
    assert (out - plain).abs().max() < 0.01
    assert out.std((2, 3)).max() < 1e-5


def test_jpeg_blocks_are_coded_on_their_own(images):
    x = images.flatten(0, 1)
    changed = x.clone()
    changed[:, :, 8:16, 16:24] = 0.5
    coded, coded_changed = (_jpeg(Loaded(uniform=50.0, chance=True), images) for images in (x, changed))
    different = (coded != coded_changed).any(1)
    assert different[:, 8:16, 16:24].any()
    different[:, 8:16, 16:24] = False
    assert not different.any()
