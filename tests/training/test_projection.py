"""The projection learns what tells places apart, on features whose answer is known."""

import pytest
import torch

from dust3r_sfm import train_descriptor
from dust3r_sfm.__main__ import main
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.descriptor import load_descriptor
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.training.places import sample_flat_places, sample_places
from dust3r_sfm.training.projection import ProjectionConfig, learn_projection, whitening
from dust3r_sfm.training.textures import generated_textures, with_mipmaps
from dust3r_sfm.training.world import Dice


@pytest.fixture
def tiny(tmp_path):
    """The file of a tiny network."""
    torch.manual_seed(0)
    parts = {f"{p}_{k}": n for p in ("enc", "dec") for k, n in [("embed_dim", 32), ("depth", 1), ("num_heads", 2)]}
    save_weights(Dust3r(Dust3rConfig(image_size=64, square_ok=True, **parts)), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def places_in_noise(num_places=60, views=5):
    """Features of which 4 numbers tell the place and 20 are noise that is as strong."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randn(num_places, 4, generator=generator).repeat_interleave(views, 0)
    features = torch.cat([place, torch.randn(num_places * views, 20, generator=generator)], dim=1)
    features += 0.2 * torch.randn(features.shape, generator=generator) + 5
    return features, torch.arange(num_places).repeat_interleave(views)


def test_whitened_features_have_no_mean_and_equal_variances():
    features, _ = places_in_noise()
    mixed = features @ torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        white = whitening(mixed, 24, power=1.0)(mixed)
    assert torch.allclose(white.T @ white / len(white), torch.eye(24), atol=1e-2)
    assert torch.allclose(white.mean(dim=0), torch.zeros(24), atol=1e-3)


def test_places_that_were_not_seen_are_found_better_than_by_whitening():
    features, places = places_in_noise()
    config = ProjectionConfig(dim=24, steps=75, batch_places=12, learning_rate=2e-2)
    projection, losses = learn_projection(features, places, config, torch.Generator().manual_seed(0))
    assert min(losses) < 0.6 * losses[0]
    strength = projection.weight.detach().norm(dim=0)
    assert strength[:4].mean() > 2 * strength[4:].mean()


def test_the_same_seed_gives_the_same_projection():
    features, places = places_in_noise(20)
    config = ProjectionConfig(dim=8, steps=10, batch_places=8)
    first, second = (learn_projection(features, places, config, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0].weight, second[0].weight)
    assert first[1] == second[1]


def test_places_are_photos_in_range_that_differ():
    images = sample_places(Dice("cpu", 0), 2, 2, 16, 24, with_mipmaps(generated_textures(4)))
    assert images.shape == (2, 2, 3, 16, 24)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert len({float(x.mean()) for x in images.flatten(0, 1)}) == 4


def test_the_stage_writes_a_projection_that_the_network_takes(tiny, tmp_path, monkeypatch):
    def noise(dice, num_places, num_views, height, width, textures):
        return dice.uniform(num_places, num_views, 3, height, width)

    monkeypatch.setattr(train_descriptor, "sample_places", noise)
    options = {"output": tmp_path / "d.safetensors", "model": tiny, "num_places": 10}
    options |= {"num_views": 2, "num_generated": 4, "dim": 8, "steps": 5, "batch_places": 4}
    assert main(["train-descriptor", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]) == 0
    network = load_descriptor(Dust3r.from_pretrained(tiny), tmp_path / "d.safetensors")
    assert network.dim == 8
    assert main(["train-descriptor", "--output", str(tmp_path / "d"), "--num_places", "3"]) == 2


def test_flat_places_are_views_of_one_photo_each():
    photos = torch.zeros(2, 256, 256, 3, dtype=torch.uint8)
    photos[1] = 255
    images = sample_flat_places(Dice("cpu", 0), photos, 4, 32, 48)
    assert images.shape == (2, 4, 3, 32, 48)
    assert images[0].mean() < 0.1
    assert images[1].mean() > 0.5


def test_the_stage_learns_from_flat_places_too(tiny, tmp_path):
    options = [f"--output={tmp_path / 'd'}", f"--model={tiny}", "--flat", "--num_generated=12", "--num_views=2"]
    assert main(["train-descriptor", *options, "--dim=8", "--steps=5", "--batch_places=4"]) == 0
    assert load_descriptor(Dust3r.from_pretrained(tiny), tmp_path / "d").dim == 8


@pytest.mark.parametrize("dim", [8, 100])
def test_no_more_numbers_than_there_are_components(dim):
    features, _ = places_in_noise()
    assert whitening(features, dim).out_features == min(dim, 24)
