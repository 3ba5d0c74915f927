"""Stage: queries matched with images that hloc made a model of, for its own localisation.

    python -m dust3r_sfm.match_queries --queries night --hloc out/hloc --image_dir photos

adds keypoints of the queries to feats.h5 and their matches to matches.h5, which `export-scene --formats hloc` wrote,
and writes pairs-queries.txt beside them. With hloc installed, and its model made of these files:

    hloc.localize_sfm.main(model, queries_with_intrinsics, pairs_queries, feats, matches, results)
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import holding
from dust3r_sfm.formats.hloc import add_queries, list_references
from dust3r_sfm.formats.pairs import read_pairs, write_pairs
from dust3r_sfm.graph import symmetrize
from dust3r_sfm.infer_pairs import InferConfig, infer_pairs
from dust3r_sfm.match_dense import MatchConfig, match_dense
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.queries import list_queries, load_queries, nearest_images
from dust3r_sfm.views import View, load_views

logger = logging.getLogger(__name__)


def main(
    queries: Path,
    hloc: Path,
    image_dir: Path,
    query_dir: Path | None = None,
    pairs_file: Path | None = None,
    num_matched: int = 10,
    model: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    infer: InferConfig = InferConfig(),  # noqa: B008  frozen
    config: MatchConfig = MatchConfig(),  # noqa: B008
) -> None:
    """Match queries with the images of hloc's files, and add them there.

    Args:
        queries: A folder of photos, a photo, or a list as hloc has it: `name`, or `name MODEL width height params...`.
        hloc: The folder with feats.h5 and matches.h5 of the reference.
        image_dir: The photos of the reference.
        query_dir: Folder that the names of a list are below; image_dir where not given.
        pairs_file: Text file with lines `query reference_image`, in place of retrieval.
        num_matched: Reference images that a query is matched with: those that look most like it.
        model: Checkpoint file, folder or hub name; the shipped weights where not given.
        on_bad_image: Stop at queries that cannot be used, or leave them out.
        infer: How to run the network.
        config: How pixels are matched.
    """
    references = list_references(hloc / "feats.h5")
    folder, cameras = list_queries(queries, query_dir or image_dir)
    both = sorted(set(cameras) & set(references))
    if both:
        raise InputError(f"{both[0]} is one of the reference's images: give the queries other names")
    network = Dust3r.from_pretrained(model)
    own = load_queries(folder, cameras, network, on_bad_image)
    pairs, views = _neighbors(network, own, references, image_dir, pairs_file, num_matched)
    with holding(hloc):
        matches = _match(network, own, views, pairs, infer, config)
        counts = add_queries(own, views, matches, hloc)
        write_pairs(hloc / "pairs-queries.txt", pairs)
    logger.info("%d queries have %d matches with %d images: %s.", len(own), sum(counts.values()), len(views), hloc)
    for name in (name for name, count in counts.items() if count == 0):
        logger.warning("%s has no matches with the reference.", name)


def _neighbors(
    network: Dust3r,
    queries: Sequence[View],
    references: Sequence[str],
    image_dir: Path,
    pairs_file: Path | None,
    num_matched: int,
) -> tuple[list[Pair], list[View]]:
    """Pairs (query, reference image), best first, and the views of their images."""
    names = [query.name for query in queries]
    pairs = []
    if pairs_file is not None:
        known = set(references)
        pairs = [p for p in read_pairs(pairs_file, {*names, *known}) if p.name0 in names and p.name1 in known]
        if not pairs:
            raise InputError(f"{pairs_file} has no line `query image` of the {len(names)} queries and the reference")
        references = sorted({pair.name1 for pair in pairs})
    size, square_ok = network.config.image_size, network.config.square_ok
    views = load_views(image_dir, size, references, square_ok=square_ok)
    if pairs_file is None:
        nearest = nearest_images(network, queries, views, num_matched)
        pairs = [Pair(name, image) for name in names for image in nearest[name]]
        needed = {pair.name1 for pair in pairs}
        views = [view for view in views if view.name in needed]
    return pairs, views


def _match(
    network: Dust3r,
    queries: Sequence[View],
    views: Sequence[View],
    pairs: Sequence[Pair],
    infer: InferConfig,
    config: MatchConfig,
) -> Mapping[Pair, Matches]:
    """Matches of the pairs in network pixels, from both directions."""
    everything = [*queries, *views]
    predictions = infer_pairs(network, everything, symmetrize(pairs), None, infer)
    found = match_dense(everything, predictions, config)
    turned = {p.reversed(): Matches(m.keypoints1, m.keypoints0, m.scores) for p, m in found.items()}
    return {pair: found[pair] if pair in found else turned[pair] for pair in pairs}


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["match-queries", *sys.argv[1:]]))
