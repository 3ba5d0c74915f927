"""hloc's files of localisation: lists of queries, and poses as lines that other tools read."""

import json

import numpy as np
import pycolmap
import pytest

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.localization import read_poses, read_queries, write_logs, write_poses

TURN = pycolmap.Rotation3d(np.radians([0.0, 90.0, 0.0]))
POSE = np.array(pycolmap.Rigid3d(TURN, [1.0, -2.0, 0.5]).matrix())


def test_a_list_of_queries_has_names_and_perhaps_cameras(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_text("# day\nday/a.jpg SIMPLE_RADIAL 1600 1200 1469.2 800 600 -0.0353\n\nnight/b.jpg\n")
    queries = read_queries(path)
    assert list(queries) == ["day/a.jpg", "night/b.jpg"]
    assert queries["night/b.jpg"] is None
    camera = queries["day/a.jpg"]
    assert (camera.model.name, camera.width, camera.height) == ("SIMPLE_RADIAL", 1600, 1200)
    assert camera.params.tolist() == [1469.2, 800, 600, -0.0353]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.jpg\na.jpg\n", "line 2: a.jpg is listed twice"),
        ("a.jpg FISH 10 10 1\n", "line 1: expected `name MODEL width height params...`"),
        ("a.jpg PINHOLE 10\n", "line 1: expected"),
        ("a.jpg PINHOLE 10 10 5 5\n", "line 1"),
        ("a.jpg SIMPLE_PINHOLE 10 10 nan 5 5\n", "line 1"),
        ("a.jpg SIMPLE_PINHOLE 10 10 -3 5 5\n", "line 1"),
    ],
)
def test_a_broken_list_is_told_by_its_line(tmp_path, text, message):
    path = tmp_path / "queries.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        read_queries(path)
    with pytest.raises(InputError, match="no queries"):
        read_queries(tmp_path / "none.txt")


def test_a_pose_is_a_line_of_name_quaternion_and_translation(tmp_path):
    """A quarter turn about y is w = y = sqrt(1/2); hloc writes w first."""
    write_poses(tmp_path / "poses.txt", {"day/a.jpg": POSE})
    name, *numbers = (tmp_path / "poses.txt").read_text().split()
    assert name == "day/a.jpg"
    np.testing.assert_allclose([float(x) for x in numbers], [0.5**0.5, 0, 0.5**0.5, 0, 1, -2, 0.5], atol=1e-12)
    np.testing.assert_allclose(read_poses(tmp_path / "poses.txt")["day/a.jpg"], POSE, atol=1e-12)


def test_file_names_alone_are_written_where_they_suffice(tmp_path):
    write_poses(tmp_path / "poses.txt", {"day/a.jpg": POSE, "day/b.jpg": POSE}, basenames=True)
    assert list(read_poses(tmp_path / "poses.txt")) == ["a.jpg", "b.jpg"]
    with pytest.raises(InputError, match="do not tell day/a.jpg and night/a.jpg apart"):
        write_poses(tmp_path / "other.txt", {"day/a.jpg": POSE, "night/a.jpg": POSE}, basenames=True)
    assert not (tmp_path / "other.txt").exists()


def test_poses_that_are_none_are_told(tmp_path):
    (tmp_path / "poses.txt").write_text("a.jpg 1 0 0\n")
    with pytest.raises(InputError, match="name qw qx qy qz tx ty tz"):
        read_poses(tmp_path / "poses.txt")


def test_logs_are_json(tmp_path):
    write_logs(tmp_path / "logs.json", {"loc": {"a.jpg": {"db": ["b.jpg"], "points3D_xyz": np.eye(2)}}})
    read = json.loads((tmp_path / "logs.json").read_text())
    assert read["loc"]["a.jpg"]["points3D_xyz"] == [[1, 0], [0, 1]]
