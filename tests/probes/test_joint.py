import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from conflictscope.methods.gate import passing_threshold
from interp.errors import UserError
from probes.joint import STRENGTHS, JointProbe, family_threshold, left_out_scores, ranks


def sites(n: int, is_conflict: np.ndarray, seed: int) -> dict[str, Tensor]:
    """Two sites of different width and scale, the second as heads, which both know something of the class."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.from_numpy(is_conflict).float()
    block = torch.randn(n, 12, generator=generator)
    heads = torch.randn(n, 2, 4, generator=generator)
    block[:, 3] += 1.5 * number
    heads[:, 1, 2] += 1.5 * number
    return {"block": block * torch.logspace(-1, 2, 12) + 5, "z": heads}


@pytest.fixture(scope="module")
def skewed() -> tuple[dict[str, Tensor], np.ndarray]:
    """A fifth of the examples are conflicts."""
    is_conflict = np.random.default_rng(0).random(400) < 0.2
    return sites(400, is_conflict, 1), is_conflict


# The probe


@pytest.mark.parametrize("strength", STRENGTHS)
def test_log_odds_are_those_of_one_logistic_regression_on_all_sites(skewed, strength):
    """Standardised and balanced, and with the prior put back, in scikit-learn."""
    features, is_conflict = skewed
    joined = torch.cat([features["block"], features["z"].flatten(1)], 1).double().numpy()
    model = LogisticRegression(
        C=1 / (strength * len(joined)), class_weight="balanced", tol=1e-10, max_iter=500, solver="newton-cholesky"
    )
    expected = make_pipeline(StandardScaler(), model).fit(joined, is_conflict).decision_function(joined)
    expected += math.log(is_conflict.sum() / (~is_conflict).sum())
    found = JointProbe.fit(features, is_conflict.tolist(), strength=strength)
    assert found.strength == strength
    np.testing.assert_allclose(found.log_odds(features).numpy(), expected, atol=2e-2)


def test_log_odds_add_up_by_site(skewed):
    features, is_conflict = skewed
    probe = JointProbe.fit(features, is_conflict.tolist(), strength=0.1)
    assert {site: tuple(weight.shape) for site, weight in probe.weights.items()} == {"block": (12,), "z": (8,)}
    alone = [JointProbe({site: weight}, 0.0, 0.1).log_odds(features) for site, weight in probe.weights.items()]
    torch.testing.assert_close(alone[0] + alone[1] + probe.bias, probe.log_odds(features))
    # The order in which sites are given does not matter.
    torch.testing.assert_close(probe.log_odds(dict(reversed(features.items()))), probe.log_odds(features))


def test_what_cannot_be_fitted_is_an_error(skewed):
    features, _ = skewed
    with pytest.raises(UserError, match="No training example is of the class 'conflict'"):
        JointProbe.fit(features, [False] * 400, strength=1.0)
    with pytest.raises(UserError, match="infinite features or NaN"):
        JointProbe.fit({"block": torch.full((4, 2), math.nan)}, [False, True] * 2, strength=1.0)


# Parts that were not seen


class Worded:
    """Prompts of nine layouts and six wordings, of which a shortcut feature tells the layout's share of conflicts.

    Attributes:
        features: ``site``: noise, of which the first tells conflicts a little; a number for each layout, if asked for.
        is_conflict: In some layouts nearly all prompts are conflicts, in others nearly none.
        parts: Layout and wording.
    """

    def __init__(self, n: int, *, seed: int, shortcut: bool = False, gap: float = 1.0):
        rng = np.random.default_rng(seed)
        layout, wording = rng.integers(9, size=n), rng.integers(6, size=n)
        share = np.where(layout // 3 % 2 == layout % 2, 0.9, 0.1) if shortcut else 0.5
        self.is_conflict = (rng.random(n) < share).tolist()
        values = rng.normal(size=(n, 5))
        values[:, 0] += gap * np.array(self.is_conflict)
        marks = np.eye(9)[layout] * 3 if shortcut else np.zeros((n, 0))
        self.features = {"site": torch.from_numpy(np.concatenate([values, marks], 1)).float()}
        self.parts = [(f"layout {a}", f"wording {b}") for a, b in zip(layout, wording, strict=True)]

    @property
    def to_fit(self):
        return self.features, self.is_conflict, self.parts

    @property
    def to_score(self):
        return self.features, self.parts


def test_scores_are_those_of_probes_that_saw_none_of_the_parts():
    """One prompt after the other, from the definition."""
    train, dev = Worded(300, seed=0), Worded(60, seed=1)
    found = left_out_scores(train.to_fit, dev.to_score, strength=0.1, folds=3)
    fold_of = [{part: n % 3 for n, part in enumerate(sorted({p[kind] for p in train.parts}))} for kind in (0, 1)]
    for i, parts in enumerate(dev.parts):
        folds = [fold_of[kind][part] for kind, part in enumerate(parts)]
        seen = [j for j, p in enumerate(train.parts) if all(fold_of[k][p[k]] != folds[k] for k in (0, 1))]
        chosen = {"site": train.features["site"][seen]}
        probe = JointProbe.fit(chosen, [train.is_conflict[j] for j in seen], strength=0.1)
        torch.testing.assert_close(found[i], probe.log_odds({"site": dev.features["site"][i : i + 1]})[0])


def test_a_part_of_dev_alone_is_scored_too():
    train, dev = Worded(200, seed=0), Worded(1, seed=1)
    scores = left_out_scores(train.to_fit, (dev.features, [("layout 9", "wording 0")]), strength=0.1)
    assert scores.isfinite().all()


def test_a_shortcut_that_marks_the_part_is_worth_nothing_where_the_part_was_left_out():
    train, dev = (Worded(2000, seed=seed, shortcut=True, gap=0.0) for seed in (0, 1))
    ordinary = JointProbe.fit(train.features, train.is_conflict, strength=0.1).log_odds(dev.features)
    left_out = left_out_scores(train.to_fit, dev.to_score, strength=0.1)
    assert ranks(ordinary, dev.is_conflict) > 0.85
    assert ranks(left_out, dev.is_conflict) < 0.6


def test_what_holds_in_every_part_is_worth_as_much_where_the_part_was_left_out():
    train, dev = Worded(2000, seed=0, gap=2.0), Worded(2000, seed=1, gap=2.0)
    ordinary = JointProbe.fit(train.features, train.is_conflict, strength=0.1).log_odds(dev.features)
    left_out = left_out_scores(train.to_fit, dev.to_score, strength=0.1)
    assert ranks(left_out, dev.is_conflict) == pytest.approx(ranks(ordinary, dev.is_conflict), abs=0.03)


def test_ranks_are_the_auroc_of_the_scores():
    scores, is_conflict = torch.randn(50), np.arange(50) % 3 == 0
    assert ranks(scores, is_conflict.tolist()) == pytest.approx(roc_auc_score(is_conflict, scores))


# Thresholds


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.9])
def test_a_new_familys_conflicts_pass_as_often_as_asked(keep):
    """Families of different sizes and offsets, whose prompts are alike."""
    rng = np.random.default_rng(0)
    passed = []
    for _ in range(1500):
        sizes = rng.integers(5, 40, size=31)
        families = [rng.normal() * 2 + rng.normal(size=size) for size in sizes]
        *known, new = families
        scores = torch.from_numpy(np.concatenate(known))
        names = np.repeat(np.arange(30), sizes[:-1]).tolist()
        passed.append(np.mean(new > family_threshold(scores, names, keep)))
    noise = np.std(passed) / len(passed) ** 0.5
    # The new family's own share counts as 1, which costs at most one family of 31.
    assert keep - 2 * noise < np.mean(passed) < keep + 1 / 31 + 2 * noise


@pytest.mark.parametrize("keep", [0.5, 0.83, 0.95])
@pytest.mark.parametrize("n", [21, 50, 137])
def test_it_is_the_threshold_over_prompts_where_every_family_has_one(n, keep):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
    assert family_threshold(scores, range(n), keep) == passing_threshold(scores, keep)


def test_the_threshold_is_the_largest_score_below_which_families_may_lie():
    """By exact fractions, for families that mix and have scores in common."""
    rng = np.random.default_rng(3)
    scores = torch.from_numpy(rng.integers(30, size=120) / 4)
    families = [*"abcdefghijkl"] * 10
    keep = Fraction(3, 4)
    fitting = []
    for t in scores.tolist():
        shares = [
            Fraction(sum(s < t for s, f in zip(scores.tolist(), families, strict=True) if f == family), 10)
            for family in set(families)
        ]
        if (1 + sum(shares)) / (len(shares) + 1) <= 1 - keep:
            fitting.append(t)
    assert family_threshold(scores, families, float(keep)) == max(fitting)


def test_too_few_families_are_an_error_however_many_prompts_they_have():
    scores = torch.randn(1000)
    assert math.isfinite(family_threshold(scores, [n % 19 for n in range(1000)], 0.95))
    with pytest.raises(UserError, match=r"conflicts of 18 families .* too few to let 0.95 .*; give more families"):
        family_threshold(scores, [n % 18 for n in range(1000)], 0.95)
