"""Detect conflicts in several ways, on plain tensors: what each reads, what is fitted, and what it scores.

=====================  =================================================================================================
two passes             what the context changes in the next-token distribution (``two_pass_features``)
named tokens           the same of the tokens that the context names, and whether it names what memory says
                       (``named_token_features``)
head lens              whether what memory heads and context heads write names two answers (``head_lens_features``)
invariance to wording  the same features without the directions in which phrasings differ (``PhrasingDirections``)
nearest subspace       the distance to the subspace of each kind of prompt (``NearestSubspaces``)
ensemble               the mean of several detectors' standardised log odds (``ensemble``), or the lowest of them
                       (``agreement``)
=====================  =================================================================================================

``shuffled_within`` makes the labels of a control, ``family_curve`` says what more phrasings are worth, and
``cross_validated`` what the activations hold at most. Linear readouts are ``probes.joint.JointProbe``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from interp.statistics import Estimate, bootstrap_weights
from probes.joint import JointProbe, ranks
from probes.quality import auroc, average_precision, false_alarms

KEPT = 0.95
"""The share of conflicts that is kept where false alarms are counted."""

TWO_PASSES = ("divergence", "confidence_gain", "entropy_gain", "bare_answer_loss", "other_answer")
"""The columns of ``two_pass_features``."""
NAMED_TOKENS = (
    "bare_answer_named",
    "answer_named",
    "bare_mass",
    "mass",
    "top_gain",
    "mass_gain",
    "top",
    "bare_answer",
    "bare_top",
)
"""The columns of ``named_token_features``."""
HEAD_LENS = ("divergence", "other_token", "memory_entropy", "context_entropy", "memory_agrees", "context_agrees")
"""The columns of ``head_lens_features``."""


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of two distributions, between 0 and ``log(2)`` nats.

    Args:
        first: Log probabilities, ``(..., n)``.
        second: The same.

    Returns:
        ``(...)``.
    """
    mixed = torch.logaddexp(first, second) - np.log(2)
    halves = [(p.exp() * (p - mixed).nan_to_num(neginf=0.0)).sum(-1) for p in (first, second)]
    return (halves[0] + halves[1]) / 2


def two_pass_features(with_context: Tensor, without: Tensor) -> Tensor:
    """Compare the next token's distribution after a prompt and after its bare question.

    Args:
        with_context: Logits, ``(n, d_vocab)``.
        without: Logits of the bare questions, ``(n, d_vocab)``.

    Returns:
        ``(n, 5)``, the columns of ``TWO_PASSES``: the Jensen-Shannon divergence; how much more probable the context
        makes its own top token (log ratio; the confidence gain); by how much it raises the entropy; how much less
        probable it makes the bare question's top token (log ratio); whether the top tokens differ.
    """
    with_context, without = (logits.float().log_softmax(-1) for logits in (with_context, without))
    own, bare = (log_p.argmax(-1, keepdim=True) for log_p in (with_context, without))

    def gained(token: Tensor) -> Tensor:
        return (with_context.gather(-1, token) - without.gather(-1, token))[:, 0]

    divergence, raised = jensen_shannon(with_context, without), _entropy(with_context) - _entropy(without)
    return torch.stack([divergence, gained(own), raised, -gained(bare), (own != bare).float()[:, 0]], 1)


def named_token_features(with_context: Tensor, without: Tensor, named: Tensor) -> Tensor:
    """Compare the two distributions on the tokens that the context names: memory's answer is one where both agree.

    Args:
        with_context: Logits, ``(n, d_vocab)``.
        without: Logits of the bare questions, ``(n, d_vocab)``.
        named: Which tokens the context names, boolean, ``(n, d_vocab)``.

    Returns:
        ``(n, 9)``, the columns of ``NAMED_TOKENS``: whether the bare question's top token is named, and whether the
        prompt's own is; the log probability of all named tokens together, without and with the context; how much more
        probable the context makes the likeliest named token (log ratio), and the named tokens together (summed over
        them, each weighted by its probability); the probability of the likeliest one; the log probability that the
        context leaves the bare question's top token, and that of the likeliest named token without the context. Log
        probabilities end at that of 1 in 10,000, which is also what no named token has.
    """
    with_context, without = (logits.float().log_softmax(-1) for logits in (with_context, without))
    own, bare = (log_p.argmax(-1, keepdim=True) for log_p in (with_context, without))
    inside, bare_inside = (log_p.masked_fill(~named, -torch.inf) for log_p in (with_context, without))
    top = inside.argmax(-1, keepdim=True)
    gain = with_context - without
    columns = [
        named.gather(-1, bare),
        named.gather(-1, own),
        bare_inside.logsumexp(-1, keepdim=True).clamp(min=_LEAST),
        inside.logsumexp(-1, keepdim=True).clamp(min=_LEAST),
        gain.gather(-1, top) * named.gather(-1, top),
        (with_context.exp() * gain * named).sum(-1, keepdim=True),
        inside.gather(-1, top).exp(),
        with_context.gather(-1, bare).clamp(min=_LEAST),
        bare_inside.gather(-1, top).clamp(min=_LEAST),
    ]
    return torch.cat([column.float() for column in columns], 1)


def head_lens_features(memory: Tensor, context: Tensor) -> Tensor:
    """Compare the next tokens that two groups of heads name.

    Args:
        memory: What the writes of the memory heads add to the logits, ``(n, d_vocab)``.
        context: The same of the context heads.

    Returns:
        ``(n, 6)``, the columns of ``HEAD_LENS``: the Jensen-Shannon divergence of the two distributions; whether their
        top tokens differ; the entropy of each; and how high each group holds the other's top token, in standard
        deviations of its own logits (heads that write little name nothing, but may still agree).
    """
    logits = [memory.float(), context.float()]
    first, second = (some.log_softmax(-1) for some in logits)
    top = [some.argmax(-1, keepdim=True) for some in logits]

    def held(some: Tensor, token: Tensor) -> Tensor:
        return ((some.gather(-1, token)[:, 0] - some.mean(-1)) / some.std(-1).clamp(min=1e-9)).nan_to_num()

    agree = held(logits[0], top[1]), held(logits[1], top[0])
    differs = (top[0] != top[1]).float()[:, 0]
    return torch.stack([jensen_shannon(first, second), differs, _entropy(first), _entropy(second), *agree], 1)


_LEAST = float(np.log(1e-4))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).nan_to_num().sum(-1)


@dataclass(frozen=True, eq=False)
class PhrasingDirections:
    """The directions in which phrasings differ, in standardised features of several sites side by side.

    Attributes:
        centre: Mean of the features, ``(d,)``.
        scale: Their standard deviation, ``(d,)``.
        directions: Orthonormal rows, the one of the largest differences first, ``(k, d)``.
    """

    centre: Tensor
    scale: Tensor
    directions: Tensor

    @classmethod
    def fit(
        cls, features: Tensor, phrasings: Sequence[Sequence[Hashable]], strata: Sequence[Hashable], *, count: int
    ) -> PhrasingDirections:
        """Find the principal directions of the mean differences between parts of phrasings.

        Args:
            features: ``(n, d)``.
            phrasings: The parts of each prompt's phrasing (for example its layout and its wording).
            strata: What each prompt is otherwise; means are compared within it.
            count: How many directions are taken at most.
        """
        values = features.float()
        centre, scale = values.mean(0), values.std(0, correction=0).clamp(min=1e-6)
        values = (values - centre) / scale
        for members in _groups(strata):
            values[members] -= values[members].mean(0)
        means = [
            values[members].mean(0) * len(members) ** 0.5
            for kind in zip(*phrasings, strict=True)
            for members in _groups(kind)
        ]
        _, size, directions = torch.linalg.svd(torch.stack(means), full_matrices=False)
        # Means of centred values sum to nothing, so that some directions are none.
        return cls(centre, scale, directions[size > 1e-4 * size[0]][:count])

    def removed(self, features: Tensor) -> Tensor:
        """The standardised features without these directions, ``(n, d)`` float32."""
        values = (features.float() - self.centre) / self.scale
        return values - values @ self.directions.T @ self.directions


class _Subspace(NamedTuple):
    centre: Tensor
    directions: Tensor


@dataclass(frozen=True, eq=False)
class NearestSubspaces:
    """Score prompts by which kind's subspace they lie nearest to: its mean and its principal directions.

    Attributes:
        conflict: The subspace of conflicts.
        others: Those of the other kinds.
    """

    conflict: _Subspace
    others: tuple[_Subspace, ...]

    @classmethod
    def fit(cls, features: Tensor, kinds: Sequence[str], *, rank: int, conflict: str = "conflict") -> NearestSubspaces:
        """Fit a subspace for each kind.

        Args:
            features: ``(n, d)``.
            kinds: The kind of each prompt.
            rank: How many principal directions a subspace has at most.
            conflict: The kind that is to be found.
        """
        spaces = {}
        for members in _groups(kinds):
            own = features[members].float()
            centre = own.mean(0)
            kept = min(rank, len(members) - 1)
            directions = torch.linalg.svd(own - centre, full_matrices=False)[2][:kept]
            spaces[kinds[members[0]]] = _Subspace(centre, directions)
        return cls(spaces.pop(conflict), tuple(spaces.values()))

    def scores(self, features: Tensor, *, rank: int) -> Tensor:
        """How much nearer a prompt lies to the conflicts' subspace than to any other, ``(n,)`` in squared distance.

        Args:
            features: ``(n, d)``.
            rank: How many directions of each subspace are used: 0 compares means.
        """

        def distance(space: _Subspace) -> Tensor:
            away = features.float() - space.centre
            return away.square().sum(1) - (away @ space.directions[:rank].T).square().sum(1)

        return torch.stack([distance(space) for space in self.others]).amin(0) - distance(self.conflict)


def ensemble(scores: Sequence[Tensor], on: Sequence[Tensor]) -> Tensor:
    """The mean of several detectors' scores, each standardised by its mean and deviation on other prompts.

    Args:
        scores: ``(n,)`` of each detector.
        on: ``(m,)`` of each detector, for the prompts that decide mean and deviation.

    Returns:
        ``(n,)``.
    """
    return _standardised(scores, on).mean(0)


def agreement(scores: Sequence[Tensor], on: Sequence[Tensor]) -> Tensor:
    """The lowest of several detectors' scores, standardised as in ``ensemble``: high where all of them are.

    Args:
        scores: As for ``ensemble``.
        on: The same.

    Returns:
        ``(n,)``.
    """
    return _standardised(scores, on).amin(0)


def _standardised(scores: Sequence[Tensor], on: Sequence[Tensor]) -> Tensor:
    return torch.stack([(s - o.mean()) / o.std() for s, o in zip(scores, on, strict=True)])


def shuffled_within(labels: Sequence[bool], strata: Sequence[Hashable], *, seed: int = 0) -> list[bool]:
    """Shuffle labels among the examples of each stratum.

    Args:
        labels: ``n`` labels.
        strata: The stratum of each.
        seed: Seed of the shuffle.
    """
    rng, shuffled = random.Random(f"{seed}/shuffled"), list(labels)
    for members in _groups(strata):
        drawn = [labels[i] for i in members]
        rng.shuffle(drawn)
        for i, label in zip(members, drawn, strict=True):
            shuffled[i] = label
    return shuffled


def cross_validated(
    features: Mapping[str, Tensor],
    is_conflict: Sequence[bool],
    clusters: Sequence[Hashable],
    *,
    strength: float,
    folds: int = 5,
    seed: int = 0,
) -> Tensor:
    """Log odds of each example by a probe that was fitted on the others, but on none of its cluster.

    Args:
        features: By site ``(n, d)``.
        is_conflict: What each example is.
        clusters: What stays together, for example the subjects.
        strength: The regularisation strength.
        folds: How many probes.
        seed: Decides which clusters go together.

    Returns:
        ``(n,)``.
    """
    names = sorted({str(cluster) for cluster in clusters})
    random.Random(f"{seed}/folds").shuffle(names)
    fold_of = {name: number % folds for number, name in enumerate(names)}
    fold = torch.tensor([fold_of[str(cluster)] for cluster in clusters])
    scores = torch.empty(len(fold))
    for number in fold.unique().tolist():
        inside = fold == number
        rest = {site: values[~inside] for site, values in features.items()}
        labels = [is_one for is_one, is_in in zip(is_conflict, inside.tolist(), strict=True) if not is_in]
        probe = JointProbe.fit(rest, labels, strength=strength)
        scores[inside] = probe.log_odds({site: values[inside] for site, values in features.items()})
    return scores


class Judged(NamedTuple):
    """How well scores tell conflicts from some other prompts, with intervals by cluster.

    Attributes:
        auroc: Area under the receiver operating characteristic.
        auprc: Average precision; ``prevalence`` is what scores reach that know nothing.
        false_alarms: The share of others that pass at the threshold that keeps 95 % of these conflicts.
        prevalence: The share of conflicts.
    """

    auroc: Estimate
    auprc: Estimate
    false_alarms: Estimate
    prevalence: float


def judged(scores: Tensor, is_conflict: Sequence[bool], clusters: Sequence[Hashable], *, seed: int = 0) -> Judged:
    """Judge scores of conflicts and others.

    Args:
        scores: ``(n,)``.
        is_conflict: What each example is.
        clusters: What is resampled together, for example the subjects.
        seed: Seed of the bootstrap.
    """
    values, positive = scores.double().numpy(), np.array(is_conflict, dtype=bool)
    drawn, once = bootstrap_weights(clusters, seed=seed), np.ones((1, len(positive)))

    def estimate(measure: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Estimate:
        low, high = np.nanquantile(measure(values, positive, drawn), [0.025, 0.975])
        return Estimate(float(measure(values, positive, once)[0]), float(low), float(high), len(positive))

    alarms = estimate(partial(false_alarms, keep=KEPT))
    return Judged(estimate(auroc), estimate(average_precision), alarms, float(positive.mean()))


class CurvePoint(NamedTuple):
    """What a probe is worth that was fitted on prompts of some families.

    Attributes:
        families: How many families.
        prompts: How many prompts of them, on average over the draws.
        auroc: AUROC on the other part, mean over the draws.
        low: The worst draw.
        high: The best draw.
        same_number: Mean AUROC where as many prompts are drawn of all families: what is left is the effect of their
            variety.
    """

    families: int
    prompts: float
    auroc: float
    low: float
    high: float
    same_number: float


def family_curve(
    train: tuple[Mapping[str, Tensor], Sequence[bool], Sequence[Hashable]],
    test: tuple[Mapping[str, Tensor], Sequence[bool]],
    counts: Sequence[int],
    *,
    strength: float,
    draws: int = 3,
    seed: int = 0,
) -> list[CurvePoint]:
    """Fit a probe on prompts of more and more families, and see what it is worth on others.

    Args:
        train: Features by site, what each example is, and its family.
        test: Features by site, and what each example is.
        counts: How many families; more than there are count as all. A number is left out where so few families never
            have two prompts of each class.
        strength: The regularisation strength.
        draws: How often families are drawn, where not all are taken.
        seed: Seed of the draws.
    """
    features, is_conflict, families = train
    groups = _groups(families)

    def worth(rows: Sequence[int]) -> float:
        chosen = {site: values[list(rows)] for site, values in features.items()}
        probe = JointProbe.fit(chosen, [is_conflict[i] for i in rows], strength=strength)
        return ranks(probe.log_odds(test[0]), test[1])

    points = []
    for count in dict.fromkeys(min(count, len(groups)) for count in counts):
        found: list[tuple[int, float, float]] = []
        for draw in range(draws if count < len(groups) else 1):
            rng = random.Random(f"{seed}/{count}/{draw}")
            rows = _two_classes(rng, groups, count, is_conflict)
            if not rows:
                continue
            as_many = rows if count == len(groups) else _stratified(rng, is_conflict, len(rows))
            own = worth(rows)
            found.append((len(rows), own, own if as_many is rows else worth(as_many)))
        if not found:
            continue
        sizes, own, same = (np.array(column) for column in zip(*found, strict=True))
        points.append(CurvePoint(count, sizes.mean(), own.mean(), own.min(), own.max(), same.mean()))
    return [CurvePoint(p.families, *map(float, p[1:])) for p in points]


def _two_classes(
    rng: random.Random, groups: Sequence[Sequence[int]], count: int, is_conflict: Sequence[bool]
) -> list[int]:
    """The rows of some groups at random that together have at least two of each class; none where no such are found."""
    order = rng.sample(range(len(groups)), len(groups))
    for first in range(len(order)):
        rows = [i for number in (order[first:] + order[:first])[:count] for i in groups[number]]
        positives = sum(is_conflict[i] for i in rows)
        if min(positives, len(rows) - positives) >= 2:
            return rows
    return []


def _stratified(rng: random.Random, is_conflict: Sequence[bool], count: int) -> list[int]:
    """As many rows at random, with the share of each class that there is in all."""
    rows: list[int] = []
    for label in (True, False):
        own = [i for i, is_one in enumerate(is_conflict) if is_one is label]
        rows += rng.sample(own, min(len(own), max(2, round(count * len(own) / len(is_conflict)))))
    return rows


def _groups(names: Sequence[Hashable]) -> list[list[int]]:
    """The numbers of equal names, group by group."""
    members: dict[Hashable, list[int]] = {}
    for number, name in enumerate(names):
        members.setdefault(name, []).append(number)
    return [members[name] for name in sorted(members, key=str)]
