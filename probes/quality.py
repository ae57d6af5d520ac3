"""How good a probe is: AUROC, AUPRC, accuracy and calibration, each with an interval by subject.

Accuracy and observed frequencies are rates, with the interval of ``interp.statistics.rate``; all else is bootstrapped.
Such a measure is computed for all resamples at once: a resample is a weight for each example, and the measures are
weighted ones. With all weights 1 they are those of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from interp.errors import UserError
from interp.statistics import Estimate, bootstrap_weights, rate

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions of similar confidence: how sure they were on average, and how often they were right.

    Attributes:
        confidence: Mean predicted probability.
        frequency: Observed frequency, with its interval.
    """

    confidence: float
    frequency: Estimate


@dataclass(frozen=True)
class ProbeScore:
    """The quality of one probe on one set of examples.

    Attributes:
        auroc: Area under the receiver operating characteristic; with more than two classes the mean over the classes,
            each against the rest.
        auprc: Average precision, likewise; a probe that knows nothing reaches ``prevalence``.
        accuracy: Share of examples whose most probable class is right.
        calibration_error: Expected calibration error in ten bins of equal width (Guo et al. 2017, arXiv 1706.04599),
            of the last class where there are two, of the predicted class where there are more.
        prevalence: Share of the last class where there are two, mean share of the classes where there are more.
        reliability: The bins that are not empty.
    """

    auroc: Estimate
    auprc: Estimate
    accuracy: Estimate
    calibration_error: Estimate
    prevalence: float
    reliability: tuple[ReliabilityBin, ...]

    def to_record(self) -> dict[str, Any]:
        """As plain dictionaries for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ProbeScore:
        """What ``to_record`` gave."""
        measures = {
            name: Estimate.from_record(record[name]) for name in ("auroc", "auprc", "accuracy", "calibration_error")
        }
        bins = (ReliabilityBin(b["confidence"], Estimate.from_record(b["frequency"])) for b in record["reliability"])
        return cls(**measures, prevalence=record["prevalence"], reliability=tuple(bins))


def score_probabilities(
    probabilities: np.ndarray,
    labels: np.ndarray,
    clusters: Sequence[Hashable],
    *,
    ranking: np.ndarray | None = None,
    seed: int = 0,
) -> ProbeScore:
    """Score predicted probabilities.

    Args:
        probabilities: ``(n, n_classes)``.
        labels: The right class of each example, ``(n,)`` integers.
        clusters: What is resampled together, for example the subjects, ``n`` of them.
        ranking: For two classes, what orders the examples by the second one's probability, for example the log odds,
            ``(n,)``; ``None`` takes the probability.
        seed: Seed of the bootstrap.

    Raises:
        UserError: If fewer than two classes occur.
    """
    n, n_classes = probabilities.shape
    present = np.unique(labels)
    if len(present) < 2:
        raise UserError(
            f"All {n} examples are of one class, so nothing can be told apart; score on examples of at least two."
        )
    judged = [1] if n_classes == 2 else present.tolist()
    scores = probabilities if ranking is None else np.stack([-ranking, ranking], 1)
    drawn = bootstrap_weights(clusters, seed=seed)
    predicted = probabilities.argmax(1)
    right = (predicted == labels).astype(float)
    if n_classes == 2:
        confidence, outcome = probabilities[:, 1], (labels == 1).astype(float)
    else:
        confidence, outcome = probabilities.max(1), right

    def estimate(measure: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        low, high = np.nanquantile(measure(drawn), [0.025, 0.975])
        return Estimate(float(measure(np.ones((1, n)))[0]), float(low), float(high), n)

    def averaged(measure: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Estimate:
        return estimate(lambda w: np.mean([measure(scores[:, c], labels == c, w) for c in judged], axis=0))

    bins = _bins(confidence)
    return ProbeScore(
        auroc=averaged(auroc),
        auprc=averaged(average_precision),
        accuracy=rate(right, clusters),
        calibration_error=estimate(lambda w: expected_calibration_error(confidence, outcome, w)),
        prevalence=float(np.mean([(labels == c).mean() for c in judged])),
        reliability=tuple(
            ReliabilityBin(
                float(confidence[bins == b].mean()),
                rate(outcome[bins == b], [cluster for cluster, own in zip(clusters, bins, strict=True) if own == b]),
            )
            for b in np.unique(bins)
        ),
    )


def pooled_auroc(
    scores: Sequence[np.ndarray], positive: np.ndarray, clusters: Sequence[Hashable], *, seed: int = 0
) -> Estimate:
    """The mean AUROC of several probes for the same examples; the interval holds the spread between them too.

    Args:
        scores: ``(n,)`` for each probe.
        positive: ``(n,)`` booleans.
        clusters: What is resampled together.
        seed: Seed of the bootstrap.
    """
    drawn, once = bootstrap_weights(clusters, seed=seed), np.ones((1, len(positive)))
    low, high = np.nanquantile([auroc(s, positive, drawn) for s in scores], [0.025, 0.975])
    return Estimate(float(np.mean([auroc(s, positive, once) for s in scores])), float(low), float(high), len(positive))


def auroc_within(
    scores: np.ndarray, positive: np.ndarray, strata: Sequence[Hashable], clusters: Sequence[Hashable], *, seed: int = 0
) -> Estimate:
    """AUROC over pairs of a positive and a negative of the same stratum: what a probe knows beyond the stratum.

    Args:
        scores: ``(n,)``.
        positive: ``(n,)`` booleans.
        strata: The stratum of each example.
        clusters: What is resampled together.
        seed: Seed of the bootstrap.
    """
    _, member = np.unique(np.asarray([str(s) for s in strata]), return_inverse=True)

    def share(weights: np.ndarray) -> np.ndarray:
        wins, pairs = np.zeros((2, len(weights)))
        for stratum in range(member.max() + 1):
            inside = member == stratum
            n_pairs = (weights[:, inside & positive].sum(1)) * (weights[:, inside & ~positive].sum(1))
            wins += np.nan_to_num(auroc(scores[inside], positive[inside], weights[:, inside])) * n_pairs
            pairs += n_pairs
        return _ratio(wins, pairs)

    low, high = np.nanquantile(share(bootstrap_weights(clusters, seed=seed)), [0.025, 0.975])
    return Estimate(float(share(np.ones((1, len(scores))))[0]), float(low), float(high), len(scores))


def auroc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The probability that a random positive scores above a random negative, ties counting half.

    Args:
        scores: ``(n,)``.
        positive: ``(n,)`` booleans.
        weights: ``(n_resamples, n)``.

    Returns:
        ``(n_resamples,)``; NaN where a resample holds only one class.
    """
    positives, negatives = _by_score(scores, positive, weights)
    below = negatives.cumsum(1) - negatives
    wins = (positives * (below + negatives / 2)).sum(1)
    return _ratio(wins, positives.sum(1) * negatives.sum(1))


def average_precision(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean precision over the recall steps, from the highest score down; shapes as in ``auroc``."""
    positives, negatives = (counts[:, ::-1] for counts in _by_score(scores, positive, weights))
    found = positives.cumsum(1)
    precision = _ratio(found, found + negatives.cumsum(1))
    return _ratio((positives * np.nan_to_num(precision)).sum(1), positives.sum(1))


def false_alarms(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray, *, keep: float) -> np.ndarray:
    """The share of negatives that pass where the threshold lets ``keep`` of the positives pass; see ``auroc``."""
    positives, negatives = (counts[:, ::-1] for counts in _by_score(scores, positive, weights))
    found, passed = positives.cumsum(1), negatives.cumsum(1)
    enough = found >= keep * found[:, -1:] - 1e-9
    last = enough.argmax(1)[:, None]
    return _ratio(np.take_along_axis(passed, last, 1)[:, 0], passed[:, -1])


def expected_calibration_error(confidence: np.ndarray, outcome: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean distance between confidence and frequency over bins, weighted by the bins' sizes.

    Args:
        confidence: Predicted probabilities, ``(n,)``.
        outcome: 1 where the predicted thing happened, else 0, ``(n,)``.
        weights: ``(n_resamples, n)``.

    Returns:
        ``(n_resamples,)``.
    """
    member = np.eye(CALIBRATION_BINS)[_bins(confidence)]
    return np.abs((weights * (confidence - outcome)) @ member).sum(1) / weights.sum(1)


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


def _by_score(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the positives and of the negatives at each distinct score, ascending."""
    order = np.argsort(scores, kind="stable")
    ascending, ordered, is_positive = scores[order], weights[:, order], positive[order]
    starts = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))
    return (
        np.add.reduceat(ordered * is_positive, starts, axis=1),
        np.add.reduceat(ordered * ~is_positive, starts, axis=1),
    )


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
