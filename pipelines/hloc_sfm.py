"""hloc's files of a finished reconstruction: a script to copy and change.

    python pipelines/hloc_sfm.py castle/images castle/out

`castle/out` is what `dust3r-sfm reconstruct` wrote. In `castle/out/hloc` then lie pairs.txt, feats.h5, matches.h5 and
global-feats.h5. With hloc installed its own stages run on them:

    hloc.reconstruction.main(sfm_dir, images, pairs, feats, matches)
    hloc.triangulation.main(sfm_dir, sparse, images, pairs, feats, matches, estimate_two_view_geometries=True)
    hloc.localize_sfm.main(sfm_dir, queries_with_intrinsics, pairs_queries, feats, matches, results)

The last of these after `dust3r-sfm match-queries`, which adds the queries to the files.

`dust3r_sfm.register_with_hloc()` adds our descriptor and matcher to hloc's own, for its stages to call.
Without the last argument of the triangulation pycolmap 4.2.1 passes over the pairs that hloc writes: no points.
"""

import sys
from pathlib import Path

from dust3r_sfm import export_scene, extract_descriptors


def main(image_dir: Path, output: Path) -> None:
    config = export_scene.ExportConfig(formats=("hloc",))
    export_scene.main(output / "scene.h5", image_dir, output, matches=output / "matches.h5", export=config)
    extract_descriptors.main(image_dir, output / "hloc" / "global-feats.h5")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
