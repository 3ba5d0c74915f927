"""Weights come back from every format; a bad file gives one sentence, and nothing in it runs."""

import json
import logging
import os
import pickle
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dust3r_sfm.errors import InputError
from dust3r_sfm.models import checkpoint, weights
from dust3r_sfm.models.checkpoint import load_model, save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig

LINEAR = Dust3rConfig(
    image_size=512, enc_embed_dim=16, enc_depth=1, enc_num_heads=2, dec_embed_dim=8, dec_depth=4, dec_num_heads=2
)
DPT = replace(LINEAR, head="dpt", dpt_layer_dims=(4, 4, 8, 8), dpt_feature_dim=8)
ARGUMENTS = {
    "pos_embed": "RoPE100", "patch_embed_cls": "ManyAR_PatchEmbed", "img_size": (512, 512), "head_type": "linear",
    "output_mode": "pts3d", "enc_embed_dim": 16, "enc_depth": 1, "enc_num_heads": 2, "dec_embed_dim": 8,
    "dec_depth": 4, "dec_num_heads": 2,
}  # fmt: skip
MODES = "depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf)"


def text_of(**changes: object) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in (ARGUMENTS | changes).items())
    return f"AsymmetricCroCo3DStereo({arguments}, {MODES})"


@pytest.fixture(scope="module")
def linear() -> Dust3r:
    torch.manual_seed(0)
    return Dust3r(LINEAR)


def write_pth(path: Path, state: dict, text: str | None = None) -> Path:
    torch.save({"args": Namespace(model=text_of() if text is None else text, epochs=3), "model": state}, path)
    return path


def write_folder(folder: Path, state: dict, config: str | None = None) -> Path:
    modes = {"depth_mode": ["exp", -float("inf"), float("inf")], "conf_mode": ["exp", 1, float("inf")]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ARGUMENTS | modes) if config is None else config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same_weights(came: Dust3r, expected: Dust3r, *, rtol: float = 0.0) -> None:
    torch.testing.assert_close(came.state_dict(), expected.state_dict(), rtol=rtol, atol=rtol * 1e-3)


@pytest.mark.parametrize("config", [LINEAR, DPT])
def test_saved_weights_come_back_as_float32_with_config_and_metadata(config, tmp_path):
    model = Dust3r(config)
    path = tmp_path / "model.safetensors"
    save_weights(model, path, {"name": "little", "licence": "MIT", "trained_on": "nothing"})
    loaded = Dust3r.from_pretrained(path)
    assert loaded.config == config
    assert (loaded.name, loaded.licence) == ("little", "MIT")
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_same_weights(loaded, model, rtol=1e-3)
    assert os.listdir(tmp_path) == ["model.safetensors"]  # no temporary file stays
    assert {x.dtype for x in load_file(path).values()} == {torch.float16}


def test_a_failed_save_keeps_the_old_file(linear, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    broken = Dust3r(LINEAR)
    torch.nn.init.constant_(broken.decoder_embed.bias, 1e9)  # beyond float16
    with pytest.raises(InputError, match=r"decoder_embed\.bias holds numbers that are not finite"):
        save_weights(broken, path)
    assert path.read_text() == "old"


def test_loaded_weights_can_be_trained_on(linear, tmp_path):
    save_weights(linear, tmp_path / "a.safetensors")
    loaded = load_model(tmp_path / "a.safetensors")
    image = torch.zeros(1, 3, 16, 32)
    loaded(image, image).confidence1.sum().backward()
    assert loaded.decoder_embed.weight.grad is not None


def test_released_pth_files_are_read(linear, tmp_path):
    loaded = load_model(str(write_pth(tmp_path / "DUSt3R_512_linear.pth", linear.state_dict())))
    assert loaded.config == LINEAR
    assert (loaded.name, loaded.licence) == ("DUSt3R_512_linear", "CC BY-NC-SA 4.0")
    assert_same_weights(loaded, linear)


def test_hub_folders_with_bare_infinity_are_read(linear, tmp_path):
    folder = write_folder(tmp_path / "hub", linear.state_dict())
    assert "Infinity" in (folder / "config.json").read_text()
    loaded = load_model(folder)
    assert (loaded.config, loaded.name, loaded.licence) == (LINEAR, "hub", "CC BY-NC-SA 4.0")
    assert_same_weights(loaded, linear)


@pytest.fixture(scope="module")
def full_dpt() -> Dust3r:
    """The head's widths are fixed in the released format."""
    return Dust3r(replace(LINEAR, head="dpt"))


def with_aliases(state: dict) -> dict:
    again = {k.replace(f"layer{i}_rn", f"layer_rn.{i - 1}"): x for k, x in state.items() for i in range(1, 5)}
    return state | again


def with_list_names_only(state: dict) -> dict:
    return {k: x for k, x in with_aliases(state).items() if not any(f"layer{i}_rn" in k for i in range(1, 5))}


def with_names_of_croco(state: dict) -> dict:
    names = {f".act_postprocess.{i}.": f".act_{i + 1}_postprocess." for i in range(4)}
    return {next((k.replace(a, b) for a, b in names.items() if a in k), k): x for k, x in state.items()}


@pytest.mark.parametrize("rename", [dict, with_aliases, with_list_names_only, with_names_of_croco])
def test_weights_stored_under_other_names_are_found(rename, full_dpt, tmp_path):
    path = write_pth(tmp_path / "dpt.pth", rename(full_dpt.state_dict()), text_of(head_type="dpt"))
    loaded = load_model(path)
    assert loaded.config == full_dpt.config
    assert_same_weights(loaded, full_dpt)


def test_one_decoder_serves_as_the_start_of_both(linear, tmp_path):
    state = {name: x for name, x in linear.state_dict().items() if not name.startswith("dec_blocks2")}
    loaded = load_model(write_pth(tmp_path / "croco.pth", state))
    torch.testing.assert_close(loaded.dec_blocks2.state_dict(), linear.dec_blocks.state_dict(), rtol=0, atol=0)
    loaded.dec_blocks[0].norm1.weight.data.zero_()
    assert loaded.dec_blocks2[0].norm1.weight.abs().sum() > 0, "the copy must be its own"


def test_the_licence_of_released_weights_is_logged_once_a_process(linear, tmp_path, caplog):
    checkpoint._log_licence.cache_clear()
    path = write_pth(tmp_path / "a.pth", linear.state_dict())
    with caplog.at_level(logging.INFO):
        load_model(path)
        load_model(path)
    assert [record.getMessage().count("CC BY-NC-SA 4.0") for record in caplog.records] == [1]


def test_weights_of_our_own_log_nothing(linear, tmp_path, caplog):
    save_weights(linear, tmp_path / "a.safetensors")
    load_model(tmp_path / "a.safetensors")
    assert caplog.records == []


def test_nothing_named_means_the_shipped_weights(linear, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "dust3r_small.safetensors")
    with pytest.raises(InputError, match=r"the shipped weights are missing at .*dust3r_small\.safetensors"):
        load_model()
    save_weights(linear, tmp_path / "dust3r_small.safetensors", {"name": "dust3r_small"})
    loaded = Dust3r.from_pretrained()
    assert (loaded.name, loaded.licence) == ("shipped dust3r_small", "Apache-2.0")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def refusal(source: object) -> str:
    with pytest.raises(InputError) as caught:
        load_model(source)
    sentence = str(caught.value)
    assert Path(str(source)).name in sentence
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


@pytest.mark.parametrize("way", ["pickle 2", "pickle 4", "torch.save", "inside the weights", "as the arguments"])
def test_a_pickle_bomb_does_not_go_off(way, linear, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "bomb.pth"
    if way.startswith("pickle"):
        path.write_bytes(pickle.dumps(Bomb(marker), protocol=int(way[-1])))
    else:
        content = {
            "torch.save": Bomb(marker),
            "inside the weights": {"args": Namespace(model=text_of()), "model": {"mask_token": Bomb(marker)}},
            "as the arguments": {"args": Namespace(model=Bomb(marker)), "model": linear.state_dict()},
        }
        torch.save(content[way], path)
    said = "nothing in it was run" if way == "pickle 4" else "it asks to run posix.system, which no weights need"
    assert said in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch MARKER')",
        "AsymmetricCroCo3DStereo(enc_depth=__import__('os').system('touch MARKER'))",
        "AsymmetricCroCo3DStereo(**{'enc_depth': open('MARKER', 'w')})",
        "(lambda: open('MARKER', 'w'))()",
        "[open('MARKER', 'w') for _ in (1,)]",
        "AsymmetricCroCo3DStereo(16)",
        "not python (",
        "",
        "(" * 9000,
        "F(a=" + "-" * 9000 + "1)",
        "F(a=1" + " " * 20_000 + ")",
        "F(a='\0')",
    ],
)
def test_hostile_constructor_texts_are_not_run(text, linear, tmp_path):
    marker = tmp_path / "marker"
    path = write_pth(tmp_path / "hostile.pth", linear.state_dict(), text.replace("MARKER", str(marker)))
    assert "its args.model is not one constructor call of plain values" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_mode": "pts3d+desc24"}, "its output_mode is 'pts3d+desc24', where 'pts3d' can be used"),
        ({"head_type": "catmlp+dpt"}, "its head_type is 'catmlp+dpt', where 'linear' or 'dpt' can be used"),
        ({"head_type": ["dpt"]}, "its head_type is ['dpt']"),
        ({"pos_embed": "cosine"}, "its pos_embed is 'cosine'"),
        ({"enc_depth": 10**9}, "speak of 1000000000 encoder and 4 decoder blocks, its weights are of 1 and 4"),
        ({"enc_embed_dim": 32}, "where the network needs"),
        ({"enc_embed_dim": 2**62}, "its settings describe no network that can be built"),
        ({"enc_embed_dim": "16"}, "its settings describe no network that can be built"),
        ({"enc_num_heads": 0}, "its settings describe no network that can be built"),
        ({"img_size": "large"}, "its settings describe no network that can be built"),
        ({"img_size": ()}, "its settings describe no network that can be built"),
        ({"mlp_ratio": float("1e300")}, "its settings describe no network that can be built"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, said, linear, tmp_path):
    assert said in refusal(write_pth(tmp_path / "settings.pth", linear.state_dict(), text_of(**changes)))


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        ("depth_mode=('log', -inf, inf)", "describe no network"),
        ("depth_mode=('exp', 0, 5)", "depth_mode with limits"),
        ("conf_mode='exp'", "describe no network"),
        ("conf_mode=('exp', 5, 1)", "confidence_limits must rise"),
    ],
)
def test_modes_that_do_not_exist_are_named(modes, said, linear, tmp_path):
    text = text_of().replace(MODES, modes)
    assert said in refusal(write_pth(tmp_path / "modes.pth", linear.state_dict(), text))


def test_settings_that_are_missing_are_named(linear, tmp_path):
    path = write_pth(tmp_path / "few.pth", linear.state_dict(), "AsymmetricCroCo3DStereo(img_size=224, enc_depth=1)")
    assert "its settings lack enc_embed_dim, enc_num_heads, dec_embed_dim" in refusal(path)


def test_weights_that_do_not_fit_are_named(linear, tmp_path):
    state = linear.state_dict()
    embed = state["decoder_embed.weight"]
    cases = {
        "lacks weights dec_norm.bias (1 in all)": {k: x for k, x in state.items() if k != "dec_norm.bias"},
        "has the unknown weights surplus (1 in all)": state | {"surplus": torch.zeros(1)},
        "its dec_norm.bias is (3,), where the network needs (8,)": state | {"dec_norm.bias": torch.zeros(3)},
        "its dec_norm.bias is no array": state | {"dec_norm.bias": torch.zeros(8, dtype=torch.int64)},
        "its decoder_embed.weight is no array": state | {"decoder_embed.weight": embed.to_sparse()},
        "its dec_norm.weight is no array": state | {"dec_norm.weight": "text"},
        "dec_norm.bias holds numbers that are not finite": state | {"dec_norm.bias": torch.full((8,), torch.nan)},
        "blocks, its weights are of 0 and 0": {},
    }
    for said, broken in cases.items():
        assert said in refusal(write_pth(tmp_path / "broken.pth", broken))


def test_the_unused_mask_token_may_be_missing(linear, tmp_path):
    state = {name: x for name, x in linear.state_dict().items() if name != "mask_token"}
    assert_same_weights(load_model(write_pth(tmp_path / "a.pth", state)), linear)


@pytest.mark.parametrize("content", [{"model": {}}, {"args": Namespace(model=3), "model": {}}, {"args": 1}, [1, 2], 7])
def test_checkpoints_of_something_else_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    assert "it h" in refusal(tmp_path / "other.pth")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_refused(suffix, share, linear, tmp_path):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"short{suffix}"
    write_pth(whole, linear.state_dict()) if suffix == ".pth" else save_weights(linear, whole)
    path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    assert "it is damaged" in refusal(path)


def test_bytes_changed_anywhere_never_escape_as_another_error(linear, tmp_path):
    whole, path = tmp_path / "whole.pth", tmp_path / "changed.pth"
    write_pth(whole, linear.state_dict())
    content = bytearray(whole.read_bytes())
    for position in range(0, 2000, 37):
        changed = content.copy()
        changed[position] ^= 0x55
        path.write_bytes(changed)
        with suppress(InputError):  # some bytes are of no account
            load_model(path)


@pytest.mark.parametrize("start", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"hello", b"PK\x03\x04", b"\x80\x04."])
def test_foreign_files_are_refused(start, tmp_path):
    (tmp_path / "photo.png").write_bytes(start + bytes(200))
    assert "it is damaged, or n" in refusal(tmp_path / "photo.png")


def test_unrelated_safetensors_are_refused(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert "not one of this package's models" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("config", ["", "[]", "{}{", '{"colour": 3}', "[" * 5000, '{"enc_embed_dim": "x"}'])
def test_own_files_with_a_strange_config_are_refused(config, linear, tmp_path):
    save_weights(linear, tmp_path / "good.safetensors")
    state = {name: x.clone() for name, x in linear.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"format": checkpoint.FORMAT, "config": config})
    assert "its config is none of this version's" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "its config.json is not JSON"),
        ("[1]", "its config.json holds no table"),
        ("[" * 9000, "its config.json is not JSON"),
        (" " * 20_000, "its config.json is far too long"),
        ("{}", "its settings lack img_size"),
    ],
)
def test_folders_with_a_strange_config_are_refused(config, said, linear, tmp_path):
    assert said in refusal(write_folder(tmp_path / "hub", linear.state_dict(), config))


def test_folders_with_missing_or_damaged_files_are_refused(linear, tmp_path):
    folder = write_folder(tmp_path / "hub", linear.state_dict())
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    assert "its model.safetensors is damaged" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "it has no model.safetensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "it has no config.json" in refusal(folder)


def test_paths_that_do_not_exist_are_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for source in ("out/model", "./naver/model", "model", "a/b/c", "a/b.pth", "", "\0", "a" * 400, Path("naver/model")):
        with pytest.raises(InputError, match="there is no such file or folder$"):
            load_model(source)


def test_a_name_on_the_hub_without_a_network_is_one_sentence(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "no model nobody/nothing: there is no such file or folder here" in refusal("nobody/nothing")


def test_a_name_on_the_hub_is_the_models_name(linear, tmp_path, monkeypatch):
    import huggingface_hub

    folder = write_folder(tmp_path / "0123abcd", linear.state_dict())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.chdir(tmp_path)
    assert load_model("naver/DUSt3R_tiny").name == "naver/DUSt3R_tiny"


def test_what_is_neither_file_nor_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "it is neither a file nor a folder" in refusal(tmp_path / "pipe")


def test_weights_load_whatever_the_first_byte_of_their_header_s_length(tmp_path):
    """One length in 256 starts with the byte that also starts a pickle."""
    torch.manual_seed(0)
    model, path, starts = Dust3r(LINEAR), tmp_path / "model.safetensors", set()
    for padding in range(0, 256, 8):
        save_weights(model, path, {"padding": "x" * padding})
        starts.add(path.read_bytes()[0])
        assert_same_weights(Dust3r.from_pretrained(path), model, rtol=1e-3)
    assert 0x80 in starts
