"""Exact neighbours are those of comparing everything with everything, whatever the engine and the blocks."""

import numpy as np
import pytest
import torch

from dust3r_sfm.errors import InputError
from dust3r_sfm.retrieval import exact
from dust3r_sfm.retrieval.exact import Neighbors, exact_top_k, pick_engine, top_k_columns, without_self
from dust3r_sfm.retrieval.key_images import farthest_points, key_links


def random_rows(n, d, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(dtype)


def brute_force(queries, database, k):
    q, x = queries.astype(np.float64), database.astype(np.float64)
    cosines = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


@pytest.fixture(params=["torch", "faiss"])
def engine(request):
    if request.param == "faiss":
        pytest.importorskip("faiss")
    return request.param


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_blocks_change_nothing(engine, dtype, monkeypatch):
    queries, database = random_rows(23, 16, 0, dtype), random_rows(517, 16, 1, dtype) * 3
    monkeypatch.setitem(exact.QUERY_ROWS, "cpu", 7)
    monkeypatch.setitem(exact.DATABASE_ROWS, "cpu", 100)
    monkeypatch.setattr(exact, "KEPT_BYTES", 100 * 16 * 4 * 2)  # two blocks of the six
    found = exact_top_k(queries, database, 12, engine)
    indices, cosines = brute_force(queries, database, 12)
    assert found.indices.tolist() == indices.tolist()
    assert np.allclose(found.scores.numpy(), cosines, atol=1e-5)


def test_long_rows_are_searched_by_groups_with_the_same_result():
    scores = torch.rand(9, 64 * 50, generator=torch.Generator().manual_seed(0))
    found, expected = top_k_columns(scores, 20), scores.topk(20, dim=1)
    assert torch.equal(found.scores, expected.values)
    assert torch.equal(scores.gather(1, found.indices), expected.values)


def test_more_neighbours_than_rows_are_all_rows(engine):
    database = random_rows(3, 4, 0)
    assert exact_top_k(database, database, 10, engine).indices.shape == (3, 3)
    assert exact_top_k(database[:0], database, 2, engine).indices.shape == (0, 2)
    assert exact_top_k(database, database[:0], 2, engine).indices.shape == (3, 0)


def test_a_query_is_left_out_by_its_index_although_equal_rows_come_first(engine):
    database = np.repeat(random_rows(2, 8, 0), 3, axis=0)  # 0 1 2 are equal, and 3 4 5
    found = without_self(exact_top_k(database, database, 3, engine), torch.arange(6), 2)
    assert found.indices.tolist() == [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]]


def test_leaving_out_the_query_keeps_all_others_of_a_small_database():
    neighbors = Neighbors(torch.tensor([[1, 0, 2], [2, 0, 1]]), torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]]))
    found = without_self(neighbors, torch.tensor([1, -1]), 5)
    assert found.indices.tolist() == [[0, 2, -1], [2, 0, 1]]
    assert found.scores[0].tolist() == pytest.approx([0.5, 0.1, -torch.inf])


def test_rows_of_different_lengths_are_an_error():
    with pytest.raises(InputError, match="8 and 9 numbers"):
        exact_top_k(random_rows(2, 8, 0), random_rows(2, 9, 0), 1)


def test_without_faiss_and_gpu_torch_searches(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_engine() == "torch"


def test_key_images_are_one_of_each_place_before_a_second_of_any():
    places = np.eye(6, 12, dtype=np.float32)
    rows = np.repeat(places, 5, axis=0) + 0.05 * random_rows(30, 12, 0)
    keys = farthest_points(rows, 6)
    assert sorted(key // 5 for key in keys) == list(range(6))
    assert keys == farthest_points(rows, 6)
    assert farthest_points(rows[:0], 3) == []


def test_key_images_end_where_all_others_are_copies():
    rows = np.repeat(np.eye(3, 4, dtype=np.float16), 4, axis=0)
    assert len(farthest_points(rows, 10)) == 3


def test_every_image_is_linked_to_its_nearest_key_image_and_keys_to_each_other():
    rows = np.repeat(np.eye(3, 4, dtype=np.float32), 4, axis=0) + 0.01 * random_rows(12, 4, 0)
    links = key_links(rows, [0, 4, 8], num_links=1)
    assert {(i, key) for i, key in links[3:]} == {(i, i // 4 * 4) for i in range(12) if i % 4}
    assert all(i in (0, 4, 8) and j in (0, 4, 8) and i != j for i, j in links[:3])
