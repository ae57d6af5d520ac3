import numpy as np
import polars as pl
import pytest
import scipy.stats
import torch
from torch import Tensor

from interp.errors import UserError
from interp.statistics import bootstrap_mean
from probes.patterns import PATTERNS, gini, hoyer, kurtosis, l1, l2, patterns_by_group


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


ONE_HOT = -3 * torch.eye(1, 16)


def test_kurtosis_is_that_of_scipy() -> None:
    features = random(5, 64) ** 3 + 2
    assert kurtosis(features).tolist() == pytest.approx(
        scipy.stats.kurtosis(features.double().numpy(), axis=1), rel=1e-4
    )


def test_kurtosis_of_one_nonzero_value_is_that_of_a_bernoulli_variable() -> None:
    variance = 1 / 16 * (1 - 1 / 16)
    assert kurtosis(ONE_HOT).item() == pytest.approx((1 - 6 * variance) / variance, rel=1e-5)


def test_one_nonzero_value_is_as_sparse_as_can_be() -> None:
    assert hoyer(ONE_HOT).item() == pytest.approx(1)
    assert gini(ONE_HOT).item() == pytest.approx(1 - 1 / 16)


def test_equal_magnitudes_are_not_sparse() -> None:
    features = torch.tensor([[0.1, -0.1] * 50])
    assert hoyer(features).item() == pytest.approx(0, abs=1e-5)
    assert gini(features).item() == pytest.approx(0, abs=1e-5)


def test_gini_of_one_to_four_is_a_quarter() -> None:
    assert gini(torch.tensor([[3.0, -1.0, 4.0, -2.0]])).item() == pytest.approx(0.25)


def test_gini_follows_the_formula_of_hurley_and_rickard() -> None:
    features = random(4, 30)
    sizes, k = np.sort(np.abs(features.double().numpy()), axis=1), np.arange(1, 31)
    expected = 1 - 2 * (sizes / sizes.sum(1, keepdims=True) * (30 - k + 0.5) / 30).sum(1)
    assert gini(features).tolist() == pytest.approx(expected, rel=1e-5)


def test_hoyer_of_three_and_four() -> None:
    assert hoyer(torch.tensor([[3.0, -4.0]])).item() == pytest.approx((2**0.5 - 7 / 5) / (2**0.5 - 1), rel=1e-4)


def test_norms_of_three_and_four() -> None:
    features = torch.tensor([[3.0, -4.0, 0.0]])
    assert (l1(features).item(), l2(features).item()) == (7, 5)


@pytest.mark.parametrize("name", ["kurtosis", "hoyer", "gini"])
def test_sparsity_does_not_depend_on_scale(name: str) -> None:
    features = random(4, 50)
    assert PATTERNS[name](1000 * features).tolist() == pytest.approx(PATTERNS[name](features).tolist(), rel=1e-4)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_zero_vector_has_the_value_zero(name: str) -> None:
    assert PATTERNS[name](torch.zeros(2, 8)).tolist() == [0, 0]


def test_a_constant_vector_has_kurtosis_zero() -> None:
    assert kurtosis(torch.full((1, 577), 0.1)).item() == 0


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_values_are_widened_before_anything_is_summed(name: str, dtype: torch.dtype) -> None:
    features = (3000 * random(3, 100)).to(dtype)
    assert PATTERNS[name](features).tolist() == PATTERNS[name](features.float()).tolist()


@pytest.mark.parametrize("name", PATTERNS)
def test_heads_are_laid_side_by_side(name: str) -> None:
    features = random(3, 4, 8)
    assert PATTERNS[name](features).tolist() == PATTERNS[name](features.reshape(3, 32)).tolist()


def test_groups_have_the_mean_and_interval_by_cluster() -> None:
    features = {"blocks.0.hook_out": random(6, 10), "blocks.0.attn.o.hook_in": random(6, 2, 4)}
    groups, clusters = ["conflict", "aligned"] * 3, ["France", "France", "Japan", "Japan", "Peru", "Peru"]
    frame = patterns_by_group(features, groups, clusters)
    assert frame.columns == ["site", "pattern", "group", "value", "low", "high", "n"]
    assert frame.height == 2 * len(PATTERNS) * 2
    row = frame.row(
        by_predicate=(pl.col("site") == "blocks.0.attn.o.hook_in")
        & (pl.col("pattern") == "gini")
        & (pl.col("group") == "aligned"),
        named=True,
    )
    expected = bootstrap_mean(gini(features["blocks.0.attn.o.hook_in"])[1::2].double().numpy(), clusters[1::2])
    assert [row[key] for key in ("value", "low", "high", "n")] == pytest.approx(
        [expected.value, expected.low, expected.high, 3]
    )


def test_groups_refuse_another_number_of_rows() -> None:
    with pytest.raises(UserError, match=r"2 groups for 3 rows of blocks\.0\.hook_out"):
        patterns_by_group({"blocks.0.hook_out": random(3, 4)}, ["a", "b"], ["x", "y"])


def test_groups_refuse_another_number_of_clusters() -> None:
    with pytest.raises(UserError, match="2 groups for 1 clusters"):
        patterns_by_group({"blocks.0.hook_out": random(2, 4)}, ["a", "b"], ["x"])
