"""Weights to and from files: our own safetensors, and the formats of DUSt3R's authors."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.models import released
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.models.released import first_line
from dust3r_sfm.models.weights import shipped_weights

logger = logging.getLogger(__name__)

FORMAT = "dust3r_sfm.1"


def load_model(source: str | Path | None = None) -> Dust3r:
    """A network with weights, in float32 and evaluation mode.

    `source` is nothing (the shipped weights), a `.pth` of the released format, a `.safetensors` of `save_weights`,
    a folder with `config.json` and `model.safetensors`, or the name of such a folder on the Hugging Face hub.
    Raises InputError, naming the file and the reason, where it cannot be used.
    """
    path = shipped_weights() if source is None else _local_path(source)
    try:
        model = _read(path)
    except (InputError, OSError) as error:
        raise InputError(f"cannot load a model from {path}: {error}") from error
    if source is None:
        model.name = f"shipped {model.name}"
    elif path != Path(source):
        model.name = str(source)  # on the hub, where the path is of a cache
    if model.licence == released.LICENCE:
        _log_licence(model.licence)
    return model.eval()


def save_weights(model: Dust3r, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Weights in float16, with the config and `metadata` in the file's header; it may replace name and licence."""
    texts = {"name": model.name, "licence": model.licence} | dict(metadata or {})
    texts |= {"format": FORMAT, "config": json.dumps(dataclasses.asdict(model.config))}
    state = {name: x.detach().to("cpu", torch.float16).contiguous() for name, x in model.state_dict().items()}
    _check_finite(state)
    write_bytes(path, save(state, metadata=texts))


def _local_path(source: str | Path) -> Path:
    """The file or folder that `source` names, downloaded if it is on the Hugging Face hub."""
    path = Path(source)
    if os.path.exists(source):
        return path
    name_on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source))
    looks_local = (
        path.suffix in (".pth", ".pt", ".ckpt", ".safetensors") or path.parent.is_dir() and len(path.parts) > 1
    )
    if isinstance(source, Path) or not name_on_hub or looks_local:
        raise InputError(f"no model at {source}: there is no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # the errors of the hub's client have no common base over its versions
        raise InputError(
            f"no model {source}: there is no such file or folder here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}); check the name and the network, or download it and name the folder"
        ) from error


def _read(path: Path) -> Dust3r:
    if path.is_dir():
        return _released_model(path.name, *released.read_folder(path))
    if not path.is_file():
        raise InputError("it is neither a file nor a folder")
    if _looks_pickled(path):
        return _released_model(path.stem, *released.read_pth(path))
    return _read_own(path)


def _looks_pickled(path: Path) -> bool:
    """True for a zip archive or a pickle, by the first bytes; safetensors have a length there, then an object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:] != b"{")


def _read_own(path: Path) -> Dust3r:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError("it is a safetensors file, but not one of this package's models")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise InputError(f"it is damaged, or no checkpoint at all ({first_line(error)})") from error
    model = _build(_config_from_json(metadata.get("config", "")), state)
    model.name, model.licence = metadata.get("name", path.stem), metadata.get("licence", "unknown")
    return model


def _config_from_json(text: str) -> Dust3rConfig:
    try:
        values = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(text).items()}
        return Dust3rConfig(**values)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"its config is none of this version's ({first_line(error)})") from error


def _released_model(name: str, config: Dust3rConfig, state: dict[str, Tensor]) -> Dust3r:
    model = _build(config, released.with_current_names(state))
    model.name, model.licence = name, released.LICENCE
    return model


def _build(config: Dust3rConfig, state: dict[str, Any]) -> Dust3r:
    """The network with exactly these weights."""
    depths = {part: _count_blocks(state, part) for part in ("enc_blocks", "dec_blocks")}
    if depths != {"enc_blocks": config.enc_depth, "dec_blocks": config.dec_depth}:
        raise InputError(
            f"its settings speak of {config.enc_depth} encoder and {config.dec_depth} decoder blocks, "
            f"its weights are of {depths['enc_blocks']} and {depths['dec_blocks']}"
        )
    try:
        with torch.device("meta"):
            model = Dust3r(config)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise InputError("its settings describe no network that can be built") from error
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    state = {"mask_token": torch.zeros(expected["mask_token"])} | state  # never used: no reason to refuse
    _check_shapes(expected, state)
    _check_finite(state)
    model.load_state_dict({name: x.to(torch.float32) for name, x in state.items()}, assign=True)
    return model


def _count_blocks(state: Mapping[str, Any], part: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{part}.")})


def _check_shapes(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]) -> None:
    for what, names in (("lacks", expected.keys() - state.keys()), ("has the unknown", state.keys() - expected.keys())):
        if names:
            raise InputError(f"it {what} weights {', '.join(sorted(names)[:3])} ({len(names)} in all)")
    for name, shape in expected.items():
        tensor = state[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise InputError(f"its {name} is no array of floating-point numbers")
        if tuple(tensor.shape) != shape:
            raise InputError(f"its {name} is {tuple(tensor.shape)}, where the network needs {shape}")


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} holds numbers that are not finite")


@lru_cache
def _log_licence(licence: str) -> None:
    """Said once a process."""
    logger.warning("These weights, or those they were trained from, are %s: not for commercial use.", licence)
