"""Benchmark: nearest neighbours of random descriptors in clusters; how long it takes and how many are found."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float16
from tqdm import tqdm

from dust3r_sfm.retrieval.exact import Engine, Neighbors, exact_top_k, has_faiss, pick_engine
from dust3r_sfm.retrieval.index import IndexConfig, build_index, search_index

logger = logging.getLogger(__name__)

PLACE_IMAGES = 32  # descriptors of one cluster
SPREAD = 0.75  # length of what tells the images of a place apart, where the places' own descriptors have length 1
BLOCK_ROWS = 8192


class RetrievalFigures(NamedTuple):
    """What was measured; None for what was not."""

    count: int
    dim: int
    engine: str
    exact_s: float
    """Of all queries that were asked."""
    num_queries: int
    build_s: float | None = None
    compressed_s: float | None = None
    recall: float | None = None
    """Share of the exact neighbours that the compressed index finds."""


def main(
    count: int = 100_000,
    dim: int = 2048,
    num_queries: int | None = None,
    num_matched: int = 20,
    engine: Engine = "auto",
    compressed: bool = True,
    config: IndexConfig = IndexConfig(),  # noqa: B008  frozen
) -> RetrievalFigures:
    """Measure exact search and the compressed index on random descriptors in clusters of 32.

    Args:
        count: Descriptors of the database.
        dim: Numbers of a descriptor.
        num_queries: Descriptors whose neighbours are asked for; all where not given.
        num_matched: Neighbours of each.
        engine: What searches exactly; auto takes the first there is.
        compressed: Measure the compressed index too.
        config: Options of the compressed index.
    """
    num_queries, engine = min(num_queries or count, count), pick_engine(engine)
    with tempfile.TemporaryDirectory() as folder:  # the search reads a file, as it does of many photos
        path = Path(folder) / "descriptors"
        matrix = np.memmap(path, np.float16, "w+", shape=(count, dim))
        clustered_descriptors(count, dim, out=matrix, device="cuda" if torch.cuda.is_available() else "cpu")
        some = np.linspace(0, count - 1, num_queries).astype(np.int64)
        queries = matrix if num_queries == count else matrix[some]
        start = time.perf_counter()
        exact = exact_top_k(queries, matrix, num_matched, engine)
        figures = RetrievalFigures(count, dim, engine, time.perf_counter() - start, num_queries)
        if compressed and has_faiss():
            figures = _measure_index(figures, exact, queries, matrix, Path(folder), config)
    _report(figures, num_matched)
    return figures


def clustered_descriptors(
    count: int, dim: int, seed: int = 0, out: Float16[np.ndarray, "n d"] | None = None, device: str = "cpu"
) -> Float16[np.ndarray, "n d"]:
    """Unit descriptors in places of 32 each, in no order.

    A place is a random direction, an image its place's plus a random vector of length 0.75: cosines are about 0.64
    within a place and 0 across places.
    """
    num_places = -(-count // PLACE_IMAGES)
    generator = torch.Generator(device).manual_seed(seed)
    draw = {"generator": generator, "device": device}
    directions = torch.randn(num_places, dim, **draw).div_(dim**0.5)
    place_of = torch.randperm(num_places * PLACE_IMAGES, **draw)[:count] % num_places
    out = np.empty((count, dim), np.float16) if out is None else out
    for start in range(0, count, BLOCK_ROWS):
        places = place_of[start : start + BLOCK_ROWS]
        noise = torch.randn(len(places), dim, **draw).mul_(SPREAD / dim**0.5)
        rows = torch.nn.functional.normalize(directions[places] + noise, dim=1)
        out[start : start + BLOCK_ROWS] = rows.half().cpu().numpy()
    return out


def _measure_index(
    figures: RetrievalFigures,
    exact: Neighbors,
    queries: Float16[np.ndarray, "q d"],
    matrix: Float16[np.ndarray, "n d"],
    folder: Path,
    config: IndexConfig,
) -> RetrievalFigures:
    with tqdm(total=2, desc="Compressed index", disable=None) as bar:
        start = time.perf_counter()
        index = build_index(matrix, folder / "index", config)
        built = time.perf_counter()
        bar.update()
        found = search_index(index, queries, matrix, exact.indices.shape[1], config)
        end = time.perf_counter()
        bar.update()
    hits = (found.indices[:, :, None] == exact.indices[:, None, :]).any(dim=2).float().mean()
    return figures._replace(build_s=built - start, compressed_s=end - built, recall=float(hits))


def _report(figures: RetrievalFigures, k: int) -> None:
    f = figures
    logger.info(
        "%d descriptors of %d numbers, %d queries, top %d, exact (%s): %.1f s, %.2f ms a query.",
        *(f.count, f.dim, f.num_queries, k, f.engine, f.exact_s, 1e3 * f.exact_s / f.num_queries),
    )
    if f.recall is None or f.build_s is None or f.compressed_s is None:
        return
    logger.info(
        "Compressed: built in %.1f s, search %.1f s, %.2f ms a query, %.1f times the speed of exact, recall %.4f.",
        *(f.build_s, f.compressed_s, 1e3 * f.compressed_s / f.num_queries, f.exact_s / f.compressed_s, f.recall),
    )
