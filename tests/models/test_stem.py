"""XFeat's frozen features beside the patches: its checkpoint, what they are, and that they change nothing untrained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from xfeat import write_xfeat

from dust3r_sfm.errors import InputError
from dust3r_sfm.models.checkpoint import load_model, save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.models.stem import Stem, XFeat, read_xfeat

DATA = Path(__file__).parent.parent / "data"
SHAPE = {"image_size": 64, "enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2}
SHAPE |= {"dec_embed_dim": 32, "dec_depth": 1, "dec_num_heads": 2}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Random weights of the published form, and their file."""
    path = tmp_path_factory.mktemp("xfeat") / "xfeat.pt"
    return write_xfeat(path), path


@pytest.mark.parametrize("size", [(64, 96), (48, 80)])  # 80: not a multiple of its coarsest level's 32 pixels
def test_features_are_those_of_the_network_with_its_batch_normalisation(published, size):
    network, path = published
    xfeat = XFeat()
    xfeat.load_state_dict(read_xfeat(path))
    image = torch.rand((2, 3, *size))
    with torch.no_grad():
        expected = network(image)
    found = xfeat(2 * image - 1)  # range and offset do not matter
    assert found.shape == (2, 64, size[0] // 8, size[1] // 8)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_the_shipped_network_sees_what_xfeat_itself_gives():
    """Golden features by the published weights and their own network, of an image that a formula gives."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    image = torch.stack([torch.sin(0.3 * x + 0.1 * k * y) * torch.cos(0.2 * y + k) for k in range(3)])[None]
    with np.load(DATA / "xfeat.npz") as file:
        expected = torch.from_numpy(file["features"]).float()
    found = load_model().stem.xfeat(image)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_each_patch_gets_the_cells_that_it_covers():
    torch.manual_seed(0)
    stem = Stem(64 * 4, 16)
    stem.proj.weight.data.copy_(torch.eye(64 * 4))
    image = torch.rand((1, 3, 48, 64))
    tokens = stem(image).unflatten(2, (64, 2, 2))
    features = nn.functional.normalize(stem.xfeat(image), dim=1) * 8
    assert torch.allclose(tokens[0, 5, :, 1, 0], features[0, :, 3, 2], atol=1e-6)  # patch in row 1, column 1 of 4


def test_a_new_stem_changes_no_prediction_and_is_not_trained():
    torch.manual_seed(0)
    plain, seeing = Dust3r(Dust3rConfig(**SHAPE)), Dust3r(Dust3rConfig(**SHAPE, stem="xfeat"))
    seeing.load_state_dict(seeing.state_dict() | plain.state_dict())
    image0, image1 = torch.rand((2, 1, 3, 32, 48))
    assert torch.equal(seeing(image0, image1).pointmap1_in_cam0, plain(image0, image1).pointmap1_in_cam0)
    seeing(image0, image1).pointmap1_in_cam0.sum().backward()
    assert seeing.stem.proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in seeing.stem.xfeat.parameters())


def test_a_network_with_a_stem_comes_back_from_its_file(tmp_path):
    torch.manual_seed(0)
    model = Dust3r(Dust3rConfig(**SHAPE, stem="xfeat")).eval()
    model.stem.proj.weight.data.normal_(std=0.1)
    save_weights(model, tmp_path / "seeing.safetensors")
    again = load_model(tmp_path / "seeing.safetensors")
    images = torch.rand((2, 1, 3, 32, 48))
    with torch.no_grad():
        difference = again(*images).pointmap0_in_cam0 - model(*images).pointmap0_in_cam0
    assert difference.abs().max() < 0.01  # float16
    assert not any(p.requires_grad for p in again.stem.xfeat.parameters())


class Hostile:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("case", ["foreign", "text", "hostile", "missing", "a list"])
def test_what_is_not_xfeats_checkpoint_is_refused_in_a_sentence_and_runs_nothing(tmp_path, case, capsys):
    path = tmp_path / "xfeat.pt"
    if case == "foreign":
        torch.save({"weight": torch.zeros(3)}, path)
    elif case == "text":
        path.write_text("not a checkpoint")
    elif case == "hostile":
        torch.save(Hostile(), path)
    elif case == "a list":
        torch.save([torch.zeros(3)], path)
    with pytest.raises(InputError, match="cannot read XFeat's weights from .*xfeat.pt: expected its published"):
        read_xfeat(path)
    assert capsys.readouterr().out == ""
