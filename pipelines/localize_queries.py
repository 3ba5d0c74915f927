"""Photos localised in a finished reconstruction: a script to copy and change.

    python pipelines/localize_queries.py castle/out castle/images night/images night/poses.txt

`castle/out` is what `dust3r-sfm reconstruct` wrote of `castle/images`. Any COLMAP or hloc model takes its place, as do
pairs of hloc's own retrieval, and a list of queries with intrinsics that of their folder.
"""

import sys
from pathlib import Path

from dust3r_sfm import extract_descriptors
from dust3r_sfm.localize import main as localize
from dust3r_sfm.pairs_from_retrieval import main as pairs_from_retrieval


def main(reference: Path, image_dir: Path, query_dir: Path, output: Path) -> None:
    work = output.parent / "retrieval"
    extract_descriptors.main(image_dir, work / "reference.h5")
    extract_descriptors.main(query_dir, work / "queries.h5")
    pairs = work / "pairs.txt"
    pairs_from_retrieval(
        work / "queries.h5", pairs, 10, db_descriptors=work / "reference.h5", db_model=reference / "sparse" / "0"
    )
    localize(query_dir, reference, output, image_dir=image_dir, pairs_file=pairs)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
