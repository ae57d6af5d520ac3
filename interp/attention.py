"""What heads look at: the attention weights of a prompt's last token, and of those that predict an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.doubled import check_single
from interp.errors import UserError
from interp.inputs import encode, padded, tokenizer_of
from interp.progress import tracked
from interp.teacher_forcing import Continued, token_batches


@dataclass(frozen=True)
class PromptAttention:
    """Attention from the last token of one prompt to all of its tokens.

    Attributes:
        tokens: The prompt's tokens as text.
        heads: The ``(layer, head)`` that were asked for.
        weights: ``(n_heads, n_tokens)`` float32 on the CPU; each row sums to 1.
    """

    tokens: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    weights: Tensor


def attention_from_last(model: nn.Module, prompt: str, heads: Sequence[tuple[int, int]]) -> PromptAttention:
    """What heads look at when the model is about to answer; interventions that are applied are seen.

    Args:
        model: The model, or a bridge around it.
        prompt: The whole prompt.
        heads: ``(layer, head)``, one or more.

    Raises:
        UserError: If no head is given, one does not exist, or the model keeps no attention weights or reads every
            prompt twice.
    """
    if not heads:
        raise UserError("No head is given; name at least one as (layer, head).")
    anatomy = Anatomy(model)
    places = [anatomy.checked_head(*head) for head in heads]
    inputs = encode(model, [prompt])
    with _kept(anatomy, {layer for layer, _ in places}, 1) as by_layer, torch.inference_mode():
        anatomy.body(**inputs, use_cache=False)
    tokenizer = tokenizer_of(model)
    tokens = tuple(tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist())
    return PromptAttention(tokens, tuple(places), torch.stack([by_layer[layer][0, head, 0] for layer, head in places]))


@torch.inference_mode()
def answer_attention(
    model: nn.Module, items: Sequence[Continued], *, progress: str | None = None
) -> Iterator[tuple[int, Tensor]]:
    """What all heads look at where the looked-at tokens of items are predicted.

    Args:
        model: The model, or a bridge around it, with whatever is applied to it.
        items: Prompts with their answers, see ``interp.teacher_forcing.continued``.
        progress: Label of a progress bar; ``None`` shows none.

    Yields:
        The number of an item, in any order, and weights ``(n_layers, n_heads, predicted, n_tokens - 1)`` float32 on the
        CPU: a row for each token that is predicted, over all tokens but the last, 0 where they come later.

    Raises:
        UserError: If the model keeps no attention weights.
    """
    anatomy = Anatomy(model)
    for batch in tracked(token_batches(model, items), progress):
        # The last token predicts nothing that is looked at.
        inputs = padded(model, [items[i].tokens[:-1] for i in batch])
        with _kept(anatomy, range(anatomy.n_layers), max(items[i].predicted for i in batch)) as by_layer:
            anatomy.body(**inputs, use_cache=False)
        for row, index in enumerate(batch):
            rows, columns = items[index].predicted, len(items[index].tokens) - 1
            weights = [by_layer[layer][row, :, -rows:, -columns:] for layer in range(anatomy.n_layers)]
            yield index, torch.stack(weights)


@contextmanager
def _kept(anatomy: Anatomy, layers: Iterable[int], rows: int) -> Iterator[dict[int, Tensor]]:
    """Keep the last ``rows`` rows of layers' attention weights, ``(n, n_heads, rows, n_tokens)``, of each pass."""
    check_single(anatomy.model)
    by_layer: dict[int, Tensor] = {}

    def keep(layer: int, _: nn.Module, __: Any, output: tuple[Tensor, Tensor | None]) -> None:
        if output[1] is None:
            raise UserError(
                f"This {anatomy.architecture} computes attention without keeping its weights; load it with "
                'interp.models.load_model(..., attention="eager").'
            )
        by_layer[layer] = output[1][:, :, -rows:].float().cpu()

    with ExitStack() as stack:
        stack.enter_context(anatomy.eager_attention())
        for layer in layers:
            handle = anatomy.attention_module(layer).register_forward_hook(partial(keep, layer))
            stack.callback(handle.remove)
        yield by_layer
