"""An aligned scene: what alignment gives and every exporter takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from dust3r_sfm.geometry.camera import split_rotation
from dust3r_sfm.geometry.lens import Lens, bent, straightened
from dust3r_sfm.pairs import Pair
from dust3r_sfm.views import View

CELLS = 24
"""Cells along the longer side of a photo: where one has a keypoint there is no hole to fill."""


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


def share_in_empty_cells(tracks: Tracks, others: Tracks, sizes: Sequence[tuple[int, int]]) -> Float64[np.ndarray, " p"]:
    """For each point, the share of its keypoints in cells of photos (of these sizes) where others have no keypoint."""
    sides = np.array([max(size) / CELLS for size in sizes])
    taken, points = set(_cells(others, sides)), tracks.point_indices.numpy()
    is_empty = np.array([cell not in taken for cell in _cells(tracks, sides)], dtype=bool)
    counts = [np.bincount(points, weights=weights, minlength=len(tracks.errors)) for weights in (is_empty, None)]
    return counts[0] / np.maximum(counts[1], 1)


def _cells(tracks: Tracks, sides: Float64[np.ndarray, " n"]) -> list[tuple[int, int, int]]:
    images = tracks.image_indices.numpy()
    x, y = (tracks.keypoints.numpy() // sides[images, None]).astype(int).T
    return list(zip(images.tolist(), x.tolist(), y.tolist(), strict=True))


@dataclass(frozen=True)
class SceneIds:
    """COLMAP's numbers of a scene that continues a model: what was in that keeps its own."""

    images: tuple[int, ...]
    cameras: tuple[int, ...]
    """Of each image; images of one number share a camera."""
    points: tuple[int, ...]
    """Of the scene's first tracks; the others are numbered from `next_point`."""
    next_point: int


@dataclass(frozen=True, eq=False)
class Scene:
    """Cameras and depth of one connected component, in one world frame of arbitrary scale.

    `K`, `cam_from_world`, `depth` and `confidence` belong to the network images (upright,
    corner origin, pinholes); `net_from_img` leads back to the stored files, where exporters
    work, by way of the lens where an image has one.
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
    lenses: tuple[Lens | None, ...] = ()
    """The distortion of each stored file, which comes after `net_from_img`'s inverse; () where none has any."""
    doubts: Mapping[Pair, str] = field(default_factory=dict)
    """Pairs of the aligned component that had no say, and why: they contradict the others."""
    ids: SceneIds | None = None
    """None where images and points are numbered from 1."""
    views: tuple[View, ...] = ()
    """The network images, to compare further photos with; () where they are not at hand, as in a scene from a file."""

    def __post_init__(self) -> None:
        n = len(self.names)
        lengths = {f: len(getattr(self, f)) for f in ("K", "cam_from_world", "depth", "confidence", "net_from_img")}
        if any(length != n for length in lengths.values()) or {len(self.original_sizes), len(self.lenses) or n} != {n}:
            raise ValueError(f"a scene of {n} names has fields of other lengths: {lengths}")
        if self.ids is not None and {len(self.ids.images), len(self.ids.cameras)} != {n}:
            raise ValueError(f"a scene of {n} names has ids of {len(self.ids.images)}, {len(self.ids.cameras)} images")
        for name, depth, confidence in zip(self.names, self.depth, self.confidence, strict=True):
            if depth.shape != confidence.shape:
                raise ValueError(f"{name}: depth is {tuple(depth.shape)}, confidence {tuple(confidence.shape)}")

    def lens(self, index: int) -> Lens | None:
        return self.lenses[index] if self.lenses else None

    def K_img(self, index: int) -> Float64[np.ndarray, "3 3"]:  # noqa: N802
        """Intrinsics of the pinhole behind a stored file, in its pixels."""
        img_from_net = self.net_from_img[index].detach().cpu().double().inverse()
        return split_rotation(img_from_net, self.K[index].detach().cpu().double())[0].numpy()

    def net_from_stored(self, index: int, pixels: Float[np.ndarray, "n 2"]) -> Float64[np.ndarray, "n 2"]:
        """Pixels of a stored file in the network image; NaN where its lens cannot say."""
        affine = self.net_from_img[index].detach().cpu().double().numpy()
        return straightened(pixels, self.K_img(index), self.lens(index)) @ affine[:2, :2].T + affine[:2, 2]

    def stored_from_net(self, index: int, pixels: Float[np.ndarray, "n 2"]) -> Float64[np.ndarray, "n 2"]:
        """Pixels of a network image in the stored file; NaN where its lens cannot say."""
        affine = self.net_from_img[index].detach().cpu().double().inverse().numpy()
        straight = np.asarray(pixels, dtype=np.float64) @ affine[:2, :2].T + affine[:2, 2]
        return bent(straight, self.K_img(index), self.lens(index))

    def net_from_seen(self, index: int, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Where pixels that the network saw lie in the pinhole's image: elsewhere under a lens found since."""
        lens = self.lens(index)
        if lens is None or lens.was_known:
            return pixels
        affine = self.net_from_img[index].detach().cpu().double().numpy()
        to_stored = np.linalg.inv(affine)
        stored = np.asarray(pixels, dtype=np.float64) @ to_stored[:2, :2].T + to_stored[:2, 2]
        return straightened(stored, self.K_img(index), lens) @ affine[:2, :2].T + affine[:2, 2]

    def seen_from_net(self, index: int, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """The inverse of `net_from_seen`."""
        lens = self.lens(index)
        if lens is None or lens.was_known:
            return pixels
        affine = self.net_from_img[index].detach().cpu().double().numpy()
        return self.stored_from_net(index, pixels) @ affine[:2, :2].T + affine[:2, 2]
