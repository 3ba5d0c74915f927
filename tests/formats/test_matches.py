import h5py
import pytest
import torch

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.matches import read_matches, write_matches
from dust3r_sfm.pairs import Matches, Pair


def random_matches(count):
    return Matches(torch.rand(count, 2) * 100, torch.rand(count, 2) * 100, torch.rand(count))


@pytest.mark.parametrize("counts", [[], [0], [3, 0, 5]])
def test_matches_come_back_as_written(counts, tmp_path):
    matches = {Pair(f"sub folder/{i}.jpg", "ü.png"): random_matches(count) for i, count in enumerate(counts)}
    write_matches(tmp_path / "matches.h5", matches)
    back = read_matches(tmp_path / "matches.h5")
    assert list(back) == list(matches)
    for pair, found in matches.items():
        for field in ("keypoints0", "keypoints1", "scores"):
            assert torch.equal(getattr(back[pair], field), getattr(found, field))
    assert [path.name for path in tmp_path.iterdir()] == ["matches.h5"]


def test_files_that_are_no_matches_are_named(tmp_path):
    path = tmp_path / "matches.h5"
    with pytest.raises(InputError, match="run match_dense first"):
        read_matches(path)
    path.write_bytes(b"text")
    with pytest.raises(InputError, match="cannot be read as matches"):
        read_matches(path)
    with h5py.File(path, "w") as file:
        file["other"] = 1
    with pytest.raises(InputError, match="holds no matches"):
        read_matches(path)
