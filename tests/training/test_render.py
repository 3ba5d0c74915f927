"""Depth against closed forms, and against a search along each ray for the first point inside the shape."""

import math

import pytest
import torch
from primitives import along_y, camera, from_above, light, pixel_rays, primitive, shoot

from dust3r_sfm.training import render as r

SIZE = (25, 33)  # odd: the middle pixel looks along the camera's axis
MIDDLE = (12, 16)


def turned(seed):
    """A random rotation."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn((3, 3), generator=g, dtype=torch.float64))
    return q * torch.linalg.det(q)


def test_a_sphere_is_its_radius_nearer_than_its_middle():
    sphere = primitive(r.ELLIPSOID, center=(0, 5, 0), half=(2, 2, 2))
    row = camera(along_y([0.0, 0, 0]), 10.0, *SIZE)
    _, depth = shoot([sphere], row, *SIZE)
    assert depth[MIDDLE] == pytest.approx(3.0, rel=1e-5)
    # four pixels to the right: slope 0.4; depth t with t^2 (1 + 0.16) - 10 t + 21 = 0
    assert depth[12, 20] == pytest.approx((10 - math.sqrt(100 - 4 * 1.16 * 21)) / 2.32, rel=1e-4)
    assert depth[12, 21] == 0  # slope 0.5 misses: sin(atan(0.5)) * 5 > 2
    assert torch.allclose(depth, depth.flip(1), rtol=1e-4)
    assert torch.allclose(depth, depth.flip(0), rtol=1e-4)


def test_faces_of_a_box_are_planes():
    box = primitive(r.BOX, center=(0, 6, -1), half=(2, 1, 1))
    row = camera(along_y([0.0, 0, 1.0]), 12.0, *SIZE)
    _, depth = shoot([box], row, *SIZE)
    front = depth[12 + 5 : 12 + 7]  # between 1 m and 3 m below the camera at 5 m: slopes 0.2 to 0.6
    assert torch.allclose(front[:, 16], torch.tensor(5.0), rtol=1e-5)
    # slope 2/12 meets the lid z = 0 at t = 1 / (2/12) = 6, between the edges at 5 and 7
    assert depth[14, 16] == pytest.approx(6.0, rel=1e-5)
    assert depth[13, 16] == 0
    assert (depth[17] > 0).tolist() == [abs(x - 16) / 12 * 5 <= 2 for x in range(33)]


def test_a_tapered_cylinder_narrows_upwards():
    cone = primitive(r.CYLINDER, center=(0, 6, 0), half=(1, 1, 2), taper=0.5)
    for height, radius in ((-1.5, 0.9375), (0.0, 0.75), (1.5, 0.5625)):
        _, depth = shoot([cone], camera(along_y([0.0, 0, height]), 50.0, *SIZE), *SIZE)
        assert depth[MIDDLE] == pytest.approx(6 - radius, rel=1e-5)
    cone = primitive(r.CYLINDER, half=(1, 1, 2), taper=0.5)
    _, depth = shoot([cone], camera(from_above(10.0), 100.0, *SIZE), *SIZE)
    on_lid = (depth[12] - 8).abs() < 1e-4  # it has half the foot's radius, 8 m below
    assert on_lid.tolist() == [abs(x - 16) / 100 * 8 < 0.5 for x in range(33)]


def test_a_room_is_seen_from_within():
    room = primitive(r.ROOM, center=(0, 0, 0), half=(3, 4, 2))
    row = camera(along_y([1.0, -1.0, 0.5]), 8.0, *SIZE)
    origin, directions = pixel_rays(row, *SIZE)
    walls = torch.where(directions > 0, 1.0, -1.0) * torch.tensor([3.0, 4, 2], dtype=torch.float64)
    expected = ((walls - origin) / directions).nan_to_num(posinf=1e9, neginf=1e9).amin(-1)
    _, depth = shoot([room], row, *SIZE)
    assert torch.allclose(depth.double(), expected, rtol=1e-5)
    assert depth[MIDDLE] == pytest.approx(5.0, rel=1e-6)


def test_only_one_side_of_a_clip_is_left():
    half_ball = primitive(r.ELLIPSOID, center=(0, 5, 0), half=(2, 2, 2), clip=(0, 1, 0, -0.25))
    lid_gone = primitive(r.ELLIPSOID, center=(0, 5, 0), half=(2, 2, 2), clip=(0, -1, 0, -0.25))
    row = camera(along_y([0.0, 0, 0]), 10.0, *SIZE)
    assert shoot([half_ball], row, *SIZE)[1][MIDDLE] == pytest.approx(3.0, rel=1e-5)  # the near part is there
    assert shoot([lid_gone], row, *SIZE)[1][MIDDLE] == pytest.approx(5.5, rel=1e-5)  # a plane at 0.25 radii behind


def test_a_level_relief_is_a_plane_at_its_height():
    numbers = torch.zeros(22)
    numbers[1], numbers[4] = 0.3, math.pi / 2  # one sine of no frequency: 0.3 everywhere
    ground = primitive(r.RELIEF, half=(50, 50, 2), relief_parameters=numbers)
    row = camera(from_above(10.0), 20.0, *SIZE)
    _, depth = shoot([ground], row, *SIZE)
    assert torch.allclose(depth, torch.tensor(10 - 0.6), rtol=1e-3)


@pytest.mark.parametrize("roundness", [0.0, 0.6, 1.0, 1.6])
def test_portals_open_where_their_outline_says(roundness):
    """A wall of two by one cells, seen from so far that rays are parallel: openings lie deeper than the wall."""
    half_width, spring, sill = 0.5, 0.2, -0.6
    numbers = torch.zeros(22)
    numbers[:13] = torch.tensor([2, 300, 2, 1, 1, 0, half_width, spring, 0.5, sill, roundness, 1, 0.1])
    wall = primitive(r.RELIEF, half=(2, 1, 1), relief_parameters=numbers)
    row = camera(from_above(1000.0), 20_000.0, 41, 81)
    origin, directions = pixel_rays(row, 41, 81)
    x, y = (origin + directions * 1000.0)[..., :2].unbind(-1)
    u, v = (x.abs() - 1).abs(), y  # the openings' middles are at x = -1 and 1
    arch = torch.where(v > spring, (u * u + roundness * (v - spring) ** 2).sqrt(), u)
    top = math.inf if roundness else spring
    gap = torch.stack([half_width - arch, v - sill, top - v]).amin(0)
    on_wall, sure = (x.abs() < 1.97) & (y.abs() < 0.97), gap.abs() > 0.03
    _, depth = shoot([wall], row, 41, 81)
    expected = torch.where(gap > 0, 1000.5, 999.5).float()
    assert torch.allclose(depth[on_wall & sure], expected[on_wall & sure], atol=0.05)
    assert (on_wall & sure & (gap > 0)).sum() > 200


def test_nothing_is_at_depth_zero_in_the_colour_of_the_sky():
    box = primitive(r.BOX, center=(0, -6, 0))  # behind the camera
    color, depth = shoot([box], camera(along_y([0.0, 0, 0]), 10.0, *SIZE), *SIZE, light(sky=0.25))
    assert not depth.any()
    assert torch.allclose(color, torch.tensor(0.25))


def sines():
    numbers = torch.zeros(22)
    for k, (amplitude, wx, wy, phase) in enumerate([(0.3, 3.0, 1.0, 0.4), (0.2, -1.0, 5.0, 1.0)]):
        numbers[1 + 4 * k : 5 + 4 * k] = torch.tensor([amplitude, wx, wy, phase])
    return numbers


def height_of_sines(q):
    return 0.3 * (3 * q[..., 0] + q[..., 1] + 0.4).sin() + 0.2 * (-q[..., 0] + 5 * q[..., 1] + 1).sin()


def recesses():
    numbers = torch.zeros(22)
    numbers[:9] = torch.tensor([1.0, 6.0, 7.0, 5.0, 0.3, 1.2, -0.3, 0.2, 0.5])
    return numbers


def height_of_recesses(q):
    depth = torch.minimum((7 * q[..., 0] + 0.3).sin() + 0.3, (5 * q[..., 1] + 1.2).sin() - 0.2)
    return -0.5 * (6 * depth).tanh()


INSIDE = {
    "ellipsoid": (r.ELLIPSOID, {}, lambda q: q.norm(dim=-1) < 1),
    "box": (r.BOX, {}, lambda q: q.abs().amax(-1) < 1),
    "clipped box": (
        r.BOX,
        {"clip": (0.6, 0.3, -0.5, 0.1)},
        lambda q: (q.abs().amax(-1) < 1) & (0.6 * q[..., 0] + 0.3 * q[..., 1] - 0.5 * q[..., 2] < 0.1),
    ),
    "cylinder": (r.CYLINDER, {}, lambda q: (q[..., :2].norm(dim=-1) < 1) & (q[..., 2].abs() < 1)),
    "cone": (
        r.CYLINDER,
        {"taper": 0.95},
        lambda q: (q[..., :2].norm(dim=-1) < 1 - 0.475 * (q[..., 2] + 1)) & (q[..., 2].abs() < 1),
    ),
    "hills": (
        r.RELIEF,
        {"relief_parameters": sines()},
        lambda q: (q.abs().amax(-1) < 1) & (q[..., 2] < height_of_sines(q)),
    ),
    "recesses": (
        r.RELIEF,
        {"relief_parameters": recesses()},
        lambda q: (q.abs().amax(-1) < 1) & (q[..., 2] < height_of_recesses(q)),
    ),
}


def first_inside(inside, origin, directions, near, far, steps=3000):
    """Depth at which each ray first enters a shape, by a walk in small steps; 0 where it does not."""
    t = torch.linspace(near, far, steps, dtype=torch.float64)
    found = torch.zeros(directions.shape[:-1], dtype=torch.float64)
    for row in range(len(directions)):
        within = inside(origin + t[:, None, None] * directions[row])
        first = t[within.float().argmax(0)]
        found[row] = torch.where(within.any(0), first, torch.zeros_like(first))
    return found


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("seed", [1, 2])
def test_depth_is_where_a_ray_enters_the_shape(name, seed):
    kind, numbers, inside = INSIDE[name]
    rotation, half = turned(seed), torch.tensor([1.5, 0.8, 1.1], dtype=torch.float64)
    shape = primitive(kind, (0.3, 6, -0.2), half.tolist(), rotation, **numbers)
    row = camera(along_y([0.0, 0, 0]), 40.0, *SIZE)
    origin, directions = pixel_rays(row, *SIZE)
    center = torch.tensor([0.3, 6, -0.2], dtype=torch.float64)
    expected = first_inside(lambda x: inside((x - center) @ rotation / half), origin, directions, 3.0, 9.0)
    _, depth = shoot([shape], row, *SIZE)
    assert 0.1 < (expected > 0).double().mean() < 1.0
    off = (depth - expected).abs() > 6e-3  # three steps of the search
    assert off.double().mean() < 0.01  # what is left are slivers at the outline


def test_the_nearest_of_several_is_seen():
    row = camera(along_y([0.0, 0, 0]), 10.0, *SIZE)
    shapes = [
        primitive(r.ROOM, half=(9, 9, 9)),
        primitive(r.BOX, center=(1, 7, 0), half=(3, 1, 1)),
        primitive(r.ELLIPSOID, center=(0, 5, 0)),
        primitive(r.NONE, center=(0, 2, 0)),
        primitive(r.CYLINDER, center=(-2, 4, 0)),
    ]
    alone = torch.stack([shoot([shape], row, *SIZE)[1] for shape in shapes])
    nearest = torch.where(alone > 0, alone, torch.tensor(math.inf)).amin(0)
    assert torch.equal(shoot(shapes, row, *SIZE)[1], nearest)
    assert len(torch.unique(alone.where(alone > 0, torch.tensor(math.inf)).argmin(0))) == 4


def test_scenes_and_views_of_a_batch_do_not_mix():
    ball, box = primitive(r.ELLIPSOID, center=(0, 5, 0)), primitive(r.BOX, center=(0, 5, 0), tint=(0.2, 0.4, 0.6))
    poses = [along_y([0.0, 0, 0]), along_y([0.5, 1.0, 0.2]), along_y([-0.4, 2.0, 0.0])]
    rows = [camera(pose, 12.0, 12, 16) for pose in poses]
    white = torch.full((1, r.TEXELS, 4), 255, dtype=torch.uint8)
    lights = torch.stack([light(), light()])
    color, depth = r.render_reference(
        torch.stack([ball, box])[:, None], lights, torch.stack([torch.stack(rows)] * 2), white, 12, 16
    )
    for i, shape in enumerate([ball, box]):
        for k, row in enumerate(rows):
            alone_color, alone_depth = shoot([shape], row, 12, 16)
            assert torch.equal(depth[i, k], alone_depth)
            assert torch.equal(color[i, k], alone_color)
