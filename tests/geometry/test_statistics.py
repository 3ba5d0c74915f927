import pytest
import torch

from dust3r_sfm.geometry.statistics import weighted_median


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_give_the_plain_median(batch, dtype):
    values = torch.randn(*batch, 101, generator=torch.Generator().manual_seed(0), dtype=dtype)
    torch.testing.assert_close(weighted_median(values, torch.ones_like(values)), values.median(dim=-1).values)


def test_weights_count_like_repeated_values():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(20)
    weights[0] = 1  # an odd total, so that one value is in the middle
    assert weighted_median(values, weights.float()) == values.repeat_interleave(weights).median()


def test_without_weight_there_is_no_median():
    assert weighted_median(torch.ones(2, 3), torch.tensor([[0.0, 0, 0], [0, 1, 0]])).isnan().tolist() == [True, False]
