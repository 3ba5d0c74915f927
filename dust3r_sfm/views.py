"""A photo as the network sees it, and the exact way back to the pixels of the stored file."""

from __future__ import annotations

import hashlib
import os
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Num, UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.geometry.lens import (
    SAME_PX,
    Lens,
    bend_px,
    bent,
    straightened,
    straightening_zoom,
    zoomed_from_straight,
)
from dust3r_sfm.geometry.transforms import camera_center

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".heic", ".heif")
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP")
MIN_SIDE = 32
PATCH = 16
SQUARE_CROP_SIZE = 224
"""The network input size that stands for a centred square, as in DUSt3R 224; any other is a long side."""

DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, EOFError, RuntimeError),
    *(MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow and its plugins raise on broken files."""

EXIF_ROTATIONS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
MIRRORED = (2, 4, 5, 7)
OVERSAMPLING = 1.5
"""Pixels of a photo, made smaller, for one of the network's, where a distorted one is sampled."""


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """One photo, upright and at the network's size.

    Pixels have their origin at the image's corner: the first pixel's centre is (0.5, 0.5).
    `net_from_img` takes homogeneous pixels of the stored file, as COLMAP reads it (EXIF
    orientation ignored), to pixels of `image`; it holds the EXIF rotation, scale and crop.
    """

    name: str
    """Posix path below the image folder."""
    image: UInt8[Tensor, "h w 3"]
    """RGB at the network's size."""
    original_size: tuple[int, int]
    """(width, height) of the stored file."""
    net_from_img: Float[Tensor, "3 3"]
    """float64 affine map. With a `lens` it takes pixels of a pinhole of the same K, and `image` has no distortion."""
    mask: Bool[Tensor, "h w"] | None = None
    """True where the photo may be used."""
    known_K: Float[Tensor, "3 3"] | None = None
    """Known intrinsics in pixels of the stored file."""
    known_cam_from_world: Float[Tensor, "4 4"] | None = None
    """Known pose of the camera of the stored file, OpenCV axes."""
    lens: Lens | None = None
    """The known distortion of the stored file, which comes with a known K."""
    focal_sigma: float = 0.0
    """Relative standard deviation of the known K's focal lengths; 0 where they are held."""
    known_position: Float[Tensor, "3"] | None = None
    """Where the camera was measured to stand, in the world's unit, z up."""
    position_sigma: Float[Tensor, "3"] | None = None
    """Standard deviation of each coordinate of the position."""
    known_depth: Float[Tensor, "h w"] | None = None
    """Known z of the pixels in metres, 0 where it is not known."""
    camera_group: str | None = None
    """Photos of one group were taken by one camera; where None that is found out."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of `image`."""
        return self.image.shape[0], self.image.shape[1]

    def net_from_stored(self, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Pixels of the stored file in `image`; NaN where its lens cannot say."""
        return _apply(self.net_from_img.numpy(), straightened(pixels, self._stored_K, self.lens))

    def stored_from_net(self, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Pixels of `image` in the stored file; NaN where its lens cannot say."""
        return bent(_apply(np.linalg.inv(self.net_from_img.numpy()), pixels), self._stored_K, self.lens)

    @property
    def _stored_K(self) -> Float[np.ndarray, "3 3"]:  # noqa: N802
        return np.eye(3) if self.known_K is None else self.known_K.double().numpy()

    def normalized(self) -> Float[Tensor, "3 h w"]:
        """The image in [-1, 1], as `Dust3r.forward` takes it."""
        return self.image.permute(2, 0, 1).to(torch.float32) / 127.5 - 1


class KnownCamera(NamedTuple):
    """What is known of a stored file's camera."""

    K: Float[Tensor, "3 3"] | None = None
    """In pixels of the stored file."""
    cam_from_world: Float[Tensor, "4 4"] | None = None
    lens: Lens | None = None
    """The distortion that goes with K; None for a pinhole."""
    size: tuple[int, int] | None = None
    """(width, height) of the file that K belongs to, where that is known."""
    focal_sigma: float = 0.0
    """Relative standard deviation of K's focal lengths; 0 where they are held."""
    position_sigma: float | None = None
    """Standard deviation of the pose's position, which is then a prior; None where the pose is held."""


KnownCameras = Mapping[str, KnownCamera]
"""By image name."""


class LoadedViews(NamedTuple):
    """The views of a folder, and why the other images of it cannot be used."""

    views: list[View]
    rejected: dict[str, str]
    """By name, a reason that continues the sentence: `is a copy of a.jpg`."""


def list_images(image_dir: Path | str) -> list[str]:
    """Sorted posix names of the images in a folder and its sub-folders; hidden files and folders are left out."""
    image_dir = _existing_folder(image_dir)
    names = []
    for folder, folders, files in os.walk(image_dir):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found = (Path(folder, name) for name in files if not name.startswith("."))
        names += [path.relative_to(image_dir).as_posix() for path in found if path.suffix.lower() in SUFFIXES]
    if not names:
        raise InputError(f"no images in {image_dir} or its sub-folders: expected files ending in {', '.join(SUFFIXES)}")
    return sorted(names)


def load_views(
    image_dir: Path | str,
    size: int,
    names: Sequence[str] | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    *,
    square_ok: bool = False,
    cameras: KnownCameras | None = None,
) -> list[View]:
    """Views of the images of a folder, or of `names` below it, in their order, with what is known of their cameras.

    Images of a known lens are freed of its distortion. Images that cannot be used (broken,
    empty, under 32 pixels, mirrored, copies) raise one
    InputError that lists them all, or are left out; `read_views` gives their reasons too.
    """
    views, rejected = read_views(image_dir, size, names, square_ok=square_ok, cameras=cameras)
    if rejected and (on_bad_image == "error" or not views):
        lines = [f"  {name} {reason}" for name, reason in rejected.items()]
        heading = f"{len(rejected)} of {len(views) + len(rejected)} images in {image_dir} cannot be used:"
        advice = "Remove them, or leave them out with --on_bad_image skip." if views else "No image is left."
        raise InputError("\n".join([heading, *lines, advice]))
    return views


def read_views(
    image_dir: Path | str,
    size: int,
    names: Sequence[str] | None = None,
    *,
    square_ok: bool = False,
    cameras: KnownCameras | None = None,
) -> LoadedViews:
    """Views of all images that can be used, and the reasons of the others, from one reading of each file."""
    if names is None:
        names = list_images(image_dir)
    image_dir = _existing_folder(image_dir)
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise InputError(f"image names must be unique, but these are listed more than once: {', '.join(repeated)}")
    with _strict_pillow(), ThreadPoolExecutor(2) as pool:
        load = partial(_try_load, image_dir, size=size, square_ok=square_ok, cameras=cameras or {})
        results = list(pool.map(load, names))
    views, rejected, name_by_digest = [], {}, {}
    for name, (view_or_reason, digest) in zip(names, results, strict=True):
        if isinstance(view_or_reason, str):
            rejected[name] = view_or_reason
        elif name_by_digest.setdefault(digest, name) != name:
            rejected[name] = f"is a copy of {name_by_digest[digest]}"
        else:
            views.append(view_or_reason)
    return LoadedViews(views, rejected)


def load_view(
    path: Path | str,
    size: int,
    name: str | None = None,
    *,
    square_ok: bool = False,
    camera: KnownCamera = KnownCamera(),  # noqa: B008  frozen
) -> View:
    """The view of one image file; its name is the file's unless given."""
    path = Path(path)
    try:
        with _strict_pillow():
            return _load(_read(path), name or path.name, size, square_ok, camera)
    except InputError as error:
        raise InputError(f"{path} {error}") from error


def with_known_cameras(views: Sequence[View], cameras: KnownCameras) -> list[View]:
    """The views with known K and pose, each may be None, for the named ones.

    A lens changes the image as well: `load_views` takes it.
    """
    unknown = sorted(set(cameras) - {view.name for view in views})
    if unknown:
        raise InputError(f"cameras are given for images that are not there: {', '.join(unknown)}")
    bending = [name for name, camera in cameras.items() if KnownCamera(*camera).lens is not None]
    if bending:
        raise ValueError(f"{bending[0]} has a lens: load_views takes it away while it reads the photo")
    known = {name: {"known_K": K, "known_cam_from_world": pose} for name, (K, pose, *_) in cameras.items()}
    return [replace(view, **known.get(view.name, {})) for view in views]


def network_crop(
    width: int, height: int, size: int, *, square_ok: bool = False
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """DUSt3R's input for an upright image: the (width, height) to resize to, then the box to cut.

    For 224 the short side becomes 224 and the centred square is cut. For other sizes the long
    side becomes `size` and both sides are cut to multiples of 16, a square to 4:3 unless `square_ok`.
    The box is (left, top, right, bottom); it is empty where an image is too narrow.
    """
    if size == SQUARE_CROP_SIZE:
        long_side = round(size * max(width, height) / min(width, height))
        w, h = (max(long_side, size), size) if width > height else (size, max(long_side, size))
        half_w = half_h = size // 2
    else:
        w, h = (round(side * size / max(width, height)) for side in (width, height))
        half_w, half_h = (side // 2 * 2 // PATCH * PATCH // 2 for side in (w, h))
        if w == h and not square_ok:
            half_h = 3 * w // 4 // PATCH * PATCH // 2
    return (w, h), (w // 2 - half_w, h // 2 - half_h, w // 2 + half_w, h // 2 + half_h)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow refuses truncated files, and does not warn of broken metadata or of many pixels."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _existing_folder(image_dir: Path | str) -> Path:
    image_dir = Path(image_dir)
    if not image_dir.exists():
        raise InputError(f"there is no folder {image_dir}: expected a folder of photos")
    if not image_dir.is_dir():
        raise InputError(f"{image_dir} is a file: expected a folder of photos")
    return image_dir


def _try_load(
    image_dir: Path, name: str, *, size: int, square_ok: bool, cameras: KnownCameras
) -> tuple[View | str, bytes]:
    """The view or the reason why there is none, and a digest of the file."""
    data = b""
    try:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise InputError("has control characters or bytes that are not UTF-8 in its name: rename it")
        data = _read(image_dir / name)
        return _load(data, name, size, square_ok, cameras.get(name, KnownCamera())), hashlib.sha256(data).digest()
    except InputError as error:
        return str(error), b""


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError("does not exist") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from error
    if not data:
        raise InputError("is empty")
    return data


def _load(data: bytes, name: str, size: int, square_ok: bool, camera: KnownCamera) -> View:
    try:
        image, orientation, is_upright = _decode(data)
    except UnidentifiedImageError:
        if Path(name).suffix.lower() in (".heic", ".heif") and not _has_heif():
            raise InputError("is HEIC, which is read once pillow-heif is installed") from None
        raise InputError("is no image: its content is not JPEG, PNG, TIFF, WebP or HEIC") from None
    except DECODE_ERRORS as error:
        raise InputError(f"cannot be decoded: {error or type(error).__name__}") from error
    if orientation in MIRRORED:
        raise InputError(f"is mirrored (EXIF orientation {orientation}), as no camera sees: save it unmirrored")
    if min(image.size) < MIN_SIDE:
        raise InputError(f"is {image.width} x {image.height} pixels: at least {MIN_SIDE} a side are needed")
    view = _view_from_pixels(image, orientation, is_upright, name, size, square_ok)
    if camera.size is not None and camera.K is not None and camera.size != view.original_size:
        sizes = [f"{w} x {h}" for w, h in (view.original_size, camera.size)]
        raise InputError(f"is {sizes[0]} pixels, but its given camera is of {sizes[1]}: give the camera of this file")
    view = replace(view, known_K=camera.K, known_cam_from_world=camera.cam_from_world, focal_sigma=camera.focal_sigma)
    if camera.position_sigma is not None and camera.cam_from_world is not None:
        position = camera_center(camera.cam_from_world.double())
        sigma = torch.full((3,), camera.position_sigma, dtype=torch.float64)
        view = replace(view, known_cam_from_world=None, known_position=position, position_sigma=sigma)
    if camera.lens is None or camera.K is None:
        return view
    upright_from_img = _upright_from_img(orientation, *view.original_size)
    source_from_img = upright_from_img if is_upright else torch.eye(3, dtype=torch.float64)
    return _straightened_view(view, image, source_from_img.numpy(), camera.lens)


def _view_from_pixels(
    image: Image.Image, orientation: int, is_upright: bool, name: str, size: int, square_ok: bool
) -> View:
    """The view of a decoded file; `is_upright` where the pixels are turned by `orientation` already."""
    turns_sides = orientation in (6, 8)
    stored_size = image.size[::-1] if turns_sides and is_upright else image.size
    upright_size = stored_size[::-1] if turns_sides else stored_size
    resized, box = network_crop(*upright_size, size, square_ok=square_ok)
    if box[0] >= box[2] or box[1] >= box[3]:
        raise InputError(f"is {stored_size[0]} x {stored_size[1]} pixels: too narrow for a long side of {size}")
    kernel = Image.Resampling.LANCZOS if max(stored_size) > max(resized) else Image.Resampling.BICUBIC
    image = image.resize(resized[::-1] if turns_sides and not is_upright else resized, kernel)
    if orientation != 1 and not is_upright:
        image = image.transpose(EXIF_ROTATIONS[orientation])
    scale_x, scale_y = resized[0] / upright_size[0], resized[1] / upright_size[1]
    net_from_upright = torch.tensor([[scale_x, 0, -box[0]], [0, scale_y, -box[1]], [0, 0, 1]], dtype=torch.float64)
    return View(
        name=name,
        image=torch.from_numpy(np.array(image.crop(box))),
        original_size=stored_size,
        net_from_img=net_from_upright @ _upright_from_img(orientation, *stored_size),
    )


def _straightened_view(view: View, image: Image.Image, source_from_img: Float64[np.ndarray, "3 3"], lens: Lens) -> View:
    """The view of a photo without its distortion, as wide as the photo fills it, from its decoded pixels."""
    K = view.known_K.double().numpy()
    if bend_px(K, view.original_size, lens) <= SAME_PX:
        return replace(view, lens=lens)
    zoomed = zoomed_from_straight(K, straightening_zoom(K, view.original_size, lens))
    view = replace(view, lens=lens, net_from_img=view.net_from_img @ torch.from_numpy(zoomed))
    height, width = view.size
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1).reshape(-1, 2)
    stored = view.stored_from_net(grid)
    if not np.isfinite(stored).all():
        raise InputError(f"has a camera whose {lens.model} distortion cannot be undone: check its coefficients")
    fineness = min(1.0, OVERSAMPLING * abs(np.linalg.det(view.net_from_img[:2, :2].numpy())) ** 0.5)
    small = tuple(max(1, round(side * fineness)) for side in image.size)
    source = _apply(source_from_img, stored) / image.size * 2 - 1
    pixels = torch.from_numpy(np.array(image.resize(small, Image.Resampling.LANCZOS))).permute(2, 0, 1).float()
    sampled = torch.nn.functional.grid_sample(
        *(pixels[None], torch.from_numpy(source).float().reshape(1, height, width, 2)),
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    )
    return replace(view, image=sampled[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).contiguous())


def _apply(affine: Float64[np.ndarray, "3 3"], pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    return pixels @ affine[:2, :2].T + affine[:2, 2]


def _decode(data: bytes) -> tuple[Image.Image, int, bool]:
    """RGB pixels, the EXIF orientation (1 where there is none), and whether they are turned by it already."""
    formats = (*FORMATS, "HEIF") if _has_heif() else FORMATS
    with Image.open(BytesIO(data), formats=formats) as image:
        is_tiff = image.format == "TIFF"  # Pillow turns these while it decodes, and forgets the tag
        orientation = image.tag_v2.get(ExifTags.Base.Orientation) if is_tiff else None
        image.load()
        if not is_tiff:
            orientation = _exif_orientation(image)
        orientation = orientation if orientation in (*EXIF_ROTATIONS, *MIRRORED) else 1
        return _to_rgb(image), orientation, is_tiff


def _exif_orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except DECODE_ERRORS:  # broken metadata do no harm to the pixels
        return None


def _upright_from_img(orientation: int, w: int, h: int) -> Float64[Tensor, "3 3"]:
    """Pixels of a stored (w, h) file to pixels of it turned upright, corner origin."""
    rows = {
        1: [[1, 0, 0], [0, 1, 0]],
        3: [[-1, 0, w], [0, -1, h]],
        6: [[0, -1, h], [1, 0, 0]],
        8: [[0, 1, 0], [-1, 0, w]],
    }[orientation]
    return torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode; transparency is dropped."""
    if image.mode[0] in "IF":  # gray of 16 or 32 bits, or floats
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_8_bit(values: Num[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Gray values over the smallest usual full scale that holds them: 1 or 255 for floats, 65535, or their largest."""
    is_float = values.dtype.kind == "f"
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0).clip(min=0)
    usual = (1.0, 255.0, 65535.0) if is_float else (65535.0,)
    peak = values.max()
    full_scale = next((scale for scale in usual if peak <= scale), peak)
    return np.round(values * (255 / full_scale)).astype(np.uint8)


@cache
def _has_heif() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True
