"""Sparse views: bags of a few photos of each scene are reconstructed, compared with their reference and with COLMAP.

    python pipelines/evaluate_bags.py scenes bags.json out

`scenes/<scene>` has images/ and cameras.json; `bags.json` is {"<scene>": [["a.jpg", "b.jpg", ...], ...]}. Interrupted,
the same command continues; the table is printed in the end and written to out/figures.json.
"""

import json
import shutil
import sys
from pathlib import Path

from dust3r_sfm import evaluate, reconstruct
from dust3r_sfm.errors import ReconstructionError


def main(scenes: Path, bags: Path, output: Path) -> None:
    runs = []
    for scene, choices in json.loads(bags.read_text()).items():
        for i, names in enumerate(choices):
            run = output / f"{scene}_{i}"
            for name in names:
                photo = run / "images" / name
                photo.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(scenes / scene / "images" / name, photo)
            runs.append((run / "model", scenes / scene, run / "images"))
    for model, _, photos in runs:
        try:
            reconstruct.main(photos, model)
        except ReconstructionError as error:
            print(f"{photos}: {error}", file=sys.stderr)
    models, references, folders = zip(*runs, strict=True)
    evaluate.main(models, references, output / "figures.json", folders, with_colmap=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
