"""Descriptors of the encoder: pooling by its formula, and a projection that belongs to one encoder alone."""

import pytest
import torch

from dust3r_sfm.errors import InputError
from dust3r_sfm.models import descriptor as module
from dust3r_sfm.models.descriptor import EncoderDescriptor, encoder_fingerprint, load_descriptor, save_descriptor
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig


def tiny_model(seed=0):
    torch.manual_seed(seed)
    parts = {f"{p}_{k}": n for p in ("enc", "dec") for k, n in [("embed_dim", 32), ("depth", 1), ("num_heads", 2)]}
    return Dust3r(Dust3rConfig(image_size=64, **parts)).eval()


def with_projection(model):
    return EncoderDescriptor(model, torch.nn.Linear(64, 16), p=2.5).eval()


def test_pooling_is_the_power_mean_of_each_sign():
    tokens = torch.tensor([[[3.0, -1.0], [1.0, -2.0]]])
    found = EncoderDescriptor(tiny_model(), p=2.0).pool(tokens)[0].tolist()
    assert found == pytest.approx([5**0.5, 0, 0, 2.5**0.5], abs=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (48, 64), (64, 32)])
def test_images_of_any_size_get_unit_descriptors(size):
    images = torch.rand(2, 3, *size) * 2 - 1
    for network, dim in ((EncoderDescriptor(tiny_model()), 64), (with_projection(tiny_model()), 16)):
        with torch.no_grad():
            found = network(images)
        assert found.shape == (2, dim) == (2, network.dim)
        assert torch.allclose(found.norm(dim=1), torch.ones(2))


def test_what_is_saved_is_what_is_loaded(tmp_path):
    model = tiny_model()
    network, images = with_projection(model), torch.rand(2, 3, 48, 64) * 2 - 1
    save_descriptor(network, tmp_path / "d.safetensors")
    with torch.no_grad():
        assert torch.allclose(load_descriptor(model, tmp_path / "d.safetensors")(images), network(images), atol=1e-3)


def test_a_projection_serves_the_encoder_that_it_was_learned_for_alone(tmp_path, monkeypatch):
    save_descriptor(with_projection(tiny_model()), tmp_path / "d.safetensors")
    with pytest.raises(InputError, match="another encoder"):
        load_descriptor(tiny_model(1), tmp_path / "d.safetensors")
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "d.safetensors")
    assert load_descriptor(tiny_model(1)).projection is None
    assert load_descriptor(tiny_model()).projection is not None


def test_the_fingerprint_survives_the_rounding_of_files_and_sees_the_encoder_alone():
    model, rounded = tiny_model(), tiny_model()
    rounded.load_state_dict({name: x.half().float() for name, x in model.state_dict().items()})
    torch.nn.init.zeros_(rounded.downstream_head1.proj.weight)
    assert encoder_fingerprint(model) == encoder_fingerprint(rounded)
    torch.nn.init.zeros_(rounded.enc_norm.weight)
    assert encoder_fingerprint(model) != encoder_fingerprint(rounded)


def test_files_that_are_no_projection_are_refused(tmp_path):
    (tmp_path / "d.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        load_descriptor(tiny_model(), tmp_path / "d.safetensors")
