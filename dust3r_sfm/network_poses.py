"""The pose of a query from pointmaps of it with images of a reference, the two ways of DUSt3R (Sec. 3.3).

Both take the unit of the reference from the ratio between known depths of an image and those predicted for it.
`dense_matches`: pixels of the query that match an image's, and the points that these see, for PnP. `relative_poses`:
the query's pose relative to an image, from the points that its pixels have in that image's frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pycolmap
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dust3r_sfm.alignment.known_focals import focused, own_focal
from dust3r_sfm.alignment.localization import CameraPose, PointMatches, QueryCamera, joined, scored
from dust3r_sfm.filter_pairs import pair_score
from dust3r_sfm.geometry.camera import split_rotation, transform_K
from dust3r_sfm.geometry.focal import focal_from_pointmap
from dust3r_sfm.geometry.resection import relative_pose_from_pointmap
from dust3r_sfm.geometry.transforms import inverse
from dust3r_sfm.match_dense import match_pair
from dust3r_sfm.pairs import Pair, PairPrediction, Predictions
from dust3r_sfm.reference import Reference
from dust3r_sfm.views import View

MIN_CONFIDENCE = 1.1
"""Typical confidence of the weaker image of a pair that counts: DUSt3R's start at 1, where it knows nothing."""
MIN_OF_MOST = 0.5
"""Images with fewer matches than this share of the best one's are left out."""
MIN_SEEN = 10
"""Pixels of known depth that an image must have for its pointmap to be scaled by them."""


def dense_matches(
    query: View, images: Sequence[str], reference: Reference, views: Mapping[str, View], predictions: Predictions
) -> PointMatches:
    """Reciprocal matches of the query with the images, whose pixels see points at the predicted, scaled depth.

    Images that share little with the query have far fewer matches than those that share much, and
    most of them wrong: they are left out.
    """
    parts: list[PointMatches] = []
    for name in images:
        pair = Pair(name, query.name)
        scale = unit_scale(predictions[pair], views[name], reference.seen.get(name))
        if scale is None or pair_score(predictions[pair]) < MIN_CONFIDENCE:
            continue
        found = match_pair(predictions[pair], views[name], query, reverse=predictions.get(pair.reversed()))
        if len(found.scores):
            points = _points_in_world(found.keypoints0, predictions[pair], views[name], scale, reference)
            parts.append(PointMatches(query.stored_from_net(found.keypoints1.double().numpy()), points))
    most = max(map(len, parts), default=0)
    return joined(part for part in parts if len(part) >= MIN_OF_MOST * most)


def relative_poses(
    query: View,
    camera: QueryCamera,
    images: Sequence[str],
    reference: Reference,
    views: Mapping[str, View],
    predictions: Predictions,
) -> list[tuple[Float64[np.ndarray, "3 4"], pycolmap.Camera]]:
    """cam_from_world of the query and its camera, once for each image that says something of them."""
    found = []
    for name in images:
        pair, view = Pair(name, query.name), views[name]
        K0 = torch.from_numpy(np.array(reference.cameras[name].calibration_matrix()))
        reference_turn, K0 = _net_camera(view, K0)
        prediction = predictions[pair]
        prediction = focused(prediction, K0.float(), own_focal(prediction, K0[:2, 2].float()))
        scale = unit_scale(prediction, view, reference.seen.get(name))
        own = _camera_of_query(query, camera, predictions.get(pair.reversed()))
        if scale is None or own is None or pair_score(prediction) < MIN_CONFIDENCE:
            continue
        turn, K = _net_camera(query, torch.from_numpy(np.array(own.calibration_matrix())))
        relative = relative_pose_from_pointmap(prediction.pointmap1_in_cam0, prediction.confidence1, K.float())
        if relative is None:
            continue
        relative = relative.double()
        relative[:3, 3] *= scale
        world = torch.eye(4, dtype=torch.float64)
        world[:3] = torch.from_numpy(reference.cam_from_world[name])
        pose = turn @ relative @ inverse(reference_turn) @ world
        found.append((pose[:3].numpy(), own))
    return found


def most_agreed(
    poses: Sequence[tuple[Float64[np.ndarray, "3 4"], pycolmap.Camera]], matches: PointMatches, max_error_px: float
) -> CameraPose | None:
    """Of several poses the one that explains most of the matches; None where there is none."""
    candidates = [scored(camera, pose, matches, max_error_px) for pose, camera in poses]
    return max(candidates, key=lambda pose: pose.score, default=None)


def unit_scale(prediction: PairPrediction, view: View, seen: Float64[np.ndarray, "k 3"] | None) -> float | None:
    """Units of the reference in one unit of the prediction: the median ratio of depths; None where too few are known.

    `seen` are pixels of the stored file of image 0 with their depths.
    """
    if seen is None or len(seen) < MIN_SEEN:
        return None
    height, width = view.size
    xy = view.net_from_stored(seen[:, :2])
    inside = (xy >= 0).all(axis=1) & (xy[:, 0] < width) & (xy[:, 1] < height)
    x, y = xy[inside].astype(int).T
    predicted = prediction.pointmap0_in_cam0[y, x, 2].double().numpy()
    usable = predicted > 0
    if usable.sum() < MIN_SEEN:
        return None
    return float(np.median(seen[inside, 2][usable] / predicted[usable]))


def _points_in_world(
    net: Float[Tensor, "n 2"], prediction: PairPrediction, view: View, scale: float, reference: Reference
) -> Float64[np.ndarray, "n 3"]:
    """The points at pixels of image 0; its own camera says in which direction, the pointmap how deep."""
    x, y = net.long().unbind(-1)
    depth = scale * prediction.pointmap0_in_cam0[y, x, 2].double().numpy()
    rays = reference.cameras[view.name].cam_from_img(view.stored_from_net(net.double().numpy()))
    in_cam = np.concatenate([rays, np.ones((len(rays), 1))], axis=1) * depth[:, None]
    in_cam[depth <= 0] = np.nan
    pose = reference.cam_from_world[view.name]
    return (in_cam - pose[:, 3]) @ pose[:, :3]


def _camera_of_query(query: View, camera: QueryCamera, own: PairPrediction | None) -> pycolmap.Camera | None:
    """The known camera, else one with the focal of the query's own pointmap, else a guess."""
    if camera.known is not None:
        return camera.known
    if own is None:
        return camera.guesses[0] if camera.guesses else None
    height, width = query.size
    center = torch.tensor([width / 2, height / 2])
    focal = float(focal_from_pointmap(own.pointmap0_in_cam0, own.confidence0, center))
    if not focal > 0:
        return None
    focal /= float(query.net_from_img[:2, :2].det().abs().sqrt())
    width, height = camera.size
    return pycolmap.Camera(model="SIMPLE_PINHOLE", width=width, height=height, params=[focal, width / 2, height / 2])


def _net_camera(view: View, K_img: Float[Tensor, "3 3"]) -> tuple[Float[Tensor, "4 4"], Float[Tensor, "3 3"]]:
    """imgcam_from_netcam of a view, and intrinsics in the network image."""
    eye = torch.eye(3, dtype=torch.float64)
    _, turn = split_rotation(torch.linalg.inv(view.net_from_img.double()), eye)
    return turn, transform_K(K_img, view.net_from_img.double()) @ turn[:3, :3]
