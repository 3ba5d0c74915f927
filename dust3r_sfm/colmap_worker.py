"""COLMAP's pipelines in a process of their own: some of their errors end the process, and their logs are not ours.

Each task takes paths and options as JSON: `python -m dust3r_sfm.colmap_worker map_images PARENT < options.json`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_IMAGE_SIDE = 1600
"""Longer photos are halved in size and so on until they are shorter, for features alone."""

WATCH_S = 0.1


def run_task(task: str, timeout_s: float | None = None, **arguments: Any) -> bool:
    """Run one of the tasks below; False where its process failed, ended itself or took too long, which is logged."""
    given = json.dumps(arguments, default=str).encode()  # a command line has no room for the names of a collection
    command = [sys.executable, "-m", "dust3r_sfm.colmap_worker", task, str(os.getpid())]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, timeout=timeout_s, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        logger.warning("COLMAP's %s took more than %.0f s and was stopped.", task, timeout_s)
        return False
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        logger.warning("COLMAP's %s failed (%d): %s", task, done.returncode, lines[-1] if lines else "no reason given")
    return done.returncode == 0


def sift(
    database: str,
    image_dir: str,
    names: list[str],
    pairs: list[tuple[str, str]] | None,
    cameras: dict[str, dict[str, Any]],
) -> None:
    """Extract SIFT features, match pairs (all where None) and verify them by their epipolar geometry.

    `cameras` are those that are known, by image name.
    """
    import pycolmap

    from dust3r_sfm.colmap_versions import match_listed

    pycolmap.set_random_seed(0)
    device = pycolmap.Device.cpu
    with pycolmap.Database.open(database):
        pass
    pycolmap.import_images(database, image_dir, image_names=names)  # else threads give out the ids, in any order
    pycolmap.extract_features(
        *(database, image_dir, names), extraction_options={"max_image_size": MAX_IMAGE_SIDE}, device=device
    )
    with pycolmap.Database.open(database) as opened:
        for image in opened.read_all_images() if cameras else ():
            if image.name in cameras:
                camera = pycolmap.Camera(camera_id=image.camera_id, **cameras[image.name])
                camera.has_prior_focal_length = True
                opened.update_camera(camera)
    verification: Any = {"ransac": {"random_seed": 0}}
    if pairs is None:
        pycolmap.match_exhaustive(database, verification_options=verification, device=device)
        return
    with short_names(database) as short, tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "pairs.txt"
        listed.write_text("".join(f"{short[a]} {short[b]}\n" for a, b in pairs if a in short and b in short))
        match_listed(database, listed, verification)


@contextmanager
def short_names(database: str) -> Iterator[dict[str, str]]:
    """The names that images have in a database meanwhile, by their own: in a list of pairs a blank ends a name."""
    import pycolmap

    with pycolmap.Database.open(database) as opened:
        names = {image.image_id: image.name for image in opened.read_all_images()}
        _rename(opened, {image_id: f"{image_id}:" for image_id in names})
    yield {name: f"{image_id}:" for image_id, name in names.items()}
    with pycolmap.Database.open(database) as opened:
        _rename(opened, names)


def _rename(opened: Any, names: dict[int, str]) -> None:
    for image in opened.read_all_images():
        image.name = names[image.image_id]
        opened.update_image(image)


def map_images(
    database: str, output: str, constant_cameras: list[int], options: dict[str, Any], previous: str | None = None
) -> None:
    """Incremental mapping with the intrinsics of some cameras held; models go to `output/0`, `output/1`, ...

    With a `previous` model it continues that one, whose poses stay.
    """
    import pycolmap

    pycolmap.set_random_seed(0)
    options = {"random_seed": 0, "extract_colors": False, "constant_cameras": set(constant_cameras)} | options
    continued: Any = {}
    if previous is not None:
        continued["input_path"] = previous
        options |= {"fix_existing_frames": True, "multiple_models": False}
    pycolmap.incremental_mapping(database, Path(database).parent, output, options, **continued)


def triangulate(database: str, model: str, output: str, options: dict[str, Any]) -> None:
    """Points of all verified matches under the poses of a model, which stay."""
    import pycolmap

    pycolmap.set_random_seed(0)
    options = {"random_seed": 0, "extract_colors": False} | options
    reconstruction = pycolmap.Reconstruction(model)
    pycolmap.triangulate_points(reconstruction, database, Path(database).parent, output, options=options)


def end_with(parent: int) -> None:
    """End this process when its parent has ended: of a killed run nothing may go on writing to its files."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


TASKS = {"sift": sift, "map_images": map_images, "triangulate": triangulate}


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    import pycolmap

    pycolmap.logging.logtostderr = True  # else it leaves files in the temporary folder
    TASKS[sys.argv[1]](**json.load(sys.stdin))
