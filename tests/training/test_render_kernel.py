"""The fused kernel, compiled for the CPU, computes what the PyTorch renderer does."""

import subprocess
from pathlib import Path

import pytest
import torch
from primitives import along_y, camera, light, primitive

from dust3r_sfm.training import render as r
from dust3r_sfm.training.viewpoints import sample_cameras
from dust3r_sfm.training.world import COURT, Dice, sample_world

SIZE = (40, 56)


@pytest.fixture(scope="module", autouse=True)
def _needs_a_compiler(kernel):
    if kernel is None:
        pytest.skip("no g++")


@pytest.fixture(scope="module")
def scenes(_needs_a_compiler, kernel, textures):
    """Random worlds of all kinds with two cameras each."""
    dice = Dice("cpu", 3)
    world = sample_world(dice, 14, len(textures))

    def depth(primitives, lights, cameras, height, width):
        return r.render_fused(kernel, primitives, lights, cameras, textures, height, width, with_color=False)[1]

    assert set(world.kind.tolist()) == set(range(COURT + 1))
    return world.primitives, world.lights, sample_cameras(dice, world, depth, *SIZE)


@pytest.mark.parametrize("samples", [1, 2])
def test_random_worlds_look_the_same(kernel, scenes, textures, samples):
    chosen = slice(None) if samples == 1 else slice(0, 5)
    scenes = [tensor[chosen] for tensor in scenes]
    color, depth = r.render_fused(kernel, *scenes, textures, *SIZE, samples)
    expected_color, expected_depth = r.render_reference(*scenes, textures, *SIZE, samples)
    assert (expected_depth > 0).float().mean() > 0.7
    off = (depth - expected_depth).abs() > 1e-3 * expected_depth
    assert off.float().mean() < 1e-3
    off = (color - expected_color).abs().amax(-1) > 0.02 * expected_color.amax(-1).clamp(min=0.1)
    assert off.float().mean() < 1e-3


def test_every_shape_is_the_same_under_every_light(kernel, textures):
    clip = (0.3, 0.5, -0.2, 0.2)
    numbers = torch.zeros(22)
    numbers[0], numbers[1], numbers[2], numbers[3], numbers[6], numbers[8] = 1, 5, 9, 12, -2, 0.4  # a grid of ribs
    shapes = [
        primitive(r.BOX, (-2.5, 6, 1), clip=clip, contrast=0.8, density0=0.5, gloss=0.7),
        primitive(r.ELLIPSOID, (0, 6, 1), (1, 1.5, 0.8), clip=clip, texture0=3, contrast=1.0, detail=0.5),
        primitive(r.CYLINDER, (2.5, 6, 1), taper=0.98, emission=0.5, contrast=0.5, texture1=2, offset=0.3),
        primitive(r.RELIEF, (0, 6, -1.5), (5, 4, 0.6), relief_parameters=numbers, texture0=5, contrast=1.0),
        primitive(r.ROOM, (0, 4, 0), (6, 7, 4), texture0=1, contrast=0.6, gloss=0.3),
        primitive(r.NONE),
    ]
    lamps = [
        light(0.3, ((1.0, 4.0, 3.0), True, 4.0), ((0.3, -0.6, 0.7), False, 1.0)),
        light(0.2, ((-0.4, -0.5, 0.7), False, 1.0), ((0.0, 0.0, 2.0), True, 2.0), sky=0.6),
    ]
    for row in lamps:
        row[31], row[32] = 4, 0.6  # clouds
    scene = torch.stack(shapes).expand(2, -1, -1), torch.stack(lamps)
    row = camera(along_y([0.2, 0.1, 0.3]), 45.0, 48, 64).expand(2, 1, -1)
    color, depth = r.render_fused(kernel, *scene, row, textures, 48, 64)
    expected_color, expected_depth = r.render_reference(*scene, row, textures, 48, 64)
    assert ((depth - expected_depth).abs() > 1e-3 * expected_depth).float().mean() < 1e-3
    assert ((color - expected_color).abs().amax(-1) > 0.01).float().mean() < 2e-3
    assert (color[0] - color[1]).abs().amax() > 0.1


def test_depth_without_colour_is_the_same_depth(kernel, scenes, textures):
    color, depth = r.render_fused(kernel, *scenes, textures, *SIZE, with_color=False)
    assert color is None
    assert torch.equal(depth, r.render_fused(kernel, *scenes, textures, *SIZE)[1])


def test_more_primitives_than_the_kernel_holds_are_refused(kernel, textures):
    rows = torch.zeros((1, r.MAX_PRIMITIVES + 1, r.PRIMITIVE_SIZE))
    with pytest.raises(ValueError, match=f"up to {r.MAX_PRIMITIVES} primitives a scene, got {r.MAX_PRIMITIVES + 1}"):
        r.render_fused(kernel, rows, light()[None], torch.zeros((1, 1, r.CAMERA_SIZE)), textures, 8, 8)


def test_the_library_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = []

    def run(call, **_):
        command.append(call)
        Path(call[-2]).touch()
        return subprocess.CompletedProcess(call, 0)

    monkeypatch.setattr(subprocess, "run", run)
    source = tmp_path / "source.cu"
    source.write_text("one")
    first = r._compile(["g++"], source)
    assert r._compile(["g++"], source) == first
    assert len(command) == 1
    source.write_text("two")  # another text is another library
    assert r._compile(["g++"], source) != first
    assert len(command) == 2


def test_a_compiler_that_fails_is_named_with_what_it_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source.cu"
    source.write_text("this is no source")
    with pytest.raises(RuntimeError, match=r"g\+\+ could not compile .*source\.cu:\n.*error"):
        r._compile(["g++", "-shared", "-x", "c++"], source)
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_without_a_compiler_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert r.load_kernel.__wrapped__("cpu") is None
