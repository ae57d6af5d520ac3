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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from interp.anatomy import Blueprint
from interp.errors import UserError
from interp.sae import SEPARATE, WEIGHT_NAMES, Architecture, Normalization, SparseAutoencoder
from interventions.base import Entry, Intervention, Patch, Place, finite_strength
from interventions.fields import Factor, Feature, TensorName, check_width, named_tensor
from interventions.identity import Count, Layer, ModelIdentity, Strict
from interventions.residual import residual_patches
from interventions.tokens import TOKENS, Tokens

AlphaForm = Literal["targets", "change"]
ALPHA_FORMS: tuple[AlphaForm, ...] = get_args(AlphaForm)

_SAE_SETTINGS = (
    "layer",
    "architecture",
    "normalization",
    "subtracts_b_dec",
    "k",
    "residual_threshold",
    "max_iterations",
    "stop_on_duplicate_support",
)


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

    def entry(self, name: str, tensors: dict[str, Tensor]) -> EditedFeaturesEntry:
        """Its part of the intervention file; its tensors are put into ``tensors``, named from ``name`` on."""
        features = list(self.sae.kept or range(self.sae.d_sae))
        order = [*(~self.added).nonzero().flatten().tolist(), *self.added.nonzero().flatten().tolist()]
        sorted_sae = self.sae.restricted(order)
        tensors[f"{name}.targets"] = self.targets[order].float()
        weights = {key: f"{name}.{key}" for key in sorted_sae.weights}
        tensors |= {weights[key]: values for key, values in sorted_sae.weights.items()}
        removed = len(order) - int(self.added.sum())
        return EditedFeaturesEntry(
            **{setting: getattr(self.sae, setting) for setting in _SAE_SETTINGS},
            removed=[features[i] for i in order[:removed]],
            added=[features[i] for i in order[removed:]],
            targets=f"{name}.targets",
            weights=weights,
        )


@dataclass(frozen=True, eq=False)
class FeatureEdit(Intervention):
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

    @property
    def n_moved(self) -> int:
        """How many features it removes and adds."""
        is_idle = self.alpha == 0 and self.alpha_form == "change"
        return 0 if is_idle else sum(edit.sae.d_sae for edit in self.layers)

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model has no such layer, or is of another width.
        """
        for edit in self.layers:
            edit.sae.check(model)
        changes = {edit.sae.layer: self._change(edit) for edit in self.layers if edit.sae.d_sae}
        return residual_patches(changes, self.tokens)

    def scaled(self, strength: float) -> FeatureEdit:
        """The same with alpha multiplied.

        Raises:
            UserError: If the strength is below 0: features cannot fire less than not at all.
        """
        if finite_strength(strength) < 0:
            raise UserError("An edit of features has no opposite; give a strength of 0 or more.")
        return replace(self, alpha=self.alpha * strength)

    def settled(self) -> tuple[FeatureEdit, ...]:
        """Itself, unless it edits no feature, or as far as 0."""
        return (self,) if self.n_moved else ()

    def described(self) -> Iterator[str]:
        """How many features it edits, and where."""
        count = sum(edit.sae.d_sae for edit in self.layers)
        layers = ", ".join(str(edit.sae.layer) for edit in self.layers)
        yield f"{count} features of layers {layers} (alpha {self.alpha:g}, {self.tokens} tokens)"

    def entry(self, name: str, tensors: dict[str, Tensor]) -> FeatureEditEntry:
        """Its part of the intervention file, whose autoencoders and targets are put into ``tensors``."""
        layers = [edit.entry(f"{name}.{edit.sae.layer}", tensors) for edit in self.layers]
        return FeatureEditEntry(alpha=self.alpha, alpha_form=self.alpha_form, tokens=self.tokens, layers=layers)

    def _change(self, edit: EditedFeatures) -> Callable[[Tensor], Tensor]:
        @cache
        def fitted(device: torch.device) -> EditedFeatures:
            return edit.to(device)

        return lambda residual: fitted(residual.device).change(residual, self.alpha, self.alpha_form)


class EditedFeaturesEntry(Strict):
    """An ``EditedFeatures``; ``weights`` maps the names of its weights to those of their tensors.

    The tensor ``targets`` holds the targets of the removed features first, then those of the added ones.
    """

    layer: Layer
    architecture: Architecture
    normalization: Normalization
    subtracts_b_dec: bool
    k: Count | None
    residual_threshold: Annotated[float, Field(ge=-1e9, le=1e9)]
    max_iterations: Annotated[int, Field(ge=1, le=10_000)] | None
    stop_on_duplicate_support: bool
    removed: list[Feature]
    added: list[Feature]
    targets: TensorName
    weights: Annotated[dict[str, TensorName], Field(max_length=20)]

    def build(self, tensors: Mapping[str, Tensor]) -> EditedFeatures:
        """The edit that this entry describes."""
        features = (*self.removed, *self.added)
        sae = SparseAutoencoder(
            **{name: getattr(self, name) for name in _SAE_SETTINGS},
            weights={key: named_tensor(tensors, name) for key, name in self.weights.items()},
            kept=features,
            name=f"of layer {self.layer}",
        )
        if len(set(features)) < len(features):
            raise UserError(f"Layer {self.layer} has a feature twice among those to remove and to add; give each once.")
        # Where each feature is computed by itself the others are not there: then numbers of features are but names.
        d_sae = sae.weights["W_enc"].shape[-1]
        if self.architecture not in SEPARATE and (outside := [i for i in features if i >= d_sae]):
            raise UserError(f"The SAE {sae.name} has no feature {outside[0]}; its features are 0 to {d_sae - 1}.")
        added = torch.arange(len(features)) >= len(self.removed)
        return EditedFeatures(sae, named_tensor(tensors, self.targets), added)

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that its weights are those of such an autoencoder, and as wide as the model."""
        weights = {key: named_tensor(tensors, name) for key, name in self.weights.items()}
        if unknown := sorted(weights.keys() - {"W_dec", "b_dec", *WEIGHT_NAMES[self.architecture]}):
            raise UserError(f"a {self.architecture} autoencoder has no weights {unknown[0][:40]!r}")
        if len(dtypes := {str(values.dtype) for values in weights.values()}) > 1:
            raise UserError(f"the weights of one autoencoder are of the dtypes {' and '.join(sorted(dtypes))}")
        if "b_dec" in weights:
            check_width("the autoencoder", weights["b_dec"], model.d_model)


class FeatureEditEntry(Entry):
    """A ``FeatureEdit``."""

    kind: Literal["feature_edit"] = "feature_edit"
    alpha: Factor
    alpha_form: AlphaForm
    tokens: Tokens
    layers: Annotated[list[EditedFeaturesEntry], Field(min_length=1)]

    def build(self, tensors: Mapping[str, Tensor]) -> FeatureEdit:
        """The intervention that this entry describes."""
        layers = tuple(layer.build(tensors) for layer in self.layers)
        return FeatureEdit(layers, self.alpha, self.alpha_form, self.tokens)

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it changes."""
        return [Place("block", layer.layer) for layer in self.layers]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that its autoencoders fit the model."""
        for layer in self.layers:
            layer.check(model, tensors)
