import dataclasses

import numpy as np
import pycolmap
import pytest
import torch
from aligned import true_scene
from procedural import make_scene

from dust3r_sfm.formats.pointclouds import dense_cloud, write_ply


@pytest.fixture(scope="module")
def procedural():
    return make_scene(2, (48, 64), seed=3, pairs=[(0, 1)])


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_others_read_the_ply_as_it_was_meant(count, tmp_path):
    points, colors = torch.randn(count, 3), torch.randint(0, 256, (count, 3), dtype=torch.uint8)
    write_ply(tmp_path / "new" / "points.ply", points, colors)
    model = pycolmap.Reconstruction()
    model.import_PLY(tmp_path / "new" / "points.ply")
    assert len(model.points3D) == count
    if count:
        read = [model.points3D[i] for i in sorted(model.points3D)]
        np.testing.assert_array_equal([p.xyz for p in read], points)
        np.testing.assert_array_equal([p.color for p in read], colors)
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_the_cloud_is_the_surfaces_seen_with_their_colours(procedural):
    points, colors = dense_cloud(true_scene(procedural), procedural.views)
    truth = torch.cat([p.reshape(-1, 3) for p in procedural.points_in_world])
    torch.testing.assert_close(points, truth, atol=1e-4, rtol=1e-4)
    assert torch.equal(colors, torch.cat([view.image.reshape(-1, 3) for view in procedural.views]))


def test_pixels_without_confidence_depth_or_under_a_mask_stay_out(procedural):
    scene = true_scene(procedural)
    confidence, depth, mask = torch.full((48, 64), 5.0), scene.depth[0].clone(), torch.ones(48, 64, dtype=torch.bool)
    confidence[:10], depth[10:20], depth[20:30], mask[30:40] = 1.0, torch.nan, 0.0, False
    scene = dataclasses.replace(scene, confidence=(confidence, confidence * 0), depth=(depth, scene.depth[1]))
    views = [dataclasses.replace(procedural.views[0], mask=mask), procedural.views[1]]
    points, _ = dense_cloud(scene, views, min_confidence=2.0)
    torch.testing.assert_close(points, procedural.points_in_world[0][40:].reshape(-1, 3), atol=1e-4, rtol=1e-4)


def test_the_less_sure_half_stays_out_unless_told_otherwise(procedural):
    scene = true_scene(procedural)
    confidence = torch.rand(48, 64, generator=torch.Generator().manual_seed(0))
    points, _ = dense_cloud(dataclasses.replace(scene, confidence=(confidence, 100 * confidence)), procedural.views)
    assert len(points) == pytest.approx(48 * 64, abs=4)


def test_thinning_is_even_and_the_same_every_time(procedural):
    scene = true_scene(procedural)
    everything, _ = dense_cloud(scene, procedural.views)
    points, colors = dense_cloud(scene, procedural.views, max_points=1000)
    assert len(points) == len(colors) == 1000
    assert torch.equal(points, dense_cloud(scene, procedural.views, max_points=1000)[0])
    assert (points[:, None] == everything[None]).all(-1).any(1).all()
    assert (points[500:, None] == everything[None, 3072:]).all(-1).any(1).all()
