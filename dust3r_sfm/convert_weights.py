"""Stage: a published AP-GeM checkpoint becomes a safetensors file, which holds numbers and nothing else."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import writing
from dust3r_sfm.models.apgem import read_published, save_apgem

logger = logging.getLogger(__name__)


def main(checkpoint: Path, output: Path, whitening: str = "Landmarks_clean") -> None:
    """Convert a checkpoint of the AP-GeM authors, once; what it asks to run is not run.

    Args:
        checkpoint: The published file, such as Resnet-101-AP-GeM.pt.
        output: The file to write, such as apgem.safetensors.
        whitening: Which of the checkpoint's PCAs to keep.
    """
    with writing(output):
        if not checkpoint.is_file():
            raise InputError(f"there is no checkpoint {checkpoint}: name the published .pt, unpacked from its archive")
        try:
            model = read_published(checkpoint, whitening)
        except InputError as error:
            raise InputError(f"cannot convert {checkpoint}: {error}") from error
        save_apgem(model, output)
    whitened = "without whitening" if model.pca is None else f"whitened by {whitening}"
    logger.info("%s: %s, %d numbers an image, %s.", output, model.config.architecture, model.dim, whitened)


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["convert-weights", *sys.argv[1:]]))
