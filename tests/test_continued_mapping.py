"""Photos added to others of known pose, on a procedural room: the known poses stay, the new ones are right."""

import dataclasses

import numpy as np
import pytest
import torch
from observed import observed_scene
from procedural import make_scene
from test_refine_scene import sparse_of

from dust3r_sfm.alignment.refine import RefineConfig
from dust3r_sfm.continued_mapping import continue_mapping
from dust3r_sfm.sparse_features import EMPTY

NUM_KNOWN = 3


@pytest.fixture(scope="module")
def procedural():
    return make_scene(5, (96, 128), pairs=[])


@pytest.fixture(scope="module")
def observed(procedural):
    return observed_scene(procedural, num_points=300, noise_px=0.5)


@pytest.fixture(scope="module")
def views(procedural, observed):
    """The first three are known, their frame turned and their unit another than the room's."""
    turned = torch.eye(4, dtype=torch.float64)
    turned[:3, :3] = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    found = []
    for i, view in enumerate(procedural.views):
        size, net_from_img = observed.original_sizes[i], observed.net_from_img[i]
        pose = procedural.cam_from_world[i].double() @ turned
        pose[:3, 3] *= 7.0
        known = {"known_K": torch.from_numpy(observed.K_img(i)), "known_cam_from_world": pose}
        view = dataclasses.replace(view, original_size=size, net_from_img=net_from_img)  # noqa: PLW2901
        found.append((dataclasses.replace(view, **known) if i < NUM_KNOWN else view, pose.numpy()))
    return found


def test_new_photos_join_known_ones_which_stay(observed, views, tmp_path):
    (model,) = continue_mapping([view for view, _ in views], sparse_of(observed), tmp_path, RefineConfig())
    truth = {view.name: pose for view, pose in views}
    assert model.names == set(truth)
    assert model.support.images == 5
    for i in model.reconstruction.reg_image_ids():
        image = model.reconstruction.image(i)
        tolerance = 1e-6 if image.name in observed.names[:NUM_KNOWN] else 0.02
        np.testing.assert_allclose(image.cam_from_world().matrix(), truth[image.name][:3], atol=7 * tolerance)


def test_where_nothing_can_be_added_there_is_no_model(observed, views, tmp_path):
    known = [view for view, _ in views]
    lone = sparse_of(observed, observed.names[:NUM_KNOWN])
    assert continue_mapping(known, lone, tmp_path, RefineConfig()) == []
    assert continue_mapping(known, EMPTY, tmp_path, RefineConfig()) == []
    unknown = [dataclasses.replace(view, known_cam_from_world=None) for view in known]
    assert continue_mapping(unknown, sparse_of(observed), tmp_path, RefineConfig()) == []
