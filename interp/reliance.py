"""Say which words of an answer come from the context: what it adds to each token's probability.

For each token of a greedy answer, with the same tokens forced after the prompt and after the bare prompt:

    gain        log p(token | with the context) - log p(token | without), nats: pointwise mutual information;
                its mean over answers is P-CXMI (Fernandes et al. 2023, arXiv 2109.07446)
    divergence  KL of the whole next-token distributions, with || without, nats
"""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch import nn

from interp.anatomy import Anatomy
from interp.answers import is_complete
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.generation import generated
from interp.inputs import prompt_batches, token_ids, tokenizer_of
from interp.progress import tracked
from interp.teacher_forcing import Continued, item_residuals

_BATCH_SIZE = 32


def token_reliance(
    model: nn.Module, conflicts: ConflictSet, *, max_new_tokens: int = 24, progress: str | None = None
) -> pl.DataFrame:
    """Measure every token of every greedy answer with the context against the same token without.

    Args:
        model: The model, or a bridge around it; interventions that are applied to it are seen.
        conflicts: The prompts; those without a context, or without a bare prompt, are left out.
        max_new_tokens: Longest answer, in tokens; it ends with its first sentence.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        A row a token: ``id, subject, kind, template``, ``position`` (from 0), ``token``, ``log_p`` and
        ``log_p_without`` (nats), ``gain`` and ``divergence``.

    Raises:
        UserError: If there is nothing to measure.
    """
    examples = [e for e in conflicts if e.contexts and e.bare_prompt]
    if not examples:
        raise UserError(f"{conflicts.name} has no prompt with a context that can be asked without it; give other data.")
    tokenizer = tokenizer_of(model)
    prompts = [e.prompt for e in examples]
    before, bare = token_ids(tokenizer, prompts), token_ids(tokenizer, [e.bare_prompt for e in examples])
    answers: list[list[int]] = [[] for _ in examples]
    network: Any = Anatomy(model).model
    ends = network.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for batch in tracked(prompt_batches(model, prompts, _BATCH_SIZE, new_tokens=max_new_tokens), progress):
        said, _ = generated(model, batch.tokens, max_new_tokens)
        for number, row in zip(batch.numbers, said.tolist(), strict=True):
            answers[number] = _until_end(tokenizer, row, ends)
    told = [i for i, answer in enumerate(answers) if answer]
    streams = [
        item_residuals(model, [Continued((*context[i], *answers[i]), len(answers[i])) for i in told])
        for context in (before, bare)
    ]
    rows = []
    for index, with_context, without in zip(told, *streams, strict=True):
        example, tokens = examples[index], answers[index]
        log_p, log_q = (_log_probabilities(model, residuals) for residuals in (with_context, without))
        divergences = (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        about = {name: getattr(example, name) for name in ("id", "subject", "kind", "template")}
        for position, (token, divergence) in enumerate(zip(tokens, divergences, strict=True)):
            own, other = log_p[position, token].item(), log_q[position, token].item()
            text = tokenizer.decode([token])
            numbers = {"log_p": own, "log_p_without": other, "gain": own - other, "divergence": divergence}
            rows.append({**about, "position": position, "token": text, **numbers})
    if not rows:
        raise UserError(f"The model answers nothing to the {len(examples)} prompts of {conflicts.name}; ask otherwise.")
    return pl.DataFrame(rows)


def _until_end(tokenizer: Any, tokens: list[int], ends: set[int | None]) -> list[int]:
    """The tokens of an answer's first sentence, without the end of the text."""
    kept: list[int] = []
    for token in tokens:
        # What makes the sentence complete, a line break for example, is no part of it.
        if token in ends or is_complete(tokenizer.decode([*kept, token])):
            break
        kept.append(token)
    return kept


def _log_probabilities(model: nn.Module, residuals: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return Anatomy(model).logits(residuals).float().log_softmax(-1).cpu()
