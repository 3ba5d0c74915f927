"""Generated textures, photos as textures, mip-maps."""

import numpy as np
import pytest
import torch
from PIL import Image

from dust3r_sfm.errors import InputError
from dust3r_sfm.training.textures import LEVELS, SIDE, TEXELS, generated_textures, photo_textures, with_mipmaps


@pytest.fixture(scope="module")
def generated():
    return generated_textures(12, seed=7)


def test_the_same_seed_gives_the_same_textures(generated):
    assert generated.shape == (12, SIDE, SIDE, 3)
    assert torch.equal(generated_textures(3, seed=7), generated[:3])
    assert not torch.equal(generated_textures(3, seed=8), generated[:3])


def test_textures_have_contrast_and_differ(generated):
    values = generated.float()
    assert (values.amax((1, 2, 3)) - values.amin((1, 2, 3)) > 20).all()
    assert len(torch.unique(generated.flatten(1), dim=0)) == 12
    assert values.mean((1, 2)).std(0).min() > 10  # of many colours


def test_textures_tile_without_a_seam(generated):
    """Of noise: the step over the border is no larger than steps inside."""
    noise = generated[::4].float()
    for dim in (1, 2):
        inner = noise.diff(dim=dim).abs().mean()
        border = (noise.select(dim, 0) - noise.select(dim, SIDE - 1)).abs().mean()
        assert border < 3 * inner


def test_every_mip_level_is_the_average_of_the_first(generated):
    pyramid = with_mipmaps(generated[:3])
    assert pyramid.shape == (3, TEXELS, 4)
    at = 0
    for level in range(LEVELS):
        side = SIDE >> level
        texels = pyramid[:, at : at + side * side, :3].reshape(3, side, side, 3).numpy().astype(float)
        blocks = generated[:3].numpy().astype(float).reshape(3, side, 1 << level, side, 1 << level, 3)
        assert np.abs(texels - blocks.mean((2, 4))).max() <= 0.5 + 1e-3
        at += side * side
    assert at == TEXELS


def test_more_textures_than_a_chunk_are_all_there():
    few = torch.arange(300)[:, None, None, None].expand(300, SIDE, SIDE, 3).remainder(256).to(torch.uint8)
    pyramid = with_mipmaps(few)
    assert torch.equal(pyramid[:, -1, :3], few[:, 0, 0])


def test_photos_are_read_by_name_in_any_mode_and_size(tmp_path):
    Image.new("RGB", (60, 40), (10, 200, 30)).save(tmp_path / "b.jpg", quality=95)
    Image.new("L", (300, 500), 77).save(tmp_path / "a.png")
    Image.new("RGBA", (16, 16), (1, 2, 3, 100)).save(tmp_path / "c.webp", lossless=True)
    (tmp_path / "readme.txt").write_text("no photo")
    photos = photo_textures(tmp_path)
    assert photos.shape == (3, SIDE, SIDE, 3)
    assert (photos[0] == 77).all()
    assert (photos[1].float() - torch.tensor([10.0, 200, 30])).abs().max() < 4


def test_a_folder_that_is_not_there_or_empty_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*nowhere: expected one of photos"):
        photo_textures(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no photos in .*: expected JPEG, PNG or WebP"):
        photo_textures(tmp_path)


def test_a_broken_photo_is_named(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"this is text")
    with pytest.raises(InputError, match=r"bad\.jpg cannot be read as a photo .* take it out"):
        photo_textures(tmp_path)
