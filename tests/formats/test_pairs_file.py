import pytest

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.pairs import read_pairs, write_pairs
from dust3r_sfm.pairs import Pair

NAMES = ["a.jpg", "sub/b.jpg", "c d.jpg", "é\u202fe.png"]


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "pairs.txt").write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / "pairs.txt"

    return write


def test_pairs_are_written_as_hloc_writes_them(tmp_path):
    write_pairs(tmp_path / "pairs.txt", [Pair("a.jpg", "sub/b.jpg"), Pair("sub/b.jpg", "a.jpg")])
    assert (tmp_path / "pairs.txt").read_bytes() == b"a.jpg sub/b.jpg\nsub/b.jpg a.jpg"


def test_every_pair_of_names_comes_back_spaces_included(tmp_path):
    pairs = [Pair(name0, name1) for name0 in NAMES for name1 in NAMES if name0 != name1]
    write_pairs(tmp_path / "pairs.txt", pairs)
    assert read_pairs(tmp_path / "pairs.txt", NAMES) == pairs


def test_written_names_come_back_even_where_spaces_alone_would_leave_a_doubt(tmp_path):
    pairs = [Pair("a b", "c"), Pair("a", "b c")]
    write_pairs(tmp_path / "pairs.txt", pairs)
    assert read_pairs(tmp_path / "pairs.txt", ["a", "b", "c", "a b", "b c"]) == pairs


@pytest.mark.parametrize("text", ["a.jpg sub/b.jpg", "a.jpg\tsub/b.jpg\n", "\ufeff  a.jpg   sub/b.jpg \r\n\r\n \n"])
def test_any_white_space_blank_lines_and_line_ends_are_read(write, text):
    assert read_pairs(write(text), NAMES) == [Pair("a.jpg", "sub/b.jpg")]


def test_a_name_with_spaces_is_found_where_only_one_split_is_known(write):
    text = "a.jpg c d.jpg\nc d.jpg sub/b.jpg"
    assert read_pairs(write(text), NAMES) == [Pair("a.jpg", "c d.jpg"), Pair("c d.jpg", "sub/b.jpg")]


def test_repeated_lines_count_once_and_self_pairs_are_left_out(write):
    text = "a.jpg sub/b.jpg\na.jpg a.jpg\na.jpg sub/b.jpg\nsub/b.jpg a.jpg"
    assert read_pairs(write(text), NAMES) == [Pair("a.jpg", "sub/b.jpg"), Pair("sub/b.jpg", "a.jpg")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a.jpg sub/b.jpg\na.jpg b.jpg", r"line 2: there is no image b.jpg \("),
        ("x y", r"line 1: there is no image x and y \("),
        ("\na.jpg", "line 2: expected `name0 name1`, got 'a.jpg'"),
        ("a.jpg sub/b.jpg 1.0", "line 1: expected `name0 name1`, got 'a.jpg sub/b.jpg 1.0'"),
        ("", "holds no pairs"),
        ("a.jpg a.jpg", "holds no pairs"),
        (b"\xff\xd8\xff\xe0", "is no pairs file"),
    ],
)
def test_lines_that_cannot_be_used_are_named(write, text, sentence):
    with pytest.raises(InputError, match=sentence):
        read_pairs(write(text), NAMES)


def test_a_line_with_two_readings_is_an_error(write):
    with pytest.raises(InputError, match="line 1: 'a b c' can be split into two names in 2 ways"):
        read_pairs(write("a b c"), ["a", "b c", "a b", "c"])


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(InputError, match="there is no pairs file"):
        read_pairs(tmp_path / "none.txt", NAMES)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_pairs(tmp_path, NAMES)


def test_names_that_would_break_the_lines_leave_the_old_file_as_it_was(write, tmp_path):
    path = write("a.jpg sub/b.jpg")
    with pytest.raises(InputError, match="tabs or line breaks"):
        write_pairs(path, [Pair("a\nb", "c")])
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.txt"]
    assert path.read_text() == "a.jpg sub/b.jpg"
