"""Files that are whole or absent, and folders that one run holds."""

import multiprocessing
import os
import signal

import pytest

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import holding, replacing, write_bytes


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path):
    path = tmp_path / "figures.json"
    write_bytes(path, b"old")

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"old"
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail_half_way()
    assert path.read_bytes() == b"old"
    write_bytes(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    with holding(tmp_path / "out"):
        with pytest.raises(InputError, match="another run is working in"), holding(tmp_path / "out"):
            pass
        with holding(tmp_path / "other"):
            pass
    with holding(tmp_path / "out"):
        pass


def _hold_until_killed(folder, held):
    with holding(folder):
        held.set()
        signal.pause()


def test_a_killed_run_leaves_no_lock_behind(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold_until_killed, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    with pytest.raises(InputError), holding(tmp_path):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with holding(tmp_path):
        pass
