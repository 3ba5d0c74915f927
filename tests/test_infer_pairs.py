"""Inference: what a killed run leaves is used, what changed is computed again, and files say what memory says."""

import dataclasses
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dust3r_sfm.__main__ import main
from dust3r_sfm.errors import InputError
from dust3r_sfm.files import holding
from dust3r_sfm.formats.pointmaps import PointmapFile, shard_folder
from dust3r_sfm.graph import pairs_exhaustive
from dust3r_sfm.infer_pairs import InferConfig, infer_pairs, pick_device
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.pairs import Pair, ReducedPrediction
from dust3r_sfm.views import View

stage = import_module("dust3r_sfm.infer_pairs")  # the package's attribute of this name is the function
FLOAT32 = InferConfig(precision="float32")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Dust3r(
        Dust3rConfig(
            image_size=64,
            enc_embed_dim=32,
            enc_depth=1,
            enc_num_heads=2,
            dec_embed_dim=32,
            dec_depth=1,
            dec_num_heads=2,
        )
    )


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(1)
    sizes = [(48, 64)] * 5 + [(64, 48)] * 4
    return [
        View(
            name=f"{i}.jpg",
            image=torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=generator),
            original_size=(w, h),
            net_from_img=torch.eye(3, dtype=torch.float64),
        )
        for i, (h, w) in enumerate(sizes)
    ]


@pytest.fixture
def pairs(views):
    return pairs_exhaustive([view.name for view in views])


@pytest.fixture
def counted(model, monkeypatch):
    """How many images the encoder and pairs the decoder took."""
    counts = {"encode": 0, "decode": 0}
    encode, decode = model.encode, model.decode

    def counting_encode(image):
        counts["encode"] += len(image)
        return encode(image)

    def counting_decode(tokens0, tokens1):
        counts["decode"] += len(tokens0.features)
        return decode(tokens0, tokens1)

    monkeypatch.setattr(model, "encode", counting_encode)
    monkeypatch.setattr(model, "decode", counting_decode)
    return counts


def contents(path):
    return {file.name: file.read_bytes() for file in shard_folder(path).glob("*.h5")}


def test_batches_of_mixed_sizes_equal_single_forward_passes(model, views, pairs):
    found = infer_pairs(model, views, pairs, config=FLOAT32)
    assert list(found) == pairs
    by_name = {view.name: view for view in views}
    for pair in pairs[::7]:
        with torch.no_grad():
            expected = model(*(by_name[name].normalized()[None] for name in pair))
        for field in ("pointmap0_in_cam0", "confidence0", "pointmap1_in_cam0", "confidence1"):
            values = getattr(found[pair], field)
            assert not values.is_inference(), "alignment must be able to differentiate through predictions"
            torch.testing.assert_close(values, getattr(expected, field)[0], rtol=1e-4, atol=1e-5)


def test_every_image_is_encoded_once_and_every_pair_decoded_once(model, views, pairs, counted):
    infer_pairs(model, views, pairs)
    assert counted == {"encode": len(views), "decode": len(pairs)}


def test_encodings_that_do_not_fit_are_computed_again_with_the_same_result(model, views, pairs):
    expected = infer_pairs(model, views, pairs, config=FLOAT32)
    found = infer_pairs(model, views, pairs, config=dataclasses.replace(FLOAT32, max_encodings_gb=1e-6))
    assert all(torch.equal(found[p].pointmap1_in_cam0, expected[p].pointmap1_in_cam0) for p in pairs)


def test_a_file_gives_back_what_memory_gives(model, views, pairs, tmp_path):
    expected = infer_pairs(model, views, pairs)
    infer_pairs(model, views, pairs, tmp_path / "pointmaps.h5")
    with PointmapFile(tmp_path / "pointmaps.h5") as found:
        assert list(found) == pairs
        for pair in pairs:
            close = {"rtol": 2e-3, "atol": 2e-3 * float(expected[pair].pointmap0_in_cam0.norm(dim=-1).median())}
            torch.testing.assert_close(found[pair].pointmap0_in_cam0, expected[pair].pointmap0_in_cam0, **close)
            torch.testing.assert_close(found[pair].confidence1, expected[pair].confidence1, rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_interrupted_run_continues_to_the_same_bits(model, views, pairs, tmp_path, monkeypatch, precision):
    config = InferConfig(precision=precision)
    monkeypatch.setattr(stage, "SHARD_PAIRS", 20)
    whole, broken = tmp_path / "whole.h5", tmp_path / "broken.h5"
    infer_pairs(model, views, pairs, whole, config)
    decode, calls = model.decode, []

    def interrupted(tokens0, tokens1):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return decode(tokens0, tokens1)

    with monkeypatch.context() as patch:
        patch.setattr(model, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            infer_pairs(model, views, pairs, broken, config)
    left = contents(broken)
    assert 0 < len(left) < len(contents(whole))
    assert not broken.exists(), "the file appears when it is whole"
    infer_pairs(model, views, pairs, broken, config)
    assert contents(broken) == contents(whole)


def test_of_many_pairs_matches_and_a_grid_are_kept_whatever_interrupts(model, views, pairs, tmp_path, monkeypatch):
    config = dataclasses.replace(FLOAT32, max_dense_pairs=10)
    whole, broken = tmp_path / "whole.h5", tmp_path / "broken.h5"
    with infer_pairs(model, views, pairs, whole, config) as found:
        assert all(isinstance(found[pair], ReducedPrediction) for pair in pairs)
        assert all((found[p].matches is None) != (found[p.reversed()].matches is None) for p in pairs)
        assert {p for p in pairs if found[p].depth0 is not None} >= {Pair("4.jpg", "3.jpg"), Pair("0.jpg", "1.jpg")}
        in_memory = infer_pairs(model, views, pairs, config=config)[pairs[0]]
        torch.testing.assert_close(found[pairs[0]].depth0, in_memory.depth0, rtol=1e-3, atol=1e-3)
    add, calls = stage.PointmapShards.add, []

    def interrupted(self, keys, predictions):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        add(self, keys, predictions)

    with monkeypatch.context() as patch:
        patch.setattr(stage.PointmapShards, "add", interrupted)
        with pytest.raises(OSError, match="No space left"):
            infer_pairs(model, views, pairs, broken, config)
    assert 0 < len(contents(broken)) < len(contents(whole))
    infer_pairs(model, views, pairs, broken, config).close()
    assert contents(broken) == contents(whole)
    with infer_pairs(model, views, pairs, broken, dataclasses.replace(config, keep_dense=True)) as dense:
        assert dense[pairs[0]].confidence0.shape == views[0].size


def test_a_second_run_computes_nothing(model, views, pairs, tmp_path, counted):
    infer_pairs(model, views, pairs, tmp_path / "p.h5")
    counted.update(encode=0, decode=0)
    infer_pairs(model, views, pairs, tmp_path / "p.h5")
    assert counted == {"encode": 0, "decode": 0}


def test_a_changed_photo_is_predicted_again_and_a_new_one_added(model, views, pairs, tmp_path, counted):
    infer_pairs(model, views[:8], [pair for pair in pairs if "8.jpg" not in pair], tmp_path / "p.h5")
    counted.update(encode=0, decode=0)
    changed = [dataclasses.replace(views[0], image=255 - views[0].image), *views[1:]]
    found = infer_pairs(model, changed, pairs, tmp_path / "p.h5")
    assert counted["decode"] == sum("8.jpg" in pair or "0.jpg" in pair for pair in pairs)
    expected = infer_pairs(model, changed, pairs)
    pair = Pair("0.jpg", "3.jpg")
    torch.testing.assert_close(found[pair].confidence0, expected[pair].confidence0, rtol=1e-2, atol=0)


def test_other_weights_start_over(model, views, pairs, tmp_path, counted):
    infer_pairs(model, views, pairs, tmp_path / "p.h5")
    other = Dust3r(model.config)
    found = infer_pairs(other, views, pairs, tmp_path / "p.h5")
    expected = infer_pairs(other, views, pairs)
    torch.testing.assert_close(found[pairs[0]].confidence0, expected[pairs[0]].confidence0, rtol=1e-2, atol=0)
    assert len(contents(tmp_path / "p.h5")) == -(-len(pairs) // 32), "shards of the old weights are gone"


def test_pairs_are_predicted_once_and_unknown_names_are_an_error(model, views, pairs):
    assert list(infer_pairs(model, views, [pairs[0], pairs[0]])) == [pairs[0]]
    with pytest.raises(InputError, match="1 names of pairs are not among the 9 images, first z.jpg"):
        infer_pairs(model, views, [Pair("0.jpg", "z.jpg")])


def test_too_small_a_disk_is_known_before_the_first_pair(model, views, pairs, tmp_path, counted, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"72 pairs need 3.5 MB, .* has 0.0 MB free"):
        infer_pairs(model, views, pairs, tmp_path / "p.h5")
    assert counted["decode"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_one_sentence():
    assert pick_device(InferConfig(device="cpu")).type == "cpu"
    with pytest.raises(InputError, match="no cuda device"):
        pick_device(InferConfig(device="cuda"))


def test_the_stage_predicts_a_pairs_file_in_both_directions(model, views, tmp_path, caplog):
    photos = tmp_path / "photos"
    photos.mkdir()
    for view in views[:3]:
        Image.fromarray(view.image.numpy()).save(photos / view.name)
    save_weights(model, tmp_path / "tiny.safetensors", {"name": "tiny one"})
    (tmp_path / "pairs.txt").write_text("0.jpg 1.jpg\n1.jpg 2.jpg")
    output = tmp_path / "new" / "pointmaps.h5"
    arguments = {"--image_dir": photos, "--pairs": tmp_path / "pairs.txt", "--output": output}
    arguments |= {"--model": tmp_path / "tiny.safetensors", "--batch_size": 2}
    assert main(["infer_pairs", *(str(x) for pair in arguments.items() for x in pair)]) == 0
    expected = ["0.jpg 1.jpg", "1.jpg 0.jpg", "1.jpg 2.jpg", "2.jpg 1.jpg"]
    assert [" ".join(pair) for pair in PointmapFile(output)] == expected
    assert "4 directed pairs of 3 images are in" in caplog.text


def test_shares_of_a_batch_scheduler_put_together_are_what_one_run_gives(model, views, tmp_path, counted):
    folder, weights = tmp_path / "photos", tmp_path / "tiny.safetensors"
    folder.mkdir()
    for view in views:
        Image.fromarray(view.image.numpy()).save(folder / f"{view.name[:-4]}.png")
    save_weights(model, weights, {"name": "tiny", "licence": "Apache-2.0"})
    names = [f"{view.name[:-4]}.png" for view in views]
    (tmp_path / "pairs.txt").write_text("\n".join(f"{a} {b}" for a in names for b in names if a < b))

    def run(output, *options):
        paths = ["--image_dir", str(folder), "--pairs", str(tmp_path / "pairs.txt"), "--output", str(output)]
        return main(["infer-pairs", *paths, "--model", str(weights), "--precision", "float32", *options])

    assert run(tmp_path / "whole" / "p.h5") == 0
    output = tmp_path / "shares" / "p.h5"
    assert run(output, "--shard", "2/2") == 0
    assert not output.exists()
    assert 0 < len(contents(output)) < len(contents(tmp_path / "whole" / "p.h5"))
    with holding(shard_folder(output), "2-2"):
        assert run(output, "--shard", "2/2") == 2
        assert run(output) == 2
        assert run(output, "--shard", "1/2") == 0
    assert run(output) == 0
    assert contents(output) == contents(tmp_path / "whole" / "p.h5")
