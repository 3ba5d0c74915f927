"""The quantised average precision: equal to a closed form in plain loops, and to the exact one where bins are fine."""

import random

import pytest
import torch

from dust3r_sfm.training.average_precision import average_precision_loss, quantized_average_precision


def closed_form(scores, relevant, num_bins):
    """AP = sum over bins of precision so far times recall gained, as printed in the paper, one number at a time."""
    width = 1 / (num_bins - 1)
    total, hits, value = 0.0, 0.0, 0.0
    for q in range(num_bins):
        center = 1 - q * width
        in_bin = [max(0.0, 1 - abs(min(max(s, 0.0), 1.0) - center) / width) for s in scores]
        gained = sum(w for w, r in zip(in_bin, relevant, strict=True) if r)
        total, hits = total + sum(in_bin), hits + gained
        value += hits / total * gained if total else 0.0
    return value / sum(relevant)


def exact_average_precision(scores, relevant):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    hits, value = 0, 0.0
    for rank, i in enumerate(order, 1):
        if relevant[i]:
            hits += 1
            value += hits / rank
    return value / hits


@pytest.mark.parametrize("num_bins", [2, 5, 25])
@pytest.mark.parametrize("seed", range(4))
def test_it_equals_the_closed_form(num_bins, seed):
    generator = random.Random(seed)
    scores = [[generator.uniform(-0.3, 1.1) for _ in range(40)] for _ in range(3)]
    relevant = [[generator.random() < 0.2 or i == 0 for i in range(40)] for _ in range(3)]
    value = quantized_average_precision(
        torch.tensor(scores, dtype=torch.float64), torch.tensor(relevant), num_bins=num_bins
    )
    expected = [closed_form(s, r, num_bins) for s, r in zip(scores, relevant, strict=True)]
    assert value.tolist() == pytest.approx(expected, abs=1e-12)


def test_scores_in_bins_of_their_own_give_the_exact_average_precision():
    generator = random.Random(0)
    scores = [i / 50 for i in range(51)]
    generator.shuffle(scores)
    relevant = [generator.random() < 0.3 for _ in scores]
    value = quantized_average_precision(torch.tensor(scores, dtype=torch.float64), torch.tensor(relevant), num_bins=51)
    assert float(value) == pytest.approx(exact_average_precision(scores, relevant), abs=1e-9)


def test_items_that_are_not_counted_change_nothing():
    scores, relevant = torch.rand(2, 30), torch.rand(2, 30) < 0.4
    counted = torch.arange(30) < 20
    value = quantized_average_precision(scores, relevant, counted.expand(2, 30))
    assert torch.allclose(value, quantized_average_precision(scores[:, :20], relevant[:, :20]))


def test_well_separated_places_have_no_loss_and_places_that_coincide_have_their_share_of_it():
    places = torch.arange(8) // 2
    assert float(average_precision_loss(torch.eye(4)[places], places)) == pytest.approx(0, abs=1e-6)
    # all scores equal: the precision is that of chance, one of the seven others
    assert float(average_precision_loss(torch.ones(8, 1), places)) == pytest.approx(6 / 7, abs=1e-6)


def test_places_of_one_image_ask_nothing():
    descriptors = torch.nn.functional.normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert float(average_precision_loss(descriptors, torch.arange(5))) == 0


def test_descending_the_loss_brings_places_together():
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(24) // 4
    descriptors = torch.rand(24, 16, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([descriptors], lr=0.05)
    losses = []
    for _ in range(120):
        loss = average_precision_loss(torch.nn.functional.normalize(descriptors, dim=-1), places)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.5
    assert losses[-1] < 0.1
