"""The network at work on pairs of views: on a device, with the encodings of the images that are in turn."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.geometry.surfaces import can_build_kernels
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig, Tokens
from dust3r_sfm.models.inference import normalized, ready
from dust3r_sfm.pairs import Pair, PairPrediction
from dust3r_sfm.reduction import HostCopies, Reduction, start_reducing
from dust3r_sfm.schedule import EncodingPass
from dust3r_sfm.views import View

ENCODE_IMAGES = 8  # images that are encoded at once
COMPILED_PAIRS = 20_000
"""From so many pairs on a GPU the minute that compiling takes is won back."""
BATCH_SIZES = {"cuda": 32}
BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    batch_size: int | None = None
    """Directed pairs that the decoder takes at once; where not given 32 on a CUDA device, else 8."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where the network runs; auto takes the first there is."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the matrix products; auto takes bfloat16 where the device computes in it."""
    compiled: Literal["auto", "on", "off"] = "auto"
    """Whether the network is compiled for the device first; auto: on CUDA, from 20,000 pairs on, with a C compiler."""
    max_encodings_gb: float = 2.0
    """Memory for encoded images; with less, images of a large collection are encoded twice."""
    keep_dense: bool = False
    """Store every pixel of all predictions, however many there are."""
    max_dense_pairs: int = 2000
    """Of more directed pairs only what alignment and matching need is kept: under 200 kB of each at 512x384."""


class PairNetwork:
    """The model on its device, with the encodings of the images that pairs wait for."""

    def __init__(
        self,
        model: Dust3r,
        views: Sequence[View],
        passes: Sequence[EncodingPass],
        config: InferConfig,
        reduction: Reduction | None = None,
    ) -> None:
        self.device = pick_device(config)
        self.batch_size = config.batch_size or BATCH_SIZES.get(self.device.type, BATCH_SIZE)
        self.dtype = product_dtype(config, self.device)
        num_pairs = sum(len(one.pairs) for one in passes)
        self.is_compiled = wants_compiled(config, self.device, num_pairs)
        self.model = ready(model, self.device, self.dtype, self.is_compiled)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        self.views = {view.name: view for view in views}
        self.reduction = reduction
        self.copies = HostCopies(self.device)
        self.largest_batch = 0
        self.max_bytes = config.max_encodings_gb * 2**30
        self.encodings: OrderedDict[str, Tokens] = OrderedDict()
        self.num_bytes = 0  # of the encodings: counted as they come and go, as there may be many
        self.pass_of = {pair: i for i, one in enumerate(passes) for pair in one.pairs}
        self.left = Counter((i, name) for i, one in enumerate(passes) for pair in one.pairs for name in pair)
        # always the same images together, so that a run that continues gives what one run gives, bit by bit
        self.blocks = {
            (i, view.name): block
            for i, one in enumerate(passes)
            for block in self._blocks([self.views[name] for name in one.names])
            for view in block
        }

    @staticmethod
    def _blocks(views: Sequence[View]) -> Iterator[list[View]]:
        by_size = sorted(views, key=lambda view: view.size)
        for _, group in itertools.groupby(by_size, lambda view: view.size):
            yield from cut(list(group), ENCODE_IMAGES)

    def predict(self, pairs: Sequence[Pair], advance: Callable[[int], object]) -> dict[Pair, PairPrediction]:
        """Predictions on the CPU in float32, or what is kept of them; `advance` hears of every batch."""
        return self._start(pairs, advance)()

    def predict_all(
        self, shards: Iterable[Sequence[Pair]], advance: Callable[[int], object]
    ) -> Iterator[dict[Pair, PairPrediction]]:
        """Those of each shard; a GPU is at the next shard while one is finished here."""
        if self.device.type != "cuda":
            yield from (self.predict(shard, advance) for shard in shards)
            return
        finish = None
        for shard in shards:
            finish_next = self._start(shard, advance)
            if finish is not None:
                yield finish()
            finish = finish_next
        if finish is not None:
            yield finish()

    def _start(
        self, pairs: Sequence[Pair], advance: Callable[[int], object]
    ) -> Callable[[], dict[Pair, PairPrediction]]:
        """What gives the predictions once the device has them."""
        found, copying = {}, []
        for batch, prediction in self.predict_on_device(pairs):
            if self.reduction is not None:
                found.update(zip(batch, unbatched(prediction), strict=True))
            else:
                values = [getattr(prediction, field.name) for field in fields(prediction)]
                copying.append((batch, self.copies.start(values)))
            advance(len(batch))
        if self.reduction is not None:
            return start_reducing({pair: found[pair] for pair in pairs}, self.views, self.reduction, self.copies)

        def finish() -> dict[Pair, PairPrediction]:
            for batch, copies in copying:
                found.update(zip(batch, unbatched(PairPrediction(*copies.finish())), strict=True))
            return {pair: found[pair] for pair in pairs}

        return finish

    def predict_on_device(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[Pair], PairPrediction]]:
        """Batches of pairs of equal sizes, nothing waiting for the device."""
        by_size = sorted(pairs, key=lambda pair: (self.pass_of[pair], self._sizes(pair)))
        for _, group in itertools.groupby(by_size, lambda pair: (self.pass_of[pair], self._sizes(pair))):
            for batch in cut(list(group), self.batch_size):
                with torch.inference_mode(), self.autocast:
                    # a compiled network takes one size of batch: smaller ones are filled up
                    self.largest_batch = max(self.largest_batch, len(batch))
                    padded = batch + batch[-1:] * (self.largest_batch - len(batch) if self.is_compiled else 0)
                    tokens0, tokens1 = (self._tokens(padded, side) for side in (0, 1))
                    prediction = self.model.decode(tokens0, tokens1)
                yield batch, _first(prediction, len(batch))

    def _sizes(self, pair: Pair) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.views[pair.name0].size, self.views[pair.name1].size

    def _tokens(self, pairs: Sequence[Pair], side: int) -> Tokens:
        """Encodings of one image of each pair as a batch."""
        for pair in dict.fromkeys(pairs):
            turn = self.pass_of[pair], pair[side]
            if pair[side] not in self.encodings:
                self._encode(self.blocks[turn])
            self.left[turn] -= 1
            self.encodings.move_to_end(pair[side])
        tokens = [self.encodings[pair[side]] for pair in pairs]
        self._forget(self.pass_of[pairs[0]], {name for pair in pairs for name in pair})
        maps = [t.finest[side] for t in tokens]
        finest: list[Tensor | None] = [None, None]
        finest[side] = torch.cat(maps) if maps[0] is not None else None  # the head of the other side is not asked
        return Tokens(torch.cat([t.features for t in tokens]), tokens[0].grid, (finest[0], finest[1]))

    def _encode(self, views: Sequence[View]) -> None:
        filled = [*views, *views[-1:] * (ENCODE_IMAGES - len(views) if self.is_compiled else 0)]
        images = torch.stack([view.image for view in filled])
        if self.device.type == "cuda":
            images = images.pin_memory()
        encoded = self.model.encode(normalized(images.to(self.device, non_blocking=True)))
        tokens = self.model.with_finest(Tokens(encoded.features.to(self.dtype), encoded.grid))
        for i, view in enumerate(views):
            finest0, finest1 = (None if maps is None else maps[i : i + 1].clone() for maps in tokens.finest)
            own = Tokens(tokens.features[i : i + 1].clone(), tokens.grid, (finest0, finest1))
            self.num_bytes += _bytes_of(own) - (
                _bytes_of(self.encodings[view.name]) if view.name in self.encodings else 0
            )
            self.encodings[view.name] = own

    def _forget(self, turn: int, needed: set[str]) -> None:
        """Drop encodings until the rest fits: first those that no pair of the pass waits for, then the oldest."""
        if self.num_bytes <= self.max_bytes:
            return
        for name in sorted(self.encodings, key=lambda name: self.left[turn, name] > 0):
            if self.num_bytes > self.max_bytes and name not in needed:
                self.num_bytes -= _bytes_of(self.encodings.pop(name))


def encoding_capacity(model: Dust3rConfig, views: Sequence[View], config: InferConfig) -> int:
    """How many encoded images of a pass may wait for partners, beside those that are encoded with them."""
    width = 4 if config.precision == "float32" else 2  # not by the device: shares on unlike hosts have one order
    patches = max(view.size[0] * view.size[1] for view in views) // model.patch_size**2
    values = patches * model.enc_embed_dim
    if model.head == "dpt":
        values += 2 * 16 * patches * model.dpt_feature_dim
    return max(2, int(config.max_encodings_gb * 2**30 / (width * values)) - 2 * ENCODE_IMAGES)


def pick_device(config: InferConfig = InferConfig()) -> torch.device:
    """The device that a config names; InputError where this machine has none of it."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if config.device == "auto":
        return torch.device(next(name for name, is_there in there.items() if is_there))
    if not there[config.device]:
        raise InputError(f"this machine has no {config.device} device: choose another or auto")
    return torch.device(config.device)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones: GPUs since 2020, CPUs that have instructions for it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # private names, and absent from some releases of torch: without them float32, which is slower and never wrong
    tests = (getattr(torch.cpu, name, bool) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and any(test() for test in tests)


def product_dtype(config: InferConfig, device: torch.device) -> torch.dtype:
    """The precision of the matrix products."""
    if config.precision == "auto":
        return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def wants_compiled(config: InferConfig, device: torch.device, num_pairs: int) -> bool:
    if config.compiled == "auto":
        return device.type == "cuda" and num_pairs >= COMPILED_PAIRS and can_build_kernels()
    return config.compiled == "on"


def cut(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _first(prediction: PairPrediction, count: int) -> PairPrediction:
    return PairPrediction(*(getattr(prediction, field.name)[:count] for field in fields(prediction)))


def unbatched(prediction: PairPrediction) -> Iterator[PairPrediction]:
    """The predictions of a batch, one by one."""
    for values in zip(*(getattr(prediction, field.name).unbind() for field in fields(prediction)), strict=True):
        yield PairPrediction(*values)


def _bytes_of(tokens: Tokens) -> int:
    tensors: list[Tensor | None] = [tokens.features, *tokens.finest]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
