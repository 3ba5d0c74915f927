"""Benchmark: Gaussian splats trained from a scene's cameras, and from the true ones, by gsplat on a CUDA device.

Both folders are laid out as `export-scene --formats gsplat` does, of the same photos, and hold points found by the same
rule: `reconstruct --formats gsplat` writes one, and with `--cameras` the one of the true cameras. Every eighth photo
by name is held out, as gsplat's own trainer has it; its pose is the scene's, so that the figure tells whether the
cameras agree with each other. Gaussians start at the points and are split and pruned by gsplat's default strategy; they
have one colour each, and the error is the absolute difference.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pycolmap
import torch
from jaxtyping import Float, UInt8
from scipy.spatial import cKDTree
from torch import Tensor
from tqdm import tqdm

from dust3r_sfm.errors import InputError
from dust3r_sfm.evaluate import markdown_table
from dust3r_sfm.formats.colmap import read_colmap
from dust3r_sfm.formats.images import decoded

logger = logging.getLogger(__name__)

NUM_NEIGHBORS = 3
"""A Gaussian starts as large as its distance to so many others in the mean."""
START_OPACITY = 0.1
RATES = {"scales": 1e-2, "quats": 5e-3, "opacities": 5e-2, "colors": 1e-2}
LAST_RATE = 0.02
"""Of the positions' rate, at the end."""
REFINE_FROM, REFINE_EVERY, REFINE_SHARE = 100, 50, 0.75
"""Steps before the first split, between two, and the share of all steps after which there is none."""


@dataclass(frozen=True, kw_only=True)
class SplatConfig:
    num_steps: int = 600
    """Steps of Adam."""
    batch_size: int = 4
    """Photos a step."""
    hold_out: int = 8
    """Of the photos ordered by name every so many-th, from the first, is not trained on but measured."""
    means_rate: float = 1e-3
    """Of the positions at the start, in units of the farthest camera's distance from the middle of all."""
    seed: int = 0
    """Of the order of photos, the same for both scenes."""


@dataclass(frozen=True, eq=False)
class SplatScene:
    """Photos, pinhole cameras and points: in units of the farthest camera's distance from the middle of all."""

    names: tuple[str, ...]
    images: Float[Tensor, "n h w 3"]
    K: Float[Tensor, "n 3 3"]
    cam_from_world: Float[Tensor, "n 4 4"]
    points: Float[Tensor, "p 3"]
    colors: Float[Tensor, "p 3"]


class SplatFigures(NamedTuple):
    held_out_db: float
    training_db: float
    num_points: int
    num_gaussians: int


def main(scene: Path, reference: Path, config: SplatConfig = SplatConfig()) -> tuple[SplatFigures, SplatFigures]:  # noqa: B008  frozen
    """Train splats of a scene, and of the same photos with their true cameras; print the PSNR of both.

    Args:
        scene: Folder with images/ and sparse/0/, as export-scene writes it for gsplat.
        reference: The same of the true cameras.
        config: How to train.
    """
    if config.hold_out < 2:
        raise InputError(f"hold_out is {config.hold_out}: expected 2 or more, so that photos are left to train on")
    models = [_model(folder) for folder in (scene, reference)]
    names = sorted({image.name for image in models[0].images.values()} & {i.name for i in models[1].images.values()})
    if len(names) <= 2:
        raise InputError(f"{scene} and {reference} share {len(names)} photos: splats are of the same photos, 3 or more")
    gsplat = _gsplat()
    scenes = [splat_scene(model, f / "images", names) for model, f in zip(models, (scene, reference), strict=True)]
    figures = tuple(_measure(gsplat, one, config) for one in scenes)
    header = ["cameras", "held out dB", "training dB", "points", "Gaussians"]
    labels = (str(scene), str(reference))
    rows = [[n, *(f"{x:.2f}" for x in f[:2]), *map(str, f[2:])] for n, f in zip(labels, figures, strict=True)]
    print(markdown_table(header, rows))
    loss = figures[1].held_out_db - figures[0].held_out_db
    print(f"{len(names)} photos, {config.num_steps} steps: {loss:.2f} dB below the reference on photos held out.")
    return figures


def _gsplat() -> ModuleType:
    if find_spec("gsplat") is None:
        raise InputError("training splats needs gsplat: pip install gsplat")
    if not torch.cuda.is_available():
        raise InputError("training splats needs a CUDA device, which PyTorch does not see")
    import gsplat  # builds its kernels at the first import, where they are not there

    return gsplat


def _model(folder: Path) -> pycolmap.Reconstruction:
    model = read_colmap(folder / "sparse" / "0")
    cameras = model.cameras.values()
    if any(camera.model.name not in ("PINHOLE", "SIMPLE_PINHOLE") for camera in cameras):
        raise InputError(f"{folder}: splats need cameras without distortion, as export-scene writes them for gsplat")
    if len({(camera.width, camera.height) for camera in cameras}) != 1:
        raise InputError(f"{folder}: photos of one size are needed here")
    if model.num_points3D() <= NUM_NEIGHBORS:
        raise InputError(f"{folder}: {model.num_points3D()} points are too few to start from")
    return model


def splat_scene(model: pycolmap.Reconstruction, image_dir: Path, names: Sequence[str]) -> SplatScene:
    """The photos of these names, and all points, about the middle of the cameras."""
    by_name = {image.name: image for image in model.images.values()}
    images = [by_name[name] for name in names]
    photos = np.stack([_photo(image_dir / image.name, image.camera) for image in images])
    centers = np.stack([image.projection_center() for image in images])
    middle = centers.mean(axis=0)
    scale = 1 / np.linalg.norm(centers - middle, axis=1).max()
    points = scale * (np.stack([point.xyz for point in model.points3D.values()]) - middle)
    poses = np.tile(np.eye(4), (len(names), 1, 1))
    for pose, image, center in zip(poses, images, centers, strict=True):
        rotation = image.cam_from_world().rotation.matrix()
        pose[:3, :3], pose[:3, 3] = rotation, -scale * rotation @ (center - middle)
    return SplatScene(
        names=tuple(names),
        images=torch.from_numpy(photos).float() / 255,
        K=torch.from_numpy(np.stack([image.camera.calibration_matrix() for image in images])).float(),
        cam_from_world=torch.from_numpy(poses).float(),
        points=torch.from_numpy(points).float(),
        colors=torch.from_numpy(np.stack([point.color for point in model.points3D.values()])).float() / 255,
    )


def _photo(path: Path, camera: pycolmap.Camera) -> UInt8[np.ndarray, "h w 3"]:
    photo = np.asarray(decoded(path))
    if photo.shape[:2] != (camera.height, camera.width):
        raise InputError(f"{path} has {photo.shape[1::-1]} pixels, but its camera {(camera.width, camera.height)}")
    return photo


def _measure(gsplat: ModuleType, scene: SplatScene, config: SplatConfig) -> SplatFigures:
    torch.manual_seed(config.seed)
    held_out = torch.arange(len(scene.names)) % config.hold_out == 0
    splats = _train(gsplat, scene, (~held_out).nonzero()[:, 0], config)
    with torch.no_grad():
        errors = torch.stack([_render(gsplat, splats, scene, [i])[0] for i in range(len(scene.names))])
        errors = (errors.clamp(0, 1).cpu() - scene.images).square().mean(dim=(1, 2, 3))
    psnr = -10 * errors.log10()
    held, trained = float(psnr[held_out].mean()), float(psnr[~held_out].mean())
    return SplatFigures(held, trained, len(scene.points), len(splats["means"]))


def _train(gsplat: ModuleType, scene: SplatScene, indices: Tensor, config: SplatConfig) -> torch.nn.ParameterDict:
    splats = start(scene).cuda()
    rates = {"means": config.means_rate, **RATES}
    optimizers = {name: torch.optim.Adam([splats[name]], lr=rate, eps=1e-15) for name, rate in rates.items()}
    last = int(REFINE_SHARE * config.num_steps)
    strategy = gsplat.DefaultStrategy(
        refine_start_iter=REFINE_FROM,
        refine_every=REFINE_EVERY,
        refine_stop_iter=last,
        reset_every=config.num_steps + 1,
    )
    strategy.check_sanity(splats, optimizers)
    state = strategy.initialize_state(scene_scale=1.0)
    photos = scene.images.cuda()
    for step in tqdm(range(config.num_steps), desc="Splats", unit="step", disable=None):
        batch = indices[torch.randperm(len(indices))[: config.batch_size]].tolist()
        rendered, info = _render(gsplat, splats, scene, batch, with_info=True)
        strategy.step_pre_backward(splats, optimizers, state, step, info)
        (rendered - photos[batch]).abs().mean().backward()
        optimizers["means"].param_groups[0]["lr"] = config.means_rate * LAST_RATE ** (step / config.num_steps)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        strategy.step_post_backward(splats, optimizers, state, step, info, packed=False)
    return splats


def start(scene: SplatScene) -> torch.nn.ParameterDict:
    """A faint ball at each point, as large as its distance to the next ones, of the point's colour."""
    points = scene.points.numpy()
    distances, _ = cKDTree(points).query(points, k=NUM_NEIGHBORS + 1)
    sizes = torch.from_numpy(distances[:, 1:].mean(axis=1)).float().clamp(min=1e-5)
    parameters = {
        "means": scene.points.clone(),
        "scales": sizes.log()[:, None].repeat(1, 3),
        "quats": torch.tensor([1.0, 0, 0, 0]).repeat(len(points), 1),
        "opacities": torch.full((len(points),), START_OPACITY).logit(),
        "colors": scene.colors.clamp(0.01, 0.99).logit(),
    }
    return torch.nn.ParameterDict({name: torch.nn.Parameter(value) for name, value in parameters.items()})


def _render(gsplat, splats, scene: SplatScene, batch: list[int], with_info: bool = False):
    """Photos of some cameras (n h w 3), and with `with_info` what gsplat's strategies want to know."""
    height, width = scene.images.shape[1:3]
    rendered, _, info = gsplat.rasterization(
        means=splats["means"],
        quats=splats["quats"],
        scales=splats["scales"].exp(),
        opacities=splats["opacities"].sigmoid(),
        colors=splats["colors"].sigmoid(),
        viewmats=scene.cam_from_world[batch].cuda(),
        Ks=scene.K[batch].cuda(),
        width=width,
        height=height,
        packed=False,
    )
    return (rendered, info) if with_info else rendered
