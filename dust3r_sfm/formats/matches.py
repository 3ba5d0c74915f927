"""Matches of all pairs in one HDF5 file: flat arrays, and where in them each pair begins."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import torch

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.pairs import Matches, Pair

FORMAT = "dust3r_sfm matches 1"


def write_matches(path: Path, matches: Mapping[Pair, Matches]) -> None:
    """Writes `names` (pairs 2), `offsets` (pairs + 1), and of all matches `keypoints0`, `keypoints1` and `scores`."""
    values = list(matches.values())
    names = np.array([list(pair) for pair in matches], dtype=object).reshape(-1, 2)
    buffer = io.BytesIO()  # a full disk is an OSError of Python's here, where HDF5 fails again on every close
    with h5py.File(buffer, "w") as file:
        file.attrs["format"] = FORMAT
        file.create_dataset("names", data=names, dtype=h5py.string_dtype())
        file["offsets"] = np.cumsum([0, *(len(m.scores) for m in values)])
        for field, shape in (("keypoints0", (0, 2)), ("keypoints1", (0, 2)), ("scores", (0,))):
            arrays = [np.zeros(shape), *(getattr(m, field).cpu().numpy() for m in values)]
            file.create_dataset(field, data=np.concatenate(arrays, dtype=np.float32), compression="lzf")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getbuffer())


def read_matches(path: Path) -> dict[Pair, Matches]:
    """What `write_matches` wrote; InputError where the file is missing, cut short or of another kind."""
    if not Path(path).is_file():
        raise InputError(f"no matches at {path}: run match_dense first")
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise InputError(f"{path} holds no matches of match_dense (expected format {FORMAT!r})")
            names, offsets = file["names"].asstr()[:].tolist(), file["offsets"][:].tolist()
            arrays = [torch.from_numpy(file[field][:]) for field in ("keypoints0", "keypoints1", "scores")]
    except (OSError, KeyError) as error:
        raise InputError(f"{path} cannot be read as matches ({error}): run match_dense again") from error
    return {
        Pair(*pair): Matches(*(array[start:end] for array in arrays))
        for pair, start, end in zip(names, offsets[:-1], offsets[1:], strict=True)
    }
