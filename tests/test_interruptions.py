"""kill -9 in the midst of a stage, then the same command: nothing is done twice, and the result is that of one run."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dust3r_sfm.__main__ import main
from dust3r_sfm.benchmarks import interruptions
from dust3r_sfm.errors import InputError
from dust3r_sfm.models.checkpoint import save_weights
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig

START = "import sys; from dust3r_sfm.__main__ import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Twelve tiny photos, all their pairs, which are five shards, and a tiny network."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "photos").mkdir()
    generator = np.random.default_rng(0)
    names = [f"{i:02d}.png" for i in range(12)]
    for name in names:
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "photos" / name)
    (folder / "pairs.txt").write_text("\n".join(f"{a} {b}" for a in names for b in names if a < b))
    torch.manual_seed(0)
    narrow = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2}
    narrow |= {"dec_embed_dim": 32, "dec_depth": 1, "dec_num_heads": 2}
    network = Dust3r(Dust3rConfig(image_size=32, **narrow))
    save_weights(network, folder / "tiny.safetensors", {"name": "tiny", "licence": "Apache-2.0"})
    return folder


def arguments(inputs, output):
    paths = {"image_dir": inputs / "photos", "pairs": inputs / "pairs.txt", "output": output}
    paths["model"] = inputs / "tiny.safetensors"
    return ["infer-pairs", *(part for name, path in paths.items() for part in (f"--{name}", str(path)))]


def test_inference_that_is_killed_continues_with_what_it_had(inputs, tmp_path):
    whole, output = tmp_path / "whole" / "p.h5", tmp_path / "killed" / "p.h5"
    assert main(arguments(inputs, whole)) == 0
    shards = output.with_name("p.shards")
    run = subprocess.Popen([sys.executable, "-c", START, *arguments(inputs, output)], stderr=subprocess.DEVNULL)
    with run:
        while run.poll() is None and not list(shards.glob("*.h5")):
            time.sleep(0.001)
        os.kill(run.pid, signal.SIGKILL)
    there = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards.glob("*.h5")}
    assert there
    assert main(arguments(inputs, output)) == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in there} == there
    expected = {path.name: path.read_bytes() for path in whole.with_name("p.shards").glob("*.h5")}
    assert {path.name: path.read_bytes() for path in shards.glob("*.h5")} == expected
    assert sorted(path.name for path in output.parent.iterdir()) == ["p.h5", "p.shards"]
    assert not list(shards.glob("*.tmp"))


FAILS = """
import os, sys
from pathlib import Path
from tempfile import TemporaryDirectory
from dust3r_sfm import __main__
from dust3r_sfm.benchmarks.interruptions import _start
__main__.main = lambda arguments: arguments[99]
with TemporaryDirectory() as folder:
    code = os.waitstatus_to_exitcode(os.waitpid(_start("filter-pairs", Path("photos"), Path(folder)), 0)[1])
    sys.exit(not (code == 1 and os.path.isdir(folder)))
"""


def test_a_stage_of_the_benchmark_that_fails_leaves_its_folder_to_the_benchmark():
    assert subprocess.run([sys.executable, "-c", FAILS], check=False).returncode == 0


def test_the_benchmark_names_the_stages_there_are(tmp_path):
    with pytest.raises(InputError, match="there is no stage everything: expected some of extract-descriptors"):
        interruptions.main(tmp_path, ("everything",))


def test_a_benchmark_of_photos_that_are_not_there_names_the_stage_that_fails(tmp_path):
    arguments = ["benchmark", "interruptions", "--image_dir", str(tmp_path / "none"), "--stages", "export-scene"]
    command = [sys.executable, "-c", START, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.endswith(
        "extract-descriptors of " + str(tmp_path / "none") + " ends with 2 without being killed: run it to see why\n"
    )
