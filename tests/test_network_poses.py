"""Queries of a procedural room by exact pointmaps: pose and unit come back, and what has no support has no pose."""

import dataclasses

import numpy as np
import pycolmap
import pytest
import torch
from aligned import true_scene
from procedural import STORED_PER_NET, make_scene

import dust3r_sfm as ds
from dust3r_sfm.alignment.localization import Features, QueryCamera, Structure
from dust3r_sfm.errors import InputError
from dust3r_sfm.models.dust3r import Dust3rConfig
from dust3r_sfm.network_poses import unit_scale
from dust3r_sfm.pairs import Pair, PairPrediction
from dust3r_sfm.query_poses import QUERY, LocateConfig, Query, locate_by_network
from dust3r_sfm.reference import reference_of_scene

NOTHING = Structure(np.zeros((0, 3)), {}, {})
NUM_REFERENCES = 3


@pytest.fixture(scope="module")
def procedural():
    return make_scene(4, (64, 96), seed=3)


@pytest.fixture(scope="module")
def scene(procedural):
    """The true scene of all images but the last, with one of its own length units."""
    whole = true_scene(procedural)
    return dataclasses.replace(
        whole,
        **{f: getattr(whole, f)[:NUM_REFERENCES] for f in ("names", "K", "cam_from_world", "net_from_img")},
        **{f: getattr(whole, f)[:NUM_REFERENCES] for f in ("depth", "confidence", "original_sizes")},
    )


@pytest.fixture(scope="module")
def query_view(procedural):
    return dataclasses.replace(procedural.views[-1], name=QUERY + procedural.names[-1])


@pytest.fixture(scope="module")
def predictions(procedural, query_view):
    names = dict(zip(procedural.names, [*procedural.names[:NUM_REFERENCES], query_view.name], strict=True))
    return {Pair(names[a], names[b]): prediction for (a, b), prediction in procedural.predictions.items()}


def true_camera(procedural):
    f, cx, cy = (STORED_PER_NET * float(procedural.K[-1][i, j]) for i, j in ((0, 0), (0, 2), (1, 2)))
    width, height = procedural.views[-1].original_size
    return pycolmap.Camera(model="SIMPLE_PINHOLE", width=width, height=height, params=[f, cx, cy])


def locate(procedural, scene, query_view, predictions, method, known, **options):
    camera = QueryCamera(query_view.original_size, known=true_camera(procedural) if known else None)
    query = Query(query_view, camera, Features(np.zeros((0, 2)), np.zeros((0, 128), np.uint8)))
    views = dict(zip(scene.names, procedural.views, strict=False))
    reference, config = reference_of_scene(scene), LocateConfig(method=method, **options)
    return locate_by_network(query, list(scene.names), NOTHING, reference, views, predictions, config)


def errors(located, procedural):
    """Degrees, and metres in a room of 8."""
    found, truth = torch.from_numpy(located.pose.cam_from_world), procedural.cam_from_world[-1].double()
    cosine = ((found[:, :3] @ truth[:3, :3].T).trace() - 1) / 2
    centers = [-p[:3, :3].T @ p[:3, 3] for p in (found, truth)]
    return float(torch.rad2deg(cosine.clamp(max=1).acos())), float((centers[0] - centers[1]).norm())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("method", ["pnp", "relative", "auto"])
def test_exact_pointmaps_give_the_pose_in_the_reference_s_unit(
    procedural, scene, query_view, predictions, method, known
):
    located = locate(procedural, scene, query_view, predictions, method, known)
    angle, distance = errors(located, procedural)
    assert located.by == ("pnp" if method == "auto" else method)
    assert angle < 1
    assert distance < 0.1
    assert abs(located.pose.camera.mean_focal_length() / true_camera(procedural).mean_focal_length() - 1) < 0.03


def test_pointmaps_of_another_place_give_no_pose(procedural, scene, query_view, predictions):
    generator = torch.Generator().manual_seed(0)

    def noise(prediction):
        shape = prediction.pointmap0_in_cam0.shape
        points = [torch.randn(shape, generator=generator) + torch.tensor([0.0, 0, 4]) for _ in range(2)]
        return PairPrediction(points[0], prediction.confidence0, points[1], prediction.confidence1)

    wrong = {pair: noise(prediction) for pair, prediction in predictions.items()}
    assert locate(procedural, scene, query_view, wrong, "pnp", known=True) is None


def test_the_unit_is_the_median_ratio_of_known_and_predicted_depths(procedural, scene):
    pair = Pair(*procedural.names[:2])
    seen = reference_of_scene(scene).seen[pair.name0].copy()
    seen[: len(seen) // 3, 2] *= 7  # a third of the depths is wrong
    scale = unit_scale(procedural.predictions[pair], procedural.views[0], seen)
    assert abs(scale * procedural.scales[pair] - 1) < 0.05
    assert unit_scale(procedural.predictions[pair], procedural.views[0], seen[:5]) is None
    assert unit_scale(procedural.predictions[pair], procedural.views[0], None) is None


def test_the_public_face_takes_model_scene_and_view(procedural, scene, query_view, predictions, monkeypatch):
    """The network is replaced by the truth; the descriptor of random weights still ranks all images."""
    torch.manual_seed(0)
    small = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2, "dec_embed_dim": 32, "dec_depth": 1}
    model = ds.Dust3r(Dust3rConfig(image_size=96, dec_num_heads=2, **small))
    monkeypatch.setattr("dust3r_sfm.queries.infer_pairs", lambda *_: predictions)
    holding = dataclasses.replace(scene, views=tuple(procedural.views[:NUM_REFERENCES]))
    located = ds.localize(model, holding, procedural.views[-1])
    assert errors(located, procedural)[1] < 0.1
    assert located.pose.camera.width == procedural.views[-1].original_size[0]
    with pytest.raises(InputError, match="give the views"):
        ds.localize(model, scene, procedural.views[-1])
