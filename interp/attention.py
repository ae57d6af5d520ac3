"""What heads look at: the attention weights of a prompt's last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.inputs import encode

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


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


def attention_from_last(model: TransformerBridge, prompt: str, heads: Sequence[tuple[int, int]]) -> PromptAttention:
    """What heads look at when the model is about to answer; interventions that are applied are seen.

    Args:
        model: The bridge.
        prompt: The whole prompt.
        heads: ``(layer, head)``, one or more.

    Raises:
        UserError: If no head is given, or one does not exist.
    """
    if not heads:
        raise UserError("No head is given; name at least one as (layer, head).")
    anatomy = Anatomy(model)
    network: Any = anatomy.model
    places = [anatomy.checked_head(*head) for head in heads]
    rows: dict[str, Tensor] = {}

    def keep(pattern: Tensor, hook: Any) -> None:
        rows[hook.name] = pattern[0, :, -1].float().cpu()

    sites = {layer: f"blocks.{layer}.attn.hook_pattern" for layer, _ in places}
    inputs = encode(model, [prompt])
    with torch.inference_mode(), model.hooks(fwd_hooks=[(site, keep) for site in sites.values()]):
        network(**inputs, use_cache=False, logits_to_keep=1)
    tokens = tuple(model.tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist())
    return PromptAttention(tokens, tuple(places), torch.stack([rows[sites[layer]][head] for layer, head in places]))
