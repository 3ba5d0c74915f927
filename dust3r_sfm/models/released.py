"""The checkpoint formats of DUSt3R's authors: `.pth`, and a folder with `config.json` and `model.safetensors`.

Nothing in these files is run: tensors are read without pickled code, the constructor's text as literals.
"""

from __future__ import annotations

import argparse
import ast
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.models.dust3r import Dust3rConfig

LICENCE = "CC BY-NC-SA 4.0"

_MAX_TEXT = 10_000  # characters; the released ones have some 400
_DIMS = ("enc_embed_dim", "enc_depth", "enc_num_heads", "dec_embed_dim", "dec_depth", "dec_num_heads")


def read_pth(path: Path) -> tuple[Dust3rConfig, dict[str, Tensor]]:
    """Config and tensors of a `.pth`: the constructor's text in `args.model`, the tensors in `model`."""
    content = unpickle_data(path, [argparse.Namespace])
    if not isinstance(content, dict) or not isinstance(content.get("model"), Mapping):
        raise InputError("it holds no 'model' with weights")
    text = getattr(content.get("args"), "model", None)
    if not isinstance(text, str):
        raise InputError("it has no 'args.model' that says which network the weights are of")
    return config_from_arguments(arguments_from_text(text)), dict(content["model"])


def read_folder(folder: Path) -> tuple[Dust3rConfig, dict[str, Tensor]]:
    """Config and tensors of a folder as the Hugging Face hub holds it."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"it has no {name}")
    if (folder / "config.json").stat().st_size > _MAX_TEXT:
        raise InputError("its config.json is far too long for one of DUSt3R's")
    try:
        arguments = json.loads((folder / "config.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"its config.json is not JSON ({error})") from error
    if not isinstance(arguments, dict):
        raise InputError("its config.json holds no table of settings")
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise InputError(f"its model.safetensors is damaged ({first_line(error)})") from error
    return config_from_arguments(arguments), state


def unpickle_data(path: Path, safe_globals: Sequence[Any]) -> Any:
    """What a pickle of tensors and the given types holds; InputError, and nothing run, where it asks for more."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(safe_globals)):
            warnings.simplefilter("ignore")  # about old forms of files: said to no purpose
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise InputError("it is damaged, or holds more than weights; nothing in it was run") from error
        raise InputError(f"it asks to run {asked[1]}, which no weights need; it was not run") from error
    except Exception as error:  # the reader of a damaged file raises whatever its bytes lead to
        raise InputError(f"it is damaged, or no checkpoint ({type(error).__name__})") from error


def arguments_from_text(text: str) -> dict[str, Any]:
    """Keyword arguments of a call such as "Network(head_type='dpt', conf_mode=('exp', 1, inf))", literals only."""
    try:
        if len(text) > _MAX_TEXT:
            raise ValueError("too long")
        call = _InfinityAsLiteral().visit(ast.parse(text.strip(), mode="eval").body)
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args):
            raise ValueError("not one call with keywords")
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("a keyword without a name")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(f"its args.model is not one constructor call of plain values: {text[:60]!r}") from error


class _InfinityAsLiteral(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float("inf")) if node.id == "inf" else node


def config_from_arguments(arguments: Mapping[str, Any]) -> Dust3rConfig:
    """Our config from the released constructor's arguments; those of training alone are ignored."""
    arguments = {"head_type": "linear", "output_mode": "pts3d", "pos_embed": "RoPE100", "patch_size": 16} | dict(
        arguments
    )
    for name, known in (
        ("output_mode", ("pts3d",)),
        ("pos_embed", ("RoPE100",)),
        ("head_type", ("linear", "dpt")),
        ("patch_size", (16,)),
    ):
        if arguments[name] not in known:
            raise InputError(f"its {name} is {arguments[name]!r}, where {' or '.join(map(repr, known))} can be used")
    missing = [name for name in ("img_size", *_DIMS) if name not in arguments]
    if missing:
        raise InputError(f"its settings lack {', '.join(missing)}")
    try:
        depth_mode, *depth_limits = arguments.get("depth_mode", ("exp", -float("inf"), float("inf")))
        confidence_mode, lowest, highest = arguments.get("conf_mode", ("exp", 1, float("inf")))
        if depth_limits != [-float("inf"), float("inf")]:
            raise ValueError(f"depth_mode with limits {depth_limits}")
        size = arguments["img_size"]
        return Dust3rConfig(
            image_size=max(size) if isinstance(size, (tuple, list)) else size,
            head=arguments["head_type"],
            mlp_ratio=float(arguments.get("mlp_ratio", 4)),
            depth_mode=depth_mode,
            confidence_mode=confidence_mode,
            confidence_limits=(float(lowest), float(highest)),
            **{name: arguments[name] for name in _DIMS},
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"its settings describe no network that can be built ({first_line(error)})") from error


def with_current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under one name each; the second decoder starts as a copy of the first where a file has one only."""
    current = {}
    for name, tensor in state.items():
        name = re.sub(r"\.act_([1-4])_postprocess\.", lambda m: f".act_postprocess.{int(m[1]) - 1}.", str(name))
        alias_of = re.sub(r"\.layer_rn\.([0-3])\.", lambda m: f".layer{int(m[1]) + 1}_rn.", name)
        if alias_of == name:
            current[name] = tensor
        else:
            current.setdefault(alias_of, tensor)
    if not any(name.startswith("dec_blocks2.") for name in current):
        first = {name: tensor for name, tensor in current.items() if name.startswith("dec_blocks.")}
        current |= {name.replace("dec_blocks.", "dec_blocks2.", 1): tensor.clone() for name, tensor in first.items()}
    return current


def first_line(error: Exception) -> str:
    """Of messages that go on with advice or with dumps."""
    return (str(error) or type(error).__name__).splitlines()[0]
