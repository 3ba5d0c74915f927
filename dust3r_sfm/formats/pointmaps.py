"""Predictions on disk: `pointmaps.h5`, and beside it `pointmaps.shards/` with the values.

A shard holds some dozens of pairs, is written under a temporary name, flushed and renamed, and is
found again by the keys of its pairs: the hash of model, image names and image contents. So a killed
run continues, and a changed photo or model computes again what it touches and nothing else.
`pointmaps.h5` is written last: `pairs` (n, 2) names, and `predictions/<i>`, an external link to the
group of pair i in its shard: `pointmap0_in_cam0`, `confidence0`, `pointmap1_in_cam0`, `confidence1` in
float16, and the attribute `scale` that the pointmaps are multiplied by (their median norm is stored as 1).
Reduced predictions hold every `strides`-th pixel of images of `sizes`; matches in 64ths of a pixel where the
reversed pair has none; and of some pairs `depth0` at every pixel with its confidence as 32 times its logarithm.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.pairs import Matches, Pair, PairPrediction, ReducedPrediction

FLOAT16_MAX = 65504.0
KEYPOINTS_PER_PX = 64
LEVELS_PER_E = 32
"""Stored levels of confidence, one byte each, for every factor of e: within 2 %, up to 2,900."""
FIELDS = ("pointmap0_in_cam0", "confidence0", "pointmap1_in_cam0", "confidence1")


class PointmapFile(Mapping[Pair, PairPrediction]):
    """The predictions of a finished `infer_pairs`, read one pair at a time as float32."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"no predictions at {path}: run infer_pairs first")
        try:
            self._file = h5py.File(self.path, "r")
            names = self._file["pairs"].asstr()[()]
        except (OSError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no pointmap file or is cut short: run infer_pairs again") from error
        self._index = {Pair(name0, name1): i for i, (name0, name1) in enumerate(names)}

    def __getitem__(self, pair: Pair) -> PairPrediction:
        index = self._index[pair]
        try:
            group = self._file[f"predictions/{index}"]
            values = {field: torch.from_numpy(group[field][()]).to(torch.float32) for field in FIELDS}
            scale = float(group.attrs["scale"])
            reduced = _read_reduced(group, scale) if "strides" in group.attrs else None
        except (OSError, KeyError) as error:
            raise InputError(
                f"{self.path} misses the values of {pair.name0} {pair.name1}: keep {shard_folder(self.path).name} "
                "beside it, or run infer_pairs again"
            ) from error
        values["pointmap0_in_cam0"] *= scale
        values["pointmap1_in_cam0"] *= scale
        return PairPrediction(**values) if reduced is None else ReducedPrediction(**values, **reduced)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path.absolute(),)  # another process opens the file anew

    def keys_of(self, pairs: Iterable[Pair]) -> list[str]:
        """What some predictions were made of, as a hash each."""
        links = [self._file["predictions"].get(str(self._index[pair]), getlink=True) for pair in pairs]
        keys = {name: _read_keys(self.path.parent / name) for name in {link.filename for link in links}}
        return [keys[link.filename][int(link.path[1:])] for link in links]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> PointmapFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class PointmapShards:
    """The shards beside a pointmap file: what is there already, and a place for more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = shard_folder(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, tuple[Path, int]] = {}
        for shard in sorted(self.folder.glob("*.h5")):
            self._register(shard, _read_keys(shard))

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def add(self, keys: Sequence[str], predictions: Sequence[PairPrediction]) -> None:
        """Write one shard; it exists as a whole or not at all."""
        buffer = io.BytesIO()  # a full disk is an OSError of Python's here, where HDF5 fails again on every close
        with h5py.File(buffer, "w") as file:
            for i, prediction in enumerate(predictions):
                _write_prediction(file.create_group(str(i)), prediction)
            file["keys"] = np.array(keys, dtype="S64")
        shard = self.folder / f"{hash_of(*keys)[:16]}.h5"
        write_bytes(shard, buffer.getbuffer())
        self._register(shard, list(keys))

    def finish(self, pairs: Sequence[Pair], keys: Sequence[str]) -> PointmapFile:
        """Write the file that names the pairs; shards of which no pair is named are removed."""
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.create_dataset("pairs", data=np.array(pairs, dtype=object).reshape(-1, 2), dtype=h5py.string_dtype())
            group = file.create_group("predictions")
            for i, key in enumerate(keys):
                shard, index = self._places[key]
                group[str(i)] = h5py.ExternalLink(f"{self.folder.name}/{shard.name}", f"/{index}")
        write_bytes(self.path, buffer.getbuffer())
        used = {self._places[key][0] for key in keys}
        for shard in {shard for shard, _ in self._places.values()} - used:
            shard.unlink()
        return PointmapFile(self.path)

    def _register(self, shard: Path, keys: Sequence[str]) -> None:
        self._places.update({key: (shard, i) for i, key in enumerate(keys)})


def shard_folder(path: Path) -> Path:
    return path.with_name(f"{path.stem}.shards")


def hash_of(*parts: str | bytes) -> str:
    """One hash of several parts, each delimited."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _read_keys(shard: Path) -> list[str]:
    """Keys of a shard's pairs; none of one that a crash of the machine left unreadable."""
    try:
        with h5py.File(shard, "r") as file:
            return [key.decode() for key in file["keys"][()]]
    except (OSError, KeyError):
        return []


def _write_prediction(group: h5py.Group, prediction: PairPrediction) -> None:
    points = (prediction.pointmap0_in_cam0, prediction.pointmap1_in_cam0)
    scale = _median_norm(torch.cat([p.reshape(-1, 3) for p in points]))
    group.attrs["scale"] = scale
    for field in FIELDS:
        values = getattr(prediction, field).to(torch.float32)
        if "pointmap" in field:
            values = values / scale
        group[field] = _half(values)
    if isinstance(prediction, ReducedPrediction):
        _write_reduced(group, prediction, scale)


def _write_reduced(group: h5py.Group, prediction: ReducedPrediction, scale: float) -> None:
    group.attrs["sizes"], group.attrs["strides"] = prediction.sizes, prediction.strides
    if prediction.matches is not None:
        keypoints = torch.cat([prediction.matches.keypoints0, prediction.matches.keypoints1], dim=1).cpu()
        kind = np.uint16 if max(map(max, prediction.sizes)) * KEYPOINTS_PER_PX < 2**16 else np.uint32
        group["keypoints"] = (keypoints * KEYPOINTS_PER_PX).round().numpy().astype(kind)
        group["scores"] = _half(prediction.matches.scores)
    if prediction.depth0 is not None and prediction.full_confidence0 is not None:
        group["depth0"] = _half(prediction.depth0 / scale)
        levels = prediction.full_confidence0.clamp(min=1).log() * LEVELS_PER_E
        group["log_confidence0"] = levels.round().clamp(max=255).to(torch.uint8).cpu().numpy()


def _read_reduced(group: h5py.Group, scale: float) -> dict[str, Any]:
    """The fields of a reduced prediction beyond those of a whole one."""
    (h0, w0), (h1, w1) = group.attrs["sizes"].tolist()
    stride0, stride1 = group.attrs["strides"].tolist()
    fields: dict[str, Any] = {"sizes": ((h0, w0), (h1, w1)), "strides": (stride0, stride1), "matches": None}
    if "keypoints" in group:
        keypoints = torch.from_numpy(group["keypoints"][()].astype(np.float32) / KEYPOINTS_PER_PX)
        scores = torch.from_numpy(group["scores"][()].astype(np.float32))
        fields["matches"] = Matches(keypoints[:, :2], keypoints[:, 2:], scores)
    if "depth0" in group:
        fields["depth0"] = torch.from_numpy(group["depth0"][()]).to(torch.float32) * scale
        fields["full_confidence0"] = (torch.from_numpy(group["log_confidence0"][()]) / LEVELS_PER_E).exp()
    return fields


def _half(values: Float[Tensor, "*shape"]) -> np.ndarray:
    return values.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16).cpu().numpy()


def _median_norm(points: Float[Tensor, "n 3"]) -> float:
    """Median distance from the origin; 1 where there is none to speak of."""
    scale = float(torch.linalg.vector_norm(points.to(torch.float32), dim=-1).median())
    return scale if np.isfinite(scale) and scale > 1e-12 else 1.0
