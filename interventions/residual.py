"""Edit the residual stream after blocks, at chosen tokens: what steering and feature editing share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from interventions.base import Patch
from interventions.tokens import Tokens, TokenTracker


def residual_patches(changes: Mapping[int, Callable[[Tensor], Tensor]], tokens: Tokens) -> list[Patch]:
    """Patches that add to the residual stream after some blocks.

    Args:
        changes: For each layer, what to add: from ``(n_tokens, d_model)`` to the same shape, on the same device.
        tokens: The tokens that are edited.
    """
    tracker = TokenTracker(tokens)
    return [Patch("block", layer, _at_tokens(tracker, changes[layer]), tracker) for layer in sorted(changes)]


def _at_tokens(tracker: TokenTracker, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def edit(residual: Tensor) -> Tensor:
        mask = tracker.mask(residual.device)
        if mask is None:
            return residual
        chosen = residual[mask]
        edited = residual.clone()
        edited[mask] = chosen + change(chosen).to(chosen.dtype)
        return edited

    return edit
