"""Refinement as a whole on procedural rooms: what explains more is taken, what no match verifies stays beside it."""

import dataclasses

import numpy as np
import pycolmap
import pytest
import torch
from observed import observed_scene, perturbed
from procedural import make_scene

from dust3r_sfm import mapping
from dust3r_sfm.alignment.align import align
from dust3r_sfm.alignment.refine import RefineConfig, Support, refine
from dust3r_sfm.alignment.tracks import build_tracks
from dust3r_sfm.colmap_versions import add_camera, add_image, new_camera
from dust3r_sfm.evaluate import evaluate_poses
from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.formats.colmap_scenes import seen_maps
from dust3r_sfm.formats.sparse_database import SparseMatches
from dust3r_sfm.geometry.lens import Lens, bent
from dust3r_sfm.geometry.transforms import camera_center
from dust3r_sfm.mapping import Model, map_from_alignment
from dust3r_sfm.match_dense import match_dense
from dust3r_sfm.pairs import Pair
from dust3r_sfm.refine_scene import choose, closing_line, refine_scenes
from dust3r_sfm.scene import SceneIds
from dust3r_sfm.sparse_features import EMPTY, guide

NUM_VIEWS = 6


@pytest.fixture(scope="module")
def procedural():
    return make_scene(NUM_VIEWS, (96, 128), pairs=[])


@pytest.fixture(scope="module")
def observed(procedural):
    return observed_scene(procedural, num_points=300, noise_px=0.5)


@pytest.fixture(scope="module")
def views(procedural, observed):
    stored = zip(procedural.views, observed.original_sizes, observed.net_from_img, strict=True)
    return [dataclasses.replace(v, original_size=size, net_from_img=m) for v, size, m in stored]


def sparse_of(scene, names=None):
    """The scene's tracks as what SIFT would have found and COLMAP verified, between the named images."""
    tracks, names = scene.tracks, scene.names if names is None else names
    rows = {name: torch.nonzero(tracks.image_indices == i)[:, 0] for i, name in enumerate(scene.names)}
    keypoints = {name: tracks.keypoints[rows[name]].double().numpy() for name in names}
    row_of = {n: {p: i for i, p in enumerate(tracks.point_indices[rows[n]].tolist())} for n in names}
    geometries = {}
    for i, name0 in enumerate(names):
        for name1 in names[i + 1 :]:
            shared = sorted(row_of[name0].keys() & row_of[name1].keys())
            matches = np.array([[row_of[name0][p], row_of[name1][p]] for p in shared], dtype=np.uint32)
            geometry = pycolmap.TwoViewGeometry()
            geometry.config, geometry.inlier_matches = 2, matches.reshape(-1, 2)  # calibrated
            if len(shared) >= 15:
                geometries[Pair(name0, name1)] = geometry
    width, height = scene.original_sizes[0]
    camera = new_camera(1, pycolmap.CameraModelId.SIMPLE_RADIAL, 1.2 * width, (width, height))
    return SparseMatches(keypoints, geometries, dict.fromkeys(names, camera), {})


def without_tracks(scene):
    return dataclasses.replace(scene, tracks=None)


def report(scene, procedural):
    truth = dict(zip(procedural.names, procedural.cam_from_world, strict=True))
    return evaluate_poses(dict(zip(scene.names, scene.cam_from_world, strict=True)), truth)


def test_a_perturbed_scene_returns_to_the_truth(procedural, observed, views, tmp_path):
    aligned = without_tracks(perturbed(observed))
    found = refine_scenes(views, [aligned], {}, sparse_of(observed), tmp_path)
    (scene,) = found.scenes
    assert report(aligned, procedural).auc[5] < 0.6
    assert report(scene, procedural).auc[1] > 0.93
    assert scene.names == observed.names
    assert set(scene.lenses) <= {None}  # a distortion that bends nothing is none
    assert scene.tracks.errors.mean() < 1
    origins = [line["origin"] for line in found.figures["candidates"]]
    assert origins[0] == "alignment"
    assert "mapping" in origins[1:]
    before, after = (found.figures["candidates"][0][key] for key in ("before", "after"))
    assert after["score"] > before["score"]
    assert closing_line(found).startswith("Refined over 15 verified pairs: 6 images by ")
    assert list(tmp_path.iterdir()) == []


def test_all_points_of_a_refined_scene_have_the_colours_of_their_pixels(procedural, observed, views, tmp_path):
    """COLMAP's are black, as it reads no photos here."""
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(128), indexing="ij")
    ramp = torch.stack([2 * columns, 2 * rows, torch.full_like(rows, 9)], dim=-1).to(torch.uint8)
    ramps = [dataclasses.replace(view, image=ramp) for view in views]
    matches = match_dense(procedural.views, make_scene(NUM_VIEWS, (96, 128)).predictions)
    (scene,) = refine_scenes(
        ramps, [build_tracks(perturbed(observed), {}, ramps)], matches, sparse_of(observed), tmp_path
    ).scenes
    tracks = scene.tracks
    assert len(tracks.errors) > 400  # of both kinds
    stored = tracks.keypoints.double().numpy()
    shown = torch.zeros(len(stored), 2, dtype=torch.float64)
    for i in range(NUM_VIEWS):
        here = tracks.image_indices == i
        shown[here] = 2 * (torch.from_numpy(scene.net_from_stored(i, stored[here.numpy()])) - 0.5)
    mean = torch.zeros(len(tracks.errors), 2, dtype=torch.float64).index_add_(0, tracks.point_indices, shown)
    mean /= tracks.point_indices.bincount()[:, None]
    assert (tracks.colors[:, :2] - mean).abs().max() <= 1.5
    assert tracks.colors[:, 2].unique().tolist() == [9]


def test_the_solvers_steps_are_those_asked_for_in_every_round(observed, views, tmp_path, monkeypatch):
    asked = []

    def noting(model, config, *held):
        asked.append(config.max_iters)
        return refine(model, config, *held)

    monkeypatch.setattr(mapping, "refine", noting)
    map_from_alignment(without_tracks(observed), views, sparse_of(observed), tmp_path, RefineConfig(max_iters=3))
    assert len(asked) > len(mapping.ROUND_FACTORS)
    assert set(asked) == {3}


def test_a_hopeless_alignment_gives_way_to_mapping_in_its_frame(procedural, observed, views, tmp_path):
    aligned = without_tracks(perturbed(observed, angle_deg=40.0, shift=1.0, focal=0.3))
    found = refine_scenes(views, [aligned], {}, sparse_of(observed), tmp_path)
    assert [line["origin"] for line in found.figures["chosen"]] == ["mapping"]
    assert report(found.scenes[0], procedural).auc[1] > 0.93


def test_images_without_matches_keep_their_aligned_place(procedural, observed, views, tmp_path):
    lone = observed.names[4]
    verified = [name for name in observed.names if name != lone]
    found = refine_scenes(views, [without_tracks(observed)], {}, sparse_of(observed, verified), tmp_path)
    (scene,) = found.scenes
    assert set(scene.names) == set(observed.names)
    assert found.figures["chosen"][0]["after"]["verified_images"] == 5
    assert report(scene, procedural).auc[3] > 0.9
    assert (scene.depth[scene.names.index(lone)] > 0).all()


def bend(scene, k1):
    """The scene's keypoints as a lens of SIMPLE_RADIAL distortion k1 would show them."""
    lens = Lens("SIMPLE_RADIAL", (k1,))
    pixels = bent(scene.tracks.keypoints.double().numpy(), scene.K_img(0), lens)
    return dataclasses.replace(
        scene, tracks=dataclasses.replace(scene.tracks, keypoints=torch.from_numpy(pixels).float())
    )


def test_distortion_that_is_found_is_exported_with_depths_on_the_pinhole(procedural, observed, views, tmp_path):
    aligned = without_tracks(perturbed(observed))
    found = refine_scenes(views, [aligned], {}, sparse_of(bend(observed, 0.2)), tmp_path)
    (scene,) = found.scenes
    assert report(scene, procedural).auc[1] > 0.93
    assert [lens.model for lens in scene.lenses] == ["SIMPLE_RADIAL"] * NUM_VIEWS
    assert [lens.coefficients[0] for lens in scene.lenses] == pytest.approx([0.2] * NUM_VIEWS, abs=0.02)
    model = colmap_from_scene(scene)
    assert model.compute_mean_reprojection_error() < 0.75  # noise of half a pixel; 20 px in the corners without
    depth = seen_maps(scene)[scene.names[0]][0]  # back to the pixels that the network saw
    there = (depth > 0) & (observed.depth[0] > 0)
    ratio = depth[there] / observed.depth[0][there]
    assert there.float().mean() > 0.9
    assert (ratio / ratio.median() - 1).abs().median() < 0.02  # bent to points of half a pixel's noise


def test_without_verified_matches_dense_tracks_alone_are_adjusted(procedural, observed, views, tmp_path):
    aligned = perturbed(observed, angle_deg=0.5, shift=0.02, focal=0.01)
    numbers = tuple(range(70, 70 + NUM_VIEWS))  # of a model that it continued once: they do not matter here
    numbered = dataclasses.replace(aligned, ids=SceneIds(numbers, numbers, (), 9))
    found = refine_scenes(views, [numbered], {}, EMPTY, tmp_path)
    assert found.figures["chosen"] == []
    assert report(found.scenes[0], procedural).auc[1] > max(0.9, report(aligned, procedural).auc[1])


def test_matches_find_images_that_the_alignment_lacks_where_gps_saw_them(procedural, observed, views, tmp_path):
    sigma = torch.full((3,), 0.2, dtype=torch.float64)
    places = 10 * procedural.centers.double()
    views = [
        dataclasses.replace(v, known_position=place, position_sigma=sigma)
        for v, place in zip(views, places, strict=True)
    ]
    found = refine_scenes(views, [], {}, sparse_of(observed), tmp_path)
    (scene,) = found.scenes
    assert found.figures["frames"] == [{"frame": "positions", "positions": NUM_VIEWS, "agreeing": NUM_VIEWS}]
    assert (camera_center(scene.cam_from_world.double()) - places).norm(dim=1).max() < 0.2
    assert report(scene, procedural).auc[1] > 0.93
    assert (scene.confidence[0] == 0).all()


def test_known_poses_are_held_and_mapping_is_not_asked(procedural, observed, views, tmp_path):
    known = [
        dataclasses.replace(view, known_cam_from_world=pose.double()) if i < 2 else view
        for i, (view, pose) in enumerate(zip(views, procedural.cam_from_world, strict=True))
    ]
    aligned = perturbed(observed)
    poses = aligned.cam_from_world.clone()
    poses[:2] = procedural.cam_from_world[:2]
    aligned = without_tracks(dataclasses.replace(aligned, cam_from_world=poses))
    found = refine_scenes(known, [aligned], {}, sparse_of(observed), tmp_path)
    assert {line["origin"] for line in found.figures["candidates"]} == {"alignment"}
    torch.testing.assert_close(
        found.scenes[0].cam_from_world[:2].float(), procedural.cam_from_world[:2], atol=1e-5, rtol=0
    )
    assert report(found.scenes[0], procedural).auc[1] > 0.9


def test_matches_that_contradict_a_confident_scene_leave_the_database(observed):
    sparse = sparse_of(observed)
    pair = Pair(*observed.names[1:3])
    wrong = pycolmap.TwoViewGeometry()
    matches = sparse.geometries[pair].inlier_matches.copy()
    matches[::2, 1] = matches[::2, 1][::-1]
    wrong.config, wrong.inlier_matches = 2, matches
    spoilt = dataclasses.replace(sparse, geometries=sparse.geometries | {pair: wrong})
    guided, trust = guide(spoilt, without_tracks(observed), [])
    assert trust.believed
    truth = set(map(tuple, sparse.geometries[pair].inlier_matches.tolist()))
    left = set(map(tuple, guided.geometries[pair].inlier_matches.tolist()))
    assert len(left - truth) <= 0.03 * len(left)
    assert len(left) > 0.4 * len(truth)


def test_noise_of_dense_matches_does_not_make_an_alignment_worse(tmp_path):
    small = make_scene(3, (32, 48), noise=0.01)
    matches = match_dense(small.views, small.predictions)
    aligned = build_tracks(align(small.views, small.predictions), matches, small.views)
    (scene,) = refine_scenes(small.views, [aligned], matches, EMPTY, tmp_path).scenes
    before, after = report(aligned, small), report(scene, small)
    assert after.median_rotation_deg <= 1.2 * before.median_rotation_deg  # 15 times without validation


def candidate(origin, images=10, evidence=1000.0, names="abcdefghij"):
    support = Support(images=images, observations=2000, points=400, score=1500.0, evidence=evidence, mean_error_px=0.5)
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera(camera_id=1, model="SIMPLE_PINHOLE", width=9, height=9, params=[9, 4, 4])
    add_camera(model, camera)
    for i, name in enumerate(names, start=1):
        add_image(model, pycolmap.Image(name=name, camera_id=1, image_id=i), pycolmap.Rigid3d())
    return Model(origin, model, support)


@pytest.mark.parametrize(
    ("mapping", "origin"),
    [
        ({"evidence": 1010.0}, "mapping"),
        ({"evidence": 997.0}, "mapping"),  # as good as equal: COLMAP's own
        ({"evidence": 990.0}, "alignment"),
        ({"evidence": 1500.0, "images": 9}, "alignment"),
    ],
)
def test_the_alignment_is_taken_where_it_explains_clearly_more(mapping, origin):
    assert [model.origin for model in choose([candidate("alignment"), candidate("mapping", **mapping)])] == [origin]
