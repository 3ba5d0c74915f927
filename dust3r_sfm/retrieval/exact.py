"""Exact nearest neighbours by cosine, block by block: faiss on a GPU or the CPU, or PyTorch where it is absent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.errors import InputError

QUERY_ROWS = {"cpu": 4096, "cuda": 8192}
DATABASE_ROWS = {"cpu": 16384, "cuda": 65536}
KEPT_BYTES = 4 * 1024**3  # of prepared blocks on the CPU
GROUP = 64  # columns of which only the best is looked at first

Engine = Literal["auto", "faiss-gpu", "torch-cuda", "faiss", "torch"]


@runtime_checkable
class Rows(Protocol):
    """Descriptors one a row, read slice by slice: an array, a memory map, or a dataset of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Of each query, the nearest rows of the database, nearest first; index -1 and score -inf where there is none."""

    indices: Int[Tensor, "q k"]
    scores: Float[Tensor, "q k"]


def exact_top_k(queries: Rows, database: Rows, k: int, engine: Engine = "auto") -> Neighbors:
    """The k rows of the highest cosine for every query; fewer columns where the database has fewer rows.

    Rows need not have unit length. Equal scores go by the lower index within what is found; which of them are found
    where more than k are equal is not said.
    """
    if queries.shape[1:] != database.shape[1:]:
        raise InputError(f"descriptors of {queries.shape[1]} and {database.shape[1]} numbers cannot be compared")
    engine = pick_engine(engine)
    blocks, k = _Blocks(database, engine), min(k, len(database))
    step = QUERY_ROWS["cuda" if engine == "torch-cuda" else "cpu"]
    found = [
        _search(queries[start : start + step], blocks, k, engine) for start in range(0, max(len(queries), 1), step)
    ]
    return Neighbors(torch.cat([n.indices for n in found]), torch.cat([n.scores for n in found]))


def without_self(neighbors: Neighbors, own: Int[Tensor, " q"], k: int) -> Neighbors:
    """The first k neighbours other than the query itself, whose index is `own` (-1: not in the database).

    Search one more than k: the query is found by its index, not by its place, as equal descriptors come in any order.
    """
    is_self = neighbors.indices == own[:, None]
    order = is_self.to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    indices, scores = neighbors.indices.gather(1, order), neighbors.scores.gather(1, order)
    missing = is_self.gather(1, order)
    return Neighbors(indices.masked_fill(missing, -1), scores.masked_fill(missing, -torch.inf))


def pick_engine(engine: Engine = "auto") -> Engine:
    """The engine to use: faiss on a GPU where it has one, PyTorch on one, faiss, PyTorch."""
    if engine != "auto":
        return engine
    if faiss_has_gpu():
        return "faiss-gpu"
    if torch.cuda.is_available():
        return "torch-cuda"
    return "faiss" if has_faiss() else "torch"


def has_faiss() -> bool:
    try:
        import faiss  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: faiss-gpu without its CUDA libraries
        return False
    return True


def faiss_has_gpu() -> bool:
    if not has_faiss():
        return False
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def unit_rows(rows: np.ndarray, device: torch.device | str = "cpu") -> Float[Tensor, "n d"]:
    """Rows in float32 and of unit length; rows of zeros stay so."""
    values = torch.from_numpy(np.ascontiguousarray(rows)).to(device).to(torch.float32)
    return torch.nn.functional.normalize(values, dim=-1)


def top_k_columns(scores: Float[Tensor, "q n"], k: int) -> Neighbors:
    """The k highest columns of each row.

    Of a long row the best of each group of columns come first: the k best columns lie in the k best groups.
    """
    num_columns = scores.shape[1]
    k = min(k, num_columns)
    if num_columns % GROUP or num_columns // GROUP < 2 * k:
        values, columns = scores.topk(k, dim=1)
    else:
        groups = scores.unflatten(1, (-1, GROUP))
        best = groups.amax(dim=2).topk(k, dim=1).indices
        values, places = groups.take_along_dim(best[:, :, None], dim=1).flatten(1).topk(k, dim=1)
        columns = best.gather(1, places // GROUP) * GROUP + places % GROUP
    return _sorted(values, columns)


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows as an engine takes them; their scores are to be multiplied by `factors` where there are any."""

    values: Float[Tensor, "n d"]
    factors: Float[Tensor, " n"] | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


def _prepare(rows: np.ndarray, engine: Engine) -> _Block:
    """Unit rows in float32; float16 rows stay as they are on a GPU, where their products are summed in float32."""
    if engine != "torch-cuda" or rows.dtype != np.float16:
        return _Block(unit_rows(rows, "cuda" if engine == "torch-cuda" else "cpu"))
    values = torch.from_numpy(np.ascontiguousarray(rows)).cuda()
    return _Block(values, 1 / torch.linalg.vector_norm(values, dim=1, dtype=torch.float32).clamp(min=1e-12))


class _Blocks:
    """The database in blocks; as many as fit are kept for the next queries."""

    def __init__(self, rows: Rows, engine: Engine) -> None:
        self.rows, self.engine = rows, engine
        on_gpu = engine == "torch-cuda"
        self.block_rows = DATABASE_ROWS["cuda" if on_gpu else "cpu"]
        self.room = torch.cuda.mem_get_info()[0] // 2 if on_gpu else KEPT_BYTES
        self.kept: dict[int, _Block] = {}

    def __iter__(self) -> Iterator[tuple[int, _Block]]:
        for start in range(0, len(self.rows), self.block_rows):
            block = self.kept.get(start)
            if block is None:
                block = _prepare(self.rows[start : start + self.block_rows], self.engine)
                if block.nbytes <= self.room:
                    self.room -= block.nbytes
                    self.kept[start] = block
            yield start, block


def _search(queries: np.ndarray, blocks: _Blocks, k: int, engine: Engine) -> Neighbors:
    search = {"faiss": _search_faiss, "faiss-gpu": _search_faiss_gpu}.get(engine, _search_torch)
    prepared = _prepare(queries, engine)
    best = None
    for start, block in blocks:
        found = search(prepared, block, k)
        found = Neighbors(found.indices + start, found.scores)
        best = found if best is None else merge(best, found, k)
    if best is None:  # an empty database
        return Neighbors(torch.empty(len(queries), 0, dtype=torch.int64), torch.empty(len(queries), 0))
    scores = best.scores if prepared.factors is None else best.scores * prepared.factors[:, None]
    return Neighbors(best.indices.cpu(), scores.cpu())


def merge(first: Neighbors, second: Neighbors, k: int) -> Neighbors:
    """The k best of two lists for each query."""
    scores, indices = torch.cat([first.scores, second.scores], 1), torch.cat([first.indices, second.indices], 1)
    merged = _sorted(scores, indices)
    return Neighbors(merged.indices[:, :k], merged.scores[:, :k])


def _search_torch(queries: _Block, block: _Block, k: int) -> Neighbors:
    if block.factors is None:
        return top_k_columns(queries.values @ block.values.mT, k)
    return top_k_columns(torch.mm(queries.values, block.values.mT, out_dtype=torch.float32).mul_(block.factors), k)


def _search_faiss(queries: _Block, block: _Block, k: int) -> Neighbors:
    import faiss

    q, rows = queries.values.numpy(), block.values.numpy()
    scores, indices = faiss.knn(q, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
    return _sorted(torch.from_numpy(scores), torch.from_numpy(indices))


def _search_faiss_gpu(queries: _Block, block: _Block, k: int) -> Neighbors:
    import faiss

    q, rows = queries.values.numpy(), block.values.numpy()
    scores, indices = faiss.knn_gpu(_gpu_resources(), q, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
    return _sorted(torch.from_numpy(scores), torch.from_numpy(indices))


@cache
def _gpu_resources() -> object:
    """One for the process: each holds a share of the GPU's memory."""
    import faiss

    return faiss.StandardGpuResources()


def _sorted(scores: Float[Tensor, "q k"], indices: Int[Tensor, "q k"]) -> Neighbors:
    """By descending score, equal ones by index."""
    by_index = indices.argsort(dim=1, stable=True)
    scores, indices = scores.gather(1, by_index), indices.gather(1, by_index)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return Neighbors(indices.gather(1, order), scores.gather(1, order))
