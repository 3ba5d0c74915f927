"""Stage: render photos of a scene, reconstruct them, and compare with the truth."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dust3r_sfm import reconstruct
from dust3r_sfm.errors import InputError
from dust3r_sfm.evaluate import PoseReport, evaluate_model
from dust3r_sfm.files import write_bytes, writing
from dust3r_sfm.training.synthetic import SyntheticViews, demo_views

logger = logging.getLogger(__name__)

NAME = "dust3r_sfm demo"
SIZE = (480, 640)


def main(output: Path = Path("demo"), model: str | None = None, num_views: int = 8, seed: int = 5) -> PoseReport:
    """Render photos of a procedural scene, reconstruct them and print the pose error against the truth.

    Args:
        output: Folder for images/, cameras.json (the truth) and all that reconstruct writes.
        model: Checkpoint file, folder or hub name; the shipped weights where not given.
        num_views: How many photos to render.
        seed: Which scene.
    """
    if num_views < 2:
        raise InputError(f"a scene needs at least 2 views, got {num_views}")
    if (output / "images").exists() and not _is_demo(output):
        raise InputError(f"{output / 'images'} holds other photos: choose another output folder")
    with writing(output / "images", is_folder=True):
        write_photos(output, num_views, seed)
        reconstruct.main(output / "images", output, model)
    report = evaluate_model(output / "sparse", output)
    errors = f"rotation {report.median_rotation_deg:.2f}, translation direction {report.median_translation_deg:.2f}"
    print(f"{report.num_registered} of {report.num_images} photos registered; median error in degrees: {errors}.")
    return report


def _is_demo(folder: Path) -> bool:
    """Whether the photos in a folder come from here, and may be written anew."""
    try:
        return json.loads((folder / "cameras.json").read_text()).get("name") == NAME
    except (OSError, ValueError, AttributeError):
        return False


def write_photos(folder: Path, num_views: int, seed: int) -> None:
    """Render photos of a scene into `images/`, and the truth, in the form that `evaluate` takes, beside it."""
    scene, images = demo_views(num_views, SIZE, seed), folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    names = [f"{i:03d}.png" for i in range(len(scene.images))]
    write_bytes(folder / "cameras.json", json.dumps(_cameras_json(names, scene), indent=1).encode())
    for name, image in zip(tqdm(names, desc="Photos", unit="photo", disable=None), scene.images, strict=True):
        Image.fromarray(image.numpy()).save(images / name)
    for path in set(images.iterdir()) - {images / name for name in names}:
        path.unlink()  # of an earlier demo of more photos


def _cameras_json(names: Sequence[str], scene: SyntheticViews) -> dict[str, Any]:
    height, width = scene.images.shape[1:3]
    frames = [
        {
            "image": f"images/{name}",
            "width": width,
            "height": height,
            "K": scene.K[i].tolist(),
            "cam_from_world": scene.cam_from_world[i].tolist(),
        }
        for i, name in enumerate(names)
    ]
    convention = "OpenCV cameras: x_cam = cam_from_world @ x_world; K for the stored image, corner at (0, 0)"
    return {"name": NAME, "convention": convention, "frames": frames}


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["demo", *sys.argv[1:]]))
