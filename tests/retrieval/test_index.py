"""The compressed index: nearly all true neighbours, whatever the shards, and a killed run continues."""

import numpy as np
import pytest
import torch

from dust3r_sfm.benchmarks.retrieval import clustered_descriptors
from dust3r_sfm.errors import InputError
from dust3r_sfm.retrieval import index as index_module
from dust3r_sfm.retrieval.exact import exact_top_k
from dust3r_sfm.retrieval.index import IndexConfig, build_index, rank_again, search_index, top_k

faiss = pytest.importorskip("faiss")

CONFIG = IndexConfig(num_lists=32, num_probes=8, reduced_dim=32, code_bytes=16, shard_rows=1500, training_rows=4000)


@pytest.fixture(scope="module")
def descriptors():
    return clustered_descriptors(4000, 64, seed=0)


def recall(found, expected):
    return np.mean([len(set(f) & set(e)) / len(e) for f, e in zip(found.tolist(), expected.tolist(), strict=True)])


def test_nearly_all_of_the_true_neighbours_are_found(descriptors, tmp_path):
    index = build_index(descriptors, tmp_path, CONFIG)
    found = search_index(index, descriptors[:300], descriptors, 20, CONFIG)
    expected = exact_top_k(descriptors[:300], descriptors, 20)
    assert recall(found.indices, expected.indices) >= 0.97
    assert torch.allclose(found.scores[:, 0], expected.scores[:, 0], atol=1e-5)


def test_merged_shards_find_what_one_shard_finds(descriptors, tmp_path):
    one = build_index(descriptors, tmp_path / "one", IndexConfig(**{**vars(CONFIG), "shard_rows": 4000}))
    several = build_index(descriptors, tmp_path / "several", CONFIG)
    assert len(list((tmp_path / "several").glob("0*.index"))) == 3
    assert several.ntotal == one.ntotal == 4000
    found = [search_index(index, descriptors[:50], descriptors, 10, CONFIG) for index in (one, several)]
    assert torch.equal(found[0].scores, found[1].scores)


def test_a_killed_run_continues_with_the_shards_that_it_has(descriptors, tmp_path):
    whole = build_index(descriptors, tmp_path, CONFIG)
    shards = sorted(tmp_path.glob("0*.index"))
    kept = shards[0].stat().st_mtime_ns, (tmp_path / "trained.index").stat().st_mtime_ns
    shards[1].unlink()
    again = build_index(descriptors, tmp_path, CONFIG)
    assert (shards[0].stat().st_mtime_ns, (tmp_path / "trained.index").stat().st_mtime_ns) == kept
    first, second = (search_index(index, descriptors[:50], descriptors, 10, CONFIG) for index in (whole, again))
    assert torch.equal(first.indices, second.indices)


def test_candidates_are_ranked_by_the_exact_cosine_and_missing_ones_come_last():
    database = np.array([[2, 0], [1, 1], [0, 3]], np.float16)
    found = rank_again(torch.tensor([[1.0, 0.0]]), torch.tensor([[2, -1, 1, 0]]), database, 4)
    assert found.indices.tolist() == [[0, 1, 2, -1]]
    assert found.scores[0].tolist() == pytest.approx([1, 0.5**0.5, 0, -torch.inf], abs=1e-6)


def test_large_databases_are_searched_by_the_index_and_small_ones_exactly(descriptors, tmp_path, monkeypatch):
    exactly = top_k(descriptors[:20], descriptors, 5, tmp_path / "index", CONFIG)
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(index_module, "MAX_EXACT", 1000)
    compressed = top_k(descriptors[:20], descriptors, 5, tmp_path / "index", CONFIG)
    assert (tmp_path / "index" / "trained.index").is_file()
    assert recall(compressed.indices, exactly.indices) >= 0.97


def test_too_few_descriptors_for_codes_are_an_error_with_a_sentence(tmp_path):
    with pytest.raises(InputError, match="at least 256"):
        build_index(np.eye(10, dtype=np.float32), tmp_path)
