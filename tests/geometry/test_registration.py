import pytest
import torch

from dust3r_sfm.geometry.registration import register_similarity, similarity_matrix
from dust3r_sfm.geometry.transforms import rotation_from_rotvec, transform_points


def known_similarity(batch, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + 2 * torch.rand(batch, generator=generator, dtype=torch.float64)
    rotation = rotation_from_rotvec(2 * torch.randn(*batch, 3, generator=generator, dtype=torch.float64))
    translation = torch.randn(*batch, 3, generator=generator, dtype=torch.float64)
    return similarity_matrix(scale, rotation, translation).to(dtype)


def cloud(batch, n, dtype=torch.float64, seed=9):
    return torch.randn(*batch, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration_recovers_a_similarity(batch, dtype):
    target_from_source, source = known_similarity(batch, dtype), cloud(batch, 50, dtype)
    result = similarity_matrix(*register_similarity(source, transform_points(target_from_source, source)))
    assert result.dtype == dtype
    torch.testing.assert_close(result, target_from_source, atol=1e-4 if dtype == torch.float32 else 1e-10, rtol=1e-5)


def test_registration_without_scale_recovers_a_rigid_transform():
    rotation, translation = rotation_from_rotvec(torch.tensor([0.1, 2.0, -1.0])), torch.tensor([1.0, 2.0, 3.0])
    source = cloud((), 20, torch.float32)
    scale, found_rotation, found_translation = register_similarity(
        source, source @ rotation.mT + translation, with_scale=False
    )
    assert scale.item() == 1
    torch.testing.assert_close(found_rotation, rotation)
    torch.testing.assert_close(found_translation, translation)


def test_registration_follows_its_points():
    """Moving the target by G moves the result by G; moving the source by G moves it by the inverse of G."""
    source, target, G = cloud((), 30), cloud((), 30, seed=1), known_similarity((), torch.float64)
    weights = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = similarity_matrix(*register_similarity(source, target, weights))
    moved_target = similarity_matrix(*register_similarity(source, transform_points(G, target), weights))
    moved_source = similarity_matrix(*register_similarity(transform_points(G, source), target, weights))
    torch.testing.assert_close(moved_target, G @ result)
    torch.testing.assert_close(moved_source @ G, result)


def test_no_small_change_of_the_result_fits_noisy_points_better():
    source, weights = cloud((), 30), torch.linspace(0.1, 2, 30, dtype=torch.float64)
    target = transform_points(known_similarity((), torch.float64), source) + 0.3 * cloud((), 30, seed=1)
    scale, rotation, translation = register_similarity(source, target, weights)

    def cost(params):
        R = rotation @ rotation_from_rotvec(params[:3])
        moved = (scale + params[3]) * source @ R.mT + translation + params[4:]
        return (weights * (moved - target).square().sum(-1)).sum()

    zero = torch.zeros(7, dtype=torch.float64)
    assert torch.autograd.functional.jacobian(cost, zero).abs().max() < 1e-10
    assert torch.linalg.eigvalsh(torch.autograd.functional.hessian(cost, zero)).min() > 0


def test_weights_count_like_repeated_points():
    source, target = cloud((), 10), cloud((), 10, seed=1)
    weighted = register_similarity(source, target, torch.arange(10).double())
    index = torch.arange(10).repeat_interleave(torch.arange(10))
    for a, b in zip(weighted, register_similarity(source[index], target[index]), strict=True):
        torch.testing.assert_close(a, b)


def test_points_of_weight_zero_may_be_anything():
    target_from_source, source = known_similarity((), torch.float64), cloud((), 10)
    target, weights = transform_points(target_from_source, source), torch.ones(10).double()
    target[3], source[5], weights[3], weights[5] = torch.nan, torch.inf, 0, 0
    torch.testing.assert_close(similarity_matrix(*register_similarity(source, target, weights)), target_from_source)


@pytest.mark.parametrize("case", ["mirrored", "planar", "planar and mirrored", "collinear", "two points"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rotation_is_proper_for_degenerate_points(case, dtype):
    source = cloud((), 2 if case == "two points" else 30, dtype)
    if "planar" in case:
        source[:, 2] = 0
    if case == "collinear":
        source[:, 1:] = 0
    target = transform_points(known_similarity((), dtype), source)
    exact = "mirrored" not in case or "planar" in case
    if "mirrored" in case:
        target[:, 0] *= -1
    scale, rotation, translation = register_similarity(source, target)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=dtype), atol=1e-5, rtol=0)
    assert torch.det(rotation).item() == pytest.approx(1, abs=1e-5)
    moved = transform_points(similarity_matrix(scale, rotation, translation), source)
    assert exact == torch.allclose(moved, target, atol=1e-4)


def test_without_weight_or_with_broken_points_only_that_element_is_nan():
    source, weights = cloud((4,), 10), torch.ones(4, 10).double()
    target = source.clone()
    weights[1], target[2, 0] = 0, torch.nan
    result = similarity_matrix(*register_similarity(source, target, weights))
    assert result[[1, 2], :3].isnan().all()
    torch.testing.assert_close(result[[0, 3]], torch.eye(4).double().expand(2, 4, 4))


def test_one_point_has_no_scale_and_no_points_have_nothing():
    assert register_similarity(torch.ones(1, 3), torch.ones(1, 3))[0].isnan()
    assert all(x.isnan().all() for x in register_similarity(torch.ones(0, 3), torch.ones(0, 3)))


def test_registration_has_exact_gradients():
    source, target = cloud((), 8), cloud((), 8, seed=1)
    weights = torch.linspace(0.5, 1, 8, dtype=torch.float64)
    inputs = tuple(x.clone().requires_grad_() for x in (source, target, weights))
    assert torch.autograd.gradcheck(register_similarity, inputs)
