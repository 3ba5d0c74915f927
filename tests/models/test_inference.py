"""The network made ready for many pairs says what the network says."""

import pytest
import torch

from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.models.inference import normalized, ready

SMALL = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2}
SMALL |= {"dec_embed_dim": 16, "dec_depth": 4, "dec_num_heads": 2}
FIELDS = ("pointmap0_in_cam0", "confidence0", "pointmap1_in_cam0", "confidence1")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["linear", "dpt"])
def model(request):
    torch.manual_seed(0)
    return Dust3r(Dust3rConfig(head=request.param, dpt_layer_dims=(8, 8, 16, 16), dpt_feature_dim=16, **SMALL)).eval()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return normalized(torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8, generator=generator))


def test_weights_that_are_rounded_once_give_what_autocast_gives(model, images):
    network = ready(model, CPU, torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, found = model(images[:1], images[1:]), network(images[:1], images[1:])
    for field in FIELDS:
        assert torch.equal(getattr(found, field), getattr(expected, field))
    assert model.decoder_embed.weight.dtype == torch.float32, "the caller's model stays as it is"
    assert ready(model, CPU, torch.float32) is model


def test_what_needs_no_partner_can_be_computed_once_an_image(model, images):
    with torch.inference_mode():
        tokens0, tokens1 = model.encode(images[:1]), model.encode(images[1:])
        expected = model.decode(tokens0, tokens1)
        found = model.decode(model.with_finest(tokens0), model.with_finest(tokens1))
    for field in FIELDS:
        assert torch.equal(getattr(found, field), getattr(expected, field))


def test_the_form_for_compilers_is_the_same_function(model, images, monkeypatch):
    with torch.inference_mode():
        expected = model(images[:1], images[1:])
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = model(images[:1], images[1:])
    for field in FIELDS:
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-5, atol=1e-6)
