"""The engine: shards are done once each, wherever, and workers that die take nothing with them."""

import operator
import pickle
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from procedural import make_scene

from dust3r_sfm.engine import EngineConfig, map_shards, packed, share_of
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.matches import read_matches
from dust3r_sfm.formats.pointmaps import PointmapShards
from dust3r_sfm.match_dense import match_dense

HUNDRED = partial(int, 100)
RAY = """
import os, signal, sys
from importlib import import_module
from pathlib import Path
from dust3r_sfm.engine import EngineConfig
from dust3r_sfm.formats.pointmaps import PointmapFile

FOLDER = Path(sys.argv[1])
stage = import_module("dust3r_sfm.match_dense")
stage.SHARD_PAIRS = 1

class Deadly(PointmapFile):
    def __getitem__(self, pair):
        if pair == list(self)[-1] and not (FOLDER / "died").exists():
            (FOLDER / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(pair)

with Deadly(FOLDER / "pointmaps.h5") as predictions:
    stage.match_dense([], predictions, output=FOLDER / "matches.h5", engine=EngineConfig(engine="ray", workers=2))
"""


def test_shards_are_done_in_order_with_what_the_worker_holds():
    assert list(map_shards(operator.add, HUNDRED, [3, 1, 2])) == [(0, 103), (1, 101), (2, 102)]
    assert list(map_shards(operator.add, HUNDRED, [])) == []


def test_shares_are_disjoint_and_together_all_shards():
    shards = list(range(10))
    shares = [share_of(shards, EngineConfig(shard=f"{i}/3")) for i in (1, 2, 3)]
    assert sorted(sum(shares, [])) == shards
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert share_of(shards, EngineConfig()) == shards


@pytest.mark.parametrize("share", ["0/3", "4/3", "2", "a/b", "1/3 ", "-1/3"])
def test_a_share_that_does_not_exist_is_an_error(share):
    with pytest.raises(InputError, match=r"i/N with i from 1 to N, such as 2/8, got"):
        share_of([1, 2, 3], EngineConfig(shard=share))


def test_less_than_one_worker_is_an_error():
    with pytest.raises(InputError, match="at least one worker is needed, got 0"):
        list(map_shards(operator.add, HUNDRED, [1], EngineConfig(workers=0)))


def test_two_processes_of_this_host_do_what_one_does():
    found = dict(map_shards(operator.add, HUNDRED, list(range(6)), EngineConfig(workers=2)))
    assert found == {i: 100 + i for i in range(6)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool, torch.bfloat16])
def test_tensors_go_to_other_processes_by_value(dtype):
    """Torch's own way takes an open file for each, and a process may have a thousand."""
    sent = {"values": torch.arange(6).view(2, 3).to(dtype), "weights": torch.nn.Parameter(torch.ones(2))}
    there = pickle.loads(packed(sent))
    assert torch.equal(there["values"], sent["values"])
    there["values"][0] = 1
    assert isinstance(there["weights"], torch.nn.Parameter)
    assert torch.equal(there["weights"], sent["weights"])


@pytest.mark.skipif(find_spec("ray") is None, reason="no wheel of ray for this Python")
def test_a_ray_worker_that_dies_is_replaced_and_nothing_is_lost_or_done_twice(tmp_path):
    """Matching on a cluster of this host, in a process of its own: Ray warns of many things."""
    scene = make_scene(3, (48, 64), pairs=[(0, 1), (1, 2), (2, 0)])
    shards, keys = PointmapShards(tmp_path / "pointmaps.h5"), ["a", "b", "c"]
    shards.add(keys, list(scene.predictions.values()))
    with shards.finish(list(scene.predictions), keys) as predictions:
        expected = match_dense([], predictions)
    done = subprocess.run([sys.executable, "-c", RAY, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    found = read_matches(tmp_path / "matches.h5")
    assert list(found) == list(expected)
    for pair, matches in expected.items():
        assert torch.allclose(found[pair].keypoints1, matches.keypoints1)
        assert torch.allclose(found[pair].scores, matches.scores)
