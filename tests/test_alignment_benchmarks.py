"""Benchmarks of the alignment, at a size that takes no time: what they measure must be right."""

import math

import pytest
import torch

from dust3r_sfm.alignment.align import AlignConfig
from dust3r_sfm.benchmarks import adjustment, alignment, scale


def test_synthetic_predictions_err_by_a_centimetre_at_a_scale_of_each_pair():
    _, predictions, _ = alignment.synthetic_predictions(3, (24, 32), torch.device("cpu"), torch.float32)
    (_, first), (_, second) = list(predictions.items())[:2]  # both in the first image's camera
    ratio = (second.pointmap0_in_cam0 / first.pointmap0_in_cam0).flatten(0, 1).median()
    assert abs(math.log(float(ratio))) > 1e-3
    difference = second.pointmap0_in_cam0 / ratio - first.pointmap0_in_cam0
    scale_of_first = first.pointmap0_in_cam0[..., 2].amax() / 6.5  # about: nothing of the room is farther
    assert float(difference.std() / scale_of_first) == pytest.approx(0.01 * 2**0.5, rel=0.5)
    assert first.confidence0.min() >= 1
    assert first.confidence0.max() <= 11


def test_the_published_objective_of_the_end_is_what_the_noise_leaves():
    figures = alignment.main(num_images=3, height=16, width=16, reference_iters=1)
    # 1 cm of noise on each axis, weighed by log(confidence) of 1.6 in the mean, in two images, at half the size
    assert 0.01 < figures.objective < 0.04
    assert figures.reference_objective > 0.9 * figures.objective
    assert figures.rotation_deg < 0.5


def test_a_survey_of_clusters_is_aligned_to_its_noise(tmp_path):
    (figures,) = scale.main(sizes=(16,), num_neighbors=8, config=AlignConfig(max_cluster=12))
    assert (figures.num_images, figures.num_aligned) == (16, 16)
    assert figures.rotation_deg < 1
    assert figures.worst_center_m < 0.05


def test_adjustment_is_nearer_to_the_truth_than_its_start(capsys):
    (figures,) = adjustment.main(sizes=(5,), num_neighbors=4)
    assert figures.after_deg < figures.before_deg
    assert figures.num_observations > 2 * figures.num_points > 100
    assert "adjustment s" in capsys.readouterr().out
