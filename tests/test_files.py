"""Files that are whole or absent, and folders that one run holds."""

import multiprocessing
import os
import signal

import pytest

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import holding, replacing, write_bytes, writing


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


def test_a_file_is_written_by_one_run_at_a_time_and_its_lock_goes_with_it(tmp_path):
    path = tmp_path / "new" / "matches.h5"
    with writing(path):
        with pytest.raises(InputError, match="another run is writing .*matches.h5: wait for it"), writing(path):
            pass
        with writing(path.with_name("pairs.txt")):
            pass
        write_bytes(path, b"whole")
    with writing(path):
        pass
    assert list(tmp_path.rglob("*")) == [path.parent, path]


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(InputError, match="is a folder: name the file to write"), writing(tmp_path):
        pass
    with writing(tmp_path, is_folder=True):
        pass


@pytest.mark.parametrize("hold", [holding, lambda folder: writing(folder / "matches.h5")])
def test_a_run_that_fails_before_it_writes_leaves_no_folder(hold, tmp_path):
    def fail(writes):
        with hold(tmp_path / "a" / "b"):
            if writes:
                write_bytes(tmp_path / "a" / "b" / "first", b"")
            raise InputError("there are no photos")

    with pytest.raises(InputError, match="no photos"):
        fail(writes=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no photos"):
        fail(writes=True)
    assert (tmp_path / "a" / "b" / "first").is_file()


def test_a_share_that_fails_leaves_the_folder_to_another(tmp_path):
    with holding(tmp_path / "out", "1-2"):
        with pytest.raises(InputError, match="no photos"), holding(tmp_path / "out", "2-2"):
            raise InputError("no photos")
        with pytest.raises(InputError, match="another run is working"), holding(tmp_path / "out", "1-2"):
            pass
        with pytest.raises(InputError, match="another run is working"), holding(tmp_path / "out"):
            pass


def _hold_until_killed(folder, held):
    with holding(folder), writing(folder / "matches.h5"):
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
    with pytest.raises(InputError), writing(tmp_path / "matches.h5"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with holding(tmp_path), writing(tmp_path / "matches.h5"):
        pass
