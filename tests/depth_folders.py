"""Procedural scenes as folders of photos with poses and depth, in the forms that training takes."""

import json

import numpy as np
import torch
from aligned import true_scene
from PIL import Image

from dust3r_sfm.formats.dense import write_dense
from dust3r_sfm.geometry.transforms import inverse, quaternion_from_rotation


def save_photos(procedural, folder):
    """As stored: twice as fine as the network sees them."""
    for view in procedural.views:
        (folder / view.name).parent.mkdir(parents=True, exist_ok=True)
        pixels = view.image.numpy().repeat(2, axis=0).repeat(2, axis=1)
        Image.fromarray(pixels).save(folder / view.name, quality=95)


def stored_intrinsics(procedural, i):
    return torch.diag(torch.tensor([2.0, 2.0, 1.0])) @ procedural.K[i]


def save_depth(procedural, i, path, scale):
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = procedural.depth[i].numpy().repeat(2, axis=0).repeat(2, axis=1)
    Image.fromarray((depth * scale).round().astype(np.uint16)).save(path)


def write_rgbd(procedural, folder):
    frames = []
    for i, view in enumerate(procedural.views):
        save_depth(procedural, i, folder / "depth" / f"{i}.png", 1000)
        width, height = view.original_size
        frame = {
            "image": f"images/{view.name}",
            "width": width,
            "height": height,
            "K": stored_intrinsics(procedural, i).tolist(),
        }
        frame |= {"cam_from_world": procedural.cam_from_world[i].tolist(), "depth": f"depth/{i}.png"}
        frames.append(frame | {"depth_scale": 1000})
    save_photos(procedural, folder / "images")
    (folder / "cameras.json").write_text(json.dumps({"frames": frames}))


def write_tum(procedural, folder):
    save_photos(procedural, folder)
    rgb, depths, poses = ["# color images"], ["# depth maps"], ["# timestamp tx ty tz qx qy qz qw"]
    for i, name in enumerate(procedural.names):
        save_depth(procedural, i, folder / f"depth/{i}.png", 5000)
        rgb.append(f"{100 + i}.00 {name}")
        depths.append(f"{100 + i}.01 depth/{i}.png")
        world_from_cam = inverse(procedural.cam_from_world[i].double())
        w, x, y, z = quaternion_from_rotation(world_from_cam[:3, :3]).tolist()
        poses.append(" ".join(map(str, [100 + i - 0.005, *world_from_cam[:3, 3].tolist(), x, y, z, w])))
    rgb.append("200.0 photos/without-pose.jpg")
    for file, lines in (("rgb.txt", rgb), ("depth.txt", depths), ("groundtruth.txt", poses)):
        (folder / file).write_text("\n".join(lines) + "\n")
    K = stored_intrinsics(procedural, 0)
    (folder / "calibration.txt").write_text(f"{K[0, 0]} {K[1, 1]} {K[0, 2]} {K[1, 2]}\n")


def write_colmap(procedural, folder):
    image_dir = folder.with_name("originals")
    save_photos(procedural, image_dir)
    write_dense(true_scene(procedural), image_dir, folder)
