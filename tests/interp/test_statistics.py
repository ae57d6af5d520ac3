import numpy as np
import pytest

from interp.statistics import bootstrap_mean


def test_interval_is_that_of_the_normal_approximation_for_independent_values():
    values = np.random.default_rng(0).normal(size=400)
    estimate = bootstrap_mean(values, range(400))
    half_width = 1.96 * values.std() / np.sqrt(400)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * half_width, rel=0.1)


def test_repeating_every_value_within_its_cluster_does_not_narrow_the_interval():
    values = np.random.default_rng(0).normal(size=100)
    once = bootstrap_mean(values, range(100))
    often = bootstrap_mean(np.repeat(values, 5), np.repeat(np.arange(100), 5).tolist())
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_the_same_seed_gives_the_same_interval():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert bootstrap_mean(values, "abcde", seed=1) == bootstrap_mean(values, "abcde", seed=1)


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean([], [])
