"""What procedural worlds are furnished with: objects of up to eight parts, each linear in random sizes.

A template takes NUMBERS random numbers in [0, 1] and gives parts; as every part's place, size and turn is linear in
them, a whole batch of objects is one matrix product (`template_table`). Units are the object's own: about one across,
standing on z = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from dust3r_sfm.training.render import BOX, CYLINDER, ELLIPSOID, NONE

PARTS, NUMBERS = 8, 32
Part = tuple[int, Sequence, Sequence, Sequence, object]
"""Kind, centre (3), half size (3), rotation vector (3), taper."""


class _Numbers:
    """Hands out the random numbers one after the other, scaled to a range."""

    def __init__(self, u: np.ndarray) -> None:
        self.u, self.next = u, 0

    def __call__(self, low: float, high: float) -> float:
        self.next += 1
        return low + (high - low) * self.u[self.next - 1]


def _part(kind: int, center: Sequence, half: Sequence, turn: Sequence = (0, 0, 0), taper: object = 0.0) -> Part:
    return kind, center, half, turn, taper


def _single(kind: int) -> Callable[[_Numbers], list[Part]]:
    def make(u: _Numbers) -> list[Part]:
        z = u(0.1, 0.7)
        return [_part(kind, (0, 0, z), (u(0.15, 0.6), u(0.15, 0.6), z), (0, 0, 0), u(0.0, 0.9))]

    return make


def _table(kind: int) -> Callable[[_Numbers], list[Part]]:
    def make(u: _Numbers) -> list[Part]:
        w, l, h, t, leg = u(0.4, 0.9), u(0.3, 0.6), u(0.3, 0.8), u(0.015, 0.05), u(0.015, 0.05)
        legs = [
            _part(kind, (x * (w - leg), y * (l - leg), 0.5 * h), (leg, leg, 0.5 * h)) for x in (-1, 1) for y in (-1, 1)
        ]
        return [
            _part(BOX, (0, 0, h + t), (w, l, t)),
            *legs,
            _part(kind, (0.3, u(-0.2, 0.2), h + 0.2), (0.1, 0.1, u(0.08, 0.2))),
        ]

    return make


def _chair(u: _Numbers) -> list[Part]:
    w, h, leg, back = u(0.2, 0.3), u(0.35, 0.5), u(0.012, 0.03), u(0.2, 0.35)
    legs = [_part(BOX, (x * (w - leg), y * (w - leg), 0.5 * h), (leg, leg, 0.5 * h)) for x in (-1, 1) for y in (-1, 1)]
    return [
        _part(BOX, (0, 0, h), (w, w, u(0.02, 0.06))),
        _part(BOX, (0, -w, h + back), (w, 0.02, back), (u(-0.1, 0.25), 0, 0)),
        *legs,
    ]


def _sofa(u: _Numbers) -> list[Part]:
    w, l, h, arm = u(0.5, 1.0), u(0.3, 0.45), u(0.15, 0.25), u(0.06, 0.14)
    return [
        _part(BOX, (0, 0, h), (w, l, h)),
        _part(BOX, (0, -l, 2 * h), (w, arm, 2 * h), (u(-0.1, 0.2), 0, 0)),
        _part(BOX, (w, 0, 1.3 * h), (arm, l, 1.3 * h)),
        _part(BOX, (-w, 0, 1.3 * h), (arm, l, 1.3 * h)),
        _part(ELLIPSOID, (u(-0.4, 0.0), 0, 2.3 * h), (0.2, 0.12, 0.15), (0.3, 0, 0)),
        _part(ELLIPSOID, (u(0.1, 0.4), 0, 2.3 * h), (0.18, 0.1, 0.15), (0.4, 0, 0)),
    ]


def _shelf(u: _Numbers) -> list[Part]:
    w, l, h, t = u(0.3, 0.7), u(0.12, 0.25), u(0.5, 1.0), u(0.012, 0.03)
    sides = [_part(BOX, (x * w, 0, h), (t, l, h)) for x in (-1, 1)]
    boards = [_part(BOX, (0, 0, 2 * h * k + t), (w, l, t)) for k in (0.05, 0.35, 0.65, 0.97)]
    things = [_part(BOX, (u(-0.3, 0.0), 0, 0.7 * h + 0.12), (u(0.05, 0.2), 0.1, 0.1))]
    return [
        *sides,
        *boards,
        *things,
        _part(CYLINDER, (u(0.0, 0.3), 0, 1.3 * h + 0.12), (0.06, 0.06, 0.1), (0, 0, 0), 0.4),
    ]


def _stairs(u: _Numbers) -> list[Part]:
    w, depth, rise = u(0.3, 0.8), u(0.1, 0.2), u(0.04, 0.1)
    return [_part(BOX, (0, (2 * k - 7) * depth, (k + 1) * rise), (w, depth, (k + 1) * rise)) for k in range(8)]


def _stack(u: _Numbers) -> list[Part]:
    parts, z = [], 0.0
    for k in range(5):
        h = u(0.05, 0.18)
        kind = (BOX, BOX, CYLINDER, BOX, ELLIPSOID)[k]
        parts.append(
            _part(
                kind, (u(-0.08, 0.08), u(-0.08, 0.08), z + h), (u(0.12, 0.35), u(0.12, 0.35), h), (0, 0, u(-1.0, 1.0))
            )
        )
        z = z + 2 * h
    return parts


def _tree(u: _Numbers) -> list[Part]:
    h, r = u(0.5, 1.2), u(0.2, 0.4)
    crown = [
        _part(ELLIPSOID, (u(-0.3, 0.3), u(-0.3, 0.3), 1.6 * h + u(-0.2, 0.35)), (r, r, u(0.15, 0.4))) for _ in range(6)
    ]
    return [_part(CYLINDER, (0, 0, h), (u(0.03, 0.1), u(0.03, 0.1), h), (u(-0.1, 0.1), u(-0.1, 0.1), 0), 0.5), *crown]


def _conifer(u: _Numbers) -> list[Part]:
    h, r = u(0.5, 1.0), u(0.25, 0.5)
    cones = [
        _part(CYLINDER, (0, 0, h * (0.7 + 0.45 * k)), (r * (1 - 0.2 * k), r * (1 - 0.2 * k), 0.4 * h), (0, 0, 0), 0.95)
        for k in range(4)
    ]
    return [_part(CYLINDER, (0, 0, 0.4 * h), (0.05, 0.05, 0.4 * h)), *cones]


def _house(u: _Numbers) -> list[Part]:
    w, l, h, roof = u(0.4, 0.7), u(0.4, 0.9), u(0.3, 0.6), u(0.3, 0.5)
    slopes = [
        _part(BOX, (s * 0.5 * w, 0, 2 * h + 0.45 * w), (0.72 * w, 1.08 * l, 0.02), (0, s * 0.75, 0)) for s in (-1, 1)
    ]
    return [
        _part(BOX, (0, 0, h), (w, l, h)),
        *slopes,
        _part(BOX, (0, l, 0.4 * h), (0.1, 0.02, 0.4 * h)),
        _part(BOX, (0.25, l, h), (0.08, 0.02, u(0.06, 0.12))),
        _part(BOX, (w, u(-0.3, -0.1), h), (0.02, 0.1, 0.1)),
        _part(BOX, (w, u(0.1, 0.3), h), (0.02, 0.1, 0.1)),
        _part(BOX, (0.5 * w, u(-0.2, 0.2), 2 * h + roof), (0.05, 0.05, 0.25)),
    ]


def _arch(u: _Numbers) -> list[Part]:
    w, h, t = u(0.3, 0.7), u(0.4, 0.8), u(0.05, 0.15)
    pillars = [_part(BOX, (x * (w + t), 0, h), (t, t, h)) for x in (-1, 1)]
    caps = [_part(BOX, (x * (w + t), 0, 2 * h), (1.4 * t, 1.4 * t, 0.03)) for x in (-1, 1)]
    return [
        *pillars,
        *caps,
        _part(BOX, (0, 0, 2 * h + t), (w + 2.5 * t, t, t)),
        _part(BOX, (0, 0, 0.02), (w, 1.5 * t, 0.02)),
    ]


def _wall_with_opening(u: _Numbers) -> list[Part]:
    w, h, t, gap, low, head = u(0.3, 0.8), u(0.5, 0.9), u(0.02, 0.08), u(0.15, 0.4), u(0.0, 0.3), u(0.1, 0.3)
    return [
        _part(BOX, (-w - gap, 0, h), (w, t, h)),
        _part(BOX, (w + gap, 0, h), (w, t, h)),
        _part(BOX, (0, 0, 2 * h - head), (gap, t, head)),
        _part(BOX, (0, 0, 0.5 * low), (gap, t, 0.5 * low)),
        _part(BOX, (0, 0, low), (gap * 1.1, 1.5 * t, 0.02)),
    ]


def _lamp(u: _Numbers) -> list[Part]:
    h, r, head = u(0.5, 1.2), u(0.008, 0.03), u(0.08, 0.2)
    return [
        _part(CYLINDER, (0, 0, 0.02), (0.15, 0.15, 0.02)),
        _part(CYLINDER, (0, 0, h), (r, r, h)),
        _part(CYLINDER, (0, 0, 2 * h), (head, head, u(0.06, 0.15)), (0, 0, 0), 0.5),
        _part(BOX, (u(0.1, 0.3), 0, 1.7 * h), (0.3, r, r)),
        _part(ELLIPSOID, (0.5, 0, 1.7 * h), (0.05, 0.05, u(0.03, 0.1))),
    ]


def _bush(u: _Numbers) -> list[Part]:
    return [
        _part(ELLIPSOID, (u(-0.35, 0.35), u(-0.35, 0.35), u(0.05, 0.5)), (u(0.1, 0.3), u(0.1, 0.3), 0.2))
        for _ in range(6)
    ]


def _leaves(u: _Numbers) -> list[Part]:
    return [
        _part(
            ELLIPSOID,
            (0.2 * x, 0.2 * y, u(0.2, 0.7)),
            (u(0.12, 0.3), 0.1, 0.008),
            (u(-0.9, 0.9), u(-0.9, 0.9), 2.4 * x + y),
        )
        for x, y in ((1, 0), (0, 1), (-1, 0), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.1, -0.2))
    ]


def _fence(u: _Numbers) -> list[Part]:
    h, r, gap = u(0.2, 0.5), u(0.01, 0.03), u(0.12, 0.25)
    posts = [_part(BOX, ((2 * k - 5) * gap, 0, h), (r, r, h)) for k in range(6)]
    return [*posts, *[_part(BOX, (0, 0.02, h * z), (5.5 * gap, 0.5 * r, r)) for z in (0.6, 1.6)]]


def _column(u: _Numbers) -> list[Part]:
    h, r = u(0.4, 1.0), u(0.08, 0.25)
    return [
        _part(BOX, (0, 0, 0.04), (1.5 * r, 1.5 * r, 0.04)),
        _part(CYLINDER, (0, 0, h), (r, r, h), (0, 0, 0), u(0.0, 0.4)),
        _part(CYLINDER, (0, 0, 2 * h), (1.3 * r, 1.3 * r, 0.05)),
        _part(BOX, (0, 0, 2 * h + 0.1), (1.5 * r, 1.5 * r, 0.06)),
        _part(ELLIPSOID, (0, 0, 2 * h + 0.3), (r, r, u(0.08, 0.3))),
    ]


def _figure(u: _Numbers) -> list[Part]:
    h, r = u(0.35, 0.5), u(0.12, 0.2)
    limbs = [_part(CYLINDER, (x * 0.1, 0, 0.5 * h), (0.06, 0.07, 0.5 * h)) for x in (-1, 1)]
    arms = [
        _part(CYLINDER, (x * (r + 0.08), u(-0.1, 0.1), 1.4 * h), (0.04, 0.04, 0.3), (u(-0.6, 0.6), 0, 0))
        for x in (-1, 1)
    ]
    return [
        *limbs,
        *arms,
        _part(ELLIPSOID, (0, 0, 1.5 * h), (r, 0.12, 0.7 * h)),
        _part(ELLIPSOID, (0, 0, 2.4 * h), (0.09, 0.1, 0.13)),
    ]


def _bicycle(u: _Numbers) -> list[Part]:
    r = u(0.2, 0.35)
    wheels = [_part(CYLINDER, (x, 0, r), (r, r, 0.02), (1.5708, 0, 0)) for x in (-0.5, 0.5)]
    tubes = [
        _part(CYLINDER, (x, 0, r + 0.2), (0.015, 0.015, 0.3), (0, a, 0))
        for x, a in ((-0.25, 0.6), (0.05, -0.5), (0.42, -0.25))
    ]
    return [
        *wheels,
        *tubes,
        _part(BOX, (-0.15, 0, r + u(0.3, 0.5)), (0.1, 0.04, 0.02)),
        _part(CYLINDER, (0.45, 0, r + 0.5), (0.01, 0.01, 0.25), (1.5708, 0, 0)),
    ]


def _vehicle(u: _Numbers) -> list[Part]:
    w, l, h = u(0.35, 0.45), u(0.8, 1.1), u(0.15, 0.25)
    wheels = [
        _part(CYLINDER, (x * w, y * 0.6, 0.16), (0.16, 0.16, 0.06), (0, 1.5708, 0)) for x in (-1, 1) for y in (-1, 1)
    ]
    return [
        *wheels,
        _part(BOX, (0, 0, h + 0.15), (w, l, h)),
        _part(ELLIPSOID, (0, u(-0.3, 0.1), 2 * h + 0.15), (w, 0.65, u(0.2, 0.4))),
    ]


def _vase(u: _Numbers) -> list[Part]:
    r, h = u(0.1, 0.3), u(0.15, 0.3)
    return [
        _part(ELLIPSOID, (0, 0, h), (r, r, h)),
        _part(CYLINDER, (0, 0, 2 * h), (0.4 * r, 0.4 * r, u(0.05, 0.15))),
        _part(CYLINDER, (0, 0, 0.02), (0.6 * r, 0.6 * r, 0.03)),
        _part(CYLINDER, (r, 0, 1.2 * h), (0.02, 0.02, 0.5 * h), (0, u(0.1, 0.5), 0)),
        _part(ELLIPSOID, (u(-0.1, 0.1), u(-0.1, 0.1), 2.6 * h), (0.2, 0.2, 0.12)),
    ]


def _rubble(u: _Numbers) -> list[Part]:
    kinds = (BOX, ELLIPSOID, BOX, CYLINDER, BOX, BOX)
    return [
        _part(kind, (u(-0.5, 0.5), u(-0.5, 0.5), 0.12), (0.15, 0.1, 0.2), (u(-1.5, 1.5), u(-1.5, 1.5), u(-1.5, 1.5)))
        for kind in kinds
    ]


TEMPLATES: tuple[Callable[[_Numbers], list[Part]], ...] = (
    _single(BOX), _single(ELLIPSOID), _single(CYLINDER), _table(BOX), _table(CYLINDER), _chair, _sofa, _shelf, _stack,
    _vase, _lamp, _figure, _rubble, _leaves, _stairs, _column, _arch, _wall_with_opening, _fence, _bush, _tree,
    _conifer, _house, _vehicle, _bicycle,
)  # fmt: skip
INDOOR = tuple(range(18))
OUTDOOR = (0, 2, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 20, 21, 22, 22, 22, 23, 24)
TABLETOP = (0, 1, 2, 0, 1, 2, 8, 8, 9, 9, 10, 11, 12, 13, 15, 22, 23, 4)


@lru_cache
def template_table() -> tuple[np.ndarray, np.ndarray]:
    """Kinds (templates, PARTS) and coefficients (templates, PARTS, 10, NUMBERS + 1) of centre, half, turn, taper."""
    kinds = np.full((len(TEMPLATES), PARTS), NONE)
    table = np.zeros((len(TEMPLATES), PARTS, 10, NUMBERS + 1), np.float32)
    for i, template in enumerate(TEMPLATES):
        for k in range(NUMBERS + 1):
            u = np.zeros(NUMBERS)
            u[k - 1 : k] = 1.0
            for j, (kind, center, half, turn, taper) in enumerate(template(_Numbers(u))):
                kinds[i, j] = kind
                table[i, j, :, k] = [*center, *half, *turn, taper]
    table[..., 1:] -= table[..., :1]
    return kinds, table
