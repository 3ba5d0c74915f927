from pathlib import Path

import numpy as np
import pytest
import torch

from dust3r_sfm.geometry.camera import K_from_focal, unproject
from dust3r_sfm.geometry.focal import focal_from_pointmap, with_focal

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "geometry.npz")


def wavy_pointmap(focal, batch=(), height=24, width=32, principal_point=(16.0, 12.0)):
    generator = torch.Generator().manual_seed(0)
    depth = 2 + torch.rand(*batch, height, width, generator=generator, dtype=torch.float64)
    principal_point = torch.tensor(principal_point, dtype=torch.float64)
    return unproject(
        K_from_focal(torch.full(batch, focal, dtype=torch.float64), principal_point), depth
    ), principal_point


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_focal_of_an_exact_pointmap_is_found(batch, dtype):
    pointmap, principal_point = wavy_pointmap(40.0, batch, principal_point=(14.0, 13.0))
    focal = focal_from_pointmap(
        pointmap.to(dtype), torch.ones(pointmap.shape[:-1], dtype=dtype), principal_point.to(dtype)
    )
    assert focal.dtype == dtype
    torch.testing.assert_close(focal, torch.full(batch, 40.0, dtype=dtype), rtol=1e-5, atol=0)


def test_the_focal_does_not_depend_on_the_scale_of_the_scene():
    pointmap, principal_point = wavy_pointmap(40.0)
    pointmap = pointmap + 0.1 * torch.randn(pointmap.shape, generator=torch.Generator().manual_seed(1))
    confidence = torch.ones(pointmap.shape[:-1])
    a = focal_from_pointmap(pointmap, confidence, principal_point)
    torch.testing.assert_close(focal_from_pointmap(1000 * pointmap, 7 * confidence, principal_point), a)


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"), [("pointmap", "clean", 1e-4), ("pointmap_outliers", "", 0.03)]
)
def test_the_published_pointmaps_give_their_focal(name, reference, tolerance):
    # The published grid counts pixels from 0 at the first centre with the principal point at (w / 2, h / 2); ours has
    # that centre at 0.5, so the same differences pixel - principal point come of a principal point half a pixel on.
    pointmap = torch.tensor(GOLDEN[name])
    height, width = pointmap.shape[:2]
    principal_point = torch.tensor([width / 2 + 0.5, height / 2 + 0.5])
    focal = focal_from_pointmap(pointmap, torch.ones(height, width), principal_point).item()
    expected = GOLDEN["focal_weiszfeld_clean"].item() if reference else 137
    assert focal == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("kind", ["scattered", "near the camera plane", "far behind the pixels", "not finite"])
def test_one_fifth_of_outliers_does_not_move_the_focal(kind):
    pointmap, principal_point = wavy_pointmap(40.0)
    generator = torch.Generator().manual_seed(1)
    outlying = torch.rand(pointmap.shape[:-1], generator=generator) < 0.2
    noise = torch.randn(int(outlying.sum()), 3, generator=generator, dtype=torch.float64)
    broken = {
        "scattered": 3 * noise,
        "near the camera plane": pointmap[outlying] * torch.tensor([1, 1, 1e-6]),
        "far behind the pixels": pointmap[outlying] * torch.tensor([1, 1, 1e6]),
        "not finite": noise * torch.nan,
    }
    pointmap[outlying] = broken[kind]
    focal = focal_from_pointmap(pointmap, torch.ones(pointmap.shape[:-1]), principal_point)
    assert focal.item() == pytest.approx(40, rel=0.01)


def test_points_without_confidence_do_not_count():
    pointmap, principal_point = wavy_pointmap(40.0)
    pointmap[:, 12:] *= torch.tensor([2.0, 2.0, 1.0])  # a consistent wrong focal in the larger part
    confidence = torch.ones(pointmap.shape[:-1])
    confidence[:, 12:] = 0
    assert focal_from_pointmap(pointmap, confidence, principal_point).item() == pytest.approx(40)
    confidence[:, 12:] = 0.1
    assert focal_from_pointmap(pointmap, confidence, principal_point).item() == pytest.approx(40, rel=0.02)


def test_a_pointmap_with_nothing_in_front_has_no_focal_and_others_are_unaffected():
    pointmap, principal_point = wavy_pointmap(40.0, (3,))
    confidence = torch.ones(pointmap.shape[:-1])
    pointmap[1, ..., 2] *= -1
    confidence[2] = 0
    focal = focal_from_pointmap(pointmap, confidence, principal_point)
    assert focal.isnan().tolist() == [False, True, True]
    assert focal[0].item() == pytest.approx(40)


def test_points_given_another_focal_length_have_it_and_stay_on_their_pixels():
    pointmap, principal_point = wavy_pointmap(40.0, (2,))
    confidence = torch.ones(pointmap.shape[:-1])
    own, known = torch.tensor([40.0, torch.nan], dtype=torch.float64), torch.tensor([70.0, 70.0], dtype=torch.float64)
    given = with_focal(pointmap.flatten(1, 2), own, known).view_as(pointmap)
    focal = focal_from_pointmap(given, confidence, principal_point)
    torch.testing.assert_close(focal, torch.tensor([70.0, 40.0], dtype=focal.dtype))  # none to tell: as it was
    assert torch.equal(given[..., :2], pointmap[..., :2])
