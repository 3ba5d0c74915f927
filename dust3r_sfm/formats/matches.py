"""Matches of all pairs in one HDF5 file: flat arrays, and where in them each pair begins.

While a file is being made its content lies in shards beside it, each whole or absent; the file itself appears when all
is there. `keys` say what the matches of each pair were made of, so that a second run finds them.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.formats.pointmaps import hash_of
from dust3r_sfm.pairs import Matches, Pair

FORMAT = "dust3r_sfm matches 1"


class MatchShards:
    """A file of matches in the making: what is there already, and a place for more."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, match_folder(path)
        self._places: dict[str, tuple[Path, Pair]] = {}
        for file in [path, *sorted(self.folder.glob("*.h5"))]:
            self._register(file, _read_keys(file))

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def add(self, matches: Mapping[Pair, Matches], keys: Mapping[Pair, str]) -> None:
        """Write one shard; it exists as a whole or not at all."""
        keys = {pair: keys[pair] for pair in matches}
        shard = self.folder / f"{hash_of(*keys.values())[:16]}.h5"
        write_matches(shard, matches, list(keys.values()))
        self._register(shard, keys)

    def read(self, keys: Mapping[Pair, str]) -> dict[Pair, Matches]:
        """The matches of pairs, whose keys are given."""
        files = {path: read_matches(path) for path in sorted({self._places[key][0] for key in keys.values()})}
        places = {pair: self._places[key] for pair, key in keys.items()}
        return {pair: files[path][there] for pair, (path, there) in places.items()}

    def finish(self, keys: Mapping[Pair, str]) -> dict[Pair, Matches]:
        """Write the file of all pairs, whose keys are given, from what is there; shards are removed."""
        matches = self.read(keys)
        if list(_read_keys(self.path).items()) != list(keys.items()):
            write_matches(self.path, matches, list(keys.values()))
        shutil.rmtree(self.folder)
        return matches

    def _register(self, path: Path, keys: Mapping[Pair, str]) -> None:
        self._places.update({key: (path, pair) for pair, key in keys.items()})


def match_folder(path: Path) -> Path:
    """Where the shards of a file of matches lie while it is being made."""
    return path.with_name(f"{path.stem}.shards")


def _read_keys(path: Path) -> dict[Pair, str]:
    """By pair; none of a file that is not there, has none or that a crash of the machine left unreadable."""
    try:
        with h5py.File(path, "r") as file:
            names, keys = file["names"].asstr()[:].tolist(), file["keys"][()]
            return {Pair(*pair): key.decode() for pair, key in zip(names, keys, strict=True)}
    except (OSError, KeyError):
        return {}


def write_matches(path: Path, matches: Mapping[Pair, Matches], keys: Sequence[str] = ()) -> None:
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
        if keys:
            file["keys"] = np.array(keys, dtype="S64")
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
