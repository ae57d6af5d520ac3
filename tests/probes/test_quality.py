import warnings

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score

from interp.errors import UserError
from interp.statistics import bootstrap_weights
from probes.quality import (
    ProbeScore,
    auroc,
    auroc_within,
    average_precision,
    expected_calibration_error,
    pooled_auroc,
    score_probabilities,
)

RNG = np.random.default_rng(0)
N = 120
LABELS = RNG.integers(0, 2, N)
SMOOTH = RNG.normal(size=N) + 0.8 * LABELS
SUBJECTS = [f"subject {i // 4}" for i in range(N)]


def probabilities_of(scores: np.ndarray) -> np.ndarray:
    second = 1 / (1 + np.exp(-scores))
    return np.stack([1 - second, second], 1)


def three_class_case(n: int = 150) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    logits = rng.normal(size=(n, 3)) + 1.2 * np.eye(3)[labels]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels


MEASURES = [(auroc, roc_auc_score), (average_precision, average_precision_score)]
SCORES = {
    "all different": SMOOTH,
    "many ties": SMOOTH.round(),
    "all the same": np.zeros(N),
    "infinite ones": np.where(SMOOTH > 1, np.inf, np.where(SMOOTH < -1, -np.inf, SMOOTH)),
}


@pytest.mark.parametrize("scores", ["all different", "many ties", "all the same"])
@pytest.mark.parametrize(("ours", "theirs"), MEASURES)
def test_weighted_measures_are_those_of_scikit_learn(ours, theirs, scores):
    weights = np.stack([np.ones(N), RNG.uniform(0, 2, N), RNG.integers(0, 4, N)])
    expected = [theirs(LABELS, SCORES[scores], sample_weight=row) for row in weights]
    np.testing.assert_allclose(ours(SCORES[scores], LABELS == 1, weights), expected, rtol=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), MEASURES)
def test_whole_weights_are_repeated_examples(ours, theirs):
    weights = RNG.integers(0, 4, N)
    repeated = np.repeat(np.arange(N), weights)
    expected = theirs(LABELS[repeated], SMOOTH.round()[repeated])
    assert ours(SMOOTH.round(), LABELS == 1, weights[None].astype(float))[0] == pytest.approx(expected)


def test_auroc_counts_infinite_scores_as_ties_by_brute_force():
    scores = SCORES["infinite ones"]
    above = scores[LABELS == 1][:, None] > scores[LABELS == 0]
    level = scores[LABELS == 1][:, None] == scores[LABELS == 0]
    assert auroc(scores, LABELS == 1, np.ones((1, N)))[0] == pytest.approx((above + level / 2).mean())


def test_a_resample_without_one_of_the_classes_has_no_value():
    weights = np.stack([LABELS == 1, LABELS == 0, np.ones(N)]).astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(auroc(SMOOTH, LABELS == 1, weights)).tolist() == [True, True, False]
        assert np.isnan(average_precision(SMOOTH, LABELS == 1, weights)).tolist() == [False, True, False]


def test_two_subjects_of_one_class_each_still_give_an_interval():
    """Half of the resamples draw one subject twice, and so one class only."""
    labels = np.array([0, 0, 1, 1])
    score = score_probabilities(probabilities_of(np.array([-1.0, 1.0, 0.0, 2.0])), labels, ["a", "a", "b", "b"])
    assert score.auroc.value == 0.75
    assert (score.auroc.low, score.auroc.high) == (0.75, 0.75)


# Calibration


def test_calibration_error_is_the_weighted_gap_between_confidence_and_frequency():
    confidence = np.array([0.05, 0.09, 0.31, 0.35, 0.39, 0.95, 1.0])
    outcome = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    # Bins 0, 3 and 9: |0.07 - 1/2| * 2/7 + |0.35 - 2/3| * 3/7 + |0.975 - 1| * 2/7
    by_hand = 0.43 * 2 / 7 + (2 / 3 - 0.35) * 3 / 7 + 0.025 * 2 / 7
    found = expected_calibration_error(confidence, outcome, np.ones((1, 7)))
    assert found[0] == pytest.approx(by_hand)


def test_calibration_error_with_whole_weights_is_that_of_repeated_examples():
    confidence, outcome = RNG.uniform(size=50), RNG.integers(0, 2, 50).astype(float)
    weights = RNG.integers(0, 3, 50)
    repeated = np.repeat(np.arange(50), weights)
    expected = expected_calibration_error(confidence[repeated], outcome[repeated], np.ones((1, len(repeated))))
    assert expected_calibration_error(confidence, outcome, weights[None].astype(float)) == pytest.approx(expected)


def test_reliability_bins_are_ten_of_equal_width_without_the_empty_ones():
    second = np.array([0.02, 0.04, 0.42, 0.44, 0.46, 0.99, 1.0])
    labels = np.array([0, 0, 1, 0, 1, 1, 1])
    score = score_probabilities(np.stack([1 - second, second], 1), labels, range(7))
    assert [b.confidence for b in score.reliability] == pytest.approx([0.03, 0.44, 0.995])
    assert [b.frequency.value for b in score.reliability] == pytest.approx([0, 2 / 3, 1])
    assert score.calibration_error.value == pytest.approx((0.03 * 2 + (2 / 3 - 0.44) * 3 + 0.005 * 2) / 7)


def test_with_three_classes_the_predicted_one_is_calibrated():
    probabilities, labels = three_class_case()
    right = (probabilities.argmax(1) == labels).astype(float)
    expected = expected_calibration_error(probabilities.max(1), right, np.ones((1, len(labels))))[0]
    score = score_probabilities(probabilities, labels, range(len(labels)))
    assert score.calibration_error.value == pytest.approx(expected)
    assert sum(b.frequency.value * np.mean(_bin(probabilities) == _bin(b.confidence)) for b in score.reliability) == (
        pytest.approx(right.mean())
    )


def _bin(confidence):
    """Number of the bin among ten, of single confidences or of the largest in each row."""
    largest = np.max(confidence, axis=-1) if np.ndim(confidence) == 2 else confidence
    return np.minimum(np.floor(np.asarray(largest) * 10), 9)


# Whole scores


def test_scores_of_two_classes_are_those_of_scikit_learn():
    probabilities = probabilities_of(SMOOTH - 0.4)
    score = score_probabilities(probabilities, LABELS, SUBJECTS)
    assert score.auroc.value == pytest.approx(roc_auc_score(LABELS, SMOOTH))
    assert score.auprc.value == pytest.approx(average_precision_score(LABELS, SMOOTH))
    assert score.accuracy.value == pytest.approx(((SMOOTH > 0.4) == LABELS).mean())
    assert score.prevalence == pytest.approx(LABELS.mean())
    assert score.auroc.n == N


def test_scores_of_three_classes_are_means_over_the_classes_each_against_the_rest():
    probabilities, labels = three_class_case()
    score = score_probabilities(probabilities, labels, range(len(labels)))
    assert score.auroc.value == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"))
    assert score.auprc.value == pytest.approx(average_precision_score(np.eye(3)[labels], probabilities))
    assert score.accuracy.value == pytest.approx((probabilities.argmax(1) == labels).mean())
    assert score.prevalence == pytest.approx(1 / 3)


def test_a_class_that_does_not_occur_is_left_out_of_the_mean():
    probabilities, labels = three_class_case()
    kept = labels != 1
    score = score_probabilities(probabilities[kept], labels[kept], range(int(kept.sum())))
    expected = [roc_auc_score(labels[kept] == c, probabilities[kept, c]) for c in (0, 2)]
    assert score.auroc.value == pytest.approx(np.mean(expected))


def test_one_class_alone_cannot_be_scored():
    with pytest.raises(UserError, match=r"All 4 examples are of one class, .*score on examples of at least two"):
        score_probabilities(probabilities_of(np.arange(4.0)), np.ones(4, dtype=int), range(4))


def test_a_score_survives_json_form():
    score = score_probabilities(probabilities_of(SMOOTH), LABELS, SUBJECTS)
    assert ProbeScore.from_record(score.to_record()) == score


# Intervals


def by_resampling_subjects(scores, labels, subjects, measure, n_resamples=2000):
    """The interval by a plain loop: draw as many subjects as there are, and take all examples of each."""
    rng = np.random.default_rng(99)
    members = [np.flatnonzero(np.asarray(subjects) == s) for s in sorted(set(subjects))]
    values = []
    for _ in range(n_resamples):
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        if len(set(labels[rows])) > 1:
            values.append(measure(labels[rows], scores[rows]))
    return np.quantile(values, [0.025, 0.975])


def brute_auroc(labels, scores):
    positives, negatives = scores[labels == 1][:, None], scores[labels == 0]
    return ((positives > negatives) + (positives == negatives) / 2).mean()


def test_intervals_are_those_of_a_loop_that_resamples_subjects():
    found = score_probabilities(probabilities_of(SMOOTH), LABELS, SUBJECTS).auroc
    low, high = by_resampling_subjects(SMOOTH, LABELS, SUBJECTS, brute_auroc)
    width = high - low
    assert (found.low, found.high) == (pytest.approx(low, abs=0.1 * width), pytest.approx(high, abs=0.1 * width))


def test_accuracy_and_frequencies_have_the_intervals_of_wilson():
    score = score_probabilities(probabilities_of(SMOOTH), LABELS, range(N))
    assert score.accuracy.value == ((SMOOTH > 0) == LABELS).mean()
    for found in (score.accuracy, *(b.frequency for b in score.reliability)):
        expected = binomtest(round(found.value * found.n), found.n).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_copies_within_a_subject_do_not_narrow_the_intervals():
    once = score_probabilities(probabilities_of(SMOOTH), LABELS, range(N))
    copied = np.repeat(np.arange(N), 5)
    often = score_probabilities(probabilities_of(SMOOTH[copied]), LABELS[copied], copied.tolist())
    as_if_new = score_probabilities(probabilities_of(SMOOTH[copied]), LABELS[copied], range(5 * N))
    for name in ("auroc", "auprc", "accuracy", "calibration_error"):
        a, b, c = (getattr(score, name) for score in (once, often, as_if_new))
        assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high))
        assert c.high - c.low < 0.6 * (b.high - b.low)


def test_the_same_seed_gives_the_same_score():
    probabilities = probabilities_of(SMOOTH)
    first, again, other = (score_probabilities(probabilities, LABELS, SUBJECTS, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.auroc.value == other.auroc.value
    assert first.auroc.low != other.auroc.low


def test_pooled_auroc_is_the_mean_and_its_interval_holds_all_probes_resamples():
    several = [SMOOTH, -SMOOTH, RNG.normal(size=N)]
    found = pooled_auroc(several, LABELS == 1, SUBJECTS, seed=4)
    weights = bootstrap_weights(SUBJECTS, seed=4)
    resampled = [roc_auc_score(LABELS, s, sample_weight=w) for s in several for w in weights[:200]]
    assert found.value == pytest.approx(np.mean([roc_auc_score(LABELS, s) for s in several]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    assert found.n == N


def test_auroc_within_strata_counts_pairs_of_the_same_stratum_only():
    rng = np.random.default_rng(3)
    strata = rng.integers(0, 4, 60)
    positive = rng.random(60) < 0.2 + 0.2 * strata
    scores = np.round(rng.random(60) + strata, 1)
    pairs = [(i, j) for i in range(60) for j in range(60) if positive[i] and not positive[j] and strata[i] == strata[j]]
    expected = np.mean([float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j]) for i, j in pairs])
    found = auroc_within(scores, positive, strata.tolist(), list(range(60)))
    assert found.value == pytest.approx(expected)
    assert found.low < expected < found.high
