"""What heads look at: the attention weights of a prompt's last token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.inputs import encode, tokenizer_of


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
        UserError: If no head is given, one does not exist, or the model keeps no attention weights.
    """
    if not heads:
        raise UserError("No head is given; name at least one as (layer, head).")
    anatomy = Anatomy(model)
    network: Any = anatomy.model
    places = [anatomy.checked_head(*head) for head in heads]
    by_layer: dict[int, Tensor] = {}

    def keep(layer: int, _: nn.Module, __: Any, output: tuple[Tensor, Tensor | None]) -> None:
        if output[1] is None:
            raise UserError(
                "The model computes attention without keeping its weights; load it with interp.models.load_model, or "
                'call model.set_attn_implementation("eager").'
            )
        by_layer[layer] = output[1][0, :, -1].float().cpu()

    inputs = encode(model, [prompt])
    with ExitStack() as stack, torch.inference_mode():
        for layer in {layer for layer, _ in places}:
            handle = anatomy.module("attention", layer).register_forward_hook(partial(keep, layer))
            stack.callback(handle.remove)
        network(**inputs, use_cache=False, logits_to_keep=1)
    tokenizer = tokenizer_of(model)
    tokens = tuple(tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist())
    return PromptAttention(tokens, tuple(places), torch.stack([by_layer[layer][head] for layer, head in places]))
