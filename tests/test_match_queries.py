"""The stage that adds queries to hloc's files: what it cannot use is one sentence, and changes nothing."""

import numpy as np
import pytest
import torch
from PIL import Image
from procedural import make_scene

from dust3r_sfm.__main__ import main
from dust3r_sfm.formats.hloc import list_references, write_hloc
from dust3r_sfm.match_dense import match_dense
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """hloc's files of two photos; beside them a query, and a tiny network of random weights."""
    folder, scene = tmp_path_factory.mktemp("place"), make_scene(2, (48, 64))
    for view in scene.views:
        path = folder / "images" / view.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(view.image.numpy()).resize(view.original_size).save(path)
    (folder / "queries").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "queries" / "new.png")
    write_hloc(scene.views, match_dense(scene.views, scene.predictions), folder / "hloc")
    small = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2, "dec_embed_dim": 32, "dec_depth": 1}
    torch.manual_seed(0)
    save_weights(Dust3r(Dust3rConfig(image_size=64, dec_num_heads=2, **small)), folder / "tiny.safetensors")
    return folder


def arguments(place, **more):
    values = {"queries": place / "queries", "hloc": place / "hloc", "image_dir": place / "images"}
    values |= {"model": place / "tiny.safetensors"} | more
    return ["match-queries", *(str(x) for key, value in values.items() for x in (f"--{key}", value))]


def test_queries_join_the_files_and_a_second_run_does_not_take_them_for_the_reference(place):
    for _ in range(2):
        assert main(arguments(place)) == 0
        assert list_references(place / "hloc" / "feats.h5") == ["photos/000.jpg", "photos/001.jpg"]
    lines = (place / "hloc" / "pairs-queries.txt").read_text().split("\n")
    assert sorted(lines) == ["new.png photos/000.jpg", "new.png photos/001.jpg"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hloc": "none"}, "there are no features at none/feats.h5"),
        ({"queries": "images"}, "is one of the reference's images"),
        ({"pairs_file": "lines.txt"}, "has no line `query image`"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(place, monkeypatch, capsys, more, message):
    monkeypatch.chdir(place)
    (place / "lines.txt").write_text("photos/000.jpg photos/001.jpg")
    before = (place / "hloc" / "feats.h5").read_bytes()
    assert main(arguments(place, **more)) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert (place / "hloc" / "feats.h5").read_bytes() == before
