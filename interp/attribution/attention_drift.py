"""Find the heads that look elsewhere when the context contradicts memory.

FocalLoRA's conflict attention drift (arXiv 2509.23188). With n and c a head's attention at the prompt's last token,
with a context that agrees and with one that contradicts, padded to the same length:

    M = mean abs(n - c)     D = 1 - cos(n, c)     G = KL(n || c) + KL(c || n)
    S = 0.4 M + 0.3 D + 0.3 G

where M, D and G are scaled to 0 to 1 over the heads of each prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, pad

from interp.attention import answer_attention
from interp.attribution.scores import HeadScores
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.teacher_forcing import continued

_WEIGHTS = (0.4, 0.3, 0.3)
# KL is infinite where one of the two does not look at all; smaller differences are rounding.
_LEAST = 1e-9


def attention_drift(model: nn.Module, conflicts: ConflictSet, *, name: str, progress: str | None = None) -> HeadScores:
    """Score every head by how far its attention moves with a contradiction, 0 to 1.

    Args:
        model: The model, or a bridge around it, whose attention keeps its weights.
        conflicts: Conflict prompts, each with the prompt of kind ``aligned`` of the same subject, relation and
            phrasing; others are left out.
        name: Name of the model, for the record.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If there is no such pair, or the model keeps no attention weights.
    """
    agreeing = {(e.subject, e.relation, e.template): e for e in conflicts.select(kind="aligned")}
    pairs = [
        (example, agreeing[key])
        for example in conflicts.select(kind="conflict")
        if (key := (example.subject, example.relation, example.template)) in agreeing
    ]
    if not pairs:
        raise UserError(
            "No conflict prompt comes with one whose context agrees; give both for the same subjects and phrasings."
        )
    # Whatever follows is not looked at: the last token of the prompt predicts it.
    items = [continued(model, e.prompt, e.memory_answers[0]) for pair in pairs for e in pair]
    rows: dict[int, Tensor] = {}
    for number, weights in answer_attention(model, items, progress=progress):
        rows[number] = weights[:, :, 0, : len(items[number].tokens) - items[number].predicted]
    values = [drift(rows[2 * i + 1], rows[2 * i]) for i in range(len(pairs))]
    return HeadScores.of(
        torch.stack(values),
        [example for example, _ in pairs],
        conflicts.select(kind="conflict"),
        method="attention_drift",
        metric="drift",
        model=name,
        settings={"unit": "drift of attention, 0 to 1 over heads", "signed": False},
    )


def drift(without: Tensor, with_conflict: Tensor) -> Tensor:
    """How far heads' attention moves, from rows ``(n_layers, n_heads, n_tokens)`` of any two lengths."""
    length = max(without.shape[-1], with_conflict.shape[-1])
    n, c = (pad(rows.double(), (0, length - rows.shape[-1])) for rows in (without, with_conflict))
    log_n, log_c = n.clamp(min=_LEAST).log(), c.clamp(min=_LEAST).log()
    parts = (
        (n - c).abs().mean(-1),
        1 - cosine_similarity(n, c, dim=-1),
        ((n - c) * (log_n - log_c)).sum(-1),
    )
    return torch.stack([weight * _scaled(part) for weight, part in zip(_WEIGHTS, parts, strict=True)]).sum(0).float()


def _scaled(values: Tensor) -> Tensor:
    """Moved and scaled to 0 to 1 over all heads; 0 where all are the same."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high - low > _LEAST else torch.zeros_like(values)
