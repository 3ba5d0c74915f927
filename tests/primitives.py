"""Scenes of a few primitives for the renderer, written down number by number."""

import torch

from dust3r_sfm.training import render as r


def primitive(kind, center=(0, 0, 0), half=(1, 1, 1), rotation=None, clip=(0, 0, 0, 1000), taper=0.0, **numbers):
    """A row: a plain white shape, of half sizes `half`, turned by a 3x3 world_from_object rotation."""
    center, half = torch.tensor(center, dtype=torch.float64), torch.tensor(half, dtype=torch.float64)
    rotation = torch.eye(3, dtype=torch.float64) if rotation is None else rotation.double()
    linear = torch.diag(1 / half) @ rotation.T
    row = torch.zeros(r.PRIMITIVE_SIZE, dtype=torch.float64)
    row[r.TYPE] = kind
    row[r.OBJECT_FROM_WORLD] = torch.cat([linear, -(linear @ center)[:, None]], 1).flatten()
    row[r.CLIP] = torch.tensor(clip, dtype=torch.float64)
    row[r.TAPER], row[r.EXTENT], row[r.TINT] = taper, half, 1.0
    row[r.BOUND] = torch.cat([center, 1.01 * half.norm()[None]])
    row[r.DENSITY0] = row[r.DENSITY1] = 1.0
    for name, value in numbers.items():
        row[getattr(r, name.upper())] = torch.as_tensor(value, dtype=torch.float64)
    return row.float()


def light(ambient=1.0, lamp0=None, lamp1=None, sky=0.0):
    """A row: the same ambient light from all sides, up to two white lamps ((x, y, z), is_point, reach), a plain sky."""
    row = torch.zeros(r.LIGHT_SIZE)
    for start, lamp in ((0, lamp0), (8, lamp1)):
        if lamp is not None:
            place, is_point, reach = lamp
            row[start : start + 8] = torch.tensor([*place, float(is_point), 1, 1, 1, reach])
    row[7] = row[7] or 1.0
    row[15] = row[15] or 1.0
    row[16:22], row[22:31], row[33] = ambient, sky, 1.0
    return row


def camera(world_from_cam, focal, height, width):
    """A row: the principal point is the image's middle."""
    return torch.cat([world_from_cam[:3].flatten(), torch.tensor([focal, focal, width / 2, height / 2])]).float()


def along_y(place):
    """world_from_cam (3, 4) of a level camera that looks along the world's y."""
    rotation = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    return torch.cat([rotation, torch.tensor(place)[:, None]], 1)


def from_above(height):
    """world_from_cam (3, 4) of a camera on the z axis that looks down; its x is the world's."""
    rotation = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])
    return torch.cat([rotation, torch.tensor([[0.0], [0.0], [height]])], 1)


def shoot(primitives, camera_row, height, width, lights=None, textures=None, samples=1):
    """Colour (h, w, 3) and depth (h, w) of one view of one scene."""
    lights = light() if lights is None else lights
    textures = torch.full((1, r.TEXELS, 4), 255, dtype=torch.uint8) if textures is None else textures
    primitives = torch.stack(primitives)[None]
    color, depth = r.render_reference(
        primitives, lights[None], camera_row[None, None], textures, height, width, samples
    )
    return color[0, 0], depth[0, 0]


def pixel_rays(camera_row, height, width):
    """Origin (3,) and directions (h, w, 3) in the world of rays through the pixels' centres, z = 1 in the camera."""
    pose, (fx, fy, cx, cy) = camera_row[:12].double().view(3, 4), camera_row[12:].double()
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    in_cam = torch.stack([(x - cx) / fx, (y - cy) / fy, torch.ones_like(x).double()], -1)
    return pose[:, 3], in_cam @ pose[:, :3].T
