"""From photos to descriptors to pairs: hloc's files and arguments, and what hloc stumbles over."""

from importlib import import_module

import h5py
import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

import dust3r_sfm
from dust3r_sfm import extract_descriptors
from dust3r_sfm.__main__ import main
from dust3r_sfm.colmap_versions import add_camera, add_image
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.descriptors import DescriptorFile, ImageDescriptor, write_descriptors
from dust3r_sfm.formats.pairs import read_pairs
from dust3r_sfm.graph import connected_components
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.descriptor import load_descriptor
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.pairs import Pair
from dust3r_sfm.views import load_views

stage = import_module("dust3r_sfm.pairs_from_retrieval")  # the package's attribute of this name is the function


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {
        f"{part}_{what}": n
        for part in ("enc", "dec")
        for what, n in [("embed_dim", 32), ("depth", 1), ("num_heads", 2)]
    }
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(Dust3r(Dust3rConfig(image_size=64, **sizes)), path)
    return path


@pytest.fixture
def image_dir(tmp_path):
    """Two places of three photos each, in sub-folders, one with spaces; photos of a place differ by noise."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for place in ("castle", "sea side"):
        (folder / place).mkdir(parents=True)
        base = rng.integers(0, 256, (6, 8, 3))
        for i in range(3):
            pixels = (base + rng.integers(-10, 10, base.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST).save(folder / place / f"{i}.png")
    return folder


def extract(image_dir, output, weights, *more):
    return main(
        ["extract-descriptors", "--image_dir", str(image_dir), "--output", str(output), "--model", str(weights), *more]
    )


def retrieve(descriptors, output, num_matched, *more):
    return main(
        ["pairs_from_retrieval", "--descriptors", str(descriptors), "--output", str(output)]
        + ["--num_matched", str(num_matched), *map(str, more)]
    )


def write(path, rows):
    write_descriptors(path, [ImageDescriptor(n, n, (640, 480), np.array(row, np.float32)) for n, row in rows.items()])
    return path


def brute_force(query_rows, rows, k):
    """hloc's result: the k most similar others by inner product of unit vectors."""
    q = np.stack(list(query_rows.values())).astype(np.float16).astype(np.float64)
    x = np.stack(list(rows.values())).astype(np.float16).astype(np.float64)
    scores = (q / np.linalg.norm(q, axis=1)[:, None]) @ (x / np.linalg.norm(x, axis=1)[:, None]).T
    names = list(rows)
    pairs = []
    for query, row in zip(query_rows, scores, strict=True):
        order = [i for i in np.argsort(-row) if names[i] != query][:k]
        pairs += [Pair(query, names[i]) for i in order]
    return pairs


def random_rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return {f"{'db' if i % 2 else 'query'}/{i:02d}.jpg": rng.normal(size=16) for i in range(n)}


def test_descriptors_lie_in_hlocs_layout_and_are_those_of_the_network(image_dir, weights, tmp_path):
    output = tmp_path / "feats" / "global-feats.h5"
    assert extract(image_dir, output, weights, "--precision", "float32") == 0
    model = Dust3r.from_pretrained(weights)
    views = load_views(image_dir, 64)
    with torch.no_grad():
        expected = load_descriptor(model)(torch.stack([view.normalized() for view in views])).numpy()
    with h5py.File(output) as file:
        for view, row in zip(views, expected, strict=True):
            group = file[view.name]
            assert group["global_descriptor"].dtype == np.float16
            assert group["image_size"][()].tolist() == [64, 48]
            assert np.allclose(group["global_descriptor"][()], row, atol=1e-3)
        assert set(file) == {"castle", "sea side"}
    assert [path.name for path in output.parent.iterdir()] == ["global-feats.h5"]


def test_a_second_run_describes_only_what_is_new(image_dir, weights, tmp_path, monkeypatch):
    described = []
    describe = extract_descriptors._describe
    monkeypatch.setattr(
        extract_descriptors,
        "_describe",
        lambda e, views, c: described.extend(v.name for v in views) or describe(e, views, c),
    )
    output = tmp_path / "f.h5"
    assert extract(image_dir, output, weights) == 0
    first = output.read_bytes()
    assert len(described) == 6
    (image_dir / "castle/copy.png").write_bytes((image_dir / "castle/0.png").read_bytes())
    assert extract(image_dir, output, weights) == 0
    assert len(described) == 6
    (image_dir / "castle/copy.png").unlink()
    Image.open(image_dir / "castle/0.png").rotate(180).save(image_dir / "castle/1.png")
    assert extract(image_dir, output, weights) == 0
    assert described[6:] == ["castle/1.png"]
    assert len(first) > 0


def test_a_killed_run_continues_with_its_shards(image_dir, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(extract_descriptors, "SHARD_IMAGES", 2)
    output, read, calls = tmp_path / "f.h5", extract_descriptors._read, []

    def read_twice(folder, names, extractor):
        calls.append(names)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(folder, names, extractor)

    monkeypatch.setattr(extract_descriptors, "_read", read_twice)
    assert extract(image_dir, output, weights) == 130
    assert not output.exists()
    (tmp_path / "f.shards" / "0000.h5.tmp").write_bytes(b"cut short")
    assert extract(image_dir, output, weights) == 0
    assert len(calls) == 4
    with DescriptorFile(output) as file:
        assert len(file.names) == 6


def test_a_bad_photo_is_named_and_the_others_can_be_described(image_dir, weights, tmp_path, capsys):
    (image_dir / "castle/bad.png").write_bytes(b"no image")
    assert extract(image_dir, tmp_path / "f.h5", weights) == 2
    assert "castle/bad.png is no image" in capsys.readouterr().err
    assert extract(image_dir, tmp_path / "f.h5", weights, "--on_bad_image", "skip") == 0
    with DescriptorFile(tmp_path / "f.h5") as file:
        assert len(file.names) == 6


def test_photos_of_a_place_find_each_other_also_with_spaces_in_names(image_dir, weights, tmp_path):
    extract(image_dir, tmp_path / "f.h5", weights)
    assert retrieve(tmp_path / "f.h5", tmp_path / "pairs.txt", 2) == 0
    with DescriptorFile(tmp_path / "f.h5") as file:
        pairs = read_pairs(tmp_path / "pairs.txt", file.names)
    assert len(pairs) == 12
    assert all(pair.name0.split("/")[0] == pair.name1.split("/")[0] for pair in pairs)


@pytest.mark.parametrize("k", [1, 3])
def test_pairs_are_those_of_comparing_all_with_all(k, tmp_path):
    rows = random_rows(15)
    write(tmp_path / "f.h5", rows)
    assert retrieve(tmp_path / "f.h5", tmp_path / "pairs.txt", k) == 0
    assert read_pairs(tmp_path / "pairs.txt", list(rows)) == brute_force(
        dict(sorted(rows.items())), dict(sorted(rows.items())), k
    )


def test_more_matches_than_images_are_all_images(tmp_path, caplog):
    rows = random_rows(4)
    write(tmp_path / "f.h5", rows)
    assert retrieve(tmp_path / "f.h5", tmp_path / "pairs.txt", 100) == 0
    assert len(read_pairs(tmp_path / "pairs.txt", list(rows))) == 12
    assert "4 images are fewer than the 100 asked for" in caplog.text


def test_prefixes_choose_queries_and_database(tmp_path):
    rows = random_rows(12)
    write(tmp_path / "f.h5", rows)
    assert (
        retrieve(tmp_path / "f.h5", tmp_path / "p.txt", 2, "--query_prefix", "query", "--db_prefix", "db/0", "db/1")
        == 0
    )
    queries = {name: row for name, row in sorted(rows.items()) if name.startswith("query")}
    database = {name: row for name, row in sorted(rows.items()) if name.startswith("db")}
    assert read_pairs(tmp_path / "p.txt", list(rows)) == brute_force(queries, database, 2)


def test_lists_choose_too_and_names_given_twice_count_once(tmp_path):
    rows = {**random_rows(8), "sea side/1.jpg": np.ones(16)}
    write(tmp_path / "f.h5", rows)
    (tmp_path / "q.txt").write_text(
        "# queries\nquery/02.jpg PINHOLE 640 480 500 500 320 240\nsea side/1.jpg\nquery/02.jpg\n"
    )
    (tmp_path / "db.txt").write_text("db/01.jpg\n\ndb/03.jpg\ndb/01.jpg\n")
    lists = ("--query_list", tmp_path / "q.txt", "--db_list", tmp_path / "db.txt")
    assert retrieve(tmp_path / "f.h5", tmp_path / "p.txt", 5, *lists) == 0
    queries = {name: rows[name] for name in ("query/02.jpg", "sea side/1.jpg")}
    database = {name: rows[name] for name in ("db/01.jpg", "db/03.jpg")}
    assert read_pairs(tmp_path / "p.txt", list(rows)) == brute_force(queries, database, 2)


def test_the_images_of_a_model_are_the_database(tmp_path):
    rows = random_rows(8)
    model = pycolmap.Reconstruction()
    add_camera(model, pycolmap.Camera(camera_id=1, model="PINHOLE", width=4, height=3, params=[1] * 4))
    for i, name in enumerate(("db/01.jpg", "db/03.jpg"), start=1):
        add_image(model, pycolmap.Image(name=name, camera_id=1, image_id=i), pycolmap.Rigid3d())
    (tmp_path / "model").mkdir()
    model.write(tmp_path / "model")
    write(tmp_path / "f.h5", rows)
    choice = ("--query_prefix", "query", "--db_model", tmp_path / "model")
    assert retrieve(tmp_path / "f.h5", tmp_path / "p.txt", 5, *choice) == 0
    queries = {name: row for name, row in rows.items() if name.startswith("query")}
    database = {name: rows[name] for name in ("db/01.jpg", "db/03.jpg")}
    assert read_pairs(tmp_path / "p.txt", list(rows)) == brute_force(queries, database, 2)


def test_the_database_may_lie_in_other_files_of_which_the_last_counts(tmp_path):
    queries, rows = random_rows(3), {f"x{i}": row for i, row in enumerate(random_rows(6, seed=1).values())}
    write(tmp_path / "q.h5", queries)
    write(tmp_path / "a.h5", {name: -row for name, row in list(rows.items())[:4]})
    write(tmp_path / "b.h5", rows)
    more = ("--db_descriptors", tmp_path / "a.h5", tmp_path / "b.h5")
    assert retrieve(tmp_path / "q.h5", tmp_path / "p.txt", 2, *more) == 0
    found = read_pairs(tmp_path / "p.txt", [*queries, *rows])
    assert found == brute_force(dict(sorted(queries.items())), rows, 2)


def test_equal_descriptors_do_not_pair_an_image_with_itself(tmp_path):
    write(tmp_path / "f.h5", dict.fromkeys(["a", "b", "c", "d"], np.ones(4)))
    assert retrieve(tmp_path / "f.h5", tmp_path / "p.txt", 2) == 0
    lines = [line.split() for line in (tmp_path / "p.txt").read_text().splitlines()]
    assert len(lines) == 8
    assert all(name0 != name1 for name0, name1 in lines)


def test_the_function_takes_what_hlocs_takes(tmp_path):
    rows = random_rows(6)
    write(tmp_path / "f.h5", rows)
    stage.main(
        tmp_path / "f.h5",
        tmp_path / "p.txt",
        1,
        query_prefix="query",
        db_prefix=("db",),
        db_descriptors=tmp_path / "f.h5",
    )
    assert len(read_pairs(tmp_path / "p.txt", list(rows))) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--query_prefix", "none"), "no image of the query begins with none"),
        (("--db_list", "missing.txt"), "there is no image list missing.txt"),
        (("--db_descriptors", "missing.h5"), "no descriptors at missing.h5: run extract_descriptors first"),
    ],
)
def test_what_cannot_be_found_is_said_in_a_sentence(more, message, tmp_path, capsys):
    write(tmp_path / "f.h5", random_rows(4))
    assert retrieve(tmp_path / "f.h5", tmp_path / "p.txt", 2, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.txt").exists()


def test_files_that_are_none_or_hold_nonsense_are_refused(tmp_path):
    (tmp_path / "text.h5").write_text("nothing")
    with pytest.raises(InputError, match="no descriptor file"):
        DescriptorFile(tmp_path / "text.h5")
    with (
        pytest.raises(InputError, match="b in .* not finite"),
        DescriptorFile(write(tmp_path / "nan.h5", {"a": [1, 2], "b": [np.nan, 1]})) as file,
    ):
        file.read(["a", "b"])
    with (
        pytest.raises(InputError, match=r"of b is \(3,\), that of a \(2,\)"),
        DescriptorFile(write(tmp_path / "mixed.h5", {"a": [1, 2], "b": [1, 2, 3]})) as file,
    ):
        file.read(["a", "b"])


def test_large_sets_are_read_to_a_temporary_file(tmp_path, monkeypatch):
    rows = random_rows(10)
    write(tmp_path / "f.h5", rows)
    monkeypatch.setattr("dust3r_sfm.formats.descriptors.MAX_IN_MEMORY_BYTES", 100)
    monkeypatch.setattr("dust3r_sfm.formats.descriptors.BLOCK_ROWS", 3)
    with DescriptorFile(tmp_path / "f.h5") as file:
        with file.matrix(file.names, tmp_path) as matrix:
            assert isinstance(matrix, np.memmap)
            assert np.array_equal(matrix, file.read(file.names))
        assert [path.name for path in tmp_path.iterdir()] == ["f.h5"]


def test_the_graph_connects_what_lists_of_neighbours_leave_apart(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        f"{place}/{i:02d}.jpg": center + 0.1 * rng.normal(size=16)
        for place, center in enumerate(np.eye(3, 16))
        for i in range(12)
    }
    write(tmp_path / "f.h5", rows)
    names = sorted(rows)
    assert retrieve(tmp_path / "f.h5", tmp_path / "lists.txt", 4) == 0
    assert retrieve(tmp_path / "f.h5", tmp_path / "graph.txt", 4, "--graph") == 0
    assert len(connected_components(names, read_pairs(tmp_path / "lists.txt", names))) == 3
    graph = read_pairs(tmp_path / "graph.txt", names)
    assert len(connected_components(names, graph)) == 1
    degrees = [sum(name in pair for pair in graph) for name in names]
    assert max(degrees) <= 4
    assert sum(pair.name0[0] == pair.name1[0] for pair in graph) / len(graph) > 0.9


def test_views_give_their_pairs_in_both_directions(image_dir, weights):
    views = load_views(image_dir, 64)
    pairs = dust3r_sfm.pairs_from_retrieval(views, num_matched=2, model=Dust3r.from_pretrained(weights))
    assert {pair.reversed() for pair in pairs} == set(pairs)
    same = [pair for pair in pairs if pair.name0.split("/")[0] == pair.name1.split("/")[0]]
    assert len(same) >= 0.8 * len(pairs)
    with pytest.raises(InputError, match="1 images give no pairs"):
        dust3r_sfm.pairs_from_retrieval(views[:1], model=Dust3r.from_pretrained(weights))
