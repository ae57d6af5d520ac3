"""Measure what an answer gains where a head writes more, or less, at the end of the prompt.

JuICE (Li et al. 2025, arXiv 2503.10996) scores heads so: the change of the probability of an answer's first token when
a head's output is scaled by 1 + factor, averaged over factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.inputs import batch_tokens_of
from interp.progress import counted
from interp.reading import ReadPrompts

HEAD_GAINS_VERSION = 1
"""Version of the gains: raise it when the same prompts would have others."""


def head_gains(
    model: nn.Module,
    prompts: Sequence[str],
    token_ids: Sequence[int],
    factors: Sequence[float],
    *,
    progress: str | None = None,
) -> Tensor:
    """Change of the next token's probability when a head writes ``1 + factor`` times as much at the prompt's end.

    Every head and factor costs one token a prompt from its layer up: the rest is read once, where it fits into memory.

    Args:
        model: The model, or a bridge around it, unedited.
        prompts: Full prompts.
        token_ids: The token whose probability is meant, of each prompt.
        factors: The gains are averaged over these.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        ``(n_prompts, n_layers, n_heads)`` float32 on the CPU.

    Raises:
        UserError: If a prompt has no tokens, or more than the model has positions.
    """
    anatomy, read = Anatomy(model), ReadPrompts(model, prompts)
    gains = torch.zeros(len(prompts), anatomy.n_layers, anatomy.n_heads)
    scales = _scales(anatomy.n_heads, factors).to(anatomy.device)
    with counted(progress, len(read.batches) * anatomy.n_layers) as advance:
        for batch, rows in enumerate(read.batches):
            wanted = torch.tensor([token_ids[i] for i in rows], device=anatomy.device)
            logits, given = read.ends(batch)
            before = _probabilities(logits, wanted)
            at_once = max(1, batch_tokens_of(model) // read.padded_tokens(batch))
            for layer in range(anatomy.n_layers):
                after = torch.cat(
                    [_scaled(read, batch, given, anatomy, layer, some, wanted) for some in scales.split(at_once)], dim=1
                )
                by_head = (after - before[:, None]).view(len(rows), anatomy.n_heads, len(factors))
                gains[rows, layer] = by_head.mean(-1).float().cpu()
                advance(1)
    return gains


def _scales(n_heads: int, factors: Sequence[float]) -> Tensor:
    """What each head's output is scaled by where one of them is scaled, ``(n_heads * n_factors, n_heads)``."""
    moved = torch.eye(n_heads).repeat_interleave(len(factors), 0)
    return 1 + moved * torch.tensor(list(factors)).repeat(n_heads)[:, None]


def _scaled(
    read: ReadPrompts,
    batch: int,
    given: Mapping[int, Any],
    anatomy: Anatomy,
    layer: int,
    scales: Tensor,
    wanted: Tensor,
) -> Tensor:
    """Probabilities of the wanted tokens with a layer's heads scaled in each of these ways, ``(n, n_ways)``."""
    ways = len(scales)

    def scale(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The z of all heads, scaled at the last token, which no padding follows."""
        z = inputs[0].clone()
        by_head = z[:, -1].unflatten(-1, (anatomy.n_heads, anatomy.d_head))
        z[:, -1] = (by_head * scales.to(z).repeat(len(wanted), 1)[:, :, None]).flatten(1)
        return (z, *inputs[1:])

    handle = anatomy.module("output_projection", layer).register_forward_pre_hook(scale)
    try:
        logits = read.repeated_logits(batch, given, layer, ways)
    finally:
        handle.remove()
    return _probabilities(logits, wanted.repeat_interleave(ways)).view(len(wanted), ways)


def _probabilities(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of each row's wanted token, ``(n,)``."""
    return logits.float().softmax(-1).gather(1, wanted[:, None].to(logits.device))[:, 0]
