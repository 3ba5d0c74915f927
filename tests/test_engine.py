"""The engine: shards are done once each, wherever, and workers that die take nothing with them."""

import json
import operator
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest

from dust3r_sfm.engine import EngineConfig, map_shards, share_of
from dust3r_sfm.errors import InputError

HUNDRED = partial(int, 100)
RAY = """
import json, os, signal, sys
from pathlib import Path
from dust3r_sfm.engine import EngineConfig, map_shards

FOLDER = Path(sys.argv[1])

def add(held, shard):
    if shard == 3 and not (FOLDER / "died").exists():
        (FOLDER / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return held + shard, os.getpid()

found = list(map_shards(add, lambda: 100, list(range(8)), EngineConfig(engine="ray", workers=2)))
print(json.dumps([found, os.getpid()]))
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


@pytest.mark.skipif(find_spec("ray") is None, reason="no wheel of ray for this Python")
def test_a_ray_worker_that_dies_is_replaced_and_nothing_is_lost_or_done_twice(tmp_path):
    """On a cluster of this host, in a process of its own: Ray warns of many things."""
    done = subprocess.run([sys.executable, "-c", RAY, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found, driver = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "died").exists()
    assert sorted((index, value) for index, (value, _) in found) == [(i, 100 + i) for i in range(8)]
    assert driver not in {process for _, (_, process) in found}
