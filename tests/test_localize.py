"""The stage on photos of a procedural room: SIFT and COLMAP as they are, the network tiny and of random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from procedural import ROOM, STORED_PER_NET, make_scene

from dust3r_sfm import evaluate_localization
from dust3r_sfm.__main__ import main
from dust3r_sfm.formats.localization import read_poses
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.query_poses import LocateConfig
from dust3r_sfm.reference import image_folder_of, read_reference

INDICES = range(6, 11)


@pytest.fixture(scope="module")
def procedural():
    """Of sixteen views on an arc five in the middle, ten degrees apart."""
    return make_scene(16, (192, 256), seed=3, pairs=[])


def mottled(points):
    """A photo of surfaces that are coloured by random values in the cells of space, interpolated: SIFT's delight."""
    cells = torch.rand(1, 1, 60, 30, 60, generator=torch.Generator().manual_seed(0))
    values = torch.nn.functional.grid_sample(cells, (points / ROOM.float())[None, None], align_corners=True)[0, 0, 0]
    return Image.fromarray((values * 255).to(torch.uint8).numpy()).convert("RGB")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    small = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2, "dec_embed_dim": 32, "dec_depth": 1}
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    save_weights(Dust3r(Dust3rConfig(image_size=64, dec_num_heads=2, **small)), path, {"name": "tiny"})
    return str(path)


@pytest.fixture(scope="module")
def place(procedural, tmp_path_factory):
    """A reference of all photos but the middle one; that one and noise are the queries, called as one of the others."""
    folder = tmp_path_factory.mktemp("place")
    frames = []
    for i, index in enumerate(INDICES):
        view = procedural.views[index]
        photo = mottled(procedural.points_in_world[index]).resize(view.original_size, Image.Resampling.BICUBIC)
        K = procedural.K[index].double() * STORED_PER_NET
        K[2, 2] = 1
        is_query = i == 2
        path = folder / ("queries/sub/0.png" if is_query else f"room/images/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path)
        frame = {"image": f"images/{i}.png", "width": photo.width, "height": photo.height, "K": K.tolist()}
        if not is_query:
            frames.append(frame | {"cam_from_world": procedural.cam_from_world[index].tolist()})
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "queries/0.png")
    (folder / "room/cameras.json").write_text(json.dumps({"frames": frames}))
    return folder


def errors(found, truth):
    """Degrees, and metres in a room of 8."""
    cosine = (np.trace(found[:, :3] @ truth[:3, :3].T) - 1) / 2
    centers = [-p[:3, :3].T @ p[:3, 3] for p in (found, truth)]
    return np.degrees(np.arccos(min(1, cosine))), np.linalg.norm(centers[0] - centers[1])


def test_a_query_is_found_and_noise_has_no_pose(place, procedural, weights, tmp_path, capsys):
    output = tmp_path / "poses.txt"
    arguments = ["--queries", place / "queries", "--reference", place / "room", "--output", output, "--model", weights]
    assert main(["localize", *map(str, arguments)]) == 0
    poses = read_poses(output)
    assert list(poses) == ["sub/0.png"]
    angle, distance = errors(poses["sub/0.png"], procedural.cam_from_world[INDICES[2]].double().numpy())
    assert angle < 0.3
    assert distance < 0.03
    logs = json.loads((tmp_path / "poses_logs.json").read_text())["loc"]
    assert logs["0.png"]["PnP_ret"] is None
    assert logs["0.png"]["reason"] == "too little agrees with these images"
    assert logs["sub/0.png"]["reason"] == "by sift"
    assert logs["sub/0.png"]["PnP_ret"]["num_inliers"] == sum(logs["sub/0.png"]["PnP_ret"]["inlier_mask"]) > 50
    assert set(logs["sub/0.png"]["db"]) == {"0.png", "1.png", "3.png", "4.png"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reference", "none"], "none"),
        (["--queries", "none.txt"], "expected a folder of photos, a photo, or a list"),
        (["--pairs_file", "none.txt"], "there is no pairs file"),
        (["--image_dir", "none"], "there is no folder none"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(place, weights, tmp_path, capsys, more, message):
    arguments = {"--queries": place / "queries", "--reference": place / "room", "--output": tmp_path / "poses.txt"}
    arguments |= {"--model": weights} | dict([more])
    assert main(["localize", *(str(x) for pair in arguments.items() for x in pair)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_report_counts_queries_without_a_pose_as_infinitely_wrong(place):
    reference = read_reference(place / "room")
    assert image_folder_of(place / "room") == place / "room/images"
    found = dict.fromkeys(reference.names)
    report = evaluate_localization.report("room", "auto", reference, found)
    assert (report.num_located, report.num_queries, report.recall_coarse) == (0, 4, 0)
    assert report.to_dict()["median_position"] is None
    assert "0/4" in evaluate_localization.table([report])
    assert LocateConfig().method == "auto"
