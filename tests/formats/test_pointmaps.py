"""Predictions on disk: float16 within a scale, shards that are whole or absent, keys that say what they belong to."""

import h5py
import pytest
import torch

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.pointmaps import PointmapFile, PointmapShards, hash_of, shard_folder
from dust3r_sfm.pairs import Pair, PairPrediction

PAIRS = [Pair("sub/a.jpg", "b.jpg"), Pair("b.jpg", "sub/a.jpg"), Pair("é ü.png", "b.jpg")]
KEYS = ["k0", "k1", "k2"]


def prediction(seed, scale=1.0, sizes=((6, 8), (8, 6))):
    generator = torch.Generator().manual_seed(seed)
    points = [scale * torch.randn(*size, 3, generator=generator) for size in sizes]
    confidences = [1 + torch.rand(size, generator=generator) for size in sizes]
    return PairPrediction(points[0], confidences[0], points[1], confidences[1])


def write_all(path):
    shards = PointmapShards(path)
    shards.add(KEYS[:2], [prediction(0), prediction(1)])
    shards.add(KEYS[2:], [prediction(2)])
    return shards.finish(PAIRS, KEYS)


def test_predictions_come_back_as_float32_within_half_precision(tmp_path):
    with write_all(tmp_path / "pointmaps.h5") as read:
        assert list(read) == PAIRS
        assert len(read) == 3
        for seed, pair in enumerate(PAIRS):
            expected, found = prediction(seed), read[pair]
            for field in ("pointmap0_in_cam0", "confidence0", "pointmap1_in_cam0", "confidence1"):
                values = getattr(found, field)
                assert values.dtype == torch.float32
                torch.testing.assert_close(values, getattr(expected, field), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_unit_of_a_scene_does_not_matter_to_float16(tmp_path, scale):
    shards = PointmapShards(tmp_path / "p.h5")
    shards.add(["k"], [prediction(0, scale)])
    found = shards.finish(PAIRS[:1], ["k"])[PAIRS[0]]
    torch.testing.assert_close(found.pointmap0_in_cam0 / scale, prediction(0).pointmap0_in_cam0, rtol=1e-3, atol=1e-6)


def test_points_and_confidences_beyond_float16_are_clamped_not_infinite(tmp_path):
    far = prediction(0)
    far.pointmap1_in_cam0[0, 0] = torch.tensor([0.0, 0.0, 1e12])
    far.confidence0[0, 0] = 1e12
    shards = PointmapShards(tmp_path / "p.h5")
    shards.add(["k"], [far])
    found = shards.finish(PAIRS[:1], ["k"])[PAIRS[0]]
    assert found.pointmap1_in_cam0.isfinite().all()
    assert found.pointmap1_in_cam0[0, 0, 2] > 1e4
    assert found.confidence0[0, 0] == 65504


def test_a_pair_that_was_not_predicted_is_a_key_error(tmp_path):
    with write_all(tmp_path / "pointmaps.h5") as read:
        assert Pair("b.jpg", "c.jpg") not in read
        with pytest.raises(KeyError):
            read[Pair("b.jpg", "c.jpg")]


def test_finished_shards_are_found_again_and_a_cut_one_is_not(tmp_path):
    path = tmp_path / "pointmaps.h5"
    write_all(path)
    cut = sorted(shard_folder(path).glob("*.h5"))[0]
    with h5py.File(cut) as file:
        lost = {key.decode() for key in file["keys"][()]}
    cut.write_bytes(cut.read_bytes()[:300])
    again = PointmapShards(path)
    assert {key for key in KEYS if key in again} == set(KEYS) - lost


def test_shards_that_nothing_refers_to_any_more_are_removed(tmp_path):
    path = tmp_path / "pointmaps.h5"
    write_all(path)
    read = PointmapShards(path).finish(PAIRS[:2], KEYS[:2])
    assert list(read) == PAIRS[:2]
    assert len(list(shard_folder(path).iterdir())) == 1


def test_a_failed_write_leaves_neither_a_shard_nor_a_temporary_file(tmp_path, monkeypatch):
    shards = PointmapShards(tmp_path / "pointmaps.h5")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        shards.add(["k"], [prediction(0)])
    assert "k" not in shards
    assert list(shards.folder.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no HDF5 at all", None])
def test_a_cut_or_foreign_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "pointmaps.h5"
    write_all(path).close()
    path.write_bytes(path.read_bytes()[:700] if content is None else content)
    with pytest.raises(InputError, match="pointmaps.h5 is no pointmap file or is cut short: run infer_pairs again"):
        PointmapFile(path)


def test_another_hdf5_file_and_a_missing_one_are_one_sentence(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = [1.0]
    with pytest.raises(InputError, match="is no pointmap file"):
        PointmapFile(tmp_path / "other.h5")
    with pytest.raises(InputError, match="run infer_pairs first"):
        PointmapFile(tmp_path / "none.h5")


def test_a_pointmap_file_without_its_shards_says_what_is_missing(tmp_path):
    path = tmp_path / "pointmaps.h5"
    read = write_all(path)
    for shard in shard_folder(path).iterdir():
        shard.unlink()
    with pytest.raises(InputError, match="keep pointmaps.shards beside it"):
        read[PAIRS[0]]


def test_a_folder_of_predictions_can_be_moved(tmp_path):
    (tmp_path / "here").mkdir()
    write_all(tmp_path / "here" / "pointmaps.h5").close()
    (tmp_path / "here").rename(tmp_path / "there")
    with PointmapFile(tmp_path / "there" / "pointmaps.h5") as read:
        assert read[PAIRS[1]].confidence0.shape == (6, 8)


def test_parts_of_a_hash_are_told_apart():
    assert hash_of("ab", "c") != hash_of("a", "bc")
    assert hash_of("ab", b"c") == hash_of("ab", "c")
