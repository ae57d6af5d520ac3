"""Find the features of a sparse autoencoder that two conditions, or two models, differ in most.

Model diffing with SAEs (Wang et al. 2025, arXiv 2506.19823, who find the features of a persona so): the same prompts
are read twice, by a model and by a fine-tune of it, or with a context and without one. Features are ordered by the
change of their mean activation; the first ones, moved to what they are on the other side, are an edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from interp.activations import record
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.sae import SparseAutoencoder
from interp.statistics import bootstrap_means
from interventions.features import EditedFeatures

_ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class FeatureDifferences:
    """How the features of one autoencoder differ between two sides, over the same prompts.

    Attributes:
        sae: The autoencoder.
        one: Activations on one side, ``(n_prompts, n_features)``, on the CPU.
        other: The same on the other.
        subjects: The prompts' subjects, the clusters of the intervals.
    """

    sae: SparseAutoencoder
    one: Tensor
    other: Tensor
    subjects: tuple[str, ...]

    @classmethod
    def of(cls, sae: SparseAutoencoder, one: Tensor, other: Tensor, subjects: Sequence[str]) -> FeatureDifferences:
        """Encode the residual streams of the same prompts on both sides.

        Args:
            sae: The autoencoder.
            one: Residual streams after its layer, ``(n_prompts, d_model)``.
            other: The same on the other side.
            subjects: The prompts' subjects.

        Raises:
            UserError: If there is no prompt, or the sides differ in their number.
        """
        if not len(one) or not len(one) == len(other) == len(subjects):
            raise UserError(f"Both sides need the same prompts, at least one; they have {len(one)} and {len(other)}.")
        ours, theirs = (
            torch.cat([sae.encode(part).cpu() for part in states.split(_ROWS_AT_ONCE)]) for states in (one, other)
        )
        return cls(sae, ours, theirs, tuple(subjects))

    @property
    def difference(self) -> Tensor:
        """Mean activation on the other side less that on the one, ``(n_features,)``."""
        return (self.other.double() - self.one.double()).mean(0)

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
        one, other = self.one[:, chosen].double(), self.other[:, chosen].double()
        means = bootstrap_means((other - one).numpy(), self.subjects)
        low, high = np.quantile(means, [0.025, 0.975], axis=0) if chosen else (np.empty(0), np.empty(0))
        return pl.DataFrame(
            {
                "layer": pl.Series([self.sae.layer] * len(chosen), dtype=pl.Int64),
                "feature": pl.Series(chosen, dtype=pl.Int64),
                "one": one.mean(0).numpy(),
                "other": other.mean(0).numpy(),
                "difference": (other - one).mean(0).numpy(),
                "low": low,
                "high": high,
                "fires_one": (one != 0).double().mean(0).numpy(),
                "fires_other": (other != 0).double().mean(0).numpy(),
            }
        )

    def edit(self, count: int) -> EditedFeatures:
        """Move the features that differ most to their means on the other side: down by the difference, or up to it.

        Raises:
            UserError: If no feature differs.
        """
        chosen = torch.tensor(self.first(count), dtype=torch.long)
        if not len(chosen):
            raise UserError(f"No feature of the SAE {self.sae.name} differs between the two sides; there is no edit.")
        removed, added = (chosen[(self.difference[chosen] > 0) == rises] for rises in (False, True))
        fall, mean = -self.difference[removed], self.other.double().mean(0)[added]
        return EditedFeatures.of(self.sae, removed.tolist(), fall, added.tolist(), mean)


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
        other: The other side, a model of the same shape; ``None`` compares prompts without and with their context.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        For each autoencoder how its features differ at the prompts' last token.

    Raises:
        UserError: If there is no prompt, or an autoencoder does not fit the other model.
    """
    examples = list(conflicts) if other is not None else [e for e in conflicts if e.bare_prompt]
    if not examples:
        raise UserError("There is no prompt to compare; give conflict prompts that are known without their context.")
    sites = list(dict.fromkeys(sae.site for sae in saes))
    whole = [example.prompt for example in examples]
    if other is None:
        one = record(model, [example.bare_prompt for example in examples], sites, progress=progress)
        two = record(model, whole, sites, progress=progress)
    else:
        for sae in saes:
            # It was trained on the one side, and need not have seen the other.
            replace(sae, card={}).check(other, "the other model")
        one, two = (record(side, whole, sites, progress=progress) for side in (model, other))
    subjects = [example.subject for example in examples]
    return [FeatureDifferences.of(sae, one[sae.site], two[sae.site], subjects) for sae in saes]
