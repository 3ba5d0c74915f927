"""Ray casting of batched procedural scenes: in PyTorch on any device, by one fused kernel (render.cu) on CUDA.

A scene is rows of numbers, so that a batch of scenes is three tensors:

    primitives  (batch, count, 60)  TYPE .. RELIEF below; a primitive is a unit shape in its own frame
    lights      (batch, 36)         two lights, ambient colours, sky
    cameras     (batch, views, 16)  world_from_cam (3x4, row by row), fx, fy, cx, cy in pixels, corner origin

The world's z points up. Depth is z in the camera, 0 where a ray meets nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dust3r_sfm.training.textures import LEVELS, SIDE, TEXELS

NONE, BOX, ELLIPSOID, CYLINDER, RELIEF, ROOM = range(6)
"""BOX, ROOM: [-1, 1]^3, a ROOM is seen from within. ELLIPSOID: unit ball. CYLINDER: along z, radius 1 at the bottom
and 1 - taper at the top. RELIEF: what lies below a height over [-1, 1]^2, within [-1, 1]^3."""

PRIMITIVE_SIZE, LIGHT_SIZE, CAMERA_SIZE = 60, 36, 16
MAX_PRIMITIVES = 128
FAR, EPS = 1e8, 1e-4
MARCH, SHADOW_MARCH, BISECT = 48, 16, 6
RELIEF_STEP = 2e-3  # of the differences that give a relief's normals

TYPE = 0
OBJECT_FROM_WORLD = slice(1, 13)
CLIP = slice(13, 17)  # only n . x <= d of the shape is there; d of 100 or more: all of it
TAPER = 17
EXTENT = slice(18, 21)  # half sizes in world units: textures keep their scale on every face
TEXTURE0, TEXTURE1, DENSITY0, DENSITY1 = 21, 22, 23, 24  # two layers; repeats a world unit
CONTRAST, DETAIL = 25, 26  # 0: plain tint, 1: texture; 0: the first layer alone, 1: times the second
TINT = slice(27, 30)
GLOSS, OFFSET = 30, 31
BOUND = slice(32, 36)  # bounding sphere in the world: centre, radius
EMISSION = 36
RELIEF_PARAMETERS = slice(38, 60)  # see _relief_height


def _sample(textures: UInt8[Tensor, "t texels 4"], index: Tensor, u: Tensor, v: Tensor, footprint: Tensor) -> Tensor:
    """Bilinear, from the mip level whose texels come nearest to `footprint` (in repeats of the texture)."""
    level = torch.floor(torch.log2((footprint * SIDE).clamp(min=1e-6)) + 0.5).clamp(0, LEVELS - 1).long()
    starts = torch.tensor([sum((SIDE >> i) ** 2 for i in range(k)) for k in range(LEVELS)], device=u.device)
    side = SIDE >> level
    x, y = (u - u.floor()) * side - 0.5, (v - v.floor()) * side - 0.5
    x0, y0 = x.floor(), y.floor()
    flat = textures.view(-1, 4)

    def texel(dx: int, dy: int) -> Tensor:
        column, row = (x0.long() + dx) & (side - 1), (y0.long() + dy) & (side - 1)
        return flat[index.long() * TEXELS + starts[level] + row * side + column, :3].float() / 255

    ax, ay = (x - x0)[:, None], (y - y0)[:, None]
    return torch.lerp(torch.lerp(texel(0, 0), texel(1, 0), ax), torch.lerp(texel(0, 1), texel(1, 1), ax), ay)


def _relief_height(f: Float[Tensor, "n 22"], x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Height of reliefs, a row each. f[0] says of which kind the numbers speak.

    0: five sines (amplitude, wx, wy, phase). 1: a grid of recesses (sharpness, frequencies, phases, thresholds,
    depth). 2: portals and windows, repeated (sharpness, half as many cells, phases; in a cell from -1 to 1 the half
    width, the spring of the arch, ..., the sill; depth; roundness of the arch; steps of the recess and their width).
    """
    w = f[:, 1:21].reshape(-1, 5, 4)
    sines = (w[..., 0] * (w[..., 1] * x[:, None] + w[..., 2] * y[:, None] + w[..., 3]).sin()).sum(-1)
    grid = torch.minimum((f[:, 2] * x + f[:, 4]).sin() - f[:, 6], (f[:, 3] * y + f[:, 5]).sin() - f[:, 7])
    height = torch.where(f[:, 0] < 0.5, sines, -f[:, 8] * torch.tanh(f[:, 1] * grid))
    return torch.where(f[:, 0] < 1.5, height, _portal_height(f, x, y))


def _portal_height(f: Float[Tensor, "n 22"], x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    u, v = x * f[:, 2] + f[:, 4], y * f[:, 3] + f[:, 5]
    u = (u - 2 * (0.5 * u + 0.5).floor()).abs()
    v = v - 2 * (0.5 * v + 0.5).floor()
    rise = (v - f[:, 7]).clamp(min=0)
    side = torch.maximum((u * u + f[:, 10] * rise * rise).sqrt(), u) - f[:, 6]
    lintel = torch.where(f[:, 10] > 0, torch.full_like(v, -FAR), v - f[:, 7])  # an arch ends where its sides meet
    edge = torch.maximum(side, torch.maximum(f[:, 9] - v, lintel))
    steps = torch.arange(4, device=x.device)
    inside = 0.5 - 0.5 * torch.tanh(f[:, 1, None] * (edge[:, None] + f[:, 12, None] * steps))
    inside = torch.where(steps < f[:, 11, None], inside, torch.zeros_like(inside)).sum(-1)
    return f[:, 8] * (1 - 2 * inside / f[:, 11].clamp(min=1))


class _Span:
    """The parameters between which rays are inside a convex shape, with the object's normals at both ends."""

    def __init__(self, rays: int, device: torch.device) -> None:
        self.t0 = torch.full((rays,), -FAR, device=device)
        self.t1 = torch.full((rays,), FAR, device=device)
        self.n0 = torch.tensor([0.0, 0.0, 1.0], device=device).expand(rays, 3)
        self.n1 = self.n0

    def enter(self, t: Tensor, normal: Tensor, where: Tensor) -> None:
        later = where & (t > self.t0)
        self.t0 = torch.where(later, t, self.t0)
        self.n0 = torch.where(later[:, None], normal, self.n0)

    def leave(self, t: Tensor, normal: Tensor, where: Tensor) -> None:
        sooner = where & (t < self.t1)
        self.t1 = torch.where(sooner, t, self.t1)
        self.n1 = torch.where(sooner[:, None], normal, self.n1)

    def empty(self, where: Tensor) -> None:
        self.t1 = torch.where(where, torch.full_like(self.t1, -FAR), self.t1)


def _slab(span: _Span, o: Tensor, d: Tensor, axis: int) -> None:
    flat = d[:, axis].abs() < 1e-9
    inverse = 1 / torch.where(flat, torch.ones_like(d[:, axis]), d[:, axis])
    a, b = (-1 - o[:, axis]) * inverse, (1 - o[:, axis]) * inverse
    normal = torch.zeros_like(o)
    normal[:, axis] = torch.where(d[:, axis] > 0, -1.0, 1.0)
    span.enter(torch.minimum(a, b), normal, ~flat)
    span.leave(torch.maximum(a, b), -normal, ~flat)
    span.empty(flat & (o[:, axis].abs() > 1))


def _half_space(span: _Span, o: Tensor, d: Tensor, clip: Float[Tensor, "n 4"]) -> None:
    n, clipped = clip[:, :3], clip[:, 3] < 100
    rate, gap = (n * d).sum(-1), clip[:, 3] - (n * o).sum(-1)
    flat = rate.abs() < 1e-9
    t = gap / torch.where(flat, torch.ones_like(rate), rate)
    span.leave(t, n, clipped & ~flat & (rate > 0))
    span.enter(t, n, clipped & ~flat & (rate <= 0))
    span.empty(clipped & flat & (gap < 0))


def _ball(span: _Span, o: Tensor, d: Tensor) -> None:
    a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
    q = b * b - a * c
    root = q.clamp(min=0).sqrt()
    t0, t1 = (-b - root) / a, (-b + root) / a
    meets = q > 0
    span.enter(t0, o + d * t0[:, None], meets)
    span.leave(t1, o + d * t1[:, None], meets)
    span.empty(~meets)


def _tapered_cylinder(span: _Span, o: Tensor, d: Tensor, taper: Tensor) -> None:
    slope = -0.5 * taper
    base = 1 + slope
    _slab(span, o, d, 2)
    ro, rd = base + slope * o[:, 2], slope * d[:, 2]
    a = d[:, 0] ** 2 + d[:, 1] ** 2 - rd * rd
    b = o[:, 0] * d[:, 0] + o[:, 1] * d[:, 1] - ro * rd
    c = o[:, 0] ** 2 + o[:, 1] ** 2 - ro * ro
    q = b * b - a * c
    a = torch.where(a.abs() < 1e-9, torch.where(a < 0, -1e-9, 1e-9), a)
    root, middle = q.clamp(min=0).sqrt() / a.abs(), -b / a
    low, high, far = middle - root, middle + root, torch.full_like(q, FAR)
    early = span.t0 < low
    enter = torch.where(a > 0, low, torch.where(early, -far, high))
    leave = torch.where(a > 0, high, torch.where(early, low, far))

    def normal(t: Tensor) -> Tensor:
        p = o + d * t[:, None]
        return torch.stack([p[:, 0], p[:, 1], -slope * (base + slope * p[:, 2])], -1)

    span.enter(enter, normal(enter), q > 0)
    span.leave(leave, normal(leave), q > 0)
    span.empty((q <= 0) & (a > 0))


def _march(f: Tensor, o: Tensor, d: Tensor, span: _Span, steps: int) -> tuple[Tensor, Tensor]:
    """First t at which rays meet a relief, and the normal there; starting inside the solid sees nothing."""

    def below(t: Tensor) -> Tensor:
        p = o + d * t[:, None]
        return p[:, 2] < _relief_height(f, p[:, 0], p[:, 1])

    within = span.t0 <= EPS
    start = torch.where(within, torch.full_like(span.t0, EPS), span.t0)
    inside = below(start)
    low, high, found = start, start, inside
    last = start
    for i in range(1, steps + 1):
        a = i / steps
        t = start + (span.t1 - start) * torch.where(within, a * a, a)
        first = ~found & below(t)
        low, high = torch.where(first, last, low), torch.where(first, t, high)
        found = found | first
        last = t
    for _ in range(BISECT):
        middle = 0.5 * (low + high)
        under = below(middle)
        low, high = torch.where(under, low, middle), torch.where(under, middle, high)
    p = o + d * high[:, None]
    x, y, e = p[:, 0], p[:, 1], RELIEF_STEP
    gx = (_relief_height(f, x + e, y) - _relief_height(f, x - e, y)) / (2 * e)
    gy = (_relief_height(f, x, y + e) - _relief_height(f, x, y - e)) / (2 * e)
    t = torch.where(found, high, torch.full_like(high, FAR))
    t = torch.where(inside, torch.where(within, torch.full_like(t, FAR), start), t)
    return t, torch.where(inside[:, None], span.n0, torch.stack([-gx, -gy, torch.ones_like(gx)], -1))


def _transform(matrix: Float[Tensor, "n 12"], points: Float[Tensor, "n 3"], w: float = 1.0) -> Float[Tensor, "n 3"]:
    m = matrix.reshape(-1, 3, 4)
    return (m[..., :3] @ points[..., None])[..., 0] + w * m[..., 3]


def _intersect(p: Float[Tensor, "n 60"], origin: Tensor, direction: Tensor, kind: int, steps: int):
    """First t of rays with primitives of one kind (a row a ray), FAR where there is none; the object's normals."""
    o, d = _transform(p[:, OBJECT_FROM_WORLD], origin), _transform(p[:, OBJECT_FROM_WORLD], direction, 0.0)
    span = _Span(len(p), p.device)
    if kind == ELLIPSOID:
        _ball(span, o, d)
    elif kind == CYLINDER:
        _tapered_cylinder(span, o, d, p[:, TAPER])
    else:
        for axis in range(3):
            _slab(span, o, d, axis)
    _half_space(span, o, d, p[:, CLIP])
    missed = (span.t1 <= span.t0) | (span.t1 <= EPS)
    if kind == ROOM:
        t, normal = span.t1, -span.n1
    elif kind == RELIEF:
        t, normal = _march(p[:, RELIEF_PARAMETERS], o, d, span, steps)
    else:
        t, normal = torch.where(span.t0 > EPS, span.t0, torch.full_like(span.t0, FAR)), span.n0
    return torch.where(missed, torch.full_like(t, FAR), t), normal


def _meets_bound(bound: Tensor, o: Tensor, d: Tensor, t_max: Tensor) -> Bool[Tensor, " n"]:
    to = bound[:, :3] - o
    t = ((to * d).sum(-1) / (d * d).sum(-1)).clamp(min=0).minimum(t_max)
    gap = to - d * t[:, None]
    return (gap * gap).sum(-1) <= bound[:, 3] ** 2


def _candidates(primitives: Tensor, scene: Tensor, k: int, o: Tensor, d: Tensor, t_max: Tensor):
    """Per kind: the rays whose scene's k-th primitive is of it and near enough, with its rows."""
    kinds = primitives[:, k, TYPE].long()
    for kind in kinds.unique().tolist():
        if kind == NONE:
            continue
        rays = ((kinds[scene] == kind) & _meets_bound(primitives[scene, k, BOUND], o, d, t_max)).nonzero()[:, 0]
        if len(rays):
            yield kind, rays, primitives[scene[rays], k]


def _nearest(primitives: Tensor, scene: Int[Tensor, " n"], o: Tensor, d: Tensor):
    best = torch.full((len(o),), FAR, device=o.device)
    which = torch.full((len(o),), -1, device=o.device)
    normals = torch.zeros_like(o)
    for k in range(primitives.shape[1]):
        for kind, rays, rows in _candidates(primitives, scene, k, o, d, torch.full_like(best, FAR)):
            t, normal = _intersect(rows, o[rays], d[rays], kind, MARCH)
            closer = t < best[rays]
            hit = rays[closer]
            best[hit], which[hit], normals[hit] = t[closer], k, normal[closer]
    return best, which, normals


def _shadowed(primitives: Tensor, scene: Tensor, o: Tensor, d: Tensor, t_max: Tensor) -> Bool[Tensor, " n"]:
    blocked = torch.zeros(len(o), dtype=torch.bool, device=o.device)
    for k in range(primitives.shape[1]):
        for kind, rays, rows in _candidates(primitives, scene, k, o, d, t_max):
            if kind != ROOM:
                t, _ = _intersect(rows, o[rays], d[rays], kind, SHADOW_MARCH)
                blocked[rays] |= t < t_max[rays]
    return blocked


def _environment(light: Tensor, textures: Tensor, d: Tensor, pixel: Tensor) -> Tensor:
    up, zenith, horizon, ground = d[:, 2], light[:, 22:25], light[:, 25:28], light[:, 28:31]
    w = up.abs().clamp(max=1).sqrt()[:, None]
    color = torch.lerp(horizon, torch.where(up[:, None] >= 0, zenith, ground), w)
    azimuth = torch.atan2(d[:, 1], d[:, 0]) * 0.15915494
    elevation = torch.asin(up.clamp(-1, 1)) * 0.31830989
    frequency = light[:, 33]
    texture = _sample(
        textures, light[:, 31], azimuth * frequency, -elevation * 0.5 * frequency, pixel * 0.16 * frequency
    )
    return torch.lerp(color, color * texture * 2, light[:, 32:33])


def _albedo(p: Tensor, textures: Tensor, q: Tensor, n: Tensor, t: Tensor, pixel: Tensor, cosine: Tensor) -> Tensor:
    m = q * p[:, EXTENT]
    axis = (n.abs() / p[:, EXTENT]).argmax(-1)
    u = torch.where(axis == 0, m[:, 1], m[:, 0])
    v = torch.where(axis == 2, m[:, 1], m[:, 2])
    size = t * pixel / cosine.clamp(min=0.1).sqrt()
    d0, d1, offset = p[:, DENSITY0], p[:, DENSITY1], p[:, OFFSET]
    c0 = _sample(textures, p[:, TEXTURE0], u * d0 + offset, -v * d0 + offset, size * d0)
    c1 = _sample(textures, p[:, TEXTURE1], -v * d1 + offset, u * d1, size * d1)
    tint = p[:, TINT]
    color = torch.lerp(c0, c0 * c1 * 2, p[:, DETAIL, None])
    return torch.lerp(tint, color * (tint + 0.5), p[:, CONTRAST, None])


def _lit(light: Tensor, x: Tensor, n: Tensor, back: Tensor, gloss: Tensor, color: Tensor, occluders) -> Tensor:
    """Light of one lamp (position, point or direction, colour, reach) that a surface sends back; shadows if asked."""
    point = light[:, 3] > 0.5
    to = torch.where(point[:, None], light[:, :3] - x, light[:, :3])
    fade = torch.where(point, 1 / (1 + (to * to).sum(-1) / light[:, 7] ** 2), torch.ones_like(gloss))
    direction = torch.nn.functional.normalize(to, dim=-1)
    diffuse = (n * direction).sum(-1)
    seen = diffuse > 0
    if occluders is not None:
        primitives, scene = occluders
        rays = seen.nonzero()[:, 0]
        reach = torch.where(point[rays], 1.0, FAR)
        seen[rays] &= ~_shadowed(primitives, scene[rays], x[rays], to[rays], reach)
    shine = (n * torch.nn.functional.normalize(direction + back, dim=-1)).sum(-1).clamp(min=0) ** 32
    total = (color * diffuse[:, None] + (gloss * shine)[:, None]) * light[:, 4:7] * fade[:, None]
    return torch.where(seen[:, None], total, torch.zeros_like(total))


def _shade(primitives: Tensor, lights: Tensor, textures: Tensor, scene: Tensor, o: Tensor, d: Tensor, pixel: Tensor):
    t, which, normal = _nearest(primitives, scene, o, d)
    view = torch.nn.functional.normalize(d, dim=-1)
    color = _environment(lights[scene], textures, view, pixel)
    hit = (which >= 0).nonzero()[:, 0]
    if len(hit) == 0:
        return color, torch.zeros_like(t)
    scene_, p, light, view, pixel = (
        scene[hit],
        primitives[scene[hit], which[hit]],
        lights[scene[hit]],
        view[hit],
        pixel[hit],
    )
    x = o[hit] + d[hit] * t[hit, None]
    rotation = p[:, OBJECT_FROM_WORLD].reshape(-1, 3, 4)[..., :3]
    n = torch.nn.functional.normalize((rotation.transpose(1, 2) @ normal[hit][..., None])[..., 0], dim=-1)
    cosine = -(n * view).sum(-1)
    n, cosine = torch.where(cosine[:, None] < 0, -n, n), cosine.abs()
    far = t[hit] * d[hit].norm(dim=-1)
    c = _albedo(p, textures, _transform(p[:, OBJECT_FROM_WORLD], x), normal[hit], far, pixel, cosine)
    start = x + n * (2e-3 * far.clamp(min=0.05))[:, None]
    total = c * torch.lerp(light[:, 19:22], light[:, 16:19], (0.5 + 0.5 * n[:, 2])[:, None]) + c * p[:, EMISSION, None]
    total = total + _lit(light[:, :8], start, n, -view, p[:, GLOSS], c, (primitives, scene_))
    total = total + _lit(light[:, 8:16], start, n, -view, p[:, GLOSS], c, None)
    mirrored = _environment(light, textures, view + n * (2 * cosine)[:, None], torch.full_like(pixel, 0.05))
    fresnel = torch.where(p[:, GLOSS] > 0.02, p[:, GLOSS] * (0.15 + 0.85 * (1 - cosine) ** 4), torch.zeros_like(cosine))
    color[hit] = torch.lerp(total, mirrored, fresnel[:, None])
    return color, torch.where(which >= 0, t, torch.zeros_like(t))


def _sample_offsets(samples: int) -> list[tuple[float, float]]:
    """Places of a pixel's colour samples about its centre."""
    if samples == 1:
        return [(0.0, 0.0)]
    return [
        ((i + 0.5) / samples - 0.5, ((i * 2 + 1) % samples + (0.0 if i * 2 >= samples else 0.5)) / samples - 0.5)
        for i in range(samples)
    ]


def _rays(cameras: Float[Tensor, "b v 16"], height: int, width: int, offset: tuple[float, float] = (0.0, 0.0)):
    """Origin, direction (z = 1 in the camera) and scene of every pixel's ray, flat."""
    b, v = cameras.shape[:2]
    y, x = torch.meshgrid(
        torch.arange(height, device=cameras.device) + 0.5 + offset[1],
        torch.arange(width, device=cameras.device) + 0.5 + offset[0],
        indexing="ij",
    )
    fx, fy, cx, cy = cameras[..., None, None, 12:].unbind(-1)
    in_cam = torch.stack(torch.broadcast_tensors((x - cx) / fx, (y - cy) / fy, torch.ones_like(cx)), -1)
    m = cameras[..., :12].reshape(b, v, 1, 1, 3, 4)
    direction = (m[..., :3] @ in_cam[..., None])[..., 0].reshape(-1, 3)
    origin = m[..., 3].expand(b, v, height, width, 3).reshape(-1, 3)
    scene = torch.arange(b, device=cameras.device).repeat_interleave(v * height * width)
    return origin, direction, scene


def render_reference(
    primitives: Float[Tensor, "b p 60"],
    lights: Float[Tensor, "b 36"],
    cameras: Float[Tensor, "b v 16"],
    textures: UInt8[Tensor, "t texels 4"],
    height: int,
    width: int,
    samples: int = 1,
) -> tuple[Float[Tensor, "b v h w 3"], Float[Tensor, "b v h w"]]:
    """Linear colour (unclipped) and depth of every pixel, in PyTorch: what the kernel must agree with."""
    shape = (*cameras.shape[:2], height, width)
    pixel = (1 / cameras[..., 12, None, None]).expand(shape).reshape(-1)
    color = torch.zeros((pixel.numel(), 3), device=cameras.device)
    for offset in _sample_offsets(samples):
        origin, direction, scene = _rays(cameras, height, width, offset)
        shade, depth = _shade(primitives, lights, textures, scene, origin, direction, pixel)
        color = color + shade / samples
    if samples > 1:
        origin, direction, scene = _rays(cameras, height, width)
        depth, which, _ = _nearest(primitives, scene, origin, direction)
        depth = torch.where(which >= 0, depth, torch.zeros_like(depth))
    return color.reshape(*shape, 3), depth.reshape(shape)


def _compile(command: list[str], source: Path) -> Path:
    """The shared library of `source`, built once for each text of it and command."""
    text = source.read_bytes() + " ".join(command).encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dust3r_sfm"
    target = cache / f"render-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "render.so"
            done = subprocess.run([*command, "-o", str(built), str(source)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{command[0]} could not compile {source}:\n{done.stderr}")
            os.replace(built, target)
    return target


@lru_cache
def load_kernel(device: str) -> ctypes.CDLL | None:
    """The fused renderer for "cuda" (by nvcc) or "cpu" (by g++); None where there is no compiler."""
    compiler = shutil.which("nvcc" if device == "cuda" else "g++")
    if compiler is None:
        return None
    flags = ["-O3", "-shared"]
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        flags += ["-use_fast_math", f"-arch=sm_{major}{minor}", "-Xcompiler", "-fPIC"]
    else:
        flags += ["-x", "c++", "-fPIC"]
    library = ctypes.CDLL(str(_compile([compiler, *flags], Path(__file__).with_name("render.cu"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.render.argtypes = [
        pointer,
        number,
        pointer,
        pointer,
        number,
        number,
        pointer,
        *[number] * 3,
        *[pointer] * 3,
    ]
    return library


def render_fused(
    kernel: ctypes.CDLL,
    primitives: Float[Tensor, "b p 60"],
    lights: Float[Tensor, "b 36"],
    cameras: Float[Tensor, "b v 16"],
    textures: UInt8[Tensor, "t texels 4"],
    height: int,
    width: int,
    samples: int = 1,
    with_color: bool = True,
) -> tuple[Float[Tensor, "b v h w 3"] | None, Float[Tensor, "b v h w"]]:
    """The same by the fused kernel, on its tensors' device and current stream; no synchronisation."""
    if primitives.shape[1] > MAX_PRIMITIVES:
        raise ValueError(f"the kernel takes up to {MAX_PRIMITIVES} primitives a scene, got {primitives.shape[1]}")
    primitives, lights, cameras = primitives.contiguous(), lights.contiguous(), cameras.contiguous()
    b, v = cameras.shape[:2]
    color = cameras.new_empty((b, v, height, width, 3)) if with_color else None
    depth = cameras.new_empty((b, v, height, width))
    stream = torch.cuda.current_stream(cameras.device).cuda_stream if cameras.is_cuda else None
    error = kernel.render(
        primitives.data_ptr(), primitives.shape[1], lights.data_ptr(), cameras.data_ptr(), b * v, v,
        textures.data_ptr(), height, width, samples, color.data_ptr() if with_color else None, depth.data_ptr(), stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"the renderer's kernel failed with CUDA error {error}")
    return color, depth


def render(
    primitives: Float[Tensor, "b p 60"],
    lights: Float[Tensor, "b 36"],
    cameras: Float[Tensor, "b v 16"],
    textures: UInt8[Tensor, "t texels 4"],
    height: int,
    width: int,
    samples: int = 1,
) -> tuple[Float[Tensor, "b v h w 3"], Float[Tensor, "b v h w"]]:
    """Linear colour and depth of every pixel: by the fused kernel on CUDA where nvcc is there, else in PyTorch."""
    kernel = load_kernel("cuda") if cameras.is_cuda else None
    if kernel is None:
        return render_reference(primitives, lights, cameras, textures, height, width, samples)
    return render_fused(kernel, primitives, lights, cameras, textures, height, width, samples)
