"""One camera for all photos of a size, or one each: what explains the photos about as well with fewer unknowns."""

import dataclasses

import numpy as np
import pytest
from observed import observed_scene, perturbed
from procedural import make_scene

from dust3r_sfm.alignment.refine import RefineConfig, Support, support
from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.mapping import _sharing_suffices, known_of, share_cameras


@pytest.fixture(scope="module", params=["one camera", "a zoom"])
def photos(request):
    """Views, and their model with a camera of each photo: taken by one camera, or with focals that differ."""
    truth = make_scene(6, (48, 64), vary_focal=request.param == "a zoom", pairs=[])
    focals = truth.K[:, 0, 0]
    assert (focals.max() / focals.min() > 1.05) == (request.param == "a zoom")
    model = colmap_from_scene(perturbed(observed_scene(truth), angle_deg=0.0, shift=0.0, focal=1e-4))
    assert model.num_cameras() == 6
    return request.param, truth, model


def test_photos_share_a_camera_where_one_explains_them_as_well_and_else_keep_their_own(photos):
    kind, truth, model = photos
    shared = share_cameras(model, support(model), known_of(truth.views), RefineConfig())
    if kind == "one camera":
        assert shared.reconstruction.num_cameras() == 1
        camera = next(iter(shared.reconstruction.cameras.values()))
        assert camera.mean_focal_length() == pytest.approx(float(truth.K[0, 0, 0]) * 16, rel=0.01)
    else:
        assert shared is None


def test_photos_that_are_said_to_share_a_camera_do_whatever_it_explains(photos):
    _, truth, model = photos
    told = [dataclasses.replace(view, camera_group="all") for view in truth.views]
    assert share_cameras(model, support(model), known_of(told), RefineConfig()).reconstruction.num_cameras() == 1


def test_known_intrinsics_are_not_exchanged_for_shared_ones(photos):
    _, truth, model = photos
    stored = np.array([[16.0, 0, 0], [0, 16, 0], [0, 0, 1]])
    known = [
        dataclasses.replace(view, known_K=(view.net_from_img.new_tensor(stored) @ K.double()))
        for view, K in zip(truth.views, truth.K, strict=True)
    ]
    assert share_cameras(model, support(model), known_of(known), RefineConfig()) is None


@pytest.mark.parametrize(
    ("images", "score", "taken"),
    [(10, 1000.0, True), (10, 995.0, True), (10, 994.0, False), (9, 2000.0, False), (11, 500.0, True)],
)
def test_shared_cameras_may_explain_half_a_percent_less_but_no_image_less(images, score, taken):
    own = Support(images=10, observations=2000, points=500, score=1000.0, evidence=700.0, mean_error_px=0.5)
    shared = Support(images=images, observations=2000, points=500, score=score, evidence=0.7 * score, mean_error_px=0.5)
    assert _sharing_suffices(shared, own) is taken
