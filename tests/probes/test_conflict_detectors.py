import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, zscore
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from probes.conflict_detectors import (
    HEAD_LENS,
    NAMED_TOKENS,
    TWO_PASSES,
    NearestSubspaces,
    PhrasingDirections,
    agreement,
    cross_validated,
    ensemble,
    family_curve,
    head_lens_features,
    jensen_shannon,
    judged,
    named_token_features,
    shuffled_within,
    two_pass_features,
)
from probes.joint import JointProbe, ranks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# What detectors read


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 0.0], [0.0, 1.0], math.log(2)),
        ([0.3, 0.7], [0.3, 0.7], 0.0),
        # The mixture is (3/4, 1/4): its entropy less half of that of a fair coin.
        ([0.5, 0.5], [1.0, 0.0], 2 * math.log(2) - 0.75 * math.log(3) - 0.5 * math.log(2)),
    ],
)
def test_the_divergence_of_distributions_made_by_hand(first, second, expected):
    found = jensen_shannon(torch.tensor(first, dtype=torch.float64).log(), torch.tensor(second).double().log())
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_two_passes_are_compared_as_scipy_does():
    first, second = normal(6, 40), normal(6, 40, seed=1)
    found = dict(zip(TWO_PASSES, two_pass_features(first, second).T.numpy(), strict=True))
    p, q = first.double().softmax(-1).numpy(), second.double().softmax(-1).numpy()
    rows = np.arange(6)
    expected: dict[Any, Any] = {
        "divergence": [jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)],
        "confidence_gain": np.log(p.max(1) / q[rows, p.argmax(1)]),
        "entropy_gain": entropy(p, axis=1) - entropy(q, axis=1),
        "bare_answer_loss": np.log(q.max(1) / p[rows, q.argmax(1)]),
        "other_answer": p.argmax(1) != q.argmax(1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_prompt_without_a_context_changes_nothing():
    logits = normal(3, 20)
    np.testing.assert_allclose(two_pass_features(logits, logits), 0, atol=1e-6)


def test_named_tokens_are_compared_token_by_token():
    """From the definition, one prompt and one token after the other; the last prompt's context names nothing."""
    first, second = 3 * normal(6, 12), 3 * normal(6, 12, seed=1)
    named = normal(6, 12, seed=2) > 0
    named[5] = False
    found = named_token_features(first, second, named).numpy()
    assert found.shape == (6, len(NAMED_TOKENS))
    p, q, least = first.double().softmax(-1).tolist(), second.double().softmax(-1).tolist(), 1e-4
    for row in range(6):
        tokens = [token for token in range(12) if named[row, token]]
        own, bare = (max(range(12), key=some[row].__getitem__) for some in (p, q))
        top = max(tokens, key=p[row].__getitem__, default=None)
        expected = {
            "bare_answer_named": bare in tokens,
            "answer_named": own in tokens,
            "bare_mass": math.log(max(least, sum(q[row][t] for t in tokens))),
            "mass": math.log(max(least, sum(p[row][t] for t in tokens))),
            "top_gain": 0 if top is None else math.log(p[row][top] / q[row][top]),
            "mass_gain": sum(p[row][t] * math.log(p[row][t] / q[row][t]) for t in tokens),
            "top": 0 if top is None else p[row][top],
            "bare_answer": math.log(max(least, p[row][bare])),
            "bare_top": math.log(least if top is None else max(least, q[row][top])),
        }
        np.testing.assert_allclose(found[row], [expected[name] for name in NAMED_TOKENS], rtol=1e-4, atol=1e-5)


def test_the_head_lens_compares_what_two_groups_name_as_scipy_does():
    first, second = 3 * normal(5, 30), 3 * normal(5, 30, seed=1)
    second[0] = first[0]
    found: dict[Any, Any] = dict(zip(HEAD_LENS, head_lens_features(first, second).T.numpy(), strict=True))
    p, q = first.double().softmax(-1).numpy(), second.double().softmax(-1).numpy()
    divergences = [jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(found["divergence"], np.nan_to_num(divergences), atol=1e-6)
    np.testing.assert_array_equal(found["other_token"], p.argmax(1) != q.argmax(1))
    np.testing.assert_allclose(found["memory_entropy"], entropy(p, axis=1), rtol=1e-4)
    np.testing.assert_allclose(found["context_entropy"], entropy(q, axis=1), rtol=1e-4)
    for name, own, other in (("memory_agrees", first, q), ("context_agrees", second, p)):
        standard = np.asarray(zscore(own.numpy(), axis=1, ddof=1))
        np.testing.assert_allclose(found[name], standard[np.arange(5), other.argmax(1)], rtol=1e-4)


# Phrasing directions and subspaces


def planted(n: int = 600, seed: int = 0) -> tuple[Tensor, list[str], list[tuple[str, str]]]:
    """Features whose second coordinate is the layout, the third the telling, and whose first is a conflict."""
    rng = np.random.default_rng(seed)
    layouts, tellings, conflicts = rng.integers(3, size=n), rng.integers(2, size=n), rng.integers(2, size=n)
    features = 0.5 * normal(n, 6, seed=seed)
    features[:, 0] += torch.tensor(2.0 * conflicts)
    features[:, 1] += torch.tensor(5.0 * layouts)
    features[:, 2] += torch.tensor(5.0 * tellings)
    kinds = ["conflict" if one else "other" for one in conflicts]
    return features, kinds, [(f"l{a}", f"t{b}") for a, b in zip(layouts, tellings, strict=True)]


def test_a_planted_phrasing_direction_vanishes_and_the_conflict_stays():
    features, kinds, phrasings = planted()
    directions = PhrasingDirections.fit(features, phrasings, kinds, count=2)
    left = directions.removed(features)
    layouts = np.array([layout for layout, _ in phrasings])
    means = np.array([left[layouts == name].mean(0).numpy() for name in np.unique(layouts)])
    assert np.ptp(means[:, 1]) < 0.1 < 1.5 < np.ptp([features[layouts == n, 1].mean() for n in np.unique(layouts)])
    assert ranks(left[:, 0], [kind == "conflict" for kind in kinds]) > 0.97


def test_means_that_are_centred_twice_leave_no_direction_of_nothing():
    features, kinds, phrasings = planted()
    directions = PhrasingDirections.fit(features, phrasings, kinds, count=1000).directions
    torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions)))
    # Three layouts and two tellings, whose means sum to nothing.
    assert len(directions) == 3


@pytest.mark.parametrize("rank", [0, 2])
def test_distances_to_subspaces_are_those_of_least_squares(rank):
    kinds = ["conflict"] * 20 + ["aligned"] * 20 + ["none"] * 20
    features, asked = normal(60, 8), normal(7, 8, seed=1)
    found = NearestSubspaces.fit(features, kinds, rank=5).scores(asked, rank=rank)

    def distance(kind: str) -> np.ndarray:
        own = features[[k == kind for k in kinds]].double().numpy()
        away = asked.double().numpy() - own.mean(0)
        _, vectors = np.linalg.eigh(np.cov(own.T))
        basis = vectors[:, ::-1][:, :rank]
        return ((away.T - basis @ np.linalg.lstsq(basis, away.T, rcond=None)[0]) ** 2).sum(0)

    expected = np.minimum(distance("aligned"), distance("none")) - distance("conflict")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


# Controls, ensembles, curves and ceilings


def test_an_ensemble_is_the_mean_of_standard_scores():
    on = [torch.tensor([0.0, 2.0]), torch.tensor([10.0, 30.0])]
    found = ensemble([torch.tensor([1.0, 3.0]), torch.tensor([20.0, 40.0])], on)
    torch.testing.assert_close(found, torch.tensor([0.0, 2**0.5]))


def test_an_agreement_is_the_lowest_standard_score():
    first, second = normal(30), 5 * normal(30, seed=1) + 2
    expected = np.minimum(*(np.asarray(zscore(some.double().numpy(), ddof=1)) for some in (first, second)))
    np.testing.assert_allclose(agreement([first, second], [first, second]), expected, rtol=1e-4, atol=1e-6)


def test_labels_are_shuffled_within_strata_and_teach_nothing():
    features, kinds, phrasings = planted(2000)
    labels, strata = [kind == "conflict" for kind in kinds], [layout for layout, _ in phrasings]
    shuffled = shuffled_within(labels, strata)
    for stratum in set(strata):
        inside = [s == stratum for s in strata]
        assert sum(np.array(shuffled)[inside]) == sum(np.array(labels)[inside])
    blind = JointProbe.fit({"s": features}, shuffled, strength=1.0).log_odds({"s": features})
    seeing = JointProbe.fit({"s": features}, labels, strength=1.0).log_odds({"s": features})
    assert abs(ranks(blind, shuffled) - 0.5) < 0.1 < 0.4 < ranks(seeing, labels) - 0.5


def test_nothing_of_a_subject_helps_with_the_same_subject():
    # Each subject has features of its own and one label: whoever sees a subject twice knows it.
    own, label_of = normal(40, 60), np.random.default_rng(0).permutation([True, False] * 20)
    subjects = [number for number in range(40) for _ in range(5)]
    features, labels = {"s": own[subjects] + 0.1 * normal(200, 60)}, [bool(label_of[s]) for s in subjects]
    fitted = JointProbe.fit(features, labels, strength=0.1)
    assert ranks(fitted.log_odds(features), labels) == 1
    assert ranks(cross_validated(features, labels, subjects, strength=0.1), labels) < 0.65


def test_a_planted_conflict_is_found_by_probes_that_did_not_see_it():
    features, kinds, _ = planted()
    labels = [kind == "conflict" for kind in kinds]
    scores = cross_validated({"s": features}, labels, [str(i) for i in range(len(labels))], strength=0.1)
    assert ranks(scores, labels) > 0.95


def test_a_curve_grows_where_one_family_misleads_and_all_together_do_not():
    n_families, each = 8, 40

    def drawn(seed: int) -> tuple[Tensor, list[bool], list[int]]:
        # A conflict shows in the first coordinate alike, in the second with a sign that alternates by family.
        families = [number for number in range(n_families) for _ in range(each)]
        labels = [number % 4 == 0 for number in range(n_families * each)]
        signs = torch.tensor([1.0 - 2 * (family % 2) for family in families])
        features = normal(len(labels), 5, seed=seed)
        features[:, :2] += torch.stack([torch.full_like(signs, 2), 3 * signs], 1) * torch.tensor(labels)[:, None]
        return features, labels, families

    (features, labels, families), (asked, expected, _) = drawn(0), drawn(1)
    points = family_curve(({"s": features}, labels, families), ({"s": asked}, expected), [1, 99], strength=0.1)
    assert [(point.families, point.prompts) for point in points] == [(1, each), (n_families, n_families * each)]
    one, every = points
    assert one.low <= one.auroc <= one.high < 0.85 < 0.9 < every.auroc
    assert one.auroc + 0.05 < one.same_number < every.auroc + 0.05
    assert every.low == every.high == every.auroc == every.same_number


def test_a_curve_leaves_out_numbers_of_families_that_never_have_both_classes():
    features, labels, families = {"s": normal(40, 3)}, [number < 20 for number in range(40)], [0] * 20 + [1] * 20
    points = family_curve((features, labels, families), (features, labels), [1, 2], strength=1.0)
    assert [(point.families, point.prompts) for point in points] == [(2, 40)]


# Judging


def test_judged_scores_are_those_of_scikit_learn():
    labels = np.random.default_rng(0).random(300) < 0.3
    scores = normal(300).double() + torch.tensor(labels.astype(float))
    found = judged(scores, labels.tolist(), [str(i % 50) for i in range(300)])
    assert found.auroc.value == pytest.approx(roc_auc_score(labels, scores))
    assert found.auprc.value == pytest.approx(average_precision_score(labels, scores))
    alarms, kept, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert found.false_alarms.value == pytest.approx(alarms[kept >= 0.95].min())
    assert found.prevalence == pytest.approx(labels.mean())
    for estimate in (found.auroc, found.auprc, found.false_alarms):
        assert estimate.low < estimate.value < estimate.high
