"""Fit one probe on several sites at once, and see what it is worth where it was not fitted.

1. The activations of all sites stand side by side, and one logistic regression reads them (``JointProbe``).
2. A probe that is to hold in words it never saw is judged in such words: every prompt is scored by a probe that was
   fitted without any of its parts, such as layout and wording (``left_out_scores``), and the strength is the one whose
   scores rank best there.
3. Its threshold is conformal over families of prompts, not over prompts: a new family counts as one more family
   (``family_threshold``).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from interp.errors import UserError
from probes.linear import ProbeSet
from probes.quality import auroc

STRENGTHS = (0.1, 0.3, 1.0, 3.0)
"""Regularisation strengths per example; see ``probes.linear.STRENGTHS``."""

_CLASSES = ("other", "conflict")


@dataclass(frozen=True, eq=False)
class JointProbe:
    """A linear readout of several sites together.

    Attributes:
        weights: For each site, in the activations' own units, ``(d,)``.
        bias: Of the log odds.
        strength: The regularisation strength.
    """

    weights: Mapping[str, Tensor]
    bias: float
    strength: float

    @classmethod
    def fit(cls, features: Mapping[str, Tensor], is_conflict: Sequence[bool], *, strength: float) -> JointProbe:
        """Fit the log odds of a conflict; see ``ProbeSet.fit`` for what is minimised.

        Args:
            features: By site ``(n, d)``, or for z ``(n, n_heads, d_head)``.
            is_conflict: What each example is.
            strength: The regularisation strength per example.

        Raises:
            UserError: If a class is missing, or a feature is no number.
        """
        labels = [_CLASSES[bool(one)] for one in is_conflict]
        # Validation only chooses among strengths, and there is one.
        first = {labels.index(name) for name in _CLASSES if name in labels}
        side_by_side = _side_by_side(features)
        doubled = torch.cat([side_by_side, side_by_side[sorted(first)]])
        probes = ProbeSet.fit(
            {"joint": doubled},
            [*labels, *(labels[n] for n in sorted(first))],
            validation=[False] * len(labels) + [True] * len(first),
            classes=_CLASSES,
            strengths=[strength],
            device="cpu",
        )
        probe = probes["joint"]
        widths = [values[0].numel() for values in features.values()]
        weights = dict(zip(features, probe.weight[0].split(widths), strict=True))
        return cls(weights, float(probe.bias[0]), strength)

    def log_odds(self, features: Mapping[str, Tensor]) -> Tensor:
        """Log odds of a conflict, ``(n,)`` float32; features as in ``fit``."""
        return (
            sum((features[site].flatten(1).float() @ w for site, w in self.weights.items()), torch.zeros(()))
            + self.bias
        )


def _side_by_side(features: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([values.flatten(1).float() for values in features.values()], 1)


def left_out_scores(
    train: tuple[Mapping[str, Tensor], Sequence[bool], Sequence[Sequence[str]]],
    dev: tuple[Mapping[str, Tensor], Sequence[Sequence[str]]],
    *,
    strength: float,
    folds: int = 3,
) -> Tensor:
    """Score prompts by probes that were fitted without any of their parts.

    Each kind of part is dealt out to the folds. A prompt is scored by a probe that was fitted on the prompts that share
    no kind's fold with it: with two kinds and three folds there are nine probes, each of four ninths of the prompts.

    Args:
        train: Features by site, what each example is, and its parts (for example layout and wording), to fit on.
        dev: Features and parts of the prompts to score.
        strength: The regularisation strength.
        folds: How many.

    Returns:
        Log odds, ``(n_dev,)``.

    Raises:
        UserError: If a class is missing among the prompts to fit on.
    """
    features, is_conflict, parts = train
    # By kind; a part of dev alone is dealt out too, since nothing was fitted on it.
    dealt = [
        {part: number % folds for number, part in enumerate(sorted(set(kind)))}
        for kind in zip(*parts, *dev[1], strict=True)
    ]

    def of_fold(some: Sequence[Sequence[str]]) -> np.ndarray:
        return np.array([[fold[part] for fold, part in zip(dealt, one, strict=True)] for one in some])

    of_train, of_dev = of_fold(parts), of_fold(dev[1])
    scores = torch.empty(len(dev[1]))
    for left_out in np.unique(of_dev, axis=0):
        rows = torch.from_numpy((of_train != left_out).all(1))
        wanted = torch.from_numpy((of_dev == left_out).all(1))
        chosen = {site: values[rows] for site, values in features.items()}
        labels = [one for one, is_in in zip(is_conflict, rows.tolist(), strict=True) if is_in]
        probe = JointProbe.fit(chosen, labels, strength=strength)
        scores[wanted] = probe.log_odds({site: values[wanted] for site, values in dev[0].items()})
    return scores


def ranks(scores: Tensor, is_conflict: Sequence[bool]) -> float:
    """Return the AUROC of scores, ``(n,)``."""
    positive = np.array(is_conflict, dtype=bool)
    return float(auroc(scores.double().numpy(), positive, np.ones((1, len(scores))))[0])


def family_threshold(scores: Tensor, families: Sequence[Hashable], keep: float) -> float:
    """Return the threshold that conflicts of a new family exceed with probability ``keep`` at least.

    It holds if the new family is exchangeable with the ``k`` given ones, and no two scores are the same: of the scores
    it is the largest ``t`` for which ``(1 + the sum of the families' shares of scores below t) / (k + 1)`` is at most
    ``1 - keep`` (hierarchical conformal prediction: Lee, Barber & Willett 2023, "Distribution-free inference with
    hierarchical data", arXiv 2306.06342). The 1 stands for the new family, all of whose scores might lie below.

    Args:
        scores: Of conflicts, ``(n,)``.
        families: The family of each.
        keep: The share that should pass, between 0 and 1.

    Returns:
        The threshold; a score passes that is greater.

    Raises:
        UserError: If there are too few families for it.
    """
    number = {family: n for n, family in enumerate(dict.fromkeys(families))}
    members = np.array([number[family] for family in families], dtype=int)
    ascending, places = np.unique(scores.numpy(), return_inverse=True)
    shares = np.bincount(places, weights=1 / np.bincount(members)[members])
    below = np.concatenate([[0], shares.cumsum()[:-1]])
    allowed = np.flatnonzero(1 + below <= (len(number) + 1) * (1 - keep) + 1e-9)
    if not len(allowed):
        raise UserError(
            f"There are conflicts of {len(number)} families to set the gate's threshold on, too few to let {keep:g} of "
            "a new one's pass; give more families, or a smaller share."
        )
    return float(ascending[allowed[-1]])
