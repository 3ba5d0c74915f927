"""The network equals the published one, whatever its shape, and is ready for training."""

import json
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dust3r_sfm.models.blocks import rope_of_grid, rotate
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig

DATA = Path(__file__).parents[1] / "data"
SHAPES = json.loads((DATA / "state_dict_shapes.json").read_text())
SMALL = Dust3rConfig(
    enc_embed_dim=32, enc_depth=2, enc_num_heads=2, dec_embed_dim=16, dec_depth=4, dec_num_heads=2,
    dpt_layer_dims=(8, 8, 16, 16), dpt_feature_dim=16,
)  # fmt: skip


def golden_cases() -> list[str]:
    with np.load(DATA / "pointmaps_mini.npz") as golden:
        return sorted({key.rsplit("/", 1)[0] for key in golden})


def config_of(name: str) -> Dust3rConfig:
    c = dict(SHAPES[f"{name}/config"])
    dims = {key: value for key, value in c.items() if key.startswith(("enc_", "dec_"))}
    return Dust3rConfig(image_size=c["img_size"][0], head=c["head_type"], **dims)


def weight_by_rule(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    z = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return torch.from_numpy(1 + np.float32(0.1) * z if name.endswith("weight") else np.float32(0.02) * z)
    z = z * np.float32(1 / np.sqrt(np.prod(shape[1:], dtype=np.float64)))
    last = "downstream_head" in name and ("head.4" in name or name.endswith(".proj.weight"))
    return torch.from_numpy(z * np.float32(0.5) if last else z)


def name_of_rule(name: str) -> str:
    """Where two names share a tensor, its values are drawn from the list form's."""
    for level in range(1, 5):
        name = name.replace(f"layer{level}_rn", f"layer_rn.{level - 1}")
    return name


@pytest.fixture(scope="module")
def golden_models() -> dict[str, Dust3r]:
    models = {}
    for name in ("mini_linear", "mini_dpt"):
        models[name] = Dust3r(config_of(name)).eval()
        state = {k: weight_by_rule(name_of_rule(k), tuple(v.shape)) for k, v in models[name].state_dict().items()}
        models[name].load_state_dict(state)
    return models


def image_by_rule(size: str, seed: int) -> torch.Tensor:
    h, w = (int(side) for side in size.split("x"))
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).random((1, 3, h, w), dtype=np.float32) * 2 - 1)


@pytest.mark.parametrize("case", golden_cases())
def test_pointmaps_equal_the_published_networks(case, golden_models):
    name, (size0, size1, seed) = case.split("/")[0], case.split("/")[1].split("_")
    seed = int(seed.removeprefix("s"))
    with torch.no_grad():
        prediction = golden_models[name](image_by_rule(size0, seed), image_by_rule(size1, seed + 1))
    with np.load(DATA / "pointmaps_mini.npz") as golden:
        for came, key in (
            (prediction.pointmap0_in_cam0, "pts3d_1"),
            (prediction.confidence0, "conf_1"),
            (prediction.pointmap1_in_cam0, "pts3d_2"),
            (prediction.confidence1, "conf_2"),
        ):
            expected = golden[f"{case}/{key}"]
            difference = np.abs(came[0, ::8, ::8].numpy() - expected)
            size = np.linalg.norm(expected, axis=-1, keepdims=True) if expected.ndim == 3 else expected
            assert (difference / size).max() < 1e-4, key


@pytest.mark.parametrize(("name", "num_parameters"), [("full_224_linear", 532_342_784), ("full_512_dpt", 571_171_208)])
def test_released_networks_have_our_names_shapes_and_size(name, num_parameters):
    with torch.device("meta"):
        state = Dust3r(config_of(name)).state_dict()
    released = {key: shape for key, shape in SHAPES[name].items() if ".layer_rn." not in key}  # second names
    assert {key: list(x.shape) for key, x in state.items()} == released
    assert sum(x.numel() for x in state.values()) == num_parameters


def random_images(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(params=["linear", "dpt"])
def small(request) -> Dust3r:
    torch.manual_seed(0)
    return Dust3r(replace(SMALL, head=request.param))


def test_pointmaps_have_the_size_of_their_images(small):
    prediction = small(random_images(2, 3, 48, 80), random_images(2, 3, 112, 64))
    assert prediction.pointmap0_in_cam0.shape == (2, 48, 80, 3)
    assert prediction.confidence0.shape == (2, 48, 80)
    assert prediction.pointmap1_in_cam0.shape == (2, 112, 64, 3)
    assert prediction.confidence1.shape == (2, 112, 64)


def test_forward_neither_reads_values_nor_copies_to_the_host(small):
    """Tensors on the meta device have no values: whatever needed one would raise."""
    image = torch.empty(2, 3, 48, 80, device="meta")
    assert small.to("meta")(image, image).confidence1.shape == (2, 48, 80)


def test_a_pair_is_independent_of_the_others_in_its_batch(small):
    image0, image1 = random_images(3, 3, 32, 48), random_images(3, 3, 48, 32, seed=1)
    with torch.no_grad():
        batch, alone = small(image0, image1), small(image0[1:2], image1[1:2])
    torch.testing.assert_close(batch.pointmap1_in_cam0[1:2], alone.pointmap1_in_cam0, rtol=1e-4, atol=1e-5)


def test_an_encoded_image_can_be_kept(small):
    image0, image1 = random_images(1, 3, 32, 48), random_images(1, 3, 32, 48, seed=1)
    with torch.no_grad():
        at_once = small(image0, image1)
        apart = small.decode(small.encode(image0), small.encode(image1))
    torch.testing.assert_close(at_once.pointmap1_in_cam0, apart.pointmap1_in_cam0, rtol=1e-4, atol=1e-5)


def test_the_two_images_of_a_pair_do_not_have_the_same_role(small):
    image = random_images(1, 3, 32, 48)
    with torch.no_grad():
        prediction = small(image, image)
    assert (prediction.pointmap0_in_cam0 - prediction.pointmap1_in_cam0).abs().max() > 1e-3


def test_first_predictions_are_of_moderate_size_and_confidence(small):
    with torch.no_grad():
        prediction = small(random_images(2, 3, 64, 64), random_images(2, 3, 64, 64, seed=1))
    for pointmap in (prediction.pointmap0_in_cam0, prediction.pointmap1_in_cam0):
        assert 0.01 < pointmap.norm(dim=-1).mean() < 3
    for confidence in (prediction.confidence0, prediction.confidence1):
        assert confidence.min() > 1
        assert 1.3 < confidence.mean() < 4


def test_bfloat16_autocast_gives_float32_close_to_full_precision(small):
    image0, image1 = random_images(1, 3, 64, 64), random_images(1, 3, 64, 64, seed=1)
    with torch.no_grad():
        exact = small(image0, image1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fast = small(image0, image1)
    assert fast.pointmap0_in_cam0.dtype == fast.confidence0.dtype == torch.float32
    error = (fast.pointmap1_in_cam0 - exact.pointmap1_in_cam0).norm(dim=-1).mean()
    assert 0 < error < 0.02 * exact.pointmap1_in_cam0.norm(dim=-1).mean()


def test_every_trainable_parameter_receives_a_gradient(small):
    """Distributed training stops where one does not."""
    prediction = small(random_images(1, 3, 48, 32), random_images(1, 3, 32, 48, seed=1))
    sum(x.sum() for x in vars(prediction).values()).backward()
    assert [name for name, p in small.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in small.parameters() if p.grad is not None)


def test_training_works_after_inference_mode_has_made_the_tables(small):
    image = random_images(1, 3, 176, 16)  # a grid that no other test has
    with torch.inference_mode():
        small(image, image)
    small(image, image).confidence0.sum().backward()


COMPILED = """
import torch
from torch._dynamo.testing import CompileCounter
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
small = dict(enc_embed_dim=32, enc_depth=3, enc_num_heads=2, dec_embed_dim=16, dec_depth=3, dec_num_heads=2)
model = Dust3r(Dust3rConfig(**small))
counter = CompileCounter()
for block in (*model.enc_blocks, *model.dec_blocks, *model.dec_blocks2):
    block.compile(backend=counter, fullgraph=True)
image = torch.rand(2, 3, 32, 48)
with torch.autocast("cpu", dtype=torch.bfloat16):
    model(image, image).confidence0.sum().backward()
print(counter.frame_count)
"""


def test_one_compiled_block_serves_all_layers_of_the_encoder_and_one_both_decoders():
    """In a process of its own: the shape checks of tests are not for compiling."""
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "2"


def test_tables_are_made_once_for_a_grid():
    assert rope_of_grid(3, 5, 16, torch.device("cpu"))[0] is rope_of_grid(3, 5, 16, torch.device("cpu"))[0]


@pytest.mark.parametrize("shift", [(1, 0), (0, 2)])
def test_attention_depends_on_relative_positions_only(shift):
    cos, sin = (x.reshape(6, 6, 16) for x in rope_of_grid(6, 6, 16, torch.device("cpu")))
    dy, dx = shift

    def product(y: int, x: int) -> torch.Tensor:
        q, k = torch.linspace(-1, 1, 16), torch.linspace(2, -3, 16)
        at = [(cos[v, u][None], sin[v, u][None]) for v, u in ((y, x), (y + 2, x + 1))]
        return rotate(q[None], at[0]) @ rotate(k[None], at[1]).T

    torch.testing.assert_close(product(0, 0), product(dy, dx))


def test_sizes_that_are_no_multiple_of_the_patch_are_refused():
    with pytest.raises(ValueError, match="multiples of 16, got 40x48"):
        Dust3r(SMALL).encode(torch.zeros(1, 3, 40, 48))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"enc_num_heads": 5}, "enc_embed_dim must be a multiple of 4 enc_num_heads, got 32 for 5 heads"),
        ({"confidence_limits": (2.0, 1.0)}, "confidence_limits must rise"),
        ({"image_size": 8}, "image_size must be"),
        ({"head": "dpt", "patch_size": 8}, "the DPT head needs patches of 16 pixels"),
    ],
)
def test_networks_that_cannot_be_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **change)
