"""Photos to COLMAP models, a call a stage: a script to copy and change.

    python pipelines/reconstruct.py castle/images castle/out

`dust3r-sfm reconstruct` does the same, and continues where it was interrupted.
"""

import sys
from pathlib import Path

import dust3r_sfm as ds


def main(image_dir: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    model = ds.Dust3r.from_pretrained()
    views = ds.load_views(image_dir, model.config.image_size, square_ok=model.config.square_ok)
    pairs = ds.pairs_exhaustive([view.name for view in views])
    predictions = ds.filter_pairs(ds.infer_pairs(model, views, pairs, output / "pointmaps.h5"))
    matches = ds.match_dense(views, predictions)
    for i, scene in enumerate(ds.align_components(views, predictions)):
        ds.write_colmap(ds.build_tracks(scene, matches, views), output / "sparse" / str(i))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
