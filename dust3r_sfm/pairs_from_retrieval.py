"""Stage: each photo with those of the most similar descriptors, as hloc's stage of this name; or the graph of them."""

from __future__ import annotations

import glob
import logging
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import writing
from dust3r_sfm.formats.descriptors import DescriptorFile
from dust3r_sfm.formats.exif import enu_positions, read_exif
from dust3r_sfm.formats.pairs import write_pairs
from dust3r_sfm.graph import connected_components, symmetrize
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.pair_graph import Reason, nearest_positions, pairs_from_neighbors
from dust3r_sfm.pairs import Pair
from dust3r_sfm.retrieval.exact import Neighbors, Rows, exact_top_k, without_self
from dust3r_sfm.retrieval.index import top_k
from dust3r_sfm.retrieval.key_images import farthest_points, key_links
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)

IMAGES_PER_KEY = 10
MAX_KEYS = 20
"""Key images: one of so many images, and at most so many."""
PLACE_SHARE = 5
"""One of so many partners of a photo is among those taken nearest."""


def main(
    descriptors: Path,
    output: Path,
    num_matched: int,
    query_prefix: str | tuple[str, ...] | None = None,
    query_list: Path | None = None,
    db_prefix: str | tuple[str, ...] | None = None,
    db_list: Path | None = None,
    db_model: Path | None = None,
    db_descriptors: Path | tuple[Path, ...] | None = None,
    graph: bool = False,
    sequence_window: int = 0,
    image_dir: Path | None = None,
) -> None:
    """Write the pairs of each query image with the database images that look most like it.

    Args:
        descriptors: Descriptors of the query images, from extract_descriptors or hloc.
        output: Text file to write, with two image names a line.
        num_matched: Database images for each query; all where there are fewer.
        query_prefix: Queries are the images whose names begin so; all where nothing is said of queries.
        query_list: Text file with the queries' names, one a line.
        db_prefix: Database images are those whose names begin so; all where nothing is said of them.
        db_list: Text file with the names of the database images, one a line.
        db_model: COLMAP model whose images are the database.
        db_descriptors: Descriptors of the database images, where they are in other files.
        graph: Write a connected graph over all images, of about num_matched pairs an image, in place of the lists.
        sequence_window: In the graph, pair each image with so many next ones by name too.
        image_dir: The folder of photos: in the graph, pair each with those taken nearest, by the GPS of their EXIF.
    """
    if num_matched < 1:
        raise InputError(f"num_matched must be at least 1, got {num_matched}")
    db_paths = (db_descriptors,) if isinstance(db_descriptors, Path) else db_descriptors or (descriptors,)
    with writing(output), DescriptorFile(descriptors) as query_file, DescriptorFile(*db_paths) as db_file:
        queries = _select(query_file.names, query_prefix, query_list, None, "query")
        database = _select(db_file.names, db_prefix, db_list, db_model, "database")
        if graph and queries != database:
            raise InputError("a graph is over one set of images: say nothing of queries, or the same of both")
        work = _search_folder(output, _fingerprint([*db_paths], database))
        with query_file.matrix(queries, work) as query_rows, db_file.matrix(database, work) as rows:
            neighbors = top_k(query_rows, rows, num_matched + 1, work)
            if graph:
                places = None if image_dir is None else _gps_places(image_dir, database)
                pairs = list(pair_graph(database, rows, num_matched, sequence_window, neighbors, places))
            else:
                pairs = _nearest_pairs(queries, database, neighbors, num_matched)
        write_pairs(output, pairs)
        rmtree(work)
    parts = connected_components(sorted({*queries, *database}), pairs)
    logger.info("%d pairs of %d images, in %d parts, are in %s.", len(pairs), sum(map(len, parts)), len(parts), output)


def pairs_from_retrieval(
    views: Sequence[View], num_matched: int = 20, model: Dust3r | None = None, sequence_window: int = 0
) -> list[Pair]:
    """Pairs worth predicting among views, both directions of each: a connected graph, of those that look alike.

    An image has about `num_matched` partners. `model` is the network whose encoder describes the images, the shipped
    one where not given. With `sequence_window` each is paired with so many next ones by name too, and
    images whose positions are known with those taken nearest.
    """
    from dust3r_sfm.extract_descriptors import describe_views

    if len(views) < 2:
        raise InputError(f"{len(views)} images give no pairs: at least two are needed")
    rows = describe_views(model or Dust3r.from_pretrained(), views)
    names = [view.name for view in views]
    places = _places({v.name: v.known_position.numpy() for v in views if v.known_position is not None}, names)
    return symmetrize(pair_graph(names, rows, num_matched, sequence_window, places=places))


def pair_graph(
    names: Sequence[str],
    rows: Rows,
    num_matched: int,
    sequence_window: int = 0,
    neighbors: Neighbors | None = None,
    places: Float[np.ndarray, "n 2"] | None = None,
) -> dict[Pair, Reason]:
    """The graph over images from their descriptors, in rows, with the reason for each pair; one direction of each.

    `places` in metres, NaN where they are not known, pair those taken nearest too: a fifth of the partners.
    """
    if num_matched < 1:
        raise InputError(f"num_matched must be at least 1, got {num_matched}")
    if neighbors is None:
        neighbors = exact_top_k(rows, rows, num_matched + 1)
    neighbors = without_self(neighbors, torch.arange(len(names)), num_matched)
    keys = farthest_points(rows, min(len(names) // IMAGES_PER_KEY, MAX_KEYS))
    links = key_links(rows, keys)
    near = [] if places is None else nearest_positions(places, max(1, num_matched // PLACE_SHARE))
    return pairs_from_neighbors(names, neighbors.indices, neighbors.scores, num_matched, links, sequence_window, near)


def _gps_places(image_dir: Path, names: Sequence[str]) -> Float[np.ndarray, "n 2"]:
    fixes = {name: gps for name in names if (gps := read_exif(image_dir / name).gps) is not None}
    logger.info("%d of %d photos have GPS positions.", len(fixes), len(names))
    return _places(enu_positions(fixes)[1] if fixes else {}, names)


def _places(positions: Mapping[str, Float[np.ndarray, "3"]], names: Sequence[str]) -> Float[np.ndarray, "n 2"]:
    """Without the altitude, which GPS tells badly."""
    unknown = np.full(3, np.nan)
    return np.stack([np.asarray(positions.get(name, unknown), dtype=np.float64)[:2] for name in names])


def _select(
    names: Sequence[str], prefix: str | Sequence[str] | None, listed: Path | None, model: Path | None, what: str
) -> list[str]:
    """The names that are asked for, once each: those of a list or model in its order, else those with a prefix, or all.

    As in hloc, a prefix goes before a list.
    """
    if prefix is not None:
        prefixes = (prefix,) if isinstance(prefix, str) else tuple(prefix)
        chosen = [name for name in names if name.startswith(prefixes)]
        if not chosen:
            raise InputError(
                f"no image of the {what} begins with {' or '.join(prefixes)}: {len(names)} others are there"
            )
        return chosen
    known = set(names)
    if listed is not None:
        chosen = _read_list(listed, known)
    elif model is not None:
        chosen = _names_of_model(model)
    else:
        return list(names)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(chosen)} images of the {what} have no descriptor, first {unknown[0]}: "
            "run extract_descriptors on them"
        )
    return list(dict.fromkeys(chosen))


def _read_list(path: Path, known: set[str]) -> list[str]:
    """Names of an image list as hloc reads it: the first word of each line, or all of it where that is a name."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise InputError(f"there is no image list {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the image list {path} cannot be read ({error}): expected one image name a line") from error
    names = [line if line in known else line.split()[0] for line in lines if line and not line.startswith("#")]
    if not names:
        raise InputError(f"the image list {path} is empty: expected one image name a line")
    return names


def _names_of_model(folder: Path) -> list[str]:
    from dust3r_sfm.formats.colmap import read_colmap

    return sorted(image.name for image in read_colmap(folder).images.values())


def _nearest_pairs(
    queries: Sequence[str], database: Sequence[str], neighbors: Neighbors, num_matched: int
) -> list[Pair]:
    """Each query with its nearest database images, nearest first."""
    own = _positions(queries, database)
    if num_matched > len(database) - bool((own >= 0).any()):
        logger.warning("%d images are fewer than the %d asked for: all are taken.", len(database), num_matched)
    neighbors = without_self(neighbors, own, num_matched)
    return [
        Pair(query, database[i])
        for query, row in zip(queries, neighbors.indices.tolist(), strict=True)
        for i in row
        if i >= 0
    ]


def _fingerprint(paths: Sequence[Path], names: Sequence[str]) -> str:
    """Of the database: what a killed search left behind is used for the same one only."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return sha256(repr((stats, list(names))).encode()).hexdigest()[:16]


def _search_folder(output: Path, fingerprint: str) -> Path:
    """Where the index of a search lies until it has ended; those that killed searches of other databases left go."""
    work = output.with_name(f".{output.stem}.search-{fingerprint}")
    for left in set(output.parent.glob(f".{glob.escape(output.stem)}.search-*")) - {work}:
        rmtree(left, ignore_errors=True)
    work.mkdir(exist_ok=True)
    return work


def _positions(queries: Sequence[str], database: Sequence[str]) -> Int[Tensor, " q"]:
    """Where each query is in the database; -1 where it is not."""
    position = {name: i for i, name in enumerate(database)}
    return torch.tensor([position.get(name, -1) for name in queries])


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["pairs-from-retrieval", *sys.argv[1:]]))
