"""Pairs of look-alike places are told from true ones by what all pairs together say."""

import math

import pytest
import torch
from lookalike import make_lookalike_graph
from procedural import make_scene

from dust3r_sfm.alignment.consensus import find_consensus
from dust3r_sfm.alignment.contradictions import match_support
from dust3r_sfm.alignment.relations import Relations, relate_images, sample_pair
from dust3r_sfm.geometry.averaging import average_similarities, disagreement, relative_to_frames
from dust3r_sfm.geometry.registration import similarity_matrix
from dust3r_sfm.geometry.transforms import inverse, rotation_from_rotvec
from dust3r_sfm.pairs import Pair


def precision_and_recall(graph, has_matches=True):
    strengths = graph.confidences.log()
    if has_matches:
        strengths = strengths * match_support(graph.num_verified)
    kept = find_consensus(graph.relations, strengths).off < 1
    both = float((kept & graph.is_true).sum())
    return both / float(kept.sum()), both / float(graph.is_true.sum())


@pytest.mark.parametrize(("false_share", "has_matches"), [(0.2, False), (0.4, True)])
def test_pairs_of_look_alike_places_go_and_true_ones_stay(false_share, has_matches):
    graph = make_lookalike_graph(200, false_share)
    assert abs(float((~graph.is_true).double().mean()) - false_share) < 0.01
    precision, recall = precision_and_recall(graph, has_matches)
    assert precision >= 0.98
    assert recall >= 0.95


def test_pairs_that_are_wrong_by_chance_do_not_tear_a_long_loop():
    """Each of 60 images with the next six and one pair in ten wrong: far images are connected by wrong pairs alone."""
    n, generator = 60, torch.Generator().manual_seed(0)
    angle = torch.arange(n).double() / n * 2 * math.pi
    turns = rotation_from_rotvec(torch.stack([torch.zeros(n), angle, torch.zeros(n)], dim=-1).double())
    frames = similarity_matrix(torch.ones(n).double(), turns, n * 0.15 / (2 * math.pi) * turns[..., 2])
    i, j = torch.arange(n).repeat(6), (torch.arange(n).repeat(6) + torch.arange(1, 7).repeat_interleave(n)) % n
    wrong = torch.rand(len(i), generator=generator) < 0.1
    j[wrong] = (i[wrong] + 10 + torch.randint(0, n - 20, (int(wrong.sum()),), generator=generator)) % n
    measured = relative_to_frames(frames, torch.stack([i, j]))
    measured[wrong] = random_frames(int(wrong.sum()), 1)
    names = tuple(f"{k:03d}" for k in range(n))
    pairs = tuple(Pair(names[a], names[b]) for a, b in zip(i.tolist(), j.tolist(), strict=True))
    relations = Relations(names, pairs, torch.stack([i, j]), measured)
    off = find_consensus(relations, 1 + 0.3 * torch.rand(len(i), generator=generator)).off
    assert float((off[~wrong] < 1).double().mean()) > 0.99
    assert float((off[wrong] < 1).double().mean()) < 0.1


def random_frames(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    turns = rotation_from_rotvec(torch.randn(n, 3, generator=generator, dtype=torch.float64))
    scales = torch.randn(n, generator=generator, dtype=torch.float64).mul(0.3).exp()
    return similarity_matrix(scales, turns, torch.randn(n, 3, generator=generator, dtype=torch.float64))


def random_graph(n=20, share_wrong=0.0, seed=0):
    frames = random_frames(n, seed)
    i, j = torch.triu_indices(n, n, 1)
    images = torch.stack([torch.cat([i, j]), torch.cat([j, i])])
    measured = relative_to_frames(frames, images)
    wrong = torch.rand(len(i), generator=torch.Generator().manual_seed(seed)).lt(share_wrong).repeat(2)
    measured[wrong] = random_frames(int(wrong.sum()), seed + 1)
    names = tuple(f"{k:02d}" for k in range(n))
    pairs = tuple(Pair(names[a], names[b]) for a, b in images.T.tolist())
    return Relations(names, pairs, images, measured), frames, wrong


def test_wrong_pairs_do_not_move_the_average():
    relations, frames, wrong = random_graph(share_wrong=0.3)
    images, measured = relations.images, relations.image1_from_image0
    weights = torch.ones(images.shape[1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    turns = rotation_from_rotvec(0.1 * torch.randn(len(frames), 3, generator=generator, dtype=torch.float64))
    start = frames @ similarity_matrix(torch.full((len(frames),), 1.1).double(), turns, 0.1 * turns[..., 0])
    found = average_similarities(images, measured, weights, start, (0.2, 0.2, 0.3), num_iters=20)
    off = disagreement(measured, relative_to_frames(found, images))
    assert float(off.rotation[~wrong].max()) < 0.02
    assert float(off.scale[~wrong].max()) < 0.02
    assert float(off.offset[~wrong].max()) < 0.1


def test_confident_pairs_are_outvoted_and_their_triangles_say_so():
    relations, _, wrong = random_graph(share_wrong=0.3)
    strengths = torch.where(wrong, 3.0, 1.0).double()
    consensus = find_consensus(relations, strengths)
    assert torch.equal(consensus.off > 1, wrong)
    assert int(consensus.num_triangles.min()) == 18
    shares = consensus.num_agreeing / consensus.num_triangles
    assert float(shares[wrong].max()) < float(shares[~wrong].min())
    assert float(consensus.off_reverse[~wrong].max()) < 1e-6


def test_parts_without_pairs_between_them_and_lone_images_are_no_trouble():
    relations, _, _ = random_graph(6)
    within = (relations.images[0] < 3) == (relations.images[1] < 3)
    within &= (relations.images < 5).all(dim=0)
    pairs = tuple(pair for pair, is_in in zip(relations.pairs, within.tolist(), strict=True) if is_in)
    parts = Relations(relations.names, pairs, relations.images[:, within], relations.image1_from_image0[within])
    consensus = find_consensus(parts, torch.ones(len(pairs)))
    assert float(consensus.off.max()) < 1e-3


def test_predictions_tell_how_images_lie_up_to_their_units():
    scene = make_scene(4, (24, 32), noise=0.01)
    samples = {pair: sample_pair(prediction) for pair, prediction in scene.predictions.items()}
    relations = relate_images(scene.names, samples)
    i, j = relations.images
    poses = scene.cam_from_world.double()
    off = disagreement(relations.image1_from_image0, poses[j] @ inverse(poses[i]))
    assert math.degrees(float(off.rotation.max())) < 1
    around = find_consensus(relations, torch.ones(len(relations.pairs)))
    assert float(around.off.max()) < 0.2
