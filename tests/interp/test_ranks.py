import math

import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from interp.ranks import compare_ranks, critical_difference

# Demsar (2006), table 5: q at a level of .05 by the number of methods.
Q = {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}


@pytest.mark.parametrize("n_methods", Q)
def test_the_critical_difference_is_that_of_demsars_table(n_methods):
    for n_blocks in (1, 14):
        wanted = Q[n_methods] * math.sqrt(n_methods * (n_methods + 1) / (6 * n_blocks))
        assert critical_difference(n_methods, n_blocks) == pytest.approx(wanted, abs=1e-3 * wanted)


def test_ranks_and_their_test_on_an_example_by_hand():
    """Four blocks: a first in all, b and c in turns, so that the ranks are 1, 2.5, 2.5 and 4 (Friedman 1937)."""
    values = {"d": [0, 0, 0, 0], "b": [2, 1, 2, 1], "c": [1, 2, 1, 2], "a": [3, 3, 3, 3]}
    found = compare_ranks({name: np.array(own, dtype=float) for name, own in values.items()})
    assert found.means == {"a": 1.0, "b": 2.5, "c": 2.5, "d": 4.0}
    assert next(iter(found.means)) == "a"
    # 12 N / (k (k + 1)) times (sum of squared mean ranks less k (k + 1)^2 / 4), with 3 degrees of freedom.
    chi = 12 * 4 / 20 * (1 + 2 * 6.25 + 16 - 4 * 25 / 4)
    upper = math.erfc(math.sqrt(chi / 2)) + math.sqrt(2 * chi / math.pi) * math.exp(-chi / 2)
    assert found.p == pytest.approx(upper)
    # q = 2.569: 2.569 sqrt(20 / 24) = 2.345.
    assert found.difference == pytest.approx(2.345, abs=1e-3)
    assert found.like_the_best == ["a", "b", "c"]
    assert found.groups == [["a", "b", "c"], ["b", "c", "d"]]


def test_ties_share_their_ranks():
    values = {"a": np.array([1.0, 1.0]), "b": np.array([1.0, 0.0]), "c": np.array([0.0, 0.0])}
    found = compare_ranks(values)
    assert found.means == {"a": 1.25, "b": 2.0, "c": 2.75}
    assert found.p == pytest.approx(friedmanchisquare(*values.values()).pvalue)


def test_methods_that_do_the_same_everywhere_are_one_group_and_do_not_differ():
    found = compare_ranks({name: np.zeros(3) for name in "abcd"})
    assert found.p == 1
    assert found.groups == [["a", "b", "c", "d"]]


def test_groups_are_all_largest_ones_without_a_difference():
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = compare_ranks({str(n): rng.normal(n, 2, size=6) for n in range(7)})
        names = list(found.means)
        runs = [
            names[a:b]
            for a in range(7)
            for b in range(a + 2, 8)
            if found.means[names[b - 1]] - found.means[names[a]] < found.difference
        ]
        assert found.groups == [run for run in runs if not any(set(run) < set(other) for other in runs)]


@pytest.mark.parametrize(("n_methods", "n_blocks"), [(2, 5), (3, 1)])
def test_too_few_are_refused(n_methods, n_blocks):
    with pytest.raises(ValueError, match="two blocks and three methods"):
        compare_ranks({str(n): np.arange(n_blocks, dtype=float) for n in range(n_methods)})
