"""Fit one probe on several sites at once, and see what it is worth where it was not fitted.

1. The activations of all sites stand side by side, and one logistic regression reads them (``JointProbe``).
2. A probe that is to hold in words it never saw is judged in such words: prompts of some parts (layouts, wordings) are
   scored by a probe that was fitted without any of these parts (``left_out_scores``), and the strength is the one whose
   scores rank best there.
3. Its threshold is conformal over families of prompts, not over prompts: a new family counts as one more family
   (``family_threshold``).
"""

from __future__ import annotations

import math
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

    Each kind of part is dealt out to the folds. A prompt all of whose parts are of one fold is scored by a probe that
    was fitted on the prompts that have no part of this fold.

    Args:
        train: Features by site, what each example is, and its parts (for example layout and wording), to fit on.
        dev: Features and parts of the prompts to score.
        strength: The regularisation strength.
        folds: How many.

    Returns:
        ``(n_dev,)``; NaN for prompts whose parts are of several folds.
    """
    features, is_conflict, parts = train
    dealt: list[dict[str, int]] = []
    for kind in zip(*parts, strict=True):
        dealt.append({part: number % folds for number, part in enumerate(sorted(set(kind)))})

    def of_fold(some: Sequence[Sequence[str]]) -> np.ndarray:
        return np.array([[fold[part] for fold, part in zip(dealt, one, strict=True)] for one in some])

    of_train, of_dev = of_fold(parts), of_fold(dev[1])
    scores = torch.full((len(dev[1]),), math.nan)
    for fold in range(folds):
        rows = torch.from_numpy((of_train != fold).all(1))
        wanted = torch.from_numpy((of_dev == fold).all(1))
        chosen = {site: values[rows] for site, values in features.items()}
        labels = [one for one, is_in in zip(is_conflict, rows.tolist(), strict=True) if is_in]
        probe = JointProbe.fit(chosen, labels, strength=strength)
        scores[wanted] = probe.log_odds({site: values[wanted] for site, values in dev[0].items()})
    return scores


def ranks(scores: Tensor, is_conflict: Sequence[bool]) -> float:
    """AUROC of scores, of those that are numbers."""
    there = ~scores.isnan().numpy()
    positive = np.array(is_conflict, dtype=bool)[there]
    return float(auroc(scores.double().numpy()[there], positive, np.ones((1, there.sum())))[0])


def family_threshold(scores: Tensor, families: Sequence[Hashable], keep: float) -> float:
    """The threshold that conflicts of a new family exceed with probability ``keep``, if it is one more of its kind.

    The ``k`` families are exchangeable with the new one, and so is a score drawn from each: the threshold is the
    largest score ``t`` for which ``(1 + the sum of the families' shares of scores up to t) / (k + 1)`` is at most
    ``1 - keep``: what a conformal threshold on one random score a family is on average (Dunn, Wasserman & Ramdas 2022,
    "Distribution-Free Prediction Sets for Two-Layer Hierarchical Models", arXiv 1809.07441).

    Args:
        scores: Of conflicts, ``(n,)``.
        families: The family of each.
        keep: The share that should pass, between 0 and 1.

    Returns:
        The threshold; a score passes that is greater.

    Raises:
        UserError: If there are too few families for it.
    """
    names, members = np.unique([str(family) for family in families], return_inverse=True)
    share = 1 / np.bincount(members)[members]
    order = scores.argsort().numpy()
    # Next to the families' own shares the new one counts as wholly below: without it the level would be optimistic.
    level = (1 + share[order].cumsum()) / (len(names) + 1)
    ascending = scores.numpy()[order]
    below = np.flatnonzero((level <= 1 - keep + 1e-12) & np.append(ascending[1:] != ascending[:-1], True))
    if not len(below):
        raise UserError(
            f"There are conflicts of {len(names)} families to set the gate's threshold on, too few to let {keep:g} of "
            "a new one's pass; give more families, or a smaller share."
        )
    return float(ascending[below[-1]])
