"""Fresh procedural pairs for measuring: exact, the same every time."""

from pathlib import Path

import pytest
import torch

from dust3r_sfm import evaluate_pairs
from dust3r_sfm.errors import InputError
from dust3r_sfm.geometry.camera import project, unproject
from dust3r_sfm.procedural_pairs import procedural_pairs

pytestmark = pytest.mark.usefixtures("fast_render")


def test_the_photos_of_a_pair_see_the_same_world():
    found = procedural_pairs(3, 64, "cpu", num_generated=3)
    assert found.pairs == ((0, 1), (2, 3), (4, 5))
    assert found.pairs_across == ((0, 3), (2, 5), (4, 1))
    for i, j in found.pairs:
        view0, view1 = found.views[i], found.views[j]
        assert view0.view.image.shape == (48, 64, 3)
        points = unproject(view0.K, view0.depth).flatten(0, 1)[view0.depth.flatten() > 0]
        cam1_from_cam0 = (view1.cam_from_world @ torch.linalg.inv(view0.cam_from_world)).float()
        in_cam1 = points @ cam1_from_cam0[:3, :3].T + cam1_from_cam0[:3, 3]
        pixels = project(view1.K, in_cam1[in_cam1[:, 2] > 0])
        inside = (pixels >= 0).all(-1) & (pixels[:, 0] < 64) & (pixels[:, 1] < 48)
        x, y = pixels[inside].long().unbind(-1)
        depth, seen = in_cam1[in_cam1[:, 2] > 0][inside][:, 2], view1.depth[y, x]
        assert inside.float().mean() > 0.05
        assert ((seen - depth).abs() < 0.05 * depth).float().mean() > 0.2  # the rest is hidden, or at an edge
    again = procedural_pairs(3, 64, "cpu", num_generated=3)
    assert all(torch.equal(a.view.image, b.view.image) for a, b in zip(found.views, again.views, strict=True))


@pytest.mark.parametrize("both", [{}, {"scenes_dir": Path("scenes"), "procedural": 3}])
def test_scenes_or_procedural_pairs_but_not_both(both):
    with pytest.raises(InputError, match="one of both"):
        evaluate_pairs.main(**both)
