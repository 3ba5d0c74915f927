"""An aligned scene: what alignment gives and every exporter takes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tracks:
    """3-D points and the pixels that see them: at most one observation an image and point."""

    points_in_world: Float[Tensor, "p 3"]
    colors: UInt8[Tensor, "p 3"]
    errors: Float[Tensor, " p"]
    """Mean reprojection error in pixels of the stored files."""
    point_indices: Int[Tensor, " o"]
    """For each observation, its point."""
    image_indices: Int[Tensor, " o"]
    """For each observation, its image: an index into `Scene.names`."""
    keypoints: Float[Tensor, "o 2"]
    """For each observation, its pixel in the stored file, corner origin."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Cameras and depth of one connected component, in one world frame of arbitrary scale.

    `K`, `cam_from_world`, `depth` and `confidence` belong to the network images (upright,
    corner origin); `net_from_img` leads back to the stored files, where exporters work.
    """

    names: tuple[str, ...]
    K: Float[Tensor, "n 3 3"]
    cam_from_world: Float[Tensor, "n 4 4"]
    depth: tuple[Float[Tensor, "_h _w"], ...]
    """z along the optical axis of every network pixel's centre; each image has its own size."""
    confidence: tuple[Float[Tensor, "_h _w"], ...]
    net_from_img: Float[Tensor, "n 3 3"]
    original_sizes: tuple[tuple[int, int], ...]
    """(width, height) of the stored files."""
    tracks: Tracks | None = None

    def __post_init__(self) -> None:
        n = len(self.names)
        lengths = {f: len(getattr(self, f)) for f in ("K", "cam_from_world", "depth", "confidence", "net_from_img")}
        if any(length != n for length in lengths.values()) or len(self.original_sizes) != n:
            raise ValueError(f"a scene of {n} names has fields of other lengths: {lengths}")
        for name, depth, confidence in zip(self.names, self.depth, self.confidence, strict=True):
            if depth.shape != confidence.shape:
                raise ValueError(f"{name}: depth is {tuple(depth.shape)}, confidence {tuple(confidence.shape)}")
