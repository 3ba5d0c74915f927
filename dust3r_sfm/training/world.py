"""Random procedural worlds, a whole batch at once: rooms, streets and hills, things on a table, and plain chaos."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dust3r_sfm.geometry.transforms import rotation_from_rotvec
from dust3r_sfm.training import render as r
from dust3r_sfm.training.templates import INDOOR, NUMBERS, OUTDOOR, PARTS, TABLETOP, template_table

GROUPS, PANELS = 11, 12
PRIMITIVES = 2 + PANELS + GROUPS * PARTS  # the room, the ground, what stands around, the objects

INSIDE, OUTSIDE, TABLE, CHAOS, COURT = range(5)
"""A court is open to the sky, and its walls are facades; a long one is a street."""
STREETS = 0.25
"""Share of the courts that are stretched to streets."""
GRAND = 0.5
"""Share of the courts whose facades have one large portal each."""
STUDIOS = 0.3
"""Share of the tables that stand before nothing but one plain brightness, as what is photographed for a catalogue."""
COURTS = 0.15
_KIND_WEIGHTS = (0.33, 0.25, 0.19, 0.08, COURTS)

# By kind: half size of the room, its height, radius in which objects stand, their size, eye height over the ground,
# distance of the camera from its subject as a share of that radius.
_ROOM = ((1.6, 4.5), (6.0, 40.0), (1.2, 4.0), (3.0, 9.0), (3.0, 14.0))
_HEIGHT = ((1.2, 2.0), (4.0, 15.0), (1.0, 2.0), (2.0, 6.0), (2.0, 8.0))
_RADIUS = ((1.2, 3.5), (4.0, 18.0), (0.15, 0.6), (0.8, 3.0), (2.0, 10.0))
_SIZE = ((0.4, 1.3), (0.8, 5.0), (0.06, 0.35), (0.15, 1.5), (0.4, 2.5))
EYE = ((0.3, 2.0), (1.0, 6.0), (0.1, 0.8), (0.2, 3.0), (1.0, 3.5))
DISTANCE = ((0.5, 1.3), (0.5, 1.6), (0.7, 2.4), (0.6, 1.8), (0.7, 2.0))


@dataclass(frozen=True, eq=False)
class World:
    """A batch of scenes as the renderer takes them, with what the choice of cameras needs to know."""

    primitives: Float[Tensor, "b p 60"]
    lights: Float[Tensor, "b 36"]
    kind: Int[Tensor, " b"]
    radius: Float[Tensor, " b"]
    """Of the disc in which objects stand."""
    room: Float[Tensor, "b 3"]
    """Half sizes of what confines the cameras, from the floor's middle; height is full."""
    subjects: Float[Tensor, "b g 3"]
    """What cameras look at: the objects' middles, and places on the walls."""


@lru_cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """A tensor of these numbers, copied to the device once: a copy at every call would wait for the device."""
    return torch.tensor(values, device=device)


@lru_cache
def _templates(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Kinds and coefficients of the templates, and by kind of scene the templates drawn from."""
    kinds, table = (torch.from_numpy(a).to(device) for a in template_table())
    everything = tuple(range(len(kinds)))
    pools = (INDOOR, OUTDOOR, TABLETOP, everything, OUTDOOR)
    pools = [tuple(pool[i * len(pool) // 25] for i in range(25)) for pool in pools]
    return kinds, table, torch.tensor(pools, device=device)


class Dice:
    """Random tensors on a device, all from one generator."""

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def uniform(self, *shape: int, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def chance(self, probability: float | Tensor, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) < probability

    def integer(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator, device=self.device)

    def ranged(self, ranges: tuple, kind: Tensor, *shape: int) -> Tensor:
        """Log-uniform within the range of each scene's kind."""
        table = constant(ranges, self.device).log()[kind]
        table = table.reshape(len(kind), *[1] * (len(shape) - 1), 2)
        return self.uniform(*shape, low=table[..., 0], high=table[..., 1]).exp()

    def sign(self, *shape: int) -> Tensor:
        return torch.where(self.chance(0.5, *shape), 1.0, -1.0)


def _yaw(angle: Tensor) -> Tensor:
    return rotation_from_rotvec(torch.stack([torch.zeros_like(angle), torch.zeros_like(angle), angle], -1))


def _place(kind: Tensor, center: Tensor, half: Tensor, rotation: Tensor, taper: Tensor) -> Tensor:
    """Rows of primitives (b, n, 60) from their place, size and turn."""
    p = center.new_zeros((*kind.shape, r.PRIMITIVE_SIZE))
    half = half.clamp(min=2e-3)
    inverse = rotation.transpose(-1, -2) / half[..., None]
    p[..., r.TYPE] = kind.float()
    p[..., r.OBJECT_FROM_WORLD] = torch.cat([inverse, -(inverse @ center[..., None])], -1).flatten(-2)
    p[..., 16] = 1000.0
    p[..., r.TAPER] = taper
    p[..., r.EXTENT] = half
    corner = half.norm(dim=-1)
    flat = half[..., :2].norm(dim=-1)
    radius = torch.where(kind == r.ELLIPSOID, half.amax(-1), corner)
    p[..., 32:35] = center
    p[..., 35] = torch.where(kind == r.CYLINDER, torch.maximum(corner, flat), radius) * 1.01
    return p


def _objects(dice: Dice, kind: Tensor, radius: Tensor, room: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all objects' parts, and the objects' middles."""
    b, device = len(kind), dice.device
    kinds, table, pools = _templates(device)
    template = pools[kind[:, None], dice.integer(pools.shape[1], b, GROUPS)]
    template = torch.where(dice.chance(0.15, b, GROUPS), dice.integer(len(kinds), b, GROUPS), template)
    template = torch.where(dice.chance(0.15, b, 1), template[:, :1], template)  # repeated elements
    same = dice.chance(0.3, b, 1)[..., None]
    numbers = torch.cat([torch.ones(b, GROUPS, 1, device=device), dice.uniform(b, GROUPS, NUMBERS)], -1)
    numbers = torch.where(same, numbers[:, :1], numbers)
    parts = (table[template] @ numbers[:, :, None, :, None])[..., 0]
    type_ = kinds[template]
    turn = parts[..., 6:9] + 0.03 * dice.normal(b, GROUPS, PARTS, 3) * dice.chance(0.2, b, GROUPS, 1, 1)
    wild = (kind == CHAOS)[:, None] & dice.chance(0.7, b, GROUPS)
    spin = torch.where(wild[..., None], 3 * dice.normal(b, GROUPS, 3), torch.zeros((), device=device))
    yaw = dice.uniform(b, GROUPS, low=-3.2, high=3.2)
    yaw = torch.where(dice.chance(0.4, b, 1), yaw[:, :1] + 1.5708 * dice.integer(4, b, GROUPS), yaw)
    stand = rotation_from_rotvec(spin) @ _yaw(yaw)
    size = dice.ranged(_SIZE, kind, b, GROUPS) * torch.where(dice.chance(0.08, b, GROUPS), 2.0, 1.0)
    size = torch.where(same[..., 0], size[:, :1], size)
    angle, reach = dice.uniform(b, GROUPS, high=6.2832), dice.uniform(b, GROUPS).sqrt() * radius[:, None]
    x, y = angle.cos() * reach, angle.sin() * reach
    row = (torch.arange(GROUPS, device=device) - GROUPS // 2) * size[:, :1] * dice.uniform(b, 1, low=0.8, high=1.6)
    in_row = dice.chance(0.15, b, 1)
    x, y = torch.where(in_row, row, x), torch.where(in_row, y * 0.15, y)
    stretch = (room[:, :1] / room[:, 1:2]).clamp(min=1.0)
    x = torch.where((kind == COURT)[:, None], x * stretch, x)
    limit = 0.92 * room[:, None]
    x, y = x.clamp(-limit[..., 0], limit[..., 0]), y.clamp(-limit[..., 1], limit[..., 1])
    lift = torch.where(wild, dice.uniform(b, GROUPS) * 0.8 * room[:, 2:], torch.zeros_like(x))
    lift = lift + torch.where(dice.chance(0.12, b, GROUPS), dice.uniform(b, GROUPS) * size, torch.zeros_like(x))
    base = torch.stack([x, y, ground[:, None] + lift - 0.01 * size], -1)
    center = (stand[:, :, None] @ (parts[..., :3, None] * size[..., None, None, None]))[..., 0] + base[:, :, None]
    rotation = stand[:, :, None] @ rotation_from_rotvec(turn)
    half = parts[..., 3:6].abs() * size[..., None, None]
    hidden = dice.chance(0.15, b, GROUPS, 1).expand_as(type_)
    type_ = torch.where(hidden, torch.full_like(type_, r.NONE), type_)
    rows = _place(type_, center, half, rotation, parts[..., 9].clamp(0, 0.98))
    return rows, base + constant((0.0, 0.0, 0.5), device) * size[..., None]


GROUND, GRID, PORTALS = range(3)
"""Kinds of relief, as the renderer numbers them."""


def _relief(dice: Dice, kind: Tensor, amplitude: Tensor, waves: Tensor) -> Tensor:
    """Parameters of reliefs (*b, 22) of the given kinds; `waves` is the lowest frequency of the sums of sines."""
    shape = amplitude.shape
    p = amplitude.new_zeros((*shape, 22))
    octave = 1.8 ** torch.arange(5, device=dice.device)
    direction = dice.uniform(*shape, 5, high=6.2832)
    frequency = waves[..., None] * octave * dice.uniform(*shape, 5, low=0.7, high=1.4)
    sines = [amplitude[..., None] * 0.45 / octave**1.1, frequency * direction.cos(), frequency * direction.sin()]
    p[..., 1:21] = torch.stack([*sines, dice.uniform(*shape, 5, high=6.2832)], -1).flatten(-2)
    grid = torch.zeros_like(p)
    grid[..., 1] = dice.uniform(*shape, low=4.0, high=15.0)
    grid[..., 2:4] = dice.uniform(*shape, 2, low=8.0, high=40.0)
    grid[..., 4:6] = dice.uniform(*shape, 2, high=6.2832)
    grid[..., 6:8] = dice.uniform(*shape, 2, low=-0.5, high=0.5)
    grid[..., 6] = torch.where(dice.chance(0.15, *shape), -2.0, grid[..., 6])  # ribs
    grid[..., 8] = 0.8 * amplitude
    wanted = kind[..., None]
    p = torch.where(wanted == GROUND, p, torch.where(wanted == GRID, grid, _portals(dice, amplitude)))
    p[..., 0] = kind.float()
    return p


def _portals(dice: Dice, amplitude: Tensor, single_share: float = 0.3) -> Tensor:
    """Doors, windows and niches, round or square, single or in rows, with stepped recesses."""
    shape = amplitude.shape
    p = amplitude.new_zeros((*shape, 22))
    p[..., 0] = PORTALS
    single = dice.chance(single_share, *shape)
    p[..., 1] = dice.uniform(*shape, low=15.0, high=60.0)
    p[..., 2] = torch.where(single, 1.0, dice.integer(6, *shape) + 2.0)
    p[..., 3] = torch.where(single | dice.chance(0.4, *shape), 1.0, dice.integer(4, *shape) + 1.0)
    p[..., 4:6] = dice.integer(2, *shape, 2).float() * ~single[..., None]
    p[..., 6] = dice.uniform(*shape, low=0.2, high=0.8)
    p[..., 7] = dice.uniform(*shape, low=-0.1, high=0.6)
    p[..., 8] = 0.9 * amplitude
    p[..., 9] = torch.where(dice.chance(0.5, *shape), -2.0, dice.uniform(*shape, low=-0.8, high=-0.2))
    p[..., 10] = torch.where(dice.chance(0.6, *shape), dice.uniform(*shape, low=0.6, high=1.6), 0.0)
    p[..., 11] = dice.integer(4, *shape) + 1.0
    p[..., 12] = dice.uniform(*shape, low=0.04, high=0.15)
    return p


def _surroundings(dice: Dice, kind: Tensor, room: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the room, the ground and the panels around (pictures, windows, facades, hills); the ground's height."""
    b, device = len(kind), dice.device
    outside, court = kind == OUTSIDE, kind == COURT
    closed = torch.where(outside | court, 0.03, torch.where(kind == CHAOS, 0.5, 0.95))
    zero, one = torch.zeros(b, device=device), torch.ones(b, device=device)
    eye = torch.eye(3, device=device).expand(b, 3, 3)
    shell = _place(
        torch.where(dice.chance(closed, b), r.ROOM, r.NONE), torch.stack([zero, zero, 0.5 * room[:, 2]], -1),
        torch.stack([room[:, 0], room[:, 1], 0.5 * room[:, 2] + 0.001], -1), eye, zero,
    )  # fmt: skip
    hilly = outside & dice.chance(0.5, b)
    amplitude = torch.where(hilly, dice.uniform(b, low=0.1, high=0.9), one * 0.1)
    wide = torch.where(
        outside, room[:, 0] * 3, torch.where(kind == TABLE, radius * dice.uniform(b, low=1.2, high=2.5), room[:, 0])
    )
    wide = torch.minimum(wide, torch.where(outside, one * 1e3, room[:, :2].amax(-1) * torch.where(court, 1.5, 1.0)))
    thick = torch.where(hilly, 0.06 * radius + 0.05, 0.02 * radius)
    floor_kind = torch.where(hilly, r.RELIEF, torch.where((kind == CHAOS) & dice.chance(0.5, b), r.NONE, r.BOX))
    lift = torch.where(kind == TABLE, dice.uniform(b, low=0.2, high=0.5) * room[:, 2], zero)
    middle = torch.stack([zero, zero, lift - torch.where(hilly, 0.3 * thick, thick)], -1)
    floor = _place(
        floor_kind,
        middle,
        torch.stack([wide, wide * torch.where(kind == TABLE, dice.uniform(b, low=0.5, high=1.0), one), thick], -1),
        _yaw(dice.uniform(b, high=6.3)),
        zero,
    )
    floor[:, r.RELIEF_PARAMETERS] = _relief(
        dice, torch.zeros_like(floor_kind), amplitude, dice.uniform(b, low=2.0, high=14.0)
    )
    return torch.cat([shell[:, None], floor[:, None], _panels(dice, kind, room, radius)], 1), lift


_STANDING = ((0.0, 0.0, -1.0), (-1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
"""Stands a relief up: its height, along its own z, looks back along x, its y up."""


def _panels(dice: Dice, kind: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """Flat things on the walls of a room; outdoors buildings with facades, and hills, in a ring."""
    b, n, device = len(kind), PANELS, dice.device
    outside = (kind == OUTSIDE)[:, None]
    side, along = dice.integer(4, b, n), dice.uniform(b, n, low=-0.9, high=0.9)
    turn = side.float() * 1.5708
    wall = torch.where(side % 2 == 0, room[:, :1], room[:, 1:2])
    other = torch.where(side % 2 == 0, room[:, 1:2], room[:, :1])
    distance, offset = wall, along * other
    ring = radius[:, None] * dice.uniform(b, n, low=1.3, high=4.0)
    turn = torch.where(outside, dice.uniform(b, n, high=6.2832), turn)
    height = room[:, 2:] * dice.uniform(b, n, low=0.2, high=0.8)
    w, h = other * dice.uniform(b, n, low=0.05, high=0.5), room[:, 2:] * dice.uniform(b, n, low=0.05, high=0.4)
    t = 0.01 + 0.1 * dice.uniform(b, n) ** 3
    tall = room[:, 2:] * dice.uniform(b, n, low=0.15, high=1.0)
    broad = radius[:, None] * dice.uniform(b, n, low=0.1, high=0.8)
    deep = radius[:, None] * dice.uniform(b, n, low=0.05, high=0.5)
    relief = dice.chance(torch.where(outside, 0.4, 0.25), b, n)
    hill = outside & dice.chance(0.2, b, n)
    distance = torch.where(outside, ring + deep, distance)
    x = torch.where(outside, distance, distance - torch.where(relief, 0.5 * t, 0.0))
    y = torch.where(outside, torch.zeros_like(offset), offset)
    rotation = _yaw(turn)
    center = (rotation @ torch.stack([x, y, torch.zeros_like(x)], -1)[..., None])[..., 0]
    center = center + torch.stack([torch.zeros_like(x)] * 2 + [torch.where(outside, tall, height)], -1)
    facing = rotation @ constant(_STANDING, device)
    w, h, t = torch.where(outside, broad, w), torch.where(outside, tall, h), torch.where(outside, deep, t)
    type_ = torch.where(relief, r.RELIEF, r.BOX)
    type_ = torch.where(hill, r.ELLIPSOID, type_)
    type_ = torch.where(dice.chance(0.3, b, n), r.NONE, type_)
    rows = _place(type_, center, torch.stack([w, h, t], -1), facing, torch.zeros_like(w))
    facades = _facades(dice, room)
    court = (kind == COURT)[:, None, None] & dice.chance(0.85, b, 4, 1)
    rows = torch.cat([torch.where(court, facades, rows[:, :4]), rows[:, 4:]], 1)
    pattern = (dice.uniform(b, n, 1) > constant((0.25, 0.5), device)).sum(-1)
    rows[..., r.RELIEF_PARAMETERS] = _relief(
        dice, pattern, dice.uniform(b, n, low=0.2, high=0.95), dice.uniform(b, n, low=2.0, high=20.0)
    )
    grand = _portals(dice, dice.uniform(b, 4, low=0.5, high=0.95), single_share=1.0)
    wanted = (kind == COURT)[:, None, None] & dice.chance(GRAND, b, 1, 1)
    rows[:, :4, r.RELIEF_PARAMETERS] = torch.where(wanted, grand, rows[:, :4, r.RELIEF_PARAMETERS])
    return rows


def _facades(dice: Dice, room: Tensor) -> Tensor:
    """Rows of four walls of relief around a court, the whole width of its sides."""
    b, device = len(room), dice.device
    turn = torch.arange(4, device=device) * 1.5708
    sides = room[:, :2]  # no lists of indices: they would be copied to the device, and a captured step cannot
    wall, other = sides.repeat(1, 2), sides.flip(1).repeat(1, 2)
    deep = room[:, 2:] * dice.uniform(b, 4, low=0.03, high=0.3)
    tall = room[:, 2:] * dice.uniform(b, 4, low=0.3, high=0.6)
    rotation = _yaw(turn)
    center = (rotation @ torch.stack([wall, 0 * wall, 0 * wall], -1)[..., None])[..., 0]
    center = center + torch.stack([0 * tall, 0 * tall, tall], -1)
    facing = rotation @ constant(_STANDING, device)
    kind = torch.full((b, 4), r.RELIEF, device=device)
    return _place(kind, center, torch.stack([other, tall, deep], -1), facing.expand(b, 4, 3, 3), 0 * tall)


def _paint(dice: Dice, rows: Tensor, textures: int, radius: Tensor, one_make: float) -> None:
    """Materials, in place: textures shared within an object, plain surfaces, gloss, a few lamps."""
    b, n, _ = rows.shape
    device = dice.device
    group = constant((*range(2 + PANELS), *(2 + PANELS + k // PARTS for k in range(GROUPS * PARTS))), device)
    own = dice.chance(0.3, b, n)

    def shared(draw: Tensor) -> Tensor:
        return torch.where(own.reshape(b, n, *[1] * (draw.ndim - 2)), draw, draw[:, group])

    # Few textures a scene: a palette of ten.
    palette = dice.integer(textures, b, 10)
    rows[..., r.TEXTURE0] = palette.gather(1, shared(dice.integer(10, b, n))).float()
    rows[..., r.TEXTURE1] = palette.gather(1, shared(dice.integer(10, b, n))).float()
    size = rows[..., r.EXTENT].amax(-1).minimum(3 * radius[:, None])
    repeats = (dice.normal(b, n) * 0.8 - 0.7).exp()
    rows[..., r.DENSITY0] = repeats / size
    rows[..., r.DENSITY1] = rows[..., r.DENSITY0] * dice.uniform(b, n, low=2.0, high=9.0)
    plain = shared(dice.chance(0.18, b, n))
    texture = torch.where(plain, 0.25 * dice.uniform(b, n) ** 2, dice.uniform(b, n, low=0.6, high=1.0))
    rows[..., r.CONTRAST] = shared(texture)
    rows[..., r.DETAIL] = shared(
        torch.where(dice.chance(0.6, b, n), dice.uniform(b, n), torch.zeros((), device=device))
    )
    gray = dice.uniform(b, n, 1, low=0.05, high=0.95)
    tint = torch.lerp(gray.expand(b, n, 3), dice.uniform(b, n, 3), dice.uniform(b, n, 1) ** 2)
    rows[..., r.TINT] = shared(tint)
    rows[..., r.GLOSS] = shared(
        torch.where(dice.chance(0.25, b, n), dice.uniform(b, n) ** 2, torch.zeros((), device=device))
    )
    rows[..., r.OFFSET] = dice.uniform(b, n)
    rows[..., r.EMISSION] = torch.where(
        dice.chance(0.02, b, n), dice.uniform(b, n, low=0.5, high=2.0), torch.zeros((), device=device)
    )
    if one_make:
        _make_alike(dice, rows, dice.chance(one_make, b, 1))


def _make_alike(dice: Dice, rows: Tensor, wanted: Bool[Tensor, "b 1"]) -> None:
    """Scenes of one stone, in place: up to three textures, and almost one colour for all."""
    b, n, _ = rows.shape
    variety, pick = dice.integer(3, b, 1) + 1, dice.integer(3, b, n)
    for column in (r.TEXTURE0, r.TEXTURE1):
        few = rows[..., column].gather(1, pick % variety)
        rows[..., column] = torch.where(wanted, few, rows[..., column])
    tint = rows[..., r.TINT]
    alike = torch.lerp(tint, tint[:, :1], dice.uniform(b, 1, 1, low=0.6, high=1.0))
    rows[..., r.TINT] = torch.where(wanted[..., None], alike, tint)


def _make_studios(dice: Dice, rows: Tensor, wanted: Bool[Tensor, "b 1"]) -> None:
    """Plain light floors and walls with nothing on them, in place."""
    b = len(rows)
    around = rows[:, :2]
    white = (dice.uniform(b, 1, 1, low=0.5, high=1.0) * (1 + 0.04 * dice.normal(b, 1, 3))).clamp(max=1.0)
    around[..., r.TINT] = torch.where(wanted[..., None], white, around[..., r.TINT])
    around[..., r.CONTRAST] = torch.where(wanted, 0.1 * dice.uniform(b, 1) ** 2, around[..., r.CONTRAST])
    panels = rows[:, 2 : 2 + PANELS]
    panels[..., r.TYPE] = panels[..., r.TYPE].masked_fill(wanted, r.NONE)


def _lights(dice: Dice, kind: Tensor, room: Tensor, textures: int) -> Tensor:
    b, device = len(kind), dice.device
    l = torch.zeros((b, r.LIGHT_SIZE), device=device)
    warm = 1 + 0.25 * dice.normal(b, 3).clamp(-2, 2) * constant((0.6, 0.2, 0.6), device)
    for start, strength in ((0, 1.0), (8, 0.35)):
        sun = (kind == OUTSIDE) | (kind == COURT) | dice.chance(0.25, b)
        direction = torch.cat([dice.normal(b, 2), dice.uniform(b, 1, low=0.3, high=2.0)], -1)
        spot = room * torch.cat([dice.uniform(b, 2, low=-0.8, high=0.8), dice.uniform(b, 1, low=0.6, high=0.97)], -1)
        l[:, start : start + 3] = torch.where(sun[:, None], torch.nn.functional.normalize(direction, dim=-1), spot)
        l[:, start + 3] = (~sun).float()
        l[:, start + 4 : start + 7] = warm * (strength * dice.uniform(b, 1, low=0.2, high=1.3))
        l[:, start + 7] = room.amax(-1) * dice.uniform(b, low=0.4, high=2.0)
    ambient = dice.uniform(b, 1, low=0.2, high=0.8)
    l[:, 16:19] = ambient * (1 + 0.12 * dice.normal(b, 3)).clamp(min=0.3)
    l[:, 19:22] = ambient * dice.uniform(b, 1, low=0.3, high=0.9) * (1 + 0.12 * dice.normal(b, 3)).clamp(min=0.3)
    blue = constant((0.35, 0.55, 0.95), device)
    l[:, 22:25] = torch.lerp(blue.expand(b, 3), dice.uniform(b, 3), dice.uniform(b, 1)) * dice.uniform(
        b, 1, low=0.3, high=1.1
    )
    l[:, 25:28] = torch.lerp(
        l[:, 22:25], torch.ones(b, 3, device=device) * dice.uniform(b, 1, low=0.3, high=1.0), dice.uniform(b, 1)
    )
    l[:, 28:31] = dice.uniform(b, 3, low=0.05, high=0.6)
    l[:, 31] = dice.integer(textures, b).float()
    l[:, 32] = dice.uniform(b) * dice.chance(0.6, b)
    l[:, 33] = dice.integer(4, b).float() + 1
    return l


def sample_world(dice: Dice, batch: int, textures: int, courts: float = COURTS, one_make: float = 0.0) -> World:
    """A batch of random scenes over `textures` textures, on the dice's device, without synchronisation.

    `courts` is the share of courts among them, `one_make` of scenes in which hardly a colour tells one thing from the
    next, as where all is of one stone: there an edge is not a step in depth.
    """
    others = (1 - courts) / sum(_KIND_WEIGHTS[:COURT])
    weights = constant((*(others * weight for weight in _KIND_WEIGHTS[:COURT]), courts), dice.device).cumsum(0)
    kind = (dice.uniform(batch, 1) * weights[-1] > weights).sum(-1).clamp(max=4)
    side = dice.ranged(_ROOM, kind, batch, 2)
    street = (kind == COURT) & dice.chance(STREETS, batch)
    stretch = torch.where(street, dice.uniform(batch, low=3.0, high=8.0), 1.0)
    side = torch.stack([side[:, 0] * stretch, side[:, 1]], -1)
    room = torch.cat([side, 2 * dice.ranged(_HEIGHT, kind, batch, 1)], -1)
    radius = torch.minimum(dice.ranged(_RADIUS, kind, batch), 0.9 * side.amin(-1))
    around, ground = _surroundings(dice, kind, room, radius)
    objects, subjects = _objects(dice, kind, radius, room, ground)
    primitives = torch.cat([around, objects.flatten(1, 2)], 1)
    _paint(dice, primitives, textures, radius, one_make)
    _make_studios(dice, primitives, (kind == TABLE)[:, None] & dice.chance(STUDIOS, batch, 1))
    wall = dice.uniform(batch, 4, 2, low=-1.0, high=1.0)
    wall = wall / wall.abs().amax(-1, keepdim=True).clamp(min=1e-3)
    on_walls = torch.cat([wall, dice.uniform(batch, 4, 1, low=0.15, high=0.7)], -1) * room[:, None]
    walled = ((kind == INSIDE) | (kind == COURT))[:, None, None]
    subjects = torch.cat([subjects, torch.where(walled, on_walls, subjects[:, :4])], 1)
    return World(primitives, _lights(dice, kind, room, textures), kind, radius, room, subjects)
