"""Stage: how well the network predicts single pairs, on fixed pairs of real photos with reference cameras.

    python -m dust3r_sfm.evaluate_pairs --scenes_dir scenes --model weights.safetensors --json figures.json

Pose: RANSAC-PnP of image 1's pixels against its pointmap in camera 0's frame, with camera 1's reference K
(pixels freed of lens distortion). Beside it with the reference K of both cameras, the pointmap being given
camera 0's focal in place of the one that it has; and with camera 1's own focal: the one that the pointmap
of image 1 gives where the pair is predicted the other way round, principal point in the centre.
These three are from one direction of the pair, and from the more confident half of the pixels. The last two
stand there both ways, too, as both directions of a pair are predicted in use: from pixels of all confidences,
and the mean of the poses that the two directions give.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from json import dumps
from pathlib import Path
from typing import NamedTuple

import pycolmap
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.formats.dev_pairs import DevPairs, DevView, load_dev_pairs
from dust3r_sfm.geometry.averaging import mean_relative_pose
from dust3r_sfm.geometry.camera import K_from_focal
from dust3r_sfm.geometry.colmap_types import colmap_camera, transform_from_rigid3d
from dust3r_sfm.geometry.focal import focal_from_pointmap, with_focal
from dust3r_sfm.geometry.metrics import (
    focal_error,
    relative_depth_errors,
    relative_rotation_error_deg,
    relative_translation_error_deg,
)
from dust3r_sfm.geometry.transforms import inverse
from dust3r_sfm.infer_pairs import computes_in_bfloat16, pick_device
from dust3r_sfm.models.dust3r import Dust3r, Tokens
from dust3r_sfm.pair_report import PairErrors, PairReport, make_report
from dust3r_sfm.pairs import PairPrediction
from dust3r_sfm.procedural_pairs import procedural_pairs

logger = logging.getLogger(__name__)

MAX_POINTS = 2000  # of image 1 in RANSAC, from the more confident half of its pixels
MAX_POINTS_BOTH_WAYS = 1000  # of either image, from all its pixels: 4000 found no better poses in four times the time
MAX_ERROR_PX = 5.0
MAX_NUM_TRIALS = 2000  # finds a pose that a seventh of the points agree with in 997 of 1000 cases

IndexPair = tuple[int, int]


class _Points(NamedTuple):
    """Some points that image 1 sees, of one prediction or of a batch."""

    in_cam0: Float[Tensor, "*b m 3"]
    pixels1: Int[Tensor, "*b m"]
    """Indices of the points' pixels in the flattened image 1."""


class _Measured(NamedTuple):
    """Of one directed pair, what is kept of its prediction; on the CPU."""

    focal: float
    confidence: Float[Tensor, 2]
    depth: Float[Tensor, 3]
    confident: _Points
    """Of the more confident half of the pixels."""
    spread: _Points
    """Of all pixels."""


def main(
    scenes_dir: Path | None = None,
    model: str | None = None,
    json: Path | None = None,
    procedural: int = 0,
    textures: Path | None = None,
) -> PairReport:
    """Measure what a network predicts for single pairs of photos, on fixed pairs with reference cameras.

    Relative poses of each pair one way, with the K of camera 1, with both K and with the own focal; and both ways, the
    mean of both directions: rotations and directions of translation within 15 degrees (RRA@15, RTA@15), and pairs with
    both within 1 to 30 degrees on average (mAA(30)). Then focal and depth errors, and what confidences say of errors.

    Args:
        scenes_dir: Folder of scenes, each with images and a cameras.json, and pairs_within_60deg.json.
        model: Checkpoint file, folder or hub name; the shipped weights where not given.
        json: File to write the figures to.
        procedural: In place of the scenes, so many rendered pairs, of worlds such as the network is trained on.
        textures: Folder of photos for the rendered worlds' textures, beside generated ones.
    """
    if (scenes_dir is None) == (procedural < 1):
        raise InputError("give --scenes_dir, or the number of --procedural pairs: one of both")
    network, device = Dust3r.from_pretrained(model), pick_device()
    c = network.config
    if scenes_dir is None:
        dev_pairs = procedural_pairs(procedural, c.image_size, device, textures)
    else:
        dev_pairs = load_dev_pairs(scenes_dir, c.image_size, square_ok=c.square_ok)
    report = evaluate_pairs(network, dev_pairs, device)
    print(report.table())
    if json is not None:
        write_bytes(json, dumps(report.to_dict(), indent=1).encode())
    logger.info("%d pairs in %.0f s.", report.total.num_pairs, report.seconds["total"])
    return report


def evaluate_pairs(
    model: Dust3r, dev_pairs: DevPairs, device: torch.device | str, batch_size: int = 16, num_threads: int | None = None
) -> PairReport:
    """Figures of a model on fixed pairs: the same model and pairs give the same figures.

    The model is moved to the device and, where it was training, set back to it. Each image is encoded
    once; pairs are decoded in batches of equal sizes, in bfloat16 where the device computes in it.
    """
    if not dev_pairs.pairs:
        raise InputError("there are no pairs to evaluate")
    start = time.perf_counter()
    was_training = model.training
    runner = _Runner(model.to(device).eval(), dev_pairs.views, torch.device(device), batch_size)
    try:
        with torch.no_grad():  # not inference_mode: training could not use what the model keeps of it
            measured = runner.measure(list(dict.fromkeys([*dev_pairs.pairs, *_reversed(dev_pairs.pairs)])))
            across = torch.cat([torch.empty(0, 2), *runner.confidences(dev_pairs.pairs_across)])
    finally:
        model.train(was_training)
    predicted = time.perf_counter()
    poses = _poses(dev_pairs, measured, num_threads or min(os.cpu_count() or 1, 16))
    errors = _errors(dev_pairs, measured, across, poses)
    end = time.perf_counter()
    return make_report(errors, {"network": predicted - start, "poses": end - predicted, "total": end - start})


class _Runner:
    """The model on its device, with all images encoded."""

    def __init__(self, model: Dust3r, views: Sequence[DevView], device: torch.device, batch_size: int) -> None:
        self.model, self.views, self.device, self.batch_size = model, views, device, batch_size
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device))
        self.tokens: dict[int, Tokens] = {}

    def measure(self, pairs: Sequence[IndexPair]) -> dict[IndexPair, _Measured]:
        found = {}
        for batch, prediction in self._predict(pairs):
            found.update(zip(batch, _measure(prediction, [self.views[i] for i, _ in batch]), strict=True))
        return found

    def confidences(self, pairs: Sequence[IndexPair]) -> Iterator[Float[Tensor, "b 2"]]:
        for _, prediction in self._predict(pairs):
            yield _median_confidences(prediction).cpu()

    def _predict(self, pairs: Sequence[IndexPair]) -> Iterator[tuple[list[IndexPair], PairPrediction]]:
        self._encode(sorted({i for pair in pairs for i in pair} - set(self.tokens)))
        for batch in self._batches(pairs, [tuple(self.views[i].view.size for i in pair) for pair in pairs]):
            with self.autocast:
                prediction = self.model.decode(*(self._stack([pair[side] for pair in batch]) for side in (0, 1)))
            fields = ("pointmap0_in_cam0", "confidence0", "pointmap1_in_cam0", "confidence1")
            yield batch, PairPrediction(*(getattr(prediction, field).float() for field in fields))

    def _encode(self, indices: Sequence[int]) -> None:
        for batch in self._batches(indices, [self.views[i].view.size for i in indices]):
            images = torch.stack([self.views[i].view.normalized() for i in batch]).to(self.device)
            with self.autocast:
                tokens = self.model.encode(images)
            self.tokens.update(
                (i, Tokens(f, tokens.grid)) for i, f in zip(batch, tokens.features.split(1), strict=True)
            )

    def _stack(self, indices: Sequence[int]) -> Tokens:
        return Tokens(torch.cat([self.tokens[i].features for i in indices]), self.tokens[indices[0]].grid)

    def _batches(self, items: Sequence, sizes: Sequence) -> Iterator[list]:
        groups = defaultdict(list)
        for item, size in zip(items, sizes, strict=True):
            groups[size].append(item)
        for group in groups.values():
            yield from (group[k : k + self.batch_size] for k in range(0, len(group), self.batch_size))


def _reversed(pairs: Sequence[IndexPair]) -> list[IndexPair]:
    return [(j, i) for i, j in pairs]


def _median_confidences(prediction: PairPrediction) -> Float[Tensor, "b 2"]:
    medians = [c.flatten(1).median(dim=1).values for c in (prediction.confidence0, prediction.confidence1)]
    return torch.stack(medians, dim=-1)


def _measure(prediction: PairPrediction, views0: Sequence[DevView]) -> Iterator[_Measured]:
    pointmap0, confidence0 = prediction.pointmap0_in_cam0, prediction.confidence0
    height, width = confidence0.shape[1:]
    center = torch.tensor([width / 2, height / 2], device=pointmap0.device)
    focals = focal_from_pointmap(pointmap0, confidence0, center).tolist()
    medians = _median_confidences(prediction).cpu()
    ranked = prediction.confidence1.flatten(1).argsort(dim=1, descending=True, stable=True)
    confident = _take(prediction.pointmap1_in_cam0, ranked[:, : max(ranked.shape[1] // 2, 1)], MAX_POINTS)
    spread = _take(prediction.pointmap1_in_cam0, ranked, MAX_POINTS_BOTH_WAYS)
    for k, view in enumerate(views0):
        depth = _depth_errors(pointmap0[k, ..., 2], confidence0[k], view)
        points = (_Points(chosen.in_cam0[k], chosen.pixels1[k]) for chosen in (confident, spread))
        yield _Measured(focals[k], medians[k], depth, *points)


def _take(pointmap1_in_cam0: Float[Tensor, "b h w 3"], ranked: Int[Tensor, "b n"], max_points: int) -> _Points:
    """Every so many of the ranked pixels, on the CPU."""
    n = ranked.shape[1]
    pixels1 = ranked[:, torch.linspace(0, n - 1, min(max_points, n), device=ranked.device).long()]
    points = torch.take_along_dim(pointmap1_in_cam0.flatten(1, 2), pixels1[..., None], dim=1)
    return _Points(points.cpu(), pixels1.cpu())


def _depth_errors(depth: Float[Tensor, "h w"], confidence: Float[Tensor, "h w"], view: DevView) -> Float[Tensor, 3]:
    """Median relative errors of all pixels with a reference, of their more confident half, and of the rest."""
    if view.depth is None or not (view.depth > 0).any():
        return torch.full((3,), torch.nan)
    known = view.depth > 0
    errors = relative_depth_errors(depth.cpu()[known], view.depth[known])
    errors = errors[confidence.cpu()[known].argsort(descending=True, stable=True)]
    half = (len(errors) + 1) // 2
    return torch.stack(
        [part.median() if len(part) else errors.median() for part in (errors, errors[:half], errors[half:])]
    )


class _Poses(NamedTuple):
    """cam1_from_cam0 of every pair; NaN where there is none."""

    known: Float[Tensor, "p 4 4"]
    """With camera 1's reference K."""
    both_known: Float[Tensor, "p 4 4"]
    """With the reference K of both cameras."""
    own_focal: Float[Tensor, "p 4 4"]
    """With camera 1's own focal."""
    both_ways: Float[Tensor, "p 4 4"]
    """With the reference K of both cameras, the mean of both directions."""
    own_focal_both_ways: Float[Tensor, "p 4 4"]
    """With the cameras' own focals, the mean of both directions."""


def _poses(dev_pairs: DevPairs, measured: dict[IndexPair, _Measured], num_threads: int) -> _Poses:
    views, pairs = dev_pairs.views, dev_pairs.pairs

    def from_confident(pair: IndexPair) -> Float[Tensor, "3 4 4"]:
        points, view1 = measured[pair].confident, views[pair[1]]
        known = _resect(points.in_cam0, view1.keypoints.flatten(0, 1)[points.pixels1], view1.K)
        return torch.stack([known, *_both_known_and_own_focal(pair, points, views, measured)])

    def from_all(pair: IndexPair) -> Float[Tensor, "2 4 4"]:
        return torch.stack(_both_known_and_own_focal(pair, measured[pair].spread, views, measured))

    with ThreadPoolExecutor(num_threads) as pool:  # pycolmap's estimators leave the lock of Python to the others
        one_way, directions = pool.map(from_confident, pairs), pool.map(from_all, measured)
        found = dict(zip(measured, directions, strict=True))
        forth, back = (torch.stack([found[pair] for pair in way]) for way in (pairs, _reversed(pairs)))
        means = mean_relative_pose(forth, inverse(back))
        return _Poses(*torch.stack([*one_way]).unbind(1), *means.unbind(1))


def _both_known_and_own_focal(
    pair: IndexPair, points: _Points, views: Sequence[DevView], measured: dict[IndexPair, _Measured]
) -> tuple[Float[Tensor, "4 4"], Float[Tensor, "4 4"]]:
    """cam1_from_cam0 with the reference K of both cameras, and with camera 1's own focal."""
    i, j = pair
    view1, (height, width) = views[j], views[j].view.size
    keypoints = view1.keypoints.flatten(0, 1)[points.pixels1]
    x, y = points.pixels1 % width + 0.5, points.pixels1 // width + 0.5
    own_K = K_from_focal(torch.tensor(measured[j, i].focal), torch.tensor([width / 2, height / 2]))
    stretched = with_focal(points.in_cam0, torch.tensor(measured[pair].focal), _focal(views[i]))
    return _resect(stretched, keypoints, view1.K), _resect(points.in_cam0, torch.stack([x, y], dim=-1), own_K)


def _focal(view: DevView) -> Float[Tensor, ""]:
    return view.K.diagonal()[:2].mean()


def _resect(
    points: Float[Tensor, "m 3"], keypoints: Float[Tensor, "m 2"], K: Float[Tensor, "3 3"]
) -> Float[Tensor, "4 4"]:
    """The pose by RANSAC-PnP with a bounded number of trials, so that a hopeless pair costs little; NaN without one."""
    nothing = torch.full((4, 4), torch.nan, dtype=torch.float64)
    finite = points.isfinite().all(dim=-1) & keypoints.isfinite().all(dim=-1)
    if finite.sum() < 4 or not K.isfinite().all() or K[0, 0] <= 0:
        return nothing
    ransac = {"max_error": MAX_ERROR_PX, "random_seed": 0, "min_num_trials": 100, "max_num_trials": MAX_NUM_TRIALS}
    found = pycolmap.estimate_and_refine_absolute_pose(
        keypoints[finite].double().numpy(),
        points[finite].double().numpy(),
        colmap_camera(K),
        estimation_options={"ransac": ransac},
    )
    return nothing if found is None else transform_from_rigid3d(found["cam_from_world"])


def _errors(
    dev_pairs: DevPairs,
    measured: dict[IndexPair, _Measured],
    across: Float[Tensor, "q 2"],
    poses: _Poses,
) -> PairErrors:
    views, pairs = dev_pairs.views, dev_pairs.pairs
    of_pairs = [measured[pair] for pair in pairs]
    reference = torch.stack([views[j].cam_from_world @ inverse(views[i].cam_from_world) for i, j in pairs]).double()
    focals = torch.tensor([found.focal for found in of_pairs])
    reference_focals = torch.stack([_focal(views[i]) for i, _ in pairs])
    return PairErrors(
        scenes=tuple(views[i].scene for i, _ in pairs),
        rotation_deg=relative_rotation_error_deg(poses.known, reference),
        translation_deg=relative_translation_error_deg(poses.known, reference),
        rotation_both_known_deg=relative_rotation_error_deg(poses.both_known, reference),
        translation_both_known_deg=relative_translation_error_deg(poses.both_known, reference),
        rotation_own_focal_deg=relative_rotation_error_deg(poses.own_focal, reference),
        translation_own_focal_deg=relative_translation_error_deg(poses.own_focal, reference),
        rotation_both_ways_deg=relative_rotation_error_deg(poses.both_ways, reference),
        translation_both_ways_deg=relative_translation_error_deg(poses.both_ways, reference),
        rotation_own_focal_both_ways_deg=relative_rotation_error_deg(poses.own_focal_both_ways, reference),
        translation_own_focal_both_ways_deg=relative_translation_error_deg(poses.own_focal_both_ways, reference),
        focal=focal_error(focals, reference_focals),
        confidence=torch.stack([found.confidence for found in of_pairs]),
        confidence_reversed=torch.stack([measured[pair].confidence.flip(0) for pair in _reversed(pairs)]),
        depth=torch.stack([found.depth for found in of_pairs]),
        confidence_across=across,
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scenes_dir", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--procedural", type=int, default=0)
    parser.add_argument("--textures", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":  # argparse, as machines that only train have no tyro
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        main(**vars(_parse(sys.argv[1:])))
    except InputError as mistake:
        print(f"evaluate_pairs: {mistake}", file=sys.stderr)
        sys.exit(2)
