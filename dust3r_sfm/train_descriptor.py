"""Stage: learns the projection of the encoder's descriptors on procedural places, by the average-precision loss."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import writing
from dust3r_sfm.infer_pairs import InferConfig, computes_in_bfloat16, pick_device
from dust3r_sfm.models.descriptor import EncoderDescriptor, save_descriptor
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.training.places import sample_flat_places, sample_places
from dust3r_sfm.training.projection import ProjectionConfig, learn_projection
from dust3r_sfm.training.textures import generated_textures, photo_textures, with_mipmaps
from dust3r_sfm.training.world import Dice

logger = logging.getLogger(__name__)

BATCH_PLACES = {"cuda": 32, "cpu": 2, "mps": 2}
ASPECT = 0.75  # height over width of the photos


def main(
    output: Path,
    model: str | None = None,
    textures: Path | None = None,
    num_places: int = 2000,
    num_views: int = 8,
    num_generated: int = 400,
    flat: bool = False,
    seed: int = 0,
    projection: ProjectionConfig = ProjectionConfig(),  # noqa: B008  frozen
    config: InferConfig = InferConfig(),  # noqa: B008  frozen
) -> list[float]:
    """Learn the projection for one network's encoder; about a minute on a GPU, hours on a CPU.

    Args:
        output: The file to write; descriptor_small.safetensors beside the shipped weights is used with them.
        model: Checkpoint file, folder or hub name; the shipped weights where not given.
        textures: Folder of photos for textures, beside the generated ones.
        num_places: Procedural worlds.
        num_views: Photos of each.
        num_generated: Generated textures.
        flat: Places are the textures themselves, seen from aside, in place of worlds: minutes on a CPU.
        seed: Of all that is random.
        projection: How to learn.
        config: How to run the network.
    """
    if num_places < 10 or num_views < 2:
        raise InputError(f"at least 10 places of 2 views are needed, got {num_places} of {num_views}")
    with writing(output):
        device = pick_device(config)
        descriptor = EncoderDescriptor(Dust3r.from_pretrained(model)).to(device)
        images = generated_textures(num_generated, seed)
        if textures is not None:
            images = torch.cat([photo_textures(textures), images])
        dice = Dice(device, seed)
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))].to(device)
        if flat:
            num_places = min(num_places, len(images))
            batches = _flat_batches(images[:num_places], dice, num_views, *_size(descriptor))
        else:
            batches = _world_batches(with_mipmaps(images), dice, num_places, num_views, *_size(descriptor))
        with tqdm(total=num_places * num_views, desc="Places", unit="image", disable=None) as bar:
            features = _pooled(descriptor, batches, bar)
        places = torch.arange(num_places, device=device).repeat_interleave(num_views)
        descriptor.projection, losses = learn_projection(
            features, places, projection, torch.Generator().manual_seed(seed)
        )
        save_descriptor(descriptor, output)
    logger.info("Held-out AP %.3f whitened, %.3f learned; written to %s.", 1 - losses[0], 1 - min(losses), output)
    return losses


def _size(descriptor: EncoderDescriptor) -> tuple[int, int]:
    """(height, width) of the photos."""
    config = descriptor.model.config
    step = 2 * config.patch_size
    return round(ASPECT * config.image_size / step) * step, config.image_size


def _world_batches(
    textures: UInt8[Tensor, "t texels 4"], dice: Dice, num_places: int, num_views: int, height: int, width: int
) -> Iterator[Float[Tensor, "places views 3 h w"]]:
    batch = BATCH_PLACES[dice.device.type]
    for start in range(0, num_places, batch):
        yield sample_places(dice, min(batch, num_places - start), num_views, height, width, textures)


def _flat_batches(
    photos: UInt8[Tensor, "t side side 3"], dice: Dice, num_views: int, height: int, width: int
) -> Iterator[Float[Tensor, "places views 3 h w"]]:
    for some in photos.split(BATCH_PLACES[dice.device.type]):
        yield sample_flat_places(dice, some, num_views, height, width)


def _pooled(
    descriptor: EncoderDescriptor, batches: Iterable[Float[Tensor, "places views 3 h w"]], bar: tqdm
) -> Float[Tensor, "n d"]:
    """Pooled features of the photos of all places."""
    device = next(descriptor.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device))
    features = []
    for images in batches:
        with torch.no_grad():
            with autocast:
                tokens = descriptor.model.encode(images.flatten(0, 1) * 2 - 1).features
            features.append(descriptor.pool(tokens.float()))
        bar.update(len(features[-1]))
    return torch.cat(features)


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["train-descriptor", *sys.argv[1:]]))
