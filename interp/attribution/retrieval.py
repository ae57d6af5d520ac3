"""Find retrieval heads: those that look at the token of the prompt that comes next in the answer.

Wu et al. 2024 (arXiv 2404.15574). A head's score on a prompt is the share of the context answer's tokens at which it
looks at that very token, in the prompt, more than at any other while it is predicted. The answer is written after the
prompt, so that the score does not depend on what the model would say.
"""

from __future__ import annotations

import torch
from torch import nn

from interp.attention import answer_attention
from interp.attribution.scores import HeadScores
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.teacher_forcing import continued

RETRIEVAL_VERSION = 1
"""Version of the scores: raise it when the same prompts would have others."""


def retrieval_scores(model: nn.Module, conflicts: ConflictSet, *, name: str, progress: str | None = None) -> HeadScores:
    """Score every head by how often it looks at the token of the prompt that comes next, 0 to 1.

    Args:
        model: The model, or a bridge around it, whose attention keeps its weights.
        conflicts: Prompts with a context; those that do not hold the tokens of their context's answer are left out.
        name: Name of the model, for the record.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If no prompt holds its answer, or the model keeps no attention weights.
    """
    asked = [e for e in conflicts if e.context_answers]
    items = [continued(model, e.prompt, e.context_answers[0]) for e in asked]
    held = [i for i, item in enumerate(items) if set(item.answer) <= set(item.tokens[: -item.predicted])]
    if not held:
        raise UserError("No prompt holds the tokens of what its context answers; give prompts with a context.")
    chosen = [items[i] for i in held]
    values: dict[int, torch.Tensor] = {}
    for number, weights in answer_attention(model, chosen, progress=progress):
        item = chosen[number]
        looked_at = torch.tensor(item.tokens)[weights.argmax(-1)]
        in_prompt = weights.argmax(-1) < len(item.tokens) - item.predicted
        is_next = (looked_at == torch.tensor(item.answer)) & in_prompt
        values[number] = is_next.float().mean(-1)
    return HeadScores.of(
        torch.stack([values[number] for number in range(len(chosen))]),
        [asked[i] for i in held],
        conflicts,
        method="retrieval",
        metric="retrieval",
        model=name,
        settings={"unit": "share of the answer's tokens", "signed": False},
    )
