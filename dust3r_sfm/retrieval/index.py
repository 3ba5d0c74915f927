"""Neighbours among more descriptors than can be compared one by one: an inverted file of product-quantised codes.

The candidates that the codes give are ranked again by the exact descriptors. The index is trained on a sample,
filled shard by shard, each shard a file, and the shards are merged; a killed run continues with the shards it has.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import replacing
from dust3r_sfm.retrieval.exact import Neighbors, Rows, exact_top_k, has_faiss, unit_rows

if TYPE_CHECKING:
    import faiss

MAX_EXACT = 1_000_000
"""Databases of up to so many descriptors are searched exactly."""

LEAST_PROBES = 32
QUERY_ROWS = 256
ADD_ROWS = 16384


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    num_lists: int | None = None
    """Lists of the inverted file; 4 sqrt(rows) to the next power of two where not given."""
    num_probes: int | None = None
    """Lists that are looked through for a query; a sixteenth of them, and at least 32, where not given."""
    reduced_dim: int = 256
    """Dimensions that are left by the principal components, before quantisation."""
    code_bytes: int = 64
    """Bytes that a descriptor is stored in."""
    num_candidates: int = 80
    """Neighbours by the codes that are compared exactly; at least four times what is asked for."""
    training_rows: int = 131_072
    """At most so many rows, evenly spread, train the index; a list is given at least 39 of them where there are."""
    shard_rows: int = 250_000
    """Rows of one shard."""


def top_k(queries: Rows, database: Rows, k: int, folder: Path, config: IndexConfig = IndexConfig()) -> Neighbors:
    """The k nearest rows for each query: exact up to a million rows, or where faiss is absent; else compressed.

    The compressed index is built in `folder`, and found there by the next call.
    """
    if len(database) <= MAX_EXACT or not has_faiss():
        return exact_top_k(queries, database, k)
    return search_index(build_index(database, folder, config), queries, database, k, config)


def build_index(database: Rows, folder: Path, config: IndexConfig = IndexConfig()) -> faiss.Index:
    """The compressed index of a database, from the shards in `folder`; those that are missing are written.

    The folder belongs to one database: nothing here sees that another one is given.
    """
    import faiss

    folder.mkdir(parents=True, exist_ok=True)
    trained = folder / "trained.index"
    if not trained.is_file():
        _write_index(_train(database, config), trained)
    shards = []
    for start in range(0, len(database), config.shard_rows):
        stop = min(start + config.shard_rows, len(database))
        shards.append(folder / f"{start:012d}-{stop:012d}.index")
        if not shards[-1].is_file():
            _write_index(_fill(trained, database, start, stop), shards[-1])
    merged = faiss.read_index(str(shards[0]))
    for shard in shards[1:]:
        faiss.merge_into(merged, faiss.read_index(str(shard)), False)
    return merged


def search_index(
    index: faiss.Index, queries: Rows, database: Rows, k: int, config: IndexConfig = IndexConfig()
) -> Neighbors:
    """The k nearest rows for each query, among the candidates of the index by their exact cosine."""
    import faiss

    ivf = faiss.extract_index_ivf(index)
    ivf.nprobe = config.num_probes or max(LEAST_PROBES, ivf.nlist // 16)
    k = min(k, len(database))
    num_candidates = min(max(config.num_candidates, 4 * k), len(database))
    found = []
    for start in range(0, len(queries), QUERY_ROWS):
        block = unit_rows(queries[start : start + QUERY_ROWS])
        _, candidates = index.search(block.numpy(), num_candidates)
        found.append(rank_again(block, torch.from_numpy(candidates), database, k))
    return Neighbors(torch.cat([n.indices for n in found]), torch.cat([n.scores for n in found]))


def rank_again(queries: Float[Tensor, "q d"], candidates: Int[Tensor, "q c"], database: Rows, k: int) -> Neighbors:
    """The k best candidates of each query by exact cosine; candidates of index -1 are none."""
    # a query's rows stay in the cache; threads of our own, as those of a product wait for each other at every query
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        rows = pool.map(partial(_cosines, database), queries.numpy(), candidates.clamp(min=0).numpy())
        scores = torch.from_numpy(np.stack(list(rows))) if len(queries) else torch.empty(candidates.shape)
    scores = scores.masked_fill(candidates < 0, -torch.inf)
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    return Neighbors(candidates.gather(1, best.indices), best.values)


def _cosines(database: Rows, query: Float[np.ndarray, " d"], places: Int[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    rows = np.asarray(database[places], dtype=np.float32)
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return np.einsum("ij,j->i", rows, query) / np.maximum(lengths, 1e-12)


def _train(database: Rows, config: IndexConfig) -> faiss.Index:
    import faiss

    num_lists = config.num_lists or 2 ** max(0, round(math.log2(4 * math.sqrt(len(database)))))
    num_lists = min(num_lists, max(1, len(database) // 39))
    dim = database.shape[1]
    if len(database) < 256:
        raise InputError(f"a compressed index needs at least 256 descriptors to learn its codes, got {len(database)}")
    reduced = min(config.reduced_dim, dim)
    # codes of 4 bits: trained in seconds where those of 8 take minutes, and compared many at once
    description = f"PCAR{reduced},IVF{num_lists},PQ{min(2 * config.code_bytes, reduced)}x4fs"
    index = faiss.index_factory(dim, description, faiss.METRIC_INNER_PRODUCT)
    count = min(len(database), max(config.training_rows, 39 * num_lists))
    index.train(_sample(database, count).numpy())
    return index


def _sample(database: Rows, count: int) -> Float[Tensor, "n d"]:
    """Rows spread evenly over the database, read in order."""
    rows = np.linspace(0, len(database) - 1, count).round().astype(np.int64)
    parts = [unit_rows(database[rows[start : start + ADD_ROWS]]) for start in range(0, count, ADD_ROWS)]
    return torch.cat(parts)


def _fill(trained: Path, database: Rows, start: int, stop: int) -> faiss.Index:
    import faiss

    index = faiss.read_index(str(trained))
    for first in range(start, stop, ADD_ROWS):
        last = min(first + ADD_ROWS, stop)
        index.add_with_ids(unit_rows(database[first:last]).numpy(), np.arange(first, last))
    return index


def _write_index(index: faiss.Index, path: Path) -> None:
    import faiss

    with replacing(path) as temporary:
        faiss.write_index(index, str(temporary))
