import hashlib
import json
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from dust3r_sfm import views as views_module
from dust3r_sfm.errors import InputError
from dust3r_sfm.views import (
    KnownCamera,
    list_images,
    load_view,
    load_views,
    network_crop,
    read_views,
    with_known_cameras,
)

SIZES = json.loads((Path(__file__).parent / "data" / "facts.json").read_text())["network_input_size_w_h"]
ORIENTATION = 0x112
# EXIF: where the stored first row and first column lie in the upright picture
STORED_FROM_UPRIGHT = {
    1: lambda a: a,
    3: lambda a: a[::-1, ::-1],  # bottom, right
    6: lambda a: a.swapaxes(0, 1)[::-1],  # right, top
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


def texture(width, height, seed=0):
    """A smooth random picture, each seed another."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save(path, image, orientation=1, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(path, exif=exif, **options)
    return path


def blob(width, height, center, sigma):
    """A Gaussian spot around a pixel, corner origin, on black."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    spot = np.exp(-((x - center[0]) ** 2 + (y[:, None] - center[1]) ** 2) / (2 * sigma**2))
    return Image.fromarray(np.round(255 * spot).astype(np.uint8)).convert("RGB")


def centroid(image):
    weights = image.double().mean(dim=-1)
    h, w = weights.shape
    x, y = (weights.sum(0) * (torch.arange(w) + 0.5)).sum(), (weights.sum(1) * (torch.arange(h) + 0.5)).sum()
    return torch.stack([x, y]) / weights.sum()


@pytest.mark.parametrize("size", [512, 224])
@pytest.mark.parametrize("image_size", SIZES)
def test_network_sizes_equal_those_of_the_published_code(image_size, size, tmp_path):
    width, height = map(int, image_size.split("x"))
    view = load_view(save(tmp_path / "a.png", Image.new("L", (width, height), 9), compress_level=1), size)
    assert [view.size[1], view.size[0]] == SIZES[image_size][str(size)]
    assert view.original_size == (width, height)


def test_a_square_stays_square_only_where_asked(tmp_path):
    path = save(tmp_path / "a.png", texture(300, 300))
    assert load_view(path, 256).size == (192, 256)
    assert load_view(path, 256, square_ok=True).size == (256, 256)
    assert load_view(path, 224).size == (224, 224)


@pytest.mark.parametrize("size", [160, 256, 512])
@pytest.mark.parametrize("square_ok", [False, True])
def test_cropped_sides_are_multiples_of_16_inside_the_resized_image(size, square_ok):
    for width, height in [(640, 480), (481, 641), (999, 1000), (33, 100), (4000, 4000), (101, 99)]:
        resized, (left, top, right, bottom) = network_crop(width, height, size, square_ok=square_ok)
        assert max(resized) == size
        assert (right - left) % 16 == (bottom - top) % 16 == 0
        assert 0 <= left < right <= resized[0]
        assert 0 <= top < bottom <= resized[1]


@pytest.mark.parametrize("size", [224, 256, 512])
@pytest.mark.parametrize("stored_size", [(641, 479), (333, 517), (1203, 801), (150, 111)])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_spot_lands_where_net_from_img_says(orientation, stored_size, size, tmp_path):
    width, height = stored_size
    center = torch.tensor([0.56 * width + 0.3, 0.41 * height - 0.2])
    sigma = 0.03 * max(stored_size)
    view = load_view(save(tmp_path / "a.png", blob(width, height, center.tolist(), sigma), orientation), size)
    expected = view.net_from_img @ torch.cat([center.double(), torch.ones(1)])
    assert view.original_size == stored_size
    assert view.net_from_img.dtype == torch.float64
    torch.testing.assert_close(centroid(view.image), expected[:2], atol=0.03, rtol=0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_network_sees_photos_upright_and_exports_stay_in_the_stored_file(orientation, suffix, tmp_path):
    upright = texture(200, 150)
    stored = Image.fromarray(np.ascontiguousarray(STORED_FROM_UPRIGHT[orientation](np.asarray(upright))))
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    path = save(tmp_path / f"a.{suffix}", stored, orientation, **lossless)
    view = load_view(path, 128)
    expected = load_view(save(tmp_path / "upright.png", upright), 128)
    assert (view.image.int() - expected.image.int()).abs().max() <= 4
    assert view.original_size == stored.size
    with Image.open(path) as image:
        assert ImageOps.exif_transpose(image).size == (200, 150)
    bitmap = pycolmap.Bitmap.read(path, True)
    if bitmap is not None:  # COLMAP's wheels do not read WebP
        assert view.original_size == bitmap.to_array().shape[1::-1]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
@pytest.mark.parametrize("orientation", [2, 4, 5, 7])
def test_mirrored_photos_are_refused(orientation, suffix, tmp_path):
    save(tmp_path / f"a.{suffix}", texture(64, 48), orientation)
    with pytest.raises(InputError, match=rf"a.{suffix} is mirrored \(EXIF orientation {orientation}\)"):
        load_view(tmp_path / f"a.{suffix}", 64)


def gray_ramp(full_scale, dtype):
    return np.broadcast_to(np.linspace(0, full_scale, 256), (64, 256)).astype(dtype)


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(gray_ramp(255, np.uint8)), "png"),
        (Image.fromarray(gray_ramp(65535, np.uint16)), "png"),
        (Image.fromarray(gray_ramp(65535, np.uint16)), "tif"),
        (Image.fromarray(gray_ramp(2**31 - 1, np.int32)), "tif"),
        (Image.fromarray(gray_ramp(1, np.float32)), "tif"),
        (Image.fromarray(gray_ramp(255, np.float32)), "tif"),
        (Image.fromarray(gray_ramp(255, np.uint8)).convert("CMYK"), "tif"),
        (Image.fromarray(gray_ramp(255, np.uint8)).convert("CMYK"), "jpg"),
        (Image.fromarray(gray_ramp(255, np.uint8)).convert("LA"), "png"),
        (Image.fromarray(gray_ramp(255, np.uint8)).convert("P"), "png"),
        (Image.fromarray(gray_ramp(255, np.uint8)).convert("YCbCr"), "tif"),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else value,
)
def test_a_gray_ramp_is_the_same_in_every_mode_and_depth(image, suffix, tmp_path):
    view = load_view(save(tmp_path / f"a.{suffix}", image), 256)
    expected = torch.from_numpy(gray_ramp(255, np.uint8).copy())[..., None].expand(-1, -1, 3)
    assert (view.image.int() - expected.int()).abs().max() <= 2


def test_16_bit_colour_is_scaled_to_8_bits(tmp_path):
    red, green = gray_ramp(65535, np.uint16), gray_ramp(65535, np.uint16)[:, ::-1]
    bitmap = np.stack([red, green, np.zeros_like(red)], axis=-1)
    (tmp_path / "a.png").write_bytes(png_of_16_bits(bitmap))
    view = load_view(tmp_path / "a.png", 256)
    expected = torch.from_numpy((bitmap // 257).astype(np.uint8))
    assert (view.image.int() - expected.int()).abs().max() <= 1


def png_of_16_bits(values):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_transparency_is_dropped_and_one_bit_is_black_and_white(tmp_path):
    rgb = texture(64, 48)
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(np.full((48, 64), 128, np.uint8)))
    palette = Image.new("P", (64, 48), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    bits = Image.fromarray(np.tile([[0, 255]], (48, 32)).astype(np.uint8)).convert("1")
    save(tmp_path / "rgb.png", rgb)
    save(tmp_path / "rgba.png", rgba)
    save(tmp_path / "palette.png", palette, transparency=bytes([0, 90]))
    save(tmp_path / "bits.png", bits)
    loaded = {view.name: view.image for view in load_views(tmp_path, 64)}
    torch.testing.assert_close(loaded["rgba.png"], loaded["rgb.png"])
    assert (loaded["palette.png"] == torch.tensor([200, 100, 50])).all()
    assert loaded["bits.png"][0, :4, 0].tolist() == [0, 255, 0, 255]


def test_images_of_sub_folders_are_listed_sorted_without_hidden_and_foreign_files(tmp_path):
    for name in ["b.JPG", "a/z.png", "a/b/c.tiff", "é f.webp", ".hidden.jpg", ".cache/x.jpg", "a/._z.png", "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a/b/c.tiff", "a/z.png", "b.JPG", "é f.webp"]


def test_a_folder_that_gives_no_images_has_its_sentence(tmp_path):
    (tmp_path / "file.jpg").touch()
    (tmp_path / "empty").mkdir()
    for folder, sentence in [("none", "there is no folder"), ("file.jpg", "is a file"), ("empty", "no images in")]:
        with pytest.raises(InputError, match=sentence):
            list_images(tmp_path / folder)
        with pytest.raises(InputError, match=sentence):
            load_views(tmp_path / folder, 64)


@pytest.fixture
def bad_folder(tmp_path):
    """Two good photos among one of each kind that cannot be used."""
    save(tmp_path / "a.jpg", texture(80, 60, seed=1))
    save(tmp_path / "z/good.png", texture(60, 80, seed=2))
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no photo")
    save(tmp_path / "tiny.png", texture(10, 40))
    save(tmp_path / "narrow.png", texture(32, 600))
    save(tmp_path / "whole.jpg", Image.effect_noise((100, 100), 90))
    (tmp_path / "short.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    (tmp_path / "whole.jpg").unlink()
    save(tmp_path / "mirror.jpg", texture(64, 48, seed=3), 5)
    return tmp_path


REASONS = {
    "b.jpg": "is a copy of a.jpg",
    "empty.jpg": "is empty",
    "mirror.jpg": "is mirrored (EXIF orientation 5)",
    "narrow.png": "is 32 x 600 pixels: too narrow",
    "short.jpg": "cannot be decoded: image file is truncated",
    "text.jpg": "is no image",
    "tiny.png": "is 10 x 40 pixels: at least 32 a side are needed",
}


def test_images_that_cannot_be_used_are_listed_all_at_once(bad_folder):
    with pytest.raises(InputError) as error:
        load_views(bad_folder, 128)
    lines = str(error.value).splitlines()
    assert lines[0] == f"7 of 9 images in {bad_folder} cannot be used:"
    assert "--on_bad_image skip" in lines[-1]
    for line, (name, reason) in zip(lines[1:-1], REASONS.items(), strict=True):
        assert line.startswith(f"  {name} {reason}")


def test_images_that_cannot_be_used_are_left_out_where_asked_and_their_reasons_known(bad_folder):
    assert [view.name for view in load_views(bad_folder, 128, on_bad_image="skip")] == ["a.jpg", "z/good.png"]
    views, rejected = read_views(bad_folder, 128)
    assert [view.name for view in views] == ["a.jpg", "z/good.png"]
    assert list(rejected) == list(REASONS)


def test_a_folder_of_bad_images_is_an_error_in_any_case(bad_folder):
    with pytest.raises(InputError, match="2 of 2 images .* cannot be used"):
        load_views(bad_folder, 128, ["text.jpg", "empty.jpg"], on_bad_image="skip")


def test_names_choose_images_and_their_order(bad_folder):
    assert [view.name for view in load_views(bad_folder, 64, ["z/good.png", "a.jpg"])] == ["z/good.png", "a.jpg"]
    with pytest.raises(InputError, match="none.jpg does not exist"):
        load_views(bad_folder, 64, ["a.jpg", "none.jpg"])
    with pytest.raises(InputError, match="z cannot be read: Is a directory"):
        load_views(bad_folder, 64, ["a.jpg", "z"])
    with pytest.raises(InputError, match="listed more than once: a.jpg"):
        load_views(bad_folder, 64, ["a.jpg", "z/good.png", "a.jpg"])


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_a_file_cut_anywhere_is_refused_even_where_another_library_made_pillow_lenient(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    buffer = BytesIO()
    formats = {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WEBP"}
    Image.effect_noise((64, 48), 90).convert("RGB").save(buffer, formats[suffix])
    data = buffer.getvalue()
    names = [f"{percent:02d}.{suffix}" for percent in range(1, 96, 3)]
    for name in names:
        (tmp_path / name).write_bytes(data[: len(data) * int(name[:2]) // 100])
    views, rejected = read_views(tmp_path, 64)
    assert not views
    assert list(rejected) == names
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_files_with_wrong_bytes_load_or_are_refused_but_never_crash(suffix, tmp_path):
    generator = np.random.default_rng(0)
    data = np.frombuffer(save(tmp_path / f"a.{suffix}", texture(64, 48), 6).read_bytes(), np.uint8)
    for i in range(150):
        broken = data.copy()
        where = generator.integers(0, min(len(data), 400 if i % 2 else len(data)), 4)
        broken[where] = generator.integers(0, 256, 4)
        (tmp_path / f"{i}.{suffix}").write_bytes(broken.tobytes())
    views, rejected = read_views(tmp_path, 64)
    assert len(views) + len(rejected) == 151


def test_a_name_that_other_files_cannot_hold_is_refused(tmp_path):
    save(tmp_path / "a\nb.png", texture(64, 48))
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(b"x")
    views, rejected = read_views(tmp_path, 64)
    assert not views
    assert all("rename it" in reason for reason in rejected.values())


def test_heic_says_what_to_install_where_its_reader_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(views_module, "_has_heif", lambda: False)
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(InputError, match="a.HEIC is HEIC, which is read once pillow-heif is installed"):
        load_view(tmp_path / "a.HEIC", 64)


def test_each_file_is_read_once_and_views_do_not_depend_on_their_neighbours(tmp_path, monkeypatch):
    for i in range(4):
        save(tmp_path / f"{i}.png", texture(90, 70, seed=i))
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or read_bytes(path))
    views = load_views(tmp_path, 64)
    assert sorted(reads) == ["0.png", "1.png", "2.png", "3.png"]
    for view in views:
        alone = load_view(tmp_path / view.name, 64)
        assert hashlib.sha256(alone.image.numpy()).digest() == hashlib.sha256(view.image.numpy()).digest()


def test_the_network_is_given_channels_first_in_minus_one_to_one(tmp_path):
    values = load_view(save(tmp_path / "a.png", Image.new("RGB", (64, 48), (0, 51, 255))), 64).normalized()
    assert values.shape == (3, 48, 64)
    torch.testing.assert_close(values[:, 0, 0], torch.tensor([-1, -0.6, 1]))


def test_known_cameras_go_to_their_views(tmp_path):
    for name in ["a.png", "b.png", "c.png"]:
        save(tmp_path / name, texture(64, 48, seed=ord(name[0])))
    views = load_views(tmp_path, 64)
    K, pose = torch.eye(3) * 2, torch.eye(4) * 3
    known = with_known_cameras(views, {"a.png": KnownCamera(K), "c.png": KnownCamera(None, pose)})
    assert [view.name for view in known] == ["a.png", "b.png", "c.png"]
    assert torch.equal(known[0].known_K, K)
    assert known[0].known_cam_from_world is known[1].known_K is known[2].known_K is None
    assert torch.equal(known[2].known_cam_from_world, pose)
    with pytest.raises(InputError, match="not there: d.png, e.png"):
        with_known_cameras(views, dict.fromkeys(["e.png", "a.png", "d.png"], KnownCamera(K, pose)))
