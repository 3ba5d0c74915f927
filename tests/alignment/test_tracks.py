import dataclasses

import pytest
import torch
from aligned import hit_error, true_scene
from procedural import STORED_PER_NET, make_scene

from dust3r_sfm.alignment.tracks import TrackConfig, build_tracks, triangulation_angles_deg
from dust3r_sfm.match_dense import match_dense
from dust3r_sfm.pairs import Matches, Pair

SIZE = (96, 128)


@pytest.fixture(scope="module")
def procedural():
    return make_scene(4, SIZE, seed=3)


@pytest.fixture(scope="module")
def matches(procedural):
    return match_dense(procedural.views, procedural.predictions)


@pytest.fixture(scope="module")
def tracks(procedural, matches):
    return build_tracks(true_scene(procedural), matches, procedural.views).tracks


def lengths(tracks):
    return torch.bincount(tracks.point_indices)


def project(scene, image, points):
    in_cam = points @ scene.cam_from_world[image, :3, :3].T + scene.cam_from_world[image, :3, 3]
    projected = in_cam @ scene.K[image].T
    return projected[:, :2] / projected[:, 2:]


def hand_matches(scene, links, points):
    """Matches of points (n 3) between images (i, j), each with a score, all at the true pixels."""
    return {
        Pair(scene.names[i], scene.names[j]): Matches(
            project(scene, i, points), project(scene, j, points), torch.full((len(points),), float(score))
        )
        for i, j, score in links
    }


def test_tracks_are_long_and_exact_where_predictions_are_exact(procedural, tracks):
    assert lengths(tracks).double().mean() > 2.5
    assert tracks.errors.median() < 0.02 * STORED_PER_NET
    assert hit_error(procedural, tracks).median() < 5e-4
    assert (hit_error(procedural, tracks) < 0.02).double().mean() > 0.93


def test_an_image_sees_a_point_at_most_once(tracks, procedural):
    keys = tracks.point_indices * len(procedural.names) + tracks.image_indices
    assert len(torch.unique(keys)) == len(keys)
    assert lengths(tracks).min() >= 2


def test_noisy_predictions_give_tracks_too():
    procedural = make_scene(4, SIZE, seed=3, noise=0.002)
    matches = match_dense(procedural.views, procedural.predictions)
    tracks = build_tracks(true_scene(procedural), matches, procedural.views).tracks
    assert lengths(tracks).double().mean() > 2.5
    assert tracks.errors.median() < 1.0 * STORED_PER_NET
    assert hit_error(procedural, tracks).median() < 0.01


def test_wrong_matches_are_removed(procedural, matches, tracks):
    generator = torch.Generator().manual_seed(0)
    spoilt = {}
    for pair, found in matches.items():
        wrong = torch.rand(len(found.scores), generator=generator) < 0.2
        anywhere = torch.rand(len(found.scores), 2, generator=generator) * torch.tensor([SIZE[1], SIZE[0]])
        spoilt[pair] = dataclasses.replace(found, keypoints1=torch.where(wrong[:, None], anywhere, found.keypoints1))
    found = build_tracks(true_scene(procedural), spoilt, procedural.views).tracks
    assert found.errors.median() < 0.05 * STORED_PER_NET
    assert (hit_error(procedural, found) < 0.02).double().mean() > 0.9
    assert 0.6 < len(found.keypoints) / len(tracks.keypoints) < 0.9


def test_of_two_keypoints_of_an_image_the_better_scored_stays(procedural):
    scene = true_scene(procedural)
    points = procedural.points_in_world[0][40:44, 60:64].reshape(-1, 3)
    links = hand_matches(scene, [(0, 1, 5), (0, 2, 4), (1, 3, 5)], points)
    conflict = Matches(project(scene, 1, points) + 1.5, project(scene, 2, points), torch.ones(len(points)))
    links[Pair(scene.names[1], scene.names[2])] = conflict
    tracks = build_tracks(scene, links, procedural.views).tracks
    assert len(tracks.errors) == len(points)
    assert (lengths(tracks) == 4).all()
    kept = tracks.keypoints[tracks.image_indices == 1] / STORED_PER_NET
    order = tracks.point_indices[tracks.image_indices == 1].argsort()
    distances = torch.cdist(kept[order], project(scene, 1, points))
    assert distances.amin(dim=0).max() < 0.02


def test_one_wrong_observation_goes_and_leaves_the_point_alone(procedural):
    scene = true_scene(procedural)
    points = procedural.points_in_world[0][40:44, 60:64].reshape(-1, 3)
    links = hand_matches(scene, [(0, 1, 1), (0, 2, 1), (0, 3, 1)], points)
    pair = Pair(scene.names[0], scene.names[2])
    links[pair] = dataclasses.replace(links[pair], keypoints1=links[pair].keypoints1 + 12)
    tracks = build_tracks(scene, links, procedural.views).tracks
    assert (lengths(tracks) == 3).all()
    assert not (tracks.image_indices == 2).any()
    assert torch.cdist(tracks.points_in_world, points).amin(dim=1).max() < 1e-3


def test_points_are_found_where_the_depths_are_useless(procedural):
    scene = true_scene(procedural)
    useless = dataclasses.replace(scene, depth=tuple(torch.full_like(d, torch.nan) for d in scene.depth))
    points = procedural.points_in_world[0][40:44, 60:64].reshape(-1, 3)
    tracks = build_tracks(useless, hand_matches(scene, [(0, 1, 1), (1, 2, 1)], points), procedural.views).tracks
    assert torch.cdist(tracks.points_in_world, points).amin(dim=1).max() < 1e-3


def test_rays_that_meet_behind_the_cameras_make_no_point(procedural):
    scene = true_scene(procedural)
    points = procedural.points_in_world[0][40:44, 60:64].reshape(-1, 3)
    behind = 2 * procedural.centers[0] - points  # on the same rays of camera 0, the other way
    keypoints = project(scene, 0, points), project(scene, 1, behind)
    links = {Pair(scene.names[0], scene.names[1]): Matches(*keypoints, torch.ones(len(points)))}
    assert len(build_tracks(scene, links, procedural.views).tracks.errors) == 0


def test_matches_that_share_nothing_or_are_none_make_empty_tracks(procedural):
    empty = Matches(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))
    for matches in ({}, {Pair(*procedural.names[:2]): empty}, {Pair("other.jpg", procedural.names[0]): empty}):
        tracks = build_tracks(true_scene(procedural), matches, procedural.views).tracks
        assert tracks.points_in_world.shape == (0, 3)
        assert tracks.keypoints.shape == (0, 2)


def test_images_outside_the_scene_are_passed_over(procedural, matches):
    scene = true_scene(procedural)
    part = dataclasses.replace(
        scene,
        **{f: getattr(scene, f)[:2] for f in ("names", "K", "cam_from_world", "depth", "confidence")},
        net_from_img=scene.net_from_img[:2],
        original_sizes=scene.original_sizes[:2],
    )
    tracks = build_tracks(part, matches, procedural.views).tracks
    assert tracks.image_indices.unique().tolist() == [0, 1]
    assert len(tracks.errors) > 200


def test_errors_and_keypoints_are_in_pixels_of_the_stored_file(procedural, matches, tracks):
    finer = torch.diag(torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)) @ true_scene(procedural).net_from_img
    fine = build_tracks(true_scene(procedural, net_from_img=finer), matches, procedural.views).tracks
    torch.testing.assert_close(fine.keypoints, 2 * tracks.keypoints)
    torch.testing.assert_close(fine.errors, 2 * tracks.errors)


def test_points_have_the_colours_of_their_pixels(procedural):
    scene = true_scene(procedural)
    flat = [
        dataclasses.replace(view, image=torch.full_like(view.image, 40 * i)) for i, view in enumerate(procedural.views)
    ]
    flat[1].image[:, :, 1] = 200
    points = procedural.points_in_world[0][40:44, 60:64].reshape(-1, 3)
    tracks = build_tracks(scene, hand_matches(scene, [(1, 2, 1)], points), flat).tracks
    assert tracks.colors.unique(dim=0).tolist() == [[60, 140, 60]]


def test_colours_are_interpolated_between_pixels(procedural):
    scene, ramps = true_scene(procedural), []
    for view in procedural.views:
        ramps.append(
            dataclasses.replace(view, image=torch.arange(SIZE[1], dtype=torch.uint8)[None, :, None].expand(*SIZE, 3))
        )
    points = procedural.points_in_world[0][40:44, 60:64].reshape(-1, 3)
    tracks = build_tracks(scene, hand_matches(scene, [(0, 1, 1)], points), ramps).tracks
    shown = tracks.keypoints[:, 0].double() / STORED_PER_NET - 0.5  # the ramp's value at x + 0.5 is x
    mean = torch.zeros(len(tracks.errors), dtype=torch.float64).index_add_(0, tracks.point_indices, shown / 2)
    assert (tracks.colors[:, 0] - mean).abs().max() <= 0.51


def test_a_longer_minimum_leaves_the_longer_tracks(procedural, matches, tracks):
    config = TrackConfig(min_length=3)
    longer = build_tracks(true_scene(procedural), matches, procedural.views, config).tracks
    assert lengths(longer).min() >= 3
    assert len(longer.errors) == pytest.approx(int((lengths(tracks) >= 3).sum()), rel=0.01)


def test_angles_are_those_between_the_rays(procedural):
    scene = true_scene(procedural)
    points = procedural.points_in_world[0][40:44, 60:64].reshape(-1, 3)
    built = build_tracks(scene, hand_matches(scene, [(0, 1, 1), (0, 3, 1)], points), procedural.views)
    rays = torch.nn.functional.normalize(built.tracks.points_in_world - procedural.centers[[0, 1, 3]][:, None], dim=-1)
    widest = torch.rad2deg(torch.acos((rays[:, None] * rays).sum(-1).clamp(max=1))).amax(dim=(0, 1))
    torch.testing.assert_close(triangulation_angles_deg(built).float(), widest, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="no tracks"):
        triangulation_angles_deg(scene)
