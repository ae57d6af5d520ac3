"""Path patching of plain transformers models the plain way: a full forward pass for each head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.anatomy import Anatomy


def difference(logits: Tensor, answers: Tensor) -> Tensor:
    """Logit of the first answer minus that of the second at the last token, ``(n,)``."""
    first, second = logits[:, -1].gather(1, answers).unbind(1)
    return first - second


@torch.inference_mode()
def effects(
    model: Any, inputs: dict[str, Tensor], answers: Tensor, replacement: Tensor, heads: Sequence[tuple[int, int]]
) -> Tensor:
    """By how much each head's replacement at the last token lowers the difference, all others frozen: ``(n, n_heads)``.

    Args:
        model: A transformers model.
        inputs: What it is given.
        answers: Token ids, ``(n, 2)``.
        replacement: ``(n, n_layers, n_heads, d_head)``.
        heads: ``(layer, head)``.
    """
    anatomy = Anatomy(model)
    projections = [anatomy.module("output_projection", layer) for layer in range(anatomy.n_layers)]
    own: list[Any] = [None] * len(projections)

    def keep(layer: int) -> Any:
        return lambda _, given: own.__setitem__(layer, given[0].clone())

    def passed(hooks: list[Any]) -> Tensor:
        handles = [module.register_forward_pre_hook(hook) for module, hook in zip(projections, hooks, strict=True)]
        try:
            return difference(model(**inputs, use_cache=False).logits, answers)
        finally:
            for handle in handles:
                handle.remove()

    clean = passed([keep(layer) for layer in range(len(projections))])

    def patched(layer: int, head: int) -> Tensor:
        z = [values.clone() for values in own]
        columns = slice(head * anatomy.d_head, (head + 1) * anatomy.d_head)
        z[layer][:, -1, columns] = replacement[:, layer, head]
        return passed([lambda _, given, at=at: (z[at], *given[1:]) for at in range(len(projections))])

    return torch.stack([clean - patched(*head) for head in heads], 1)
