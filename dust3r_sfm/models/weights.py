"""Where the weights that come with the package lie."""

from __future__ import annotations

from pathlib import Path

from dust3r_sfm.errors import InputError

SHIPPED = Path(__file__).parent / "weights" / "dust3r_small.safetensors"


def shipped_weights() -> Path:
    """The file of the shipped weights; its model card and licence lie beside it."""
    if not SHIPPED.is_file():
        raise InputError(
            f"the shipped weights are missing at {SHIPPED}: install the package with its data, or name a model"
        )
    return SHIPPED
