"""Shards of work done here, on several GPUs of this host, or on a Ray cluster.

    for index, result in map_shards(function, make, shards, EngineConfig(engine="ray")):

`make()` gives what every worker holds, such as the network; `function(held, shard)` does one shard. Results come as
they are done, to the process that asked, and it alone writes them: a shard that a dying worker leaves undone is done
again elsewhere, and nothing is written twice.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dust3r_sfm.errors import InputError

Shard = TypeVar("Shard")
Held = TypeVar("Held")
Result = TypeVar("Result")

MAX_RETRIES = 3
"""Of a shard whose worker dies."""
WAITING_SHARDS = 2
"""Of each process, so that none waits for work while results stay few."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    engine: Literal["local", "ray"] = "local"
    """Where shards are done: on this host, or on a Ray cluster (RAY_ADDRESS, or one that is started here)."""
    workers: int | None = None
    """Processes at work; where not given one a GPU, and in this process where there is none or one."""
    shard: str | None = None
    """Only the i-th of N shares, as in 2/8, for jobs of a batch scheduler; without it all is done, and put together."""


def share_of(shards: Sequence[Shard], config: EngineConfig) -> list[Shard]:
    """The shards that a run is to do: the i-th N-th of them where its config asks for a share.

    Shards beside each other are one share's: they have images in common.
    """
    if config.shard is None:
        return list(shards)
    found = re.fullmatch(r"(\d+)/(\d+)", config.shard)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"a share is written i/N with i from 1 to N, such as 2/8, got {config.shard}")
    i, n = int(found[1]), int(found[2])
    return list(shards)[len(shards) * (i - 1) // n : len(shards) * i // n]


def share_name(config: EngineConfig) -> str | None:
    """Of a share, fit for a file's name; None where all is done."""
    return None if config.shard is None else config.shard.replace("/", "-")


def is_local(config: EngineConfig) -> bool:
    """Whether shards are done in this process."""
    return config.engine == "local" and _num_workers(config) == 1


def map_shards(
    function: Callable[[Held, Shard], Result],
    make: Callable[[], Held],
    shards: Sequence[Shard],
    config: EngineConfig = EngineConfig(),
) -> Iterator[tuple[int, Result]]:
    """The index and result of each shard, once each, as they are done; in order where they are done in this process."""
    if not shards:
        return
    if config.engine == "ray":
        yield from _map_on_ray(function, make, shards, config.workers)
    elif is_local(config):
        held = make()
        for index, shard in enumerate(shards):
            yield index, function(held, shard)
    else:
        yield from _map_on_processes(function, make, shards, _num_workers(config))


def _num_workers(config: EngineConfig) -> int:
    if config.workers is not None:
        if config.workers < 1:
            raise InputError(f"at least one worker is needed, got {config.workers}")
        return config.workers
    import torch

    return max(1, torch.cuda.device_count())


_held: Any = None
"""What this process holds, where it is a worker."""


def _hold(make: bytes, devices: Any) -> None:
    global _held  # noqa: PLW0603  a worker process holds one thing
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before CUDA starts: the network finds one GPU
    _held = pickle.loads(make)()


def _do(function: Callable[[Any, Any], Any], index: int, shard: bytes) -> tuple[int, bytes]:
    return index, packed(function(_held, pickle.loads(shard)))


class _Pickler(pickle.Pickler):
    """Tensors as arrays: torch's own way between processes takes an open file for each, which are soon too many."""

    def reducer_override(self, item: Any) -> Any:
        import torch

        if type(item) is torch.Tensor and item.device.type == "cpu" and not item.requires_grad:
            with suppress(TypeError):  # of types that numpy does not know
                return torch.from_numpy, (item.numpy(),)
        return NotImplemented


def packed(item: Any) -> bytes:
    """What goes to another process, and is there by `pickle.loads`."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(item)
    return buffer.getvalue()


def _map_on_processes(
    function: Callable[[Any, Any], Any], make: Callable[[], Any], shards: Sequence[Any], workers: int
) -> Iterator[tuple[int, Any]]:
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    visible = _visible_devices()
    for worker in range(workers):
        devices.put(visible[worker % len(visible)] if visible else None)
    rest = list(enumerate(shards))[::-1]
    with ProcessPoolExecutor(workers, context, _hold, (packed(make), devices)) as pool:
        running = set()
        try:
            while rest or running:
                while rest and len(running) < WAITING_SHARDS * workers:
                    index, shard = rest.pop()
                    running.add(pool.submit(_do, function, index, packed(shard)))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    index, result = future.result()
                    yield index, pickle.loads(result)
        except BrokenProcessPool as error:
            raise InputError("a worker process died: run the same command again, with fewer workers") from error


def _visible_devices() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


class _Actor:
    """A worker on Ray."""

    def __init__(self) -> None:
        self.held: Any = None
        self.is_ready = False

    def do(self, references: list[Any], index: int, shard: Any) -> tuple[int, bytes]:
        """One shard; `references` to the function and to what makes what is held, which are fetched once."""
        if not self.is_ready:
            import ray

            self.function, make = ray.get(references)
            self.held, self.is_ready = make(), True
        return index, packed(self.function(self.held, shard))


def _map_on_ray(
    function: Callable[[Any, Any], Any], make: Callable[[], Any], shards: Sequence[Any], workers: int | None
) -> Iterator[tuple[int, Any]]:
    """Ray's own pool: it gives a worker its next shard, replaces workers that die and does their shards again."""
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise InputError('the engine ray needs Ray: pip install "dust3r_sfm[ray]"') from None
    is_ours = not ray.is_initialized()
    if is_ours:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own futures
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        options = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_restarts": -1, "max_task_retries": MAX_RETRIES}
        actor = ray.remote(**options)(_Actor)
        references = [ray.put(function), ray.put(make)]
        count = min(workers or gpus or int(ray.cluster_resources().get("CPU", 1)), len(shards))
        pool = ActorPool([actor.remote() for _ in range(count)])
        found = pool.map_unordered(lambda a, item: a.do.remote(references, *item), list(enumerate(shards)))
        for index, result in found:
            yield index, pickle.loads(result)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        raise InputError(f"workers died on one shard {MAX_RETRIES + 1} times, the same command continues") from error
    finally:
        if is_ours:
            ray.shutdown()
