"""Archives of photos, honest and otherwise."""

import gzip
import io
import random
import resource
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from dust3r_sfm.errors import InputError
from dust3r_sfm.serving.archives import is_archive, pack, unpack_photos
from dust3r_sfm.serving.limits import Allowance, Limits, TimeLimitError


@pytest.fixture
def allowance():
    return Allowance(Limits(max_images=3, max_gb=1e-4))


def make_zip(path, entries, links=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
        for name, target in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return path


def make_tar(path, entries, links=(), compression="gz"):
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


MAKERS = [make_zip, make_tar]


@contextmanager
def traced():
    """A function that tells the most memory that the block has taken."""
    tracemalloc.start()
    try:
        yield lambda: most
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@pytest.mark.parametrize("make", MAKERS)
def test_photos_are_unpacked_and_nothing_else(make, allowance, tmp_path):
    entries = [("a.jpg", b"1"), ("sub/b.PNG", b"2"), ("notes.txt", b"3"), ("run.sh", b"4"), (".hidden.jpg", b"5")]
    entries += [("__MACOSX/a.jpg", b"6")]
    path = make(tmp_path / "photos.bin", entries, links=[("link.jpg", "/etc/passwd"), ("there", "/tmp")])
    assert is_archive(path)
    assert unpack_photos(path, tmp_path / "out", allowance) == ["a.jpg", "sub/b.PNG"]
    found = [p.relative_to(tmp_path / "out").as_posix() for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()]
    assert found == ["a.jpg", "sub/b.PNG"]
    assert (tmp_path / "out" / "sub" / "b.PNG").read_bytes() == b"2"


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", ["../a.jpg", "sub/../../a.jpg", "/tmp/a.jpg", "..\\a.jpg", "C:a.jpg"])
def test_a_name_that_leads_out_of_the_folder_is_refused(make, name, allowance, tmp_path):
    path = make(tmp_path / "photos.bin", [(name, b"1")])
    with pytest.raises(InputError, match="leads out of its folder"):
        unpack_photos(path, tmp_path / "out", allowance)
    assert [p.name for p in tmp_path.iterdir()] == ["photos.bin"]


@pytest.mark.parametrize("make", MAKERS)
def test_a_link_does_not_lead_out_either(make, allowance, tmp_path):
    """A link to a folder outside, then a photo below its name."""
    (tmp_path / "outside").mkdir()
    path = make(tmp_path / "first.bin", [], links=[("sub", str(tmp_path / "outside"))])
    with make_append(path) as append:
        append("sub/a.jpg", b"1")
    assert unpack_photos(path, tmp_path / "out", allowance) == ["sub/a.jpg"]
    assert (tmp_path / "out" / "sub" / "a.jpg").is_file()
    assert not (tmp_path / "out" / "sub").is_symlink()
    assert not any((tmp_path / "outside").iterdir())


class make_append:  # noqa: N801
    """Adds entries to an archive of either kind, after those it has."""

    def __init__(self, path):
        self.path, self.entries = path, []

    def __enter__(self):
        return lambda name, data: self.entries.append((name, data))

    def __exit__(self, *_):
        if zipfile.is_zipfile(self.path):
            with zipfile.ZipFile(self.path, "a") as archive:
                for name, data in self.entries:
                    archive.writestr(name, data)
            return
        with tarfile.open(self.path) as before:
            links = [(member.name, member.linkname) for member in before]
        with tarfile.open(self.path, "w") as archive:
            for name, target in links:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = tarfile.SYMTYPE, target
                archive.addfile(info)
            for name, data in self.entries:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("make", MAKERS)
def test_count_and_unpacked_size_are_limited(make, tmp_path):
    many = make(tmp_path / "many.bin", [(f"{i}.jpg", b"1") for i in range(4)])
    with pytest.raises(InputError, match="4 images are more than the 3 allowed"):
        unpack_photos(many, tmp_path / "many", Allowance(Limits(max_images=3)))
    bomb = make(tmp_path / "bomb.bin", [("a.jpg", bytes(2_000_000))])
    assert bomb.stat().st_size < 10_000
    with pytest.raises(InputError, match=r"larger than 0.001 GB"):
        unpack_photos(bomb, tmp_path / "bomb", Allowance(Limits(max_gb=0.001)))
    assert sum(p.stat().st_size for p in (tmp_path / "bomb").iterdir()) <= 1_000_000


@pytest.mark.parametrize("make", MAKERS)
def test_a_job_whose_time_is_over_while_unpacking_is_told_so(make, tmp_path):
    path = make(tmp_path / "photos.bin", [("a.jpg", b"1")])
    with pytest.raises(TimeLimitError, match="longer than 0 s"):
        unpack_photos(path, tmp_path / "out", Allowance(Limits(max_seconds=0.0)))


def test_what_a_tar_file_skips_counts_too(tmp_path):
    path = make_tar(tmp_path / "skipped.tgz", [("a.bin", bytes(2_000_000)), ("a.jpg", b"1")])
    with pytest.raises(InputError, match="larger than"):
        unpack_photos(path, tmp_path / "out", Allowance(Limits(max_gb=0.001)))


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_name_twice_and_no_photo_at_all_are_refused(make, allowance, tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name") if make is make_zip else pytest.MonkeyPatch.context():
        path = make(tmp_path / "twice.bin", [("a.jpg", b"1"), ("a.jpg", b"2")])
    with pytest.raises(InputError, match=r"has 'a.jpg' twice"):
        unpack_photos(path, tmp_path / "out", allowance)
    with pytest.raises(InputError, match="holds no photos"):
        unpack_photos(make(tmp_path / "none.bin", [("a.txt", b"1")]), tmp_path / "none", allowance)


@pytest.mark.parametrize("make", MAKERS)
def test_a_damaged_archive_is_a_sentence(make, allowance, tmp_path):
    data = bytearray(make(tmp_path / "photos.bin", [("a.jpg", bytes(range(256)) * 99)]).read_bytes())
    data[60:90] = bytes(30)
    (tmp_path / "photos.bin").write_bytes(data)
    with pytest.raises(InputError, match="the archive cannot be unpacked"):
        unpack_photos(tmp_path / "photos.bin", tmp_path / "out", allowance)


@pytest.mark.parametrize("kind", ["zip", "gz", "bz2", "xz"])
def test_damage_anywhere_is_a_sentence_or_does_no_harm(kind, tmp_path):
    numbers, path = random.Random(0), tmp_path / "photos.bin"
    entries = [("\u00e4.jpg", numbers.randbytes(2000)), ("sub/b.jpg", bytes(range(256)) * 9)]
    (make_zip if kind == "zip" else partial(make_tar, compression=kind))(path, entries)
    whole = path.read_bytes()
    for trial in range(150):
        data = bytearray(whole)
        for _ in range(numbers.choice((1, 5, 20))):
            data[numbers.randrange(max(0, len(data) - 250) if trial % 2 else 0, len(data))] = numbers.randrange(256)
        path.write_bytes(data if trial % 3 else data[: numbers.randrange(len(data))])
        with suppress(InputError):
            if is_archive(path):
                unpack_photos(path, tmp_path / str(trial), Allowance(Limits()))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_file_that_cannot_be_read_piece_by_piece_is_refused(method, allowance, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", method) as archive:
        archive.writestr("a.jpg", bytes(20_000_000))
    with traced() as peak, pytest.raises(InputError, match="compressed by an unusual method: pack it anew"):
        unpack_photos(tmp_path / "photos.zip", tmp_path / "out", allowance)
    assert peak() < 5_000_000


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_files_header_is_not_taken_into_memory_whatever_its_size(kind, allowance, tmp_path):
    entry = tarfile.TarInfo("a.jpg")
    entry.type, entry.size = kind, 20_000_000
    (tmp_path / "photos.tgz").write_bytes(gzip.compress(entry.tobuf(tarfile.GNU_FORMAT) + bytes(entry.size + 1024)))
    for read in (is_archive, lambda path: unpack_photos(path, tmp_path / "out", allowance)):
        with traced() as peak, pytest.raises(InputError, match="a header of 20000000 bytes"):
            read(tmp_path / "photos.tgz")
        assert peak() < 5_000_000


def test_a_zip_files_list_of_entries_is_not_taken_into_memory_whatever_its_size(allowance, tmp_path):
    entries = 1_000_000 * (b"PK\x01\x02\x14\x00\x14\x00" + bytes(38))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(entries), 0, 0)
    (tmp_path / "photos.zip").write_bytes(entries + end)
    with traced() as peak, pytest.raises(InputError, match="list of entries has 46000000 bytes"):
        unpack_photos(tmp_path / "photos.zip", tmp_path / "out", allowance)
    assert peak() < 5_000_000


def test_sparse_files_of_either_kind_are_refused(allowance, tmp_path):
    path, entry = tmp_path / "photos.tar", tarfile.TarInfo("a.jpg")
    entry.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(InputError, match="has a sparse file: pack it anew"):
        unpack_photos(path, tmp_path / "out", allowance)
    entry = tarfile.TarInfo("a.jpg")
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    path.write_bytes(entry.tobuf(tarfile.PAX_FORMAT) + b"9\n" * 256 + bytes(1024))
    with pytest.raises(InputError, match="has a sparse file: pack it anew"):
        unpack_photos(path, tmp_path / "out", allowance)


@pytest.mark.parametrize("make", MAKERS)
def test_a_name_too_long_for_a_file_is_a_sentence_that_names_no_folder_of_ours(make, allowance, tmp_path):
    path = make(tmp_path / "photos.bin", [("\u5bfa" * 100 + ".jpg", b"1")])
    with pytest.raises(InputError, match="the archive cannot be unpacked .File name too long") as error:
        unpack_photos(path, tmp_path / "out", allowance)
    assert str(tmp_path) not in str(error.value)


def test_a_disk_that_takes_no_more_is_not_the_archives_fault(tmp_path):
    path = make_zip(tmp_path / "photos.bin", [("a.jpg", bytes(5000))])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            unpack_photos(path, tmp_path / "out", Allowance(Limits()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_result_is_packed_as_it_lies(tmp_path):
    (tmp_path / "out" / "sparse" / "0").mkdir(parents=True)
    (tmp_path / "out" / "sparse" / "0" / "cameras.bin").write_bytes(b"model")
    (tmp_path / "out" / "summary.json").write_text("{}")
    pack(tmp_path / "out", ["sparse/0/cameras.bin", "summary.json"], tmp_path / "result.zip")
    with zipfile.ZipFile(tmp_path / "result.zip") as archive:
        assert archive.testzip() is None
        assert archive.read("sparse/0/cameras.bin") == b"model"
