"""Which features of a sparse autoencoder tell what source an answer will follow (SpARE; Zhao et al. 2024, 2410.15999).

1. Of every feature: its information about the source, and its mean activation with either source.
2. Features by descending information; k is the smallest number of them that together hold more than a given share.
3. Walk that order: a feature that is larger with the context goes to the context's set, one that is larger with memory
   to memory's; one that is equal is skipped, and the next takes its place. Stop at k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from interp.errors import UserError
from probes.information import mutual_information


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """What the features of one autoencoder have to do with the source; every tensor is ``(n_features,)``.

    Attributes:
        information: Mutual information with the source, nats.
        context_mean: Mean activation over the prompts that were answered from the context.
        memory_mean: The same from memory.
        frequency: Share of prompts for which the feature fires.
    """

    information: Tensor
    context_mean: Tensor
    memory_mean: Tensor
    frequency: Tensor

    @classmethod
    def of(cls, activations: Tensor, follows_context: Tensor) -> FeatureStatistics:
        """Of the features of prompts and what each was answered from.

        Args:
            activations: ``(n_prompts, n_features)``, at the last prompt token.
            follows_context: Whether the answer was the context's (else memory's), boolean ``(n_prompts,)``.

        Raises:
            UserError: If one of the sources was never followed.
        """
        chosen = follows_context.to(activations.device).bool()
        if not 0 < int(chosen.sum()) < len(chosen):
            raise UserError(
                f"Of {len(chosen)} prompts {int(chosen.sum())} were answered from the context: both sources are "
                "needed; give more prompts or other relations."
            )
        return cls(
            mutual_information(activations, chosen.long()),
            activations[chosen].double().mean(0),
            activations[~chosen].double().mean(0),
            (activations != 0).double().mean(0),
        )

    @property
    def expectation(self) -> Tensor:
        """How much larger the feature is with the context: positive for the context's, negative for memory's."""
        return self.context_mean - self.memory_mean


class SelectedFeatures(NamedTuple):
    """The two sets, each by descending information.

    Attributes:
        context: Features that stand for the context.
        memory: Features that stand for memory.
    """

    context: list[int]
    memory: list[int]


def select_features(information: Tensor, expectation: Tensor, share: float) -> SelectedFeatures:
    """The features that hold the given share of all information about the source.

    Args:
        information: ``(n_features,)``.
        expectation: Mean activation with the context less that with memory, ``(n_features,)``.
        share: Between 0 and 1: the published K.

    Raises:
        UserError: If the share is not between 0 and 1, or no feature has any information.
    """
    if not 0 < share < 1:
        raise UserError(f"The share of information must lie between 0 and 1, not {share:g}.")
    total = information.double().sum()
    if total <= 0:
        raise UserError("No feature tells anything about the source; give more prompts, or another SAE or layer.")
    values, order = information.double().sort(descending=True, stable=True)
    count = int((values.cumsum(0) <= share * total).sum()) + 1
    sign = expectation[order].sign()
    walked = order[sign != 0][:count]
    positive = expectation[walked] > 0
    return SelectedFeatures(walked[positive].tolist(), walked[~positive].tolist())


def matched_random_features(statistics: FeatureStatistics, features: list[int], seed: int) -> list[int]:
    """For each feature another one that fires about as often, drawn at random: the control of a selection.

    Args:
        statistics: Of the autoencoder.
        features: The features to be matched; none of them is drawn.
        seed: Of the draws.

    Raises:
        UserError: If there are not enough other features.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency = statistics.frequency.cpu()
    free = torch.ones(len(frequency), dtype=torch.bool)
    free[torch.tensor(features, dtype=torch.long)] = False
    if int(free.sum()) < len(features):
        raise UserError(f"There are too few other features for a random control of {len(features)}.")
    drawn = []
    for feature in features:
        distance = (frequency - frequency[feature]).abs().masked_fill(~free, torch.inf)
        nearest = distance.topk(min(10, int(free.sum())), largest=False).indices
        chosen = int(nearest[torch.randint(len(nearest), (), generator=generator)])
        free[chosen] = False
        drawn.append(chosen)
    return drawn
