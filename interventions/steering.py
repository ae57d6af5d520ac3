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
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interventions.base import Handle, Patch, Placed, attach_patches
from interventions.residual import residual_patches
from interventions.tokens import TOKENS, Tokens

SteeringMode = Literal["add", "replace"]


@dataclass(frozen=True, eq=False)
class Steering:
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

    def attach(self, model: nn.Module) -> Handle:
        """Apply to a transformers model or a ``TransformerBridge`` until the handle is removed.

        Raises:
            UserError: As ``patches``.
        """
        return attach_patches(model, self.patches(model))
