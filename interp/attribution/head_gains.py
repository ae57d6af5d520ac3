"""Measure what an answer gains where a head writes more, or less, at the end of the prompt.

JuICE (Li et al. 2025, arXiv 2503.10996) scores heads so: the change of the probability of an answer's first token when
a head's output is scaled by 1 + factor, averaged over factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.generation import gathered_logits
from interp.progress import tracked
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

    Every head and factor costs one token a prompt: what comes before is read once, where it fits into memory.

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
    anatomy = Anatomy(model)
    read = ReadPrompts(model, prompts)
    tokens = torch.tensor(list(token_ids), device=anatomy.device)[:, None]

    def probabilities() -> Tensor:
        logits = gathered_logits(read.next_logits("end"), len(prompts))
        return logits.softmax(-1).gather(1, tokens.to(logits.device))[:, 0].cpu()

    before = probabilities()
    gains = torch.zeros(len(prompts), anatomy.n_layers, anatomy.n_heads)
    for layer, head in tracked(anatomy.heads, progress):
        for factor in factors:
            hook = partial(_scaled, slice(head * anatomy.d_head, (head + 1) * anatomy.d_head), 1 + factor)
            handle = anatomy.module("output_projection", layer).register_forward_pre_hook(hook)
            try:
                gains[:, layer, head] += (probabilities() - before) / len(factors)
            finally:
                handle.remove()
    return gains


def _scaled(head: slice, scale: float, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The z of all heads, of which one is scaled at the last token, which no padding follows."""
    z = inputs[0].clone()
    z[:, -1, head] *= scale
    return (z, *inputs[1:])
