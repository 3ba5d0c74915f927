"""The table of objects is what its templates draw."""

import numpy as np
import pytest

from dust3r_sfm.training.render import BOX, CYLINDER, ELLIPSOID, NONE
from dust3r_sfm.training.templates import (
    INDOOR,
    NUMBERS,
    OUTDOOR,
    PARTS,
    TABLETOP,
    TEMPLATES,
    _Numbers,
    template_table,
)

INDICES = range(len(TEMPLATES))


@pytest.mark.parametrize("index", INDICES)
def test_parts_are_linear_in_the_random_numbers(index):
    kinds, table = template_table()
    for seed in range(5):
        u = np.random.default_rng(seed).uniform(size=NUMBERS)
        drawn = TEMPLATES[index](_Numbers(u))
        expected = np.array([[*center, *half, *turn, taper] for _, center, half, turn, taper in drawn])
        parts = table[index] @ np.concatenate([[1.0], u])
        np.testing.assert_allclose(parts[: len(drawn)], expected, atol=1e-5)
        assert kinds[index].tolist() == [part[0] for part in drawn] + [NONE] * (PARTS - len(drawn))


def test_parts_have_a_size_and_no_more_taper_than_a_cone():
    kinds, table = template_table()
    least = table[..., 0] + np.minimum(table[..., 1:], 0).sum(-1)  # over all numbers in [0, 1]
    most = table[..., 0] + np.maximum(table[..., 1:], 0).sum(-1)
    there = kinds != NONE
    assert set(np.unique(kinds[there])) == {BOX, ELLIPSOID, CYLINDER}
    assert (least[there][:, 3:6] >= 0).all()
    assert (least[there][:, 9] >= 0).all()
    assert (most[there][:, 3:6] > 0).all()
    assert (most[there][:, 9] < 1).all()
    assert (most[there][:, :6] < 5).all()  # about one across
    assert not table[~there].any()


def test_every_template_is_of_several_random_numbers():
    _, table = template_table()
    assert ((np.abs(table[..., 1:]).max((1, 2)) > 0).sum(-1) >= 2).all()


def test_scenes_draw_from_templates_that_exist():
    assert set(INDOOR) | set(OUTDOOR) | set(TABLETOP) <= set(INDICES)
