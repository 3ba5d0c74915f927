"""Jobs from request to manifest; the reconstruction is a stand-in that writes what such a run writes, but for one."""

import dataclasses
import functools
import hashlib
import inspect
import io
import json
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pycolmap
import pytest
import torch
import tyro
from PIL import Image
from procedural import make_scene
from website import LOCAL, Site, serving

from dust3r_sfm import reconstruct
from dust3r_sfm.errors import InputError
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.serving.job import Worker
from dust3r_sfm.serving.limits import Limits
from dust3r_sfm.serving.request import arguments_of, parse_request

STAND_IN = """
import json, os, sys
argv = sys.argv
source, output = argv[2], argv[argv.index("--output") + 1]
names = sorted(os.listdir(source)) if os.path.isdir(source) else [os.path.basename(source)]
os.makedirs(output + "/sparse/0")
os.makedirs(output + "/pointmaps.shards")
for name in ("sparse/0/cameras.bin", "pointmaps.shards/0.h5", "pointmaps.h5", ".note"):
    open(output + "/" + name, "w").write(" ".join(names))
images = {name: {"registered": True} for name in names}
summary = {"images": images, "network": None, "counts": {"images": len(names)}, "models": [], "timings_s": {}}
json.dump(summary, open(output + "/summary.json", "w"))
print("stage load")
"""


def photo(color):
    file = io.BytesIO()
    Image.new("RGB", (64, 48), color).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def volume(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "volume" / "castle").mkdir(parents=True, exist_ok=True)
        (tmp_path / "volume" / "castle" / name).write_bytes(photo(name[0] == "a" and "red" or "blue"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "volume"


@pytest.fixture
def worker(volume):
    limits = Limits(volume=str(volume), scratch=str(volume.parent / "scratch"), max_images=3)
    return Worker(limits=limits, local=LOCAL, child=(sys.executable, "-S", "-c", STAND_IN))


def run(worker, **request):
    told = []
    return worker.run(request, told.append), told


def test_a_folder_of_the_volume_becomes_a_folder_of_the_volume(worker, volume):
    manifest, told = run(worker, volume_path="castle", output_path="out/castle")
    assert told == ["fetch", "load", "deliver"]
    assert manifest["counts"] == {"images": 2}
    assert manifest["output"] == [{"volume_path": "out/castle", "files": 2, "bytes": manifest["output"][0]["bytes"]}]
    found = [p.relative_to(volume / "out").as_posix() for p in (volume / "out").rglob("*") if p.is_file()]
    assert sorted(found) == ["castle/sparse/0/cameras.bin", "castle/summary.json"]
    assert not any((volume.parent / "scratch").iterdir())


def test_addresses_of_photos_become_a_zip_file_at_an_address(worker):
    with serving() as site:
        urls = [f"{site}/a%20b/c%2Fd.jpg?key=1", f"{site}/typed?key=2"]
        manifest, _ = run(worker, images=urls, output_url=f"{site}/put?key=3")
        body = Site.uploads["/put?key=3"]
    assert "key" not in json.dumps(manifest)
    assert manifest["output"][0]["sha256"] == hashlib.sha256(body).hexdigest()
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert sorted(archive.namelist()) == ["sparse/0/cameras.bin", "summary.json"]
        assert archive.read("sparse/0/cameras.bin") == b"0000_d.jpg 0001_typed.png"


def test_archives_and_videos_come_from_addresses_too(worker, volume):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x.jpg", photo("red"))
    with serving({"/photos.zip": packed.getvalue(), "/clip.mp4": b"frames"}) as site:
        run(worker, archive=f"{site}/photos.zip", output_path="from_zip")
        run(worker, video=f"{site}/clip.mp4", output_path="from_video")
        answer, _ = run(worker, archive=f"{site}/clip.mp4", output_path="none")
    assert (volume / "from_zip" / "sparse" / "0" / "cameras.bin").read_text() == "x.jpg"
    assert (volume / "from_video" / "sparse" / "0" / "cameras.bin").read_text() == "video"
    assert answer["code"] == "input"
    assert "is no archive" in answer["error"]


def test_an_archive_counts_as_what_it_unpacks_to(worker, volume):
    data = bytes(1000)
    with zipfile.ZipFile(volume / "photos.zip", "w") as archive:
        archive.writestr("x.jpg", data)
    with serving({"/photos.zip": (volume / "photos.zip").read_bytes()}) as site:
        for size, is_enough in ((1500e-9, True), (900e-9, False)):
            small = dataclasses.replace(worker, limits=dataclasses.replace(worker.limits, max_gb=size))
            for source in ({"archive": f"{site}/photos.zip"}, {"volume_path": "photos.zip"}):
                answer, _ = run(small, **source, output_path=f"out{size}{len(source)}{[*source][0]}")
                assert ("error" not in answer) == is_enough


def test_a_video_of_the_volume_counts_as_one_from_an_address_does(worker, volume):
    (volume / "clip.mp4").write_bytes(bytes(1000))
    small = dataclasses.replace(worker, limits=dataclasses.replace(worker.limits, max_gb=900e-9))
    assert "larger than 9e-07 GB" in run(small, volume_path="clip.mp4", output_path="out")[0]["error"]


def test_jobs_at_the_same_time_do_not_meet(worker, volume):
    for i in range(4):
        (volume / f"in{i}").mkdir()
        (volume / f"in{i}" / f"{i}.jpg").write_bytes(photo("red"))
    requests = [{"volume_path": f"in{i}", "output_path": f"out{i}"} for i in range(4)]
    requests += [{"volume_path": "castle", "output_path": "same"}] * 2
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda request: worker.run(request, lambda _: None), requests))
    for i in range(4):
        assert results[i]["counts"] == {"images": 1}
        assert (volume / f"out{i}" / "sparse" / "0" / "cameras.bin").read_text() == f"{i}.jpg"
    refused = [result["error"] for result in results[4:] if "error" in result]
    assert len(refused) == 1
    assert "choose another output_path" in refused[0]
    assert len([p for p in volume.iterdir() if p.name.startswith(".")]) == 0


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({}, "expected exactly one of images, archive, video, volume_path and demo"),
        ("castle", "the input is not as expected"),
        ({"volume_path": "castle"}, "expected output_url or output_path"),
        ({"volume_path": "castle", "archive": "https://x.example/a.zip", "output_path": "o"}, "expected exactly one"),
        ({"volume_path": "castle", "output_path": "o", "options": {"fps": "2"}}, "options.fps: .* got '2'"),
        ({"volume_path": "castle", "output_path": "o", "options": {"pairs": "some"}}, "'exhaustive'.*got 'some'"),
        ({"volume_path": "castle", "output_path": "o", "options": {"model": "x"}}, "options.model: there is no such"),
        ({"images": ["ftp://x.example/a.jpg"] * 2, "output_path": "o"}, "images.0: String should match pattern"),
        ({"images": ["https://10.0.0.1/a.jpg"] * 2, "output_path": "o"}, "is not on the public internet"),
        ({"images": ["https://10.0.0.1/a.jpg"] * 4, "output_path": "o"}, "4 images are more than the 3 allowed"),
        ({"volume_path": "castle", "output_url": "https://10.0.0.1/a"}, "is not on the public internet"),
        ({"volume_path": "nothing", "output_path": "o"}, "there is no nothing on the volume"),
        ({"volume_path": "../castle", "output_path": "o"}, r"\.\./castle is not below the volume"),
        ({"volume_path": "/etc", "output_path": "o"}, "/etc is not below the volume"),
        ({"volume_path": ".", "output_path": "o"}, "is not below the volume"),
        ({"volume_path": "link", "output_path": "o"}, "link is not below the volume"),
        ({"volume_path": "castle", "output_path": "../o"}, "is not below the volume"),
        ({"volume_path": "castle", "output_path": "castle"}, "castle is on the volume already"),
        ({"volume_path": "castle", "output_path": "castle/a.jpg/o"}, "castle/a.jpg/o is below a file of the volume"),
        ({"volume_path": "castle", "output_path": "x" * 201}, "expected names of up to 200 bytes"),
        ({"volume_path": "castle", "output_path": "sub/" * 255 + "\u00e4" * 4}, "is no path here"),
        ({"volume_path": "castle\0", "output_path": "o"}, "is no path here"),
        ({"images": ["https://[x/a.jpg"] * 2, "output_path": "o"}, "is no address: expected https"),
        ({"volume_path": "castle", "output_url": "https://[x/a.zip"}, "is no address: expected https"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_before_any_work(worker, volume, request_, sentence):
    (volume / "link").symlink_to("/usr")
    told = []
    answer = worker.run(request_, told.append)
    assert answer["code"] == "input"
    with pytest.raises(InputError, match=sentence):
        raise InputError(answer["error"])
    assert told in ([], ["fetch"])
    assert not (volume / "o").exists()


def test_limits_come_from_the_environment_and_are_told_when_wrong():
    environment = {"DUST3R_SFM_MAX_IMAGES": "7", "DUST3R_SFM_MAX_GB": "0.5", "DUST3R_SFM_MAX_SECONDS": ""}
    assert Limits.from_environment(environment) == Limits(max_images=7, max_gb=0.5)
    with pytest.raises(InputError, match="DUST3R_SFM_MAX_IMAGES must be a number, got 'many'"):
        Limits.from_environment({"DUST3R_SFM_MAX_IMAGES": "many"})


def told_by(function):
    """A function of the same arguments that returns them."""

    @functools.wraps(function)
    def tell(*arguments, **named):
        return inspect.signature(function).bind(*arguments, **named).arguments

    return tell


def test_every_option_of_a_job_is_one_that_reconstruct_takes(tmp_path, capsys):
    options = {"pairs": "sequential", "formats": ["colmap", "gsplat"], "downscale": [2, 4], "fps": 5, "text": True}
    request = parse_request({"demo": 2, "options": options})
    arguments = arguments_of(request, tmp_path, tmp_path / "out", "weights.safetensors", 30)
    parsed = tyro.cli(told_by(reconstruct.main), args=arguments, use_underscores=True)
    assert parsed["image_dir"] == tmp_path
    assert parsed["pairs"] == "sequential"
    assert parsed["config"].export.downscale == (2, 4)
    assert parsed["config"].frames.fps == 5
    assert parsed["config"].frames.max_frames == 30
    assert parsed["text"]


def test_a_job_with_the_real_reconstruction_ends_in_a_model_or_a_sentence(volume):
    scene = make_scene(3, (32, 48))
    for view in scene.views:
        path = volume / "room" / view.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(view.image.numpy()).resize(view.original_size).save(path, quality=95)
    sizes = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2}
    sizes |= {key.replace("enc", "dec"): value for key, value in sizes.items()}
    torch.manual_seed(0)
    weights = volume / "tiny.safetensors"
    save_weights(Dust3r(Dust3rConfig(image_size=48, **sizes)), weights, {"name": "tiny", "licence": "Apache-2.0"})
    limits = Limits(volume=str(volume), scratch=str(volume.parent / "scratch"), model=str(weights))
    told = []
    options = {"refine": "none", "formats": ["colmap"]}
    request = {"volume_path": "room", "output_path": "model", "options": options}
    manifest = Worker(limits=limits).run(request, told.append)
    assert told[:3] == ["fetch", "load", "infer_pairs"]
    if "error" in manifest:
        assert manifest["code"] == "scene"
        return
    assert manifest["counts"]["images"] == 3
    assert manifest["network"] == {"name": "tiny", "licence": "Apache-2.0"}
    assert pycolmap.Reconstruction(volume / "model" / "sparse" / "0").num_reg_images() >= 2
