"""Prompts with the answer that should follow: what the model thinks of its tokens, without generating anything."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.doubled import check_single
from interp.inputs import (
    check_lengths,
    continuation_ids,
    most_positions,
    padded,
    pass_tokens,
    together,
    token_ids,
    tokenizer_of,
)
from interp.precision import can_be_rough, rough
from interp.progress import tracked

TOKENS_AT_ONCE = 512
"""Tokens of a batch at most, where it has more than one item."""
FORCING_VERSION = 1
"""Version of what is read off forced answers: raise it when the same items would give other results."""


@dataclass(frozen=True)
class Continued:
    """A prompt and what follows it, or a text of which every token counts.

    Attributes:
        tokens: Token ids of all.
        predicted: How many of them, the last ones, are looked at: those of the answer, or all of a text but the first.
    """

    tokens: tuple[int, ...]
    predicted: int

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens that are looked at."""
        return self.tokens[len(self.tokens) - self.predicted :]


def continued(model: nn.Module, prompt: str, answer: str) -> Continued:
    """``prompt`` and the tokens of ``answer`` after it.

    Raises:
        UserError: If they are longer than the model's positions.
    """
    before, after = continuation_ids(model, prompt, answer)
    check_lengths(model, [before], new_tokens=len(after))
    return Continued((*before, *after), len(after))


def text_tokens(model: nn.Module, text: str, longest: int) -> Continued:
    """The first tokens of a text, of which all but the very first are looked at."""
    (tokens,) = token_ids(tokenizer_of(model), [text])
    kept = tokens[: min(longest, most_positions(model) or longest)]
    return Continued(tuple(kept), len(kept) - 1)


def token_batches(model: nn.Module, items: Sequence[Continued]) -> list[list[int]]:
    """Numbers of items of similar length, with no more tokens in a batch than are worth running at once."""
    lengths = {i: len(item.tokens) for i, item in enumerate(items)}
    return together(lengths, max(1, len(items)), TOKENS_AT_ONCE, pass_tokens(model))


def predicting_residuals(model: nn.Module, items: Sequence[Continued], *, roughly: bool = False) -> Tensor:
    """The final residual stream where the looked-at tokens are predicted, one item after another.

    Args:
        model: The model, or a bridge around it, with whatever is applied to it; gradients are kept if they are wanted.
        items: Items for one batch.
        roughly: Whether ``interp.precision.rough`` numbers are enough.

    Returns:
        ``(sum of predicted, d_model)``.
    """
    check_single(model)
    anatomy = Anatomy(model)
    inputs = padded(model, [item.tokens for item in items])
    width = inputs["input_ids"].shape[1]
    seen: list[Tensor] = []
    handle = anatomy.final_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with rough(model) if roughly else nullcontext():
            anatomy.body(**inputs, use_cache=False)
    finally:
        handle.remove()
    residuals = torch.cat([seen[0][i, width - 1 - item.predicted : width - 1] for i, item in enumerate(items)])
    if roughly and can_be_rough(model) and not residuals.isfinite().all():
        return predicting_residuals(model, items)
    return residuals


def item_residuals(
    model: nn.Module, items: Sequence[Continued], *, roughly: bool = False, progress: str | None = None
) -> list[Tensor]:
    """``predicting_residuals`` of any number of items, for each ``(predicted, d_model)``, without gradients."""
    states: list[Tensor] = [torch.empty(0)] * len(items)
    for batch in tracked(token_batches(model, items), progress):
        chosen = [items[i] for i in batch]
        with torch.no_grad():
            parts = predicting_residuals(model, chosen, roughly=roughly).split([item.predicted for item in chosen])
        for index, part in zip(batch, parts, strict=True):
            states[index] = part
    return states


def greedily_continued(
    model: nn.Module, items: Sequence[Continued], *, roughly: bool = False, progress: str | None = None
) -> list[bool]:
    """Whether the model's greedy continuation of each prompt starts with the tokens that follow there."""
    found = [False] * len(items)
    for batch in tracked(token_batches(model, items), progress):
        chosen = [items[i] for i in batch]
        with torch.no_grad():
            greedy = Anatomy(model).logits(predicting_residuals(model, chosen, roughly=roughly)).argmax(-1).cpu()
        parts = greedy.split([item.predicted for item in chosen])
        for index, item, tokens in zip(batch, chosen, parts, strict=True):
            found[index] = tuple(tokens.tolist()) == item.answer
    return found
