"""Find the features of a sparse autoencoder that two conditions, or two models, differ in most.

Model diffing with SAEs (Wang et al. 2025, arXiv 2506.19823, who find the features of a persona so): the same prompts
are read twice, by a model and by a fine-tune of it, or without a context and with it. Features are ordered by the
change of their mean activation. An edit of the first ones shifts what fires less on the other side down by the change,
to 0 at the least, and raises what fires more to its mean there: it moves means, not every prompt to where it would be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from interp.activations import record
from interp.anatomy import Anatomy
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.inputs import token_ids, tokenizer_of
from interp.sae import SparseAutoencoder
from interp.statistics import bootstrap_means

_ROWS_AT_ONCE = 512


class Side(NamedTuple):
    """What the features of an autoencoder do on one side; each ``(n_features,)`` float64 on the CPU.

    Attributes:
        mean: Mean activation.
        fires: Share of the prompts for which it is not 0.
    """

    mean: Tensor
    fires: Tensor


class Moves(NamedTuple):
    """Which features an edit moves, and where.

    Attributes:
        removed: Those that fall.
        falls: By how much.
        added: Those that rise.
        means: To what.
    """

    removed: list[int]
    falls: Tensor
    added: list[int]
    means: Tensor


@dataclass(frozen=True, eq=False)
class FeatureDifferences:
    """How the features of one autoencoder differ between two sides, over the same prompts.

    Attributes:
        sae: The autoencoder.
        states: Residual streams after its layer on the one side and on the other, each ``(n_prompts, d_model)``.
        subjects: The prompts' subjects, the clusters of the intervals.

    Raises:
        UserError: If there is no prompt, or the sides differ in their number.
    """

    sae: SparseAutoencoder
    states: tuple[Tensor, Tensor]
    subjects: tuple[str, ...]

    def __post_init__(self) -> None:
        one, other = map(len, self.states)
        if not one or not one == other == len(self.subjects):
            raise UserError(f"Both sides need the same prompts, at least one; they have {one} and {other}.")

    @cached_property
    def sides(self) -> tuple[Side, Side]:
        """What features do on the one side and on the other."""
        one, other = (self._side(states) for states in self.states)
        return one, other

    @property
    def difference(self) -> Tensor:
        """Mean activation on the other side less that on the one, ``(n_features,)``."""
        return self.sides[1].mean - self.sides[0].mean

    def first(self, count: int) -> list[int]:
        """The features that differ most, those that do not differ left out."""
        size = self.difference.abs()
        order = size.argsort(descending=True, stable=True)[:count]
        return order[size[order] > 0].tolist()

    def table(self, count: int) -> pl.DataFrame:
        """The features that differ most, a row each.

        Returns:
            ``layer, feature``, mean activations ``one`` and ``other``, their ``difference`` with its 95 % interval by
            subject ``low`` and ``high``, and the shares of prompts for which they fire, ``fires_one`` and
            ``fires_other``.
        """
        chosen = self.first(count)
        ours, theirs = (torch.cat([z[:, chosen] for z in self._encoded(states)]) for states in self.states)
        means = bootstrap_means((theirs - ours).double().numpy(), self.subjects)
        low, high = np.quantile(means, [0.025, 0.975], axis=0) if chosen else (np.empty(0), np.empty(0))
        one, other = self.sides
        return pl.DataFrame(
            {
                "layer": pl.Series([self.sae.layer] * len(chosen), dtype=pl.Int64),
                "feature": pl.Series(chosen, dtype=pl.Int64),
                "one": one.mean[chosen].numpy(),
                "other": other.mean[chosen].numpy(),
                "difference": self.difference[chosen].numpy(),
                "low": low,
                "high": high,
                "fires_one": one.fires[chosen].numpy(),
                "fires_other": other.fires[chosen].numpy(),
            }
        )

    def moves(self, count: int) -> Moves:
        """What becomes of the features that differ most; the arguments of ``interventions.features.EditedFeatures.of``.

        Raises:
            UserError: If no feature differs.
        """
        chosen = torch.tensor(self.first(count), dtype=torch.long)
        if not len(chosen):
            raise UserError(f"No feature of the SAE {self.sae.name} differs between the two sides; there is no edit.")
        removed, added = (chosen[(self.difference[chosen] > 0) == rises] for rises in (False, True))
        return Moves(removed.tolist(), -self.difference[removed], added.tolist(), self.sides[1].mean[added])

    def _side(self, states: Tensor) -> Side:
        total, fires = torch.zeros(2, self.sae.d_sae, dtype=torch.float64)
        for z in self._encoded(states):
            total += z.double().sum(0)
            fires += (z != 0).sum(0)
        return Side(total / len(states), fires / len(states))

    def _encoded(self, states: Tensor) -> Iterator[Tensor]:
        """Activations of some prompts at a time, ``(n, n_features)`` on the CPU: wide autoencoders' are large."""
        device = self.sae.weights["W_dec"].device
        for part in states.split(_ROWS_AT_ONCE):
            yield self.sae.encode(part.to(device)).cpu()


def differences(
    saes: Sequence[SparseAutoencoder],
    model: nn.Module,
    conflicts: ConflictSet,
    *,
    other: nn.Module | None = None,
    progress: str | None = None,
) -> list[FeatureDifferences]:
    """Compare two models on the same prompts, or one model on prompts without and with their context.

    Args:
        saes: Autoencoders of the model's residual stream; they read both sides.
        model: The one side.
        conflicts: The prompts; those that are not known without their context are left out where that is compared.
        other: The other side, a fine-tune of the model; ``None`` compares prompts without and with their context.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        For each autoencoder how its features differ at the prompts' last token.

    Raises:
        UserError: If there is no prompt, or the other model is no fine-tune of the one.
    """
    examples = [example for example in conflicts if other is not None or example.bare_prompt]
    if not examples:
        known = "" if other is not None else " that are known without their context"
        raise UserError(f"There is no prompt to compare; give conflict prompts{known}.")
    sites = list(dict.fromkeys(sae.site for sae in saes))
    whole = [example.prompt for example in examples]
    if other is None:
        one = record(model, [example.bare_prompt for example in examples], sites, progress=progress)
        two = record(model, whole, sites, progress=progress)
    else:
        _check_related(model, other, whole)
        one, two = (record(side, whole, sites, progress=progress) for side in (model, other))
    subjects = tuple(example.subject for example in examples)
    device = Anatomy(model).device
    return [FeatureDifferences(sae.to(device), (one[sae.site], two[sae.site]), subjects) for sae in saes]


def _check_related(model: nn.Module, other: nn.Module, prompts: Sequence[str]) -> None:
    ours, theirs = Anatomy(model), Anatomy(other)
    for said, one, two in (
        ("architecture", ours.architecture, theirs.architecture),
        ("number of layers", ours.n_layers, theirs.n_layers),
        ("width", ours.d_model, theirs.d_model),
    ):
        if one != two:
            raise UserError(f"The other model has another {said}, {two} and not {one}; give a fine-tune of the model.")
    if token_ids(tokenizer_of(model), prompts) != token_ids(tokenizer_of(other), prompts):
        raise UserError("The other model's tokenizer gives other tokens; give a fine-tune that kept the tokenizer.")
