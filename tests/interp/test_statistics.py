import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from interp.files import read_json, write_json
from interp.statistics import (
    RESAMPLES,
    Crossed,
    Estimate,
    bootstrap_mean,
    bootstrap_means,
    bootstrap_weights,
    cluster_wilson,
    group_difference,
    kept_share,
    paired_difference,
    pigeonhole_means,
    rate,
)


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


@pytest.mark.parametrize(("ones", "n"), [(0, 9), (9, 9), (1, 9), (17, 57), (40, 400)])
def test_the_rate_of_independent_values_has_the_interval_of_wilson(ones, n):
    estimate = rate([1] * ones + [0] * (n - ones), range(n))
    expected = binomtest(ones, n).proportion_ci(method="wilson")
    assert (estimate.value, estimate.n) == (ones / n, n)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("ones", [0, 1, 13, 20])
def test_a_rate_of_values_that_are_all_alike_within_clusters_is_as_sure_as_there_are_clusters(ones):
    values = [1] * ones + [0] * (20 - ones)
    often = rate(np.repeat(values, 6), np.repeat(np.arange(20), 6).tolist())
    expected = binomtest(ones, 20).proportion_ci(method="wilson")
    assert (often.low, often.high) == pytest.approx((expected.low, expected.high))


def test_the_rate_of_one_cluster_is_that_of_one_value():
    expected = binomtest(1, 1).proportion_ci(method="wilson")
    estimate = rate([1] * 8, ["a"] * 8)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("n_clusters", [20, 57])
@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("truth", [0.01, 0.03, 0.1, 0.3, 0.5, 0.97])
def test_the_interval_of_a_rate_covers_the_truth_about_as_often_as_it_says(n_clusters, correlation, truth):
    """Beta-binomial clusters of one to seven values."""
    rng = np.random.default_rng(7)
    shape = (2000, n_clusters)
    sizes = rng.integers(1, 8, size=shape)
    if correlation == 0:
        chance = np.full(shape, truth)
    elif correlation == 1:
        chance = (rng.random(shape) < truth).astype(float)
    else:
        strength = (1 - correlation) / correlation
        chance = rng.beta(truth * strength, (1 - truth) * strength, size=shape)
    low, high = cluster_wilson(rng.binomial(sizes, chance).astype(float), sizes.astype(float))
    covered = ((low <= truth) & (truth <= high)).mean()
    # Wilson's own coverage goes down to .88 near 0 and 1, where one success more or less decides.
    assert covered >= (0.88 if correlation == 1 and n_clusters == 20 else 0.925)
    assert covered <= 0.999 or truth < 0.05


def test_a_rate_wants_zeros_and_ones():
    with pytest.raises(ValueError, match="zeros and ones"):
        rate([0.5, 1], "ab")
    with pytest.raises(ValueError, match="at least one value"):
        rate([], [])


def test_four_of_57_that_changed_one_way_are_no_clear_change():
    found = paired_difference([1] * 57, [0] * 4 + [1] * 53, range(57))
    assert found.value == pytest.approx(-4 / 57)
    assert found.p == 0.125  # two of the sixteen ways in which four signs fall
    assert found.low < found.value < 0 < found.high


def test_the_p_value_is_that_of_every_flip_of_the_clusters_signs():
    rng = np.random.default_rng(2)
    before, after = rng.random((2, 24)).round(1)
    clusters = [i % 9 for i in range(24)]
    sums = [sum(after[i] - before[i] for i in range(24) if clusters[i] == c) for c in range(9)]
    flipped = [abs(np.dot(signs, sums)) for signs in itertools.product((1, -1), repeat=9)]
    expected = np.mean([total >= abs(sum(sums)) - 1e-12 for total in flipped])
    assert paired_difference(before, after, clusters).p == pytest.approx(expected)


def test_the_p_value_of_many_clusters_is_about_that_of_the_sign_test():
    after = [1.0] * 26 + [-1.0] * 14 + [0.0] * 30
    found = paired_difference([0.0] * 70, after, range(70))
    assert found.p == pytest.approx(binomtest(26, 40).pvalue, abs=0.015)
    assert found == paired_difference([0.0] * 70, after, range(70))


def test_the_interval_of_a_change_of_no_values_has_a_width():
    found = paired_difference([0] * 30, [0] * 30, range(30))
    reach = binomtest(0, 30).proportion_ci(method="wilson").high
    # Rises and falls could each be as many as that.
    assert (found.value, found.p) == (0, 1)
    assert (found.low, found.high) == pytest.approx((-reach, reach))


def test_the_interval_of_a_paired_change_of_rates_covers_the_truth():
    """Changes of 60 clusters of three: a share rises, a share falls."""
    rng = np.random.default_rng(0)
    for rises, falls in ((0.05, 0.0), (0.1, 0.05), (0.4, 0.3)):
        chances = rng.dirichlet(2 * np.array([rises, falls, 1 - rises - falls]) + 1e-9, size=(150, 60))
        drawn = rng.multinomial(3, chances).reshape(150, -1)
        covered = []
        for counts in drawn:
            change = np.repeat(np.tile([1, -1, 0], 60), counts)
            found = paired_difference(np.zeros(180), change, np.repeat(np.arange(60), 3).tolist())
            covered.append(found.low <= rises - falls <= found.high)
        assert np.mean(covered) >= 0.91


def test_other_changes_are_bootstrapped():
    change = np.random.default_rng(0).normal(size=50)
    found = paired_difference(np.zeros(50), change, range(50))
    expected = bootstrap_mean(change, range(50))
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_a_pair_needs_equally_many_values():
    with pytest.raises(ValueError, match="equally many values, not 2 and 1"):
        paired_difference([1, 0], [1], "ab")


def test_what_is_undefined_is_null_in_json_and_said_in_words(tmp_path):
    undefined = Estimate.undefined(12)
    write_json(tmp_path / "estimate.json", undefined.to_record())
    record = read_json(tmp_path / "estimate.json")
    assert record == {"value": None, "low": None, "high": None, "n": 12}
    assert math.isnan(Estimate.from_record(record).value)
    assert str(Estimate.from_record(record)) == "undefined"


def test_of_a_change_one_way_the_kept_share_is_the_rate_among_what_changed():
    before, after, in_part = np.zeros(12), np.repeat([1.0, 0.0], [8, 4]), np.repeat([1.0, 0.0], [6, 6])
    found = kept_share(np.stack([before, after, in_part], axis=1), range(12))
    assert found == rate(np.repeat([1.0, 0.0], [6, 2]), range(8))


def test_where_changes_go_both_ways_the_kept_share_is_the_ratio_of_the_mean_changes():
    before, after, in_part = (np.array(hits, dtype=float) for hits in ([0, 0, 0, 1], [1, 1, 1, 0], [1, 0, 0, 1]))
    found = kept_share(np.stack([before, after, in_part], axis=1), range(4))
    assert found.value == pytest.approx((2 / 4 - 1 / 4) / (3 / 4 - 1 / 4))
    assert found.n == 4


def test_of_what_does_not_change_there_is_no_share_to_keep():
    hits = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    assert not kept_share(hits, "ab").is_defined


def test_two_groups_of_other_things_are_compared_by_dealing_clusters_out_anew():
    """Clusters 1, 1, 1 against 4, 4: of ten deals of five clusters only the given one is as far apart."""
    found = group_difference([1, 1, 1, 1], [4, 4], ["a", "a", "b", "c"], ["d", "e"])
    assert found.value == 3
    assert (found.low, found.high, found.n) == (3, 3, 6)
    assert found.p == pytest.approx(1 / 10)


def test_groups_are_compared_as_scipy_does_where_every_value_is_its_own_cluster():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, 20), rng.normal(0.7, 1, 25)
    found = group_difference(first, second, range(20), range(25))
    expected = permutation_test(
        (second, first), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True, n_resamples=20_000, rng=1
    )
    assert found.value == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue, abs=0.01)
    assert found.low < found.value < found.high


def test_a_label_in_both_groups_is_a_cluster_in_each_and_an_empty_group_is_refused():
    assert group_difference([0, 1], [0, 1], ["a", "b"], ["a", "b"]).p == 1
    with pytest.raises(ValueError, match="needs values in both groups"):
        group_difference([], [1], [], ["a"])


def test_values_of_one_seed_are_resampled_by_subject_alone():
    rng = np.random.default_rng(0)
    values, subjects = rng.normal(size=40), [f"subject {i // 3}" for i in range(40)]
    for seed in (0, 7):
        (found,) = pigeonhole_means([Crossed(values, subjects, ["seed 5"] * 40)], seed=seed).T
        np.testing.assert_allclose(found, bootstrap_means(values, subjects, seed=seed))


def test_the_pigeonhole_bootstrap_draws_subjects_and_seeds_as_a_naive_loop_does():
    """Owen & Eckles (2012), section 3: the weight of a value is the product of those of its row and its column."""
    rng = np.random.default_rng(1)
    rows, columns = ["a", "b", "b", "c", "a", "c"], [0, 0, 1, 1, 2, 2]
    tables = [
        Crossed(rng.normal(size=6), rows, columns),
        Crossed(rng.normal(size=6), ["d", "a", "b", "e", "e", "b"], columns),
        Crossed(rng.normal(size=6), rows, [0, 0, 1, 1, 1, 0]),
    ]
    found = pigeonhole_means(tables, seed=3)
    drawn_rows = np.random.default_rng(3).multinomial(5, [0.2] * 5, size=RESAMPLES)
    three = np.random.default_rng(4).multinomial(3, [1 / 3] * 3, size=RESAMPLES)
    two = np.random.default_rng(5).multinomial(2, [0.5] * 2, size=RESAMPLES)
    for number, (table, drawn_columns) in enumerate(zip(tables, (three, three, two), strict=True)):
        for draw in range(RESAMPLES):
            values = []
            for value, row, column in zip(*table, strict=True):
                values += [value] * (drawn_rows[draw]["abcde".index(str(row))] * drawn_columns[draw][column])
            assert found[draw, number] == pytest.approx(np.mean(values) if values else np.nan, nan_ok=True)


def test_the_pigeonhole_interval_covers_a_mean_that_depends_on_subjects_and_seeds():
    """Subjects and seeds each shift values: one-way resampling covers far less than nine in ten."""
    rng = np.random.default_rng(2)
    rows, columns = np.repeat(np.arange(60), 8), np.tile(np.arange(8), 60)
    covered = {"two ways": 0, "one way": 0}
    for _ in range(60):
        values = rng.normal(size=60)[rows] + rng.normal(size=8)[columns] + rng.normal(size=480)
        means = {
            "two ways": pigeonhole_means([Crossed(values, rows.tolist(), columns.tolist())])[:, 0],
            "one way": bootstrap_means(values, rows.tolist()),
        }
        for name, drawn in means.items():
            low, high = np.quantile(drawn, [0.025, 0.975])
            covered[name] += low <= 0 <= high
    assert covered["two ways"] >= 50 > covered["one way"] + 10
