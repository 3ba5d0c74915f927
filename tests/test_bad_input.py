"""What a user can get wrong, through the command line: a sentence that names it, exit code 2, nothing half-written."""

import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image
from procedural import make_scene

from dust3r_sfm.__main__ import main
from dust3r_sfm.files import LOCK_NAME
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    torch.manual_seed(0)
    small = {"enc_embed_dim": 64, "enc_depth": 2, "enc_num_heads": 2, "dec_embed_dim": 64, "dec_depth": 2}
    save_weights(Dust3r(Dust3rConfig(image_size=64, dec_num_heads=2, **small)), path, {"name": "random weights"})
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder of three photos."""
    return write_photos(tmp_path / "photos", 3)


def write_photos(folder, count):
    folder.mkdir()
    for i, view in enumerate(make_scene(count, (48, 64), pairs=[]).views):
        Image.fromarray(view.image.numpy()).save(folder / f"{i:02d}.jpg")
    return folder


@pytest.fixture
def refused(tmp_path, weights, capsys):
    """Runs `reconstruct`, which must exit with code 2 and one sentence; the sentence."""

    def run(image_dir, *options, output=tmp_path / "out"):
        capsys.readouterr()
        given = ["--image_dir", str(image_dir), "--output", str(output), *options]
        model = [] if "--model" in options else ["--model", str(weights)]
        assert main(["reconstruct", *given, *model]) == 2
        error = capsys.readouterr().err
        assert error.startswith("dust3r-sfm: ")
        assert "Traceback" not in error
        leftovers = [path.name for path in output.glob("**/*") if path.suffix == ".tmp"] if output.is_dir() else []
        assert not leftovers
        assert not (output / "sparse").exists()
        return error

    return run


def test_no_such_folder(refused, tmp_path):
    assert "there is no folder" in refused(tmp_path / "none")


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused(tmp_path / "empty")


def test_one_image(refused, tmp_path):
    assert "1 usable image" in refused(write_photos(tmp_path / "one", 1))


def test_a_text_file_named_jpg(refused, photos):
    (photos / "notes.jpg").write_text("not a photo")
    assert "notes.jpg is no image" in refused(photos)


def test_a_truncated_jpeg(refused, photos):
    content = (photos / "00.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(content[: len(content) // 2])
    assert "cut.jpg cannot be decoded" in refused(photos)


def test_an_image_of_10_pixels(refused, photos):
    Image.new("RGB", (10, 10)).save(photos / "tiny.png")
    assert "tiny.png is 10 x 10 pixels" in refused(photos)


def test_two_copies_of_one_photo(refused, photos):
    (photos / "copy.jpg").write_bytes((photos / "01.jpg").read_bytes())
    assert "copy.jpg is a copy of 01.jpg" in refused(photos)


def test_all_bad_images_are_listed_at_once_and_can_be_left_out(refused, photos, weights, tmp_path):
    (photos / "notes.jpg").write_text("not a photo")
    (photos / "empty.png").write_bytes(b"")
    error = refused(photos)
    assert "notes.jpg" in error
    assert "empty.png is empty" in error
    assert "--on_bad_image skip" in error
    for name in ("00.jpg", "01.jpg"):
        (photos / name).unlink()
    assert "1 usable image" in refused(photos, "--on_bad_image", "skip")


def test_an_output_below_a_file(refused, photos, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(photos, output=tmp_path / "file" / "out")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_an_output_in_a_folder_that_nobody_can_write_to(refused, photos):
    assert "cannot be written to" in refused(photos, output=Path("/proc/out"))


def test_a_checkpoint_that_is_a_pickle_bomb(refused, photos, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"model": Bomb()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb()))
    with zipfile.ZipFile(tmp_path / "hand.pth", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    for name in ("zip.pth", "plain.pth", "hand.pth"):
        assert name in refused(photos, "--model", str(tmp_path / name))
        assert not (tmp_path / "exploded").exists()


def test_a_missing_model_pairs_file_and_cameras(refused, photos, tmp_path):
    assert "none.pth" in refused(photos, "--model", str(tmp_path / "none.pth"))
    assert "there is no pairs file" in refused(photos, "--pairs_file", str(tmp_path / "none.txt"))
    assert "none" in refused(photos, "--cameras", str(tmp_path / "none"))
    (tmp_path / "pairs.txt").write_text("00.jpg 77.jpg")
    assert "there is no image 77.jpg" in refused(photos, "--pairs_file", str(tmp_path / "pairs.txt"))
    (tmp_path / "cameras.json").write_text('{"frames": [{"image": "other.jpg", "width": 64, "height": 48}]}')
    assert "none of which is among the 3 photos" in refused(photos, "--cameras", str(tmp_path / "cameras.json"))


def test_names_with_blanks_do_not_fit_into_a_text_model(refused, photos):
    (photos / "00.jpg").rename(photos / "a b.jpg")
    assert "'a b.jpg'" in refused(photos, "--text")


def test_photos_of_mixed_sizes_and_orientations_are_all_accounted_for(tmp_path, weights):
    photos = write_photos(tmp_path / "photos", 2)
    noise = np.random.default_rng(0)
    sizes = {"portrait.png": (70, 100), "wide.png": (200, 90), "square.png": (80, 80), "turned.jpg": (96, 64)}
    for name, (width, height) in sizes.items():
        image = Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8))
        exif = image.getexif()
        exif[0x0112] = 6 if name == "turned.jpg" else 1
        image.save(photos / name, exif=exif)
    out = tmp_path / "out"
    assert main(["reconstruct", "--image_dir", str(photos), "--output", str(out), "--model", str(weights)]) == 0
    stored = {}
    for folder in (out / "sparse").iterdir():
        model = pycolmap.Reconstruction(folder)
        stored |= {im.name: (im.camera.width, im.camera.height) for im in model.images.values()}
    assert stored == {"00.jpg": (64, 48), "01.jpg": (64, 48)} | sizes


def command(photos, output, weights):
    given = ["--image_dir", photos, "--output", output, "--model", weights]
    return [sys.executable, "-m", "dust3r_sfm", "reconstruct", *map(str, given)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [("size=64k", "need 0.3 MB"), ("size=400k", "disk full|No space left"), ("size=1m,ro", "cannot be written to")],
)
def test_a_small_and_a_read_only_disk(photos, weights, tmp_path, options, sentence):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this container does not let root mount a disk")
    try:
        found = run(photos, disk / "out", weights)
        left = sorted(path.name for path in disk.glob("out/**/*.tmp"))
    finally:
        subprocess.run(["umount", disk], check=True)
    assert found.returncode == 2, found.stderr
    assert re.search(sentence, found.stderr)
    assert "Traceback" not in found.stderr
    assert not left


def test_a_disk_that_fills_up_on_the_way_and_the_same_command_again(photos, weights, tmp_path):
    def limit():  # a file that grows beyond this fails to, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    found = run(photos, tmp_path / "out", weights, preexec_fn=limit)
    assert found.returncode == 2, found.stderr
    assert "File too large" in found.stderr
    assert "Traceback" not in found.stderr
    assert not list((tmp_path / "out").glob("**/*.tmp"))
    assert run(photos, tmp_path / "out", weights).returncode == 0


def interrupt(arguments, when):
    """Start the command, send SIGINT as ctrl-C does once `when()` holds; exit code and stderr."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not when():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, error


def test_ctrl_c_in_inference_and_after_it_then_the_same_command_again(weights, tmp_path):
    photos, out = write_photos(tmp_path / "photos", 12), tmp_path / "out"
    arguments = command(photos, out, weights)
    shards = out / "pointmaps.shards"
    for moment in ((out / LOCK_NAME).exists, lambda: any(shards.glob("*.h5")), (out / "pointmaps.h5").exists):
        code, error = interrupt(arguments, moment)
        assert code == 130, error
        assert "interrupted; run the same command to continue" in error
        assert "Traceback" not in error
        assert not (out / "sparse").exists()
    first = sorted(shards.glob("*.h5"))
    written = [path.stat().st_mtime_ns for path in first]
    assert subprocess.run(arguments, capture_output=True, timeout=120, check=False).returncode == 0
    assert [path.stat().st_mtime_ns for path in first] == written
    assert (out / "sparse" / "0" / "images.bin").is_file()
