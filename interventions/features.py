"""SpARE: edit the features of sparse autoencoders (Zhao et al. 2024, arXiv 2410.15999).

With z the features of the residual stream h after a block, t the features' mean activations where the model followed
the source that they stand for, and dec the decoder without its bias:

    removed features    z- = min(z, alpha t)
    added features      z+ = max(alpha t - z, 0)
    h' = h - dec(z-) + dec(z+)                                   alpha_form "targets", the published code
    h' = h + alpha (-dec(min(z, t)) + dec(max(t - z, 0)))        alpha_form "change", the paper's equation 4

To steer towards the context the features of memory are removed and those of the context added; the other way round
for memory. h is never replaced by its reconstruction: what the autoencoder cannot tell stays as it is. Several layers
are edited in one pass, each on what the edits below made of it. ``probes.feature_selection`` selects the features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from interp.errors import UserError
from interp.sae import SparseAutoencoder
from interventions.base import Handle, Patch, attach_patches
from interventions.residual import residual_patches
from interventions.tokens import TOKENS, Tokens

AlphaForm = Literal["targets", "change"]
ALPHA_FORMS: tuple[AlphaForm, ...] = get_args(AlphaForm)


@dataclass(frozen=True, eq=False)
class EditedFeatures:
    """Features of one autoencoder and what becomes of them.

    Attributes:
        sae: The autoencoder, with these features only (``SparseAutoencoder.restricted``).
        targets: Their mean activations with the source that they stand for, ``(n_features,)``.
        added: Whether each is added (else it is removed), boolean ``(n_features,)``.
    """

    sae: SparseAutoencoder
    targets: Tensor
    added: Tensor

    def __post_init__(self) -> None:
        if not self.targets.shape == self.added.shape == (self.sae.d_sae,):
            raise UserError(
                f"The edit of layer {self.sae.layer} has {self.sae.d_sae} features, targets of shape "
                f"{tuple(self.targets.shape)} and marks of what is added of shape {tuple(self.added.shape)}; give one "
                "of each for each feature."
            )
        if not self.targets.isfinite().all():
            raise UserError(f"The targets of layer {self.sae.layer} hold NaN or infinity; fit the edit again.")

    @classmethod
    def of(
        cls,
        sae: SparseAutoencoder,
        removed: Sequence[int],
        removed_targets: Tensor,
        added: Sequence[int],
        added_targets: Tensor,
    ) -> EditedFeatures:
        """Remove some features of ``sae`` and add others, with their targets in the same order.

        Raises:
            UserError: If there is no such feature, or one is given twice.
        """
        features = [*removed, *added]
        if len(set(features)) < len(features):
            raise UserError("A feature is given twice among those to remove and to add; give each once.")
        return cls(
            sae.restricted(features),
            torch.cat([removed_targets, added_targets]).float(),
            torch.arange(len(features)) >= len(removed),
        )

    def change(self, residual: Tensor, alpha: float, form: AlphaForm) -> Tensor:
        """What the edit adds to residual streams: ``(..., d_in)`` -> ``(..., d_in)``, in the weights' dtype."""
        z = self.sae.encode(residual)
        target = (self.targets * alpha if form == "targets" else self.targets).to(z)
        difference = torch.where(self.added.to(z.device), (target - z).clamp(min=0), -torch.minimum(z, target))
        written = self.sae.decoded_change(difference, residual)
        return written if form == "targets" else alpha * written

    def to(self, device: torch.device) -> EditedFeatures:
        """The same on another device."""
        return replace(self, sae=self.sae.to(device), targets=self.targets.to(device), added=self.added.to(device))


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """Edits features of one or several layers. Immutable; attach it as often as you like.

    Attributes:
        layers: What happens in each layer; each layer at most once.
        alpha: How far; with features that are never negative (all but ``abstopk``) 0 changes nothing.
        alpha_form: What alpha multiplies: see the module.
        tokens: The tokens whose features are edited; published is ``last_prompt``.

    Raises:
        UserError: If a layer occurs twice, alpha is not finite, or a choice does not exist.
    """

    layers: tuple[EditedFeatures, ...]
    alpha: float = 1.0
    alpha_form: AlphaForm = "targets"
    tokens: Tokens = "last_prompt"

    def __post_init__(self) -> None:
        numbers = [edit.sae.layer for edit in self.layers]
        if (twice := next((layer for layer, count in Counter(numbers).items() if count > 1), None)) is not None:
            raise UserError(f"Layer {twice} is edited twice; give each layer once.")
        if not math.isfinite(self.alpha):
            raise UserError(f"alpha must be a finite number, not {self.alpha}.")
        if self.alpha_form not in ALPHA_FORMS:
            raise UserError(f"There is no form of alpha {self.alpha_form!r}; choose among {', '.join(ALPHA_FORMS)}.")
        if self.tokens not in TOKENS:
            raise UserError(f"There is no choice of tokens {self.tokens!r}; choose among {', '.join(TOKENS)}.")

    @property
    def edited_layers(self) -> set[int]:
        """The layers that it changes."""
        return {edit.sae.layer for edit in self.layers if edit.sae.d_sae}

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model has no such layer, or is of another width.
        """
        for edit in self.layers:
            edit.sae.check(model)
        changes = {edit.sae.layer: self._change(edit) for edit in self.layers if edit.sae.d_sae}
        return residual_patches(changes, self.tokens)

    def attach(self, model: nn.Module) -> Handle:
        """Apply to a transformers model or a ``TransformerBridge`` until the handle is removed.

        Raises:
            UserError: As ``patches``.
        """
        return attach_patches(model, self.patches(model))

    def _change(self, edit: EditedFeatures) -> Callable[[Tensor], Tensor]:
        @cache
        def fitted(device: torch.device) -> EditedFeatures:
            return edit.to(device)

        return lambda residual: fitted(residual.device).change(residual, self.alpha, self.alpha_form)

    def __len__(self) -> int:
        return sum(edit.sae.d_sae for edit in self.layers)
