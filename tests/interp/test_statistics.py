import numpy as np
import pytest

from interp.statistics import RESAMPLES, bootstrap_mean, bootstrap_means, bootstrap_weights


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


def test_each_resample_draws_whole_clusters_as_many_as_there_are():
    clusters = ["a", "b", "a", "c", "c", "c", "d"]
    weights = bootstrap_weights(clusters)
    assert weights.shape == (RESAMPLES, 7)
    first_of = {name: clusters.index(name) for name in "abcd"}
    for column, name in enumerate(clusters):
        assert (weights[:, column] == weights[:, first_of[name]]).all()
    drawn = weights[:, sorted(first_of.values())]
    assert (drawn == drawn.round()).all()
    assert (drawn.sum(1) == 4).all()
    # Each draw takes each of four clusters with probability 1/4.
    assert drawn.mean(0) == pytest.approx([1] * 4, abs=0.1)
    assert drawn.var(0) == pytest.approx([0.75] * 4, abs=0.1)


@pytest.mark.parametrize("shape", [(9,), (9, 2)])
def test_bootstrap_means_are_means_with_the_bootstrap_weights(shape):
    values = np.random.default_rng(0).normal(size=shape)
    clusters = [str(i // 2) for i in range(9)]
    weights = bootstrap_weights(clusters, seed=3)
    expected = ((weights @ values).T / weights.sum(1)).T
    np.testing.assert_allclose(bootstrap_means(values, clusters, seed=3), expected)
