"""Edit the residual stream after blocks, at chosen tokens: what steering and feature editing share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from interp.anatomy import Anatomy
from interventions.base import Handle
from interventions.tokens import Tokens, TokenTracker


def attach_residual_edits(
    model: nn.Module, changes: Mapping[int, Callable[[Tensor], Tensor]], tokens: Tokens
) -> Handle:
    """Add to the residual stream after some blocks, in every forward pass until the handle is removed.

    Args:
        model: A transformers model or a ``TransformerBridge``.
        changes: For each layer, what to add: from ``(n_tokens, d_model)`` to the same shape, on the same device.
        tokens: The tokens that are edited.

    Raises:
        UserError: If the model has no such layer.
    """
    anatomy = Anatomy(model)
    blocks = {layer: anatomy.module("block", layer) for layer in sorted(changes)}
    if not blocks:
        return Handle([])
    tracker = TokenTracker(tokens)
    handles = [tracker.attach(model)]
    handles += [block.register_forward_hook(_edit(tracker, changes[layer])) for layer, block in blocks.items()]
    return Handle(handles)


def _edit(tracker: TokenTracker, change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        residual: Tensor = output[0] if isinstance(output, tuple) else output
        mask = tracker.mask(residual.device)
        if mask is None:
            return output
        chosen = residual[mask]
        edited = residual.clone()
        edited[mask] = chosen + change(chosen).to(chosen.dtype)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook
