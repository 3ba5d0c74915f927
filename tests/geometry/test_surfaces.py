"""Nearest points of pointmaps: a search of the likeliest tiles finds what a search of everything finds."""

import pytest
import torch
from procedural import make_scene

from dust3r_sfm.geometry import surfaces
from dust3r_sfm.geometry.surfaces import (
    TILE,
    Surface,
    exact_pixels,
    exact_pixels_by_kernel,
    near_pixels,
    nearest_on_surface,
)
from dust3r_sfm.match_dense import match_pair


@pytest.fixture(scope="module")
def prediction():
    scene = make_scene(2, (60, 84), seed=2, noise=0.003)
    return next(iter(scene.predictions.values()))


def surface_of(points, usable):
    return Surface(points[None], usable[None])


def distances(queries, surface, pixels):
    return (surface.points.flatten(1, 2)[0, pixels[0]] - queries[0]).norm(dim=-1)


def test_all_tiles_together_are_an_exact_search(prediction):
    points = prediction.pointmap1_in_cam0
    usable = torch.rand(points.shape[:2], generator=torch.Generator().manual_seed(0)) > 0.3
    points = torch.where(usable[..., None], points, torch.nan)
    target = surface_of(points, usable)
    queries = prediction.pointmap0_in_cam0[::3, ::3].reshape(1, -1, 3)
    found = near_pixels(queries, target, num_tiles=10_000)
    expected = torch.cdist(queries[0].double(), points[usable].double()).amin(dim=1)
    torch.testing.assert_close(distances(queries, target, found).double(), expected, rtol=1e-5, atol=1e-7)
    assert usable.flatten()[found].all()
    exact = exact_pixels(queries, torch.ones(queries.shape[:2], dtype=torch.bool), target)
    torch.testing.assert_close(distances(queries, target, exact).double(), expected, rtol=1e-5, atol=1e-7)


def test_kernels_are_built_where_triton_a_compiler_and_python_s_headers_are(tmp_path, monkeypatch):
    """Triton compiles a C file before it starts a first kernel, and fails where it cannot."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(surfaces.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    can_build = surfaces.can_build_kernels.__wrapped__
    assert can_build()
    for part in ("gcc", "Python.h"):
        (tmp_path / part).rename(tmp_path / "away")
        assert not can_build()
        (tmp_path / "away").rename(tmp_path / part)
    (tmp_path / "gcc").unlink()
    monkeypatch.setenv("CC", "cc")
    assert can_build()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for CUDA devices")
def test_the_kernel_finds_what_an_exact_search_finds(prediction):
    points = torch.stack([prediction.pointmap0_in_cam0, prediction.pointmap1_in_cam0])
    usable = torch.rand(points.shape[:3], generator=torch.Generator().manual_seed(0)) > 0.3
    queries = points.flip(0)[:, ::3, ::3].flatten(1, 2)
    asked = torch.rand(queries.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.1
    on_device = Surface(points.cuda(), usable.cuda())
    found = exact_pixels_by_kernel(queries.cuda(), asked.cuda(), on_device).cpu()
    exact = exact_pixels(queries, asked, Surface(points, usable))
    assert usable.flatten(1).gather(1, found)[asked].all()
    far, near = ((points.flatten(1, 2).take_along_dim(i[..., None], 1) - queries).norm(dim=-1) for i in (found, exact))
    torch.testing.assert_close(far[asked], near[asked], rtol=1e-5, atol=0)


def test_the_tiles_that_are_searched_hold_99_of_100_matches(prediction, monkeypatch):
    exact = match_pair(prediction)
    monkeypatch.setattr(surfaces, "exact_pixels", lambda queries, _, surface: near_pixels(queries, surface, 12))
    assert (60 // TILE) * (84 // TILE) / 5 > 12
    near = match_pair(prediction)
    partner = {tuple(k0): k1 for k0, k1 in zip(near.keypoints0.tolist(), near.keypoints1.tolist(), strict=True)}
    same = [
        tuple(k0) in partner and (torch.tensor(partner[tuple(k0)]) - torch.tensor(k1)).norm() < 1e-3
        for k0, k1 in zip(exact.keypoints0.tolist(), exact.keypoints1.tolist(), strict=True)
    ]
    assert len(same) > 500
    assert sum(same) >= 0.99 * len(same)


def test_a_point_beside_a_plane_falls_on_it_between_pixels():
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    plane = surface_of(torch.stack([x, y, 0 * x], dim=-1), torch.ones(24, 32, dtype=torch.bool))
    queries = torch.tensor([[[7.3, 11.6, 0.4], [20.0, 3.25, -2.0]]])
    asked = torch.ones(1, 2, dtype=torch.bool)
    pixels, points = nearest_on_surface(queries, asked, plane)
    torch.testing.assert_close(pixels, queries[..., :2] + 0.5)
    torch.testing.assert_close(points[..., :2], queries[..., :2])
    assert (points[..., 2] == 0).all()


@pytest.mark.parametrize("search", [exact_pixels, lambda queries, _, surface: near_pixels(queries, surface)])
def test_a_map_without_usable_points_gives_some_pixel_of_it(search):
    nothing = surface_of(torch.full((9, 13, 3), torch.nan), torch.zeros(9, 13, dtype=torch.bool))
    found = search(torch.zeros(1, 5, 3), torch.ones(1, 5, dtype=torch.bool), nothing)
    assert ((found >= 0) & (found < 9 * 13)).all()
