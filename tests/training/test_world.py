"""Laws that every random world keeps, so that the renderer's short cuts hold and cameras have something to see."""

import math

import pytest
import torch

from dust3r_sfm.training import render as r
from dust3r_sfm.training.viewpoints import _facing, cameras_from, look_at, sample_cameras
from dust3r_sfm.training.world import (
    CHAOS,
    COURT,
    GRAND,
    GROUPS,
    INSIDE,
    OUTSIDE,
    PANELS,
    PORTALS,
    STREETS,
    STUDIOS,
    TABLE,
    Dice,
    rotation_from_rotvec,
    sample_world,
)

TEXTURES = 50


@pytest.fixture(scope="module")
def world():
    return sample_world(Dice("cpu", 21), 64, TEXTURES)


@pytest.fixture(scope="module")
def rows(world):
    """All primitives that are there."""
    flat = world.primitives.flatten(0, 1)
    return flat[flat[:, r.TYPE] != r.NONE]


def flat_depth(primitives, lights, cameras, height, width):
    """Every view is as good as the other."""
    return torch.ones((*cameras.shape[:2], height, width))


def test_worlds_are_of_all_kinds_and_have_something_in_them(world):
    assert set(world.kind.tolist()) == {INSIDE, OUTSIDE, TABLE, CHAOS, COURT}
    there = world.primitives[..., r.TYPE] != r.NONE
    assert there.sum(1).min() > 12
    assert world.primitives.shape[1] <= r.MAX_PRIMITIVES
    assert set(world.primitives[..., r.TYPE].unique().tolist()) == {r.NONE, 1, 2, 3, 4, 5}
    assert world.primitives.isfinite().all()
    assert world.lights.isfinite().all()


def test_extents_are_the_shapes_half_sizes(rows):
    linear = rows[:, r.OBJECT_FROM_WORLD].view(-1, 3, 4)[..., :3].double()
    assert torch.allclose(1 / linear.norm(dim=-1), rows[:, r.EXTENT].double(), rtol=1e-3)
    turn = linear * rows[:, r.EXTENT].double()[..., None]
    assert torch.allclose(turn @ turn.mT, torch.eye(3).double().expand(len(rows), 3, 3), atol=1e-3)


def test_bounding_spheres_hold_the_shapes(rows):
    """Points of the surface of each shape, in the world, are in its sphere."""
    g = torch.Generator().manual_seed(0)
    in_object = 2 * torch.rand((len(rows), 200, 3), generator=g) - 1
    in_object[:, :8] = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1.0, 1) for z in (-1.0, 1)])
    kind = rows[:, r.TYPE, None, None]
    in_object = torch.where(kind == r.ELLIPSOID, torch.nn.functional.normalize(in_object, dim=-1), in_object)
    rim = torch.cat([torch.nn.functional.normalize(in_object[..., :2], dim=-1), in_object[..., 2:].sign()], -1)
    in_object = torch.where(kind == r.CYLINDER, rim, in_object)
    m = rows[:, r.OBJECT_FROM_WORLD].view(-1, 3, 4).double()
    in_world = torch.linalg.solve(m[..., :3], (in_object.double() - m[:, None, :, 3]).mT).mT
    away = (in_world - rows[:, None, 32:35]).norm(dim=-1).amax(1)
    assert (away <= rows[:, 35] * 1.001).all()


def test_materials_are_within_their_ranges(rows):
    for index in (r.TEXTURE0, r.TEXTURE1):
        assert torch.equal(rows[:, index], rows[:, index].floor())
        assert rows[:, index].min() >= 0
        assert rows[:, index].max() < TEXTURES
    assert (rows[:, [r.DENSITY0, r.DENSITY1]] > 0).all()
    for index in (r.CONTRAST, r.DETAIL, r.GLOSS, 27, 28, 29):
        assert rows[:, index].min() >= 0
        assert rows[:, index].max() <= 1
    assert (rows[:, r.TAPER] <= 0.98).all()


def test_worlds_of_one_make_have_few_textures_and_hardly_two_colours(world):
    alike, usual = sample_world(Dice("cpu", 21), 64, TEXTURES, one_make=1.0).primitives, world.primitives
    assert max(len(scene[..., r.TEXTURE0].unique()) for scene in alike) <= 3
    assert max(len(scene[..., r.TEXTURE0].unique()) for scene in usual) > 5
    assert alike[..., r.TINT].std(1).mean() < 0.4 * usual[..., r.TINT].std(1).mean()
    assert torch.equal(alike[..., r.OBJECT_FROM_WORLD], usual[..., r.OBJECT_FROM_WORLD])  # the shapes stay


@pytest.mark.parametrize("courts", [0.0, 0.5, 1.0])
def test_as_many_worlds_are_courts_as_asked_for(courts):
    kind = sample_world(Dice("cpu", 3), 400, TEXTURES, courts=courts).kind
    assert (kind == COURT).float().mean() == pytest.approx(courts, abs=0.08)


@pytest.fixture(scope="module")
def courts():
    return sample_world(Dice("cpu", 5), 300, TEXTURES, courts=1.0)


def test_some_courts_are_streets_with_things_all_along(courts):
    aspect = courts.room[:, 0] / courts.room[:, 1]
    streets = aspect > 4.7  # more than two random sides give
    assert 0.3 * STREETS < streets.float().mean() < STREETS
    reach = courts.subjects[streets, :GROUPS, 0].abs().amax(1) / courts.room[streets, 1]
    assert reach.median() > 2


def test_in_half_of_the_courts_each_facade_has_one_large_portal(courts):
    facades = courts.primitives[:, 2:6]
    relief = facades[..., r.RELIEF_PARAMETERS]
    single = (relief[..., 0] == PORTALS) & (relief[..., 2] == 1) & (relief[..., 3] == 1)
    assert single.all(1).float().mean() == pytest.approx(GRAND, abs=0.1)


def test_some_tables_stand_before_one_plain_brightness():
    world = sample_world(Dice("cpu", 6), 1000, TEXTURES)
    panels = world.primitives[:, 2 : 2 + PANELS, r.TYPE]
    bare = (panels == r.NONE).all(1)
    assert bare[world.kind == TABLE].float().mean() == pytest.approx(STUDIOS, abs=0.1)
    assert not bare[world.kind != TABLE].any()
    around = world.primitives[bare, :2]
    assert (around[..., r.CONTRAST] <= 0.1).all()
    assert (around[..., r.TINT].amin(-1) > 0.4).all()
    assert torch.equal(around[:, 0, r.TINT], around[:, 1, r.TINT])


def test_most_cameras_in_streets_look_along_them():
    world = sample_world(Dice("cpu", 7), 600, TEXTURES, courts=1.0)
    ahead = sample_cameras(Dice("cpu", 8), world, flat_depth, 24, 32)[:, 0, [2, 6]].abs()
    angle = torch.atan2(ahead[:, 1], ahead[:, 0]).rad2deg()  # to the long side, from 0 to 90 degrees
    is_street = world.room[:, 0] > 4.7 * world.room[:, 1]
    assert (angle[is_street] < 20).float().mean() > 0.8


def test_the_narrower_the_field_of_view_the_farther_most_cameras_stand():
    """As photographers frame what they show; walls and ceilings end it."""
    world = sample_world(Dice("cpu", 11), 2000, TEXTURES)
    first = sample_cameras(Dice("cpu", 12), world, flat_depth, 24, 32)[:, 0]
    nearest = (world.subjects - first[:, None, [3, 7, 11]]).norm(dim=-1).amin(1) / world.radius
    fov = 2 * torch.atan(16 / first[:, 12]).rad2deg()
    table = world.kind == TABLE
    narrow, wide = (nearest[table & which].median() for which in (fov < 35, fov > 75))
    assert narrow > 1.25 * wide


def test_most_cameras_that_look_at_a_wall_stand_before_it(courts):
    at_wall = torch.ones((len(courts.kind), 4), dtype=torch.bool)
    nothing = torch.zeros((*at_wall.shape, 3)), torch.zeros(at_wall.shape), torch.zeros(at_wall.shape)
    subject, azimuth, distance = _facing(Dice("cpu", 9), courts, at_wall, nothing)
    facing = distance > 0
    assert facing.float().mean() == pytest.approx(0.7, abs=0.05)
    sides = courts.room[:, None, :2]
    on_wall = ((subject[..., :2].abs() - sides).abs() < 1e-4 * sides).any(-1)
    assert on_wall[facing].all()
    place = subject[..., :2] + torch.stack([azimuth.cos(), azimuth.sin()], -1) * distance[..., None]
    inwards = -subject[..., :2] / sides
    is_x = inwards[..., 0].abs() > inwards[..., 1].abs()
    normal = torch.stack([inwards[..., 0].sign() * is_x, inwards[..., 1].sign() * ~is_x], -1)
    before = ((place - subject[..., :2]) * normal).sum(-1) / distance
    assert (before[facing] > 0.8).float().mean() > 0.7


def test_suns_are_directions_and_lamps_hang_in_the_room(world):
    for start in (0, 8):
        lamp = world.lights[:, start : start + 8]
        is_point = lamp[:, 3] > 0.5
        assert torch.allclose(lamp[~is_point, :3].norm(dim=-1), torch.tensor(1.0))
        assert (lamp[~is_point, 2] > 0).all()
        assert (lamp[is_point, :3].abs() <= world.room[is_point]).all()
        assert (world.kind[is_point] != OUTSIDE).all()
    assert (world.lights[:, 4:7] > 0).float().mean() > 0.95


def test_subjects_stand_in_their_disc(world):
    inner = world.subjects[:, :GROUPS, :2].norm(dim=-1) / world.radius[:, None]
    assert (inner < 1.01).float().mean() > 0.8  # rows of things may be longer
    assert (world.subjects[..., :2].abs() <= world.room[:, None, :2] * 1.01).all()


def test_cameras_stand_in_the_room_above_the_ground(world):
    rows = sample_cameras(Dice("cpu", 3), world, flat_depth, 24, 32)
    place = rows[..., [3, 7, 11]]
    assert rows.shape == (64, 2, r.CAMERA_SIZE)
    assert (place[..., :2].abs() <= 0.9 * world.room[:, None, :2] + 1e-4).all()
    assert (place[..., 2] >= 0.02 - 1e-6).all()
    assert (place[..., 2] <= 0.93 * world.room[:, None, 2] + 1e-4).all()
    assert (place[:, 0] - place[:, 1]).norm(dim=-1).median() > 0.01


def test_the_same_dice_throw_the_same_world():
    first, again, other = (sample_world(Dice("cpu", seed), 3, 8).primitives for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_camera_looks_at_its_target_with_its_x_level():
    g = torch.Generator().manual_seed(0)
    center, target = torch.randn((2, 20, 3), generator=g)
    pose = look_at(center, target, torch.zeros(20))
    x, y, z = pose[..., :3].unbind(-1)
    assert torch.equal(pose[..., 3], center)
    assert torch.allclose(z, torch.nn.functional.normalize(target - center, dim=-1), atol=1e-5)
    assert torch.allclose(torch.linalg.cross(x, y), z, atol=1e-5)
    assert (x[:, 2].abs() < 5e-3).all()  # down is turned by a thousandth, for cameras that look straight down
    assert (y[:, 2] < 0).all()
    rolled = look_at(center, target, torch.full((20,), 0.3))
    assert torch.allclose((rolled[..., 0] * x).sum(-1), torch.tensor(math.cos(0.3)), atol=1e-5)
    assert torch.allclose((rolled[..., 0] * y).sum(-1), torch.tensor(math.sin(0.3)), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(30, 40), (40, 30)])
def test_the_field_of_view_spans_the_longer_side(height, width):
    pose = torch.eye(4)[None, :3]
    (row,) = cameras_from(pose, torch.tensor([1.2]), height, width)
    assert float(row[12]) == float(row[13])
    assert 2 * math.atan(20 / float(row[12])) == pytest.approx(1.2)
    assert row[14:].tolist() == [width / 2, height / 2]
    (shifted,) = cameras_from(pose, torch.tensor([1.2]), height, width, torch.tensor([[0.1, -0.2]]))
    assert shifted[14:].tolist() == pytest.approx([0.6 * width, height / 2 - 0.2 * width])


def test_rotation_vectors_turn_by_their_length_about_themselves():
    v = torch.tensor([[0.0, 0, math.pi / 2], [0.3, -0.4, 0.5], [0, 0, 0]])
    R = rotation_from_rotvec(v)
    assert torch.allclose(R[0] @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6)
    assert torch.allclose((R @ v[..., None])[..., 0], v, atol=1e-6)
    assert torch.allclose(R.diagonal(dim1=1, dim2=2).sum(-1), 1 + 2 * v.norm(dim=-1).cos(), atol=1e-5)
    assert torch.allclose(R @ R.mT, torch.eye(3).expand(3, 3, 3), atol=1e-6)


def test_ranged_dice_are_log_uniform_within_the_range_of_each_kind():
    kind = torch.tensor([0, 1, 0, 1])
    drawn = Dice("cpu", 0).ranged(((1.0, 4.0), (10.0, 1000.0)), kind, 4, 2000)
    for k, (low, high) in zip(kind, [(1, 4), (10, 1000)] * 2, strict=True):
        values = drawn[0 if k == 0 else 1]
        assert low <= values.min() < values.max() <= high
        assert float(values.log().mean()) == pytest.approx(math.log(low * high) / 2, abs=0.1)
