"""Steering: push the residual stream along a direction, or replace it.

    add        h' = h + strength * vector
    replace    h' = h + strength * (vector - h)

These are the baselines of feature editing. Activation addition (Turner et al. 2023, arXiv 2308.10248) adds the
difference of mean activations to the prompt's last token, contrastive activation addition (CAA; Rimsky et al. 2023,
2312.06681) to every token that predicts an answer; a probe's direction is added likewise. A task vector (Hendel et al.
2023, 2310.15916) replaces the last token's activation by a mean one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy, Blueprint
from interp.errors import UserError
from interventions.base import Entry, Intervention, Patch, Place, Placed, finite_strength
from interventions.fields import Factor, TensorName, check_width, named_tensor
from interventions.folding import Folding
from interventions.identity import Layer, ModelIdentity
from interventions.residual import residual_patches
from interventions.tokens import TOKENS, Tokens

SteeringMode = Literal["add", "replace"]


@dataclass(frozen=True, eq=False)
class Steering(Intervention):
    """Adds a vector to the residual stream after one block, or puts it there. Immutable.

    Attributes:
        layer: The block.
        vector: ``(d_model,)``.
        strength: Factor on what is added; with ``replace`` the share that is replaced, 1 being all.
        tokens: The tokens it acts on; see ``TokenTracker``.
        mode: ``add`` or ``replace``.

    Raises:
        UserError: If vector or strength are not finite, or a choice does not exist.
    """

    layer: int
    vector: Tensor
    strength: float = 1.0
    tokens: Tokens = "last_prompt"
    mode: SteeringMode = "add"

    def __post_init__(self) -> None:
        if self.vector.ndim != 1 or not self.vector.isfinite().all():
            raise UserError(
                f"A steering vector is a row of finite numbers, not of shape {tuple(self.vector.shape)}; fit it again."
            )
        if not math.isfinite(self.strength):
            raise UserError(f"The strength of steering must be a finite number, not {self.strength}.")
        if self.tokens not in TOKENS:
            raise UserError(f"There is no choice of tokens {self.tokens!r}; choose among {', '.join(TOKENS)}.")
        if self.mode not in ("add", "replace"):
            raise UserError(f"Steering adds or replaces, it cannot {self.mode!r}; choose add or replace.")

    @property
    def edited_layers(self) -> set[int]:
        """The layers that it changes."""
        return {self.layer}

    @property
    def n_moved(self) -> int:
        """1, or 0 without strength or direction."""
        return len(self.settled())

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model has no such layer, or is of another width.
        """
        anatomy = Anatomy(model)
        if len(self.vector) != anatomy.d_model:
            raise UserError(
                f"The steering vector has {len(self.vector)} numbers, but the residual stream of this model has "
                f"{anatomy.d_model}; fit it on this model."
            )

        placed = Placed(self.vector)

        def change(residual: Tensor) -> Tensor:
            vector = placed.on(residual.device, torch.float32)
            return self.strength * (vector - residual.float() if self.mode == "replace" else vector.expand_as(residual))

        return residual_patches({anatomy.checked_layer(self.layer): change}, self.tokens)

    def scaled(self, strength: float) -> Steering:
        """The same with its strength multiplied."""
        return replace(self, strength=self.strength * finite_strength(strength))

    def settled(self) -> tuple[Steering, ...]:
        """Itself, unless it adds nothing."""
        is_idle = self.strength == 0 or (self.mode == "add" and not self.vector.any())
        return () if is_idle else (self,)

    def described(self) -> Iterator[str]:
        """Where it acts, and how."""
        yield f"direction after layer {self.layer} ({self.mode}, strength {self.strength:g}, {self.tokens} tokens)"

    def entry(self, name: str, tensors: dict[str, Tensor]) -> SteeringEntry:
        """Its part of the intervention file, whose vector is put into ``tensors``."""
        tensors[f"{name}.vector"] = self.vector.float()
        return SteeringEntry(
            layer=self.layer, vector=f"{name}.vector", strength=self.strength, tokens=self.tokens, mode=self.mode
        )

    def folded(self) -> Folding:
        """What it adds to the bias of the MLP's last map.

        Raises:
            UserError: If it does not add the same at every token.
        """
        if (self.tokens, self.mode) != ("all", "add"):
            return super().folded()
        return Folding(directions={self.layer: self.strength * self.vector.float()})


class SteeringEntry(Entry):
    """A ``Steering``; ``vector`` is the name of its tensor."""

    kind: Literal["steering"] = "steering"
    layer: Layer
    vector: TensorName
    strength: Factor
    tokens: Tokens
    mode: SteeringMode

    def build(self, tensors: Mapping[str, Tensor]) -> Steering:
        """The intervention that this entry describes."""
        return Steering(self.layer, named_tensor(tensors, self.vector), self.strength, self.tokens, self.mode)

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it changes."""
        return [Place("block", self.layer)]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that its vector is as wide as the model."""
        check_width("the steering vector", named_tensor(tensors, self.vector), model.d_model)
