"""Path patching the plain way, with transformer_lens hooks and one full forward pass per head.

The reference of the tests and of the benchmark; it shares no code with the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def encode_left_padded(bridge: TransformerBridge, prompts: Sequence[str]) -> dict[str, Any]:
    """Token ids, mask and position ids, padded on the left."""
    tokens = bridge.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    device = next(bridge.original_model.parameters()).device
    mask = tokens["attention_mask"].to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input": tokens["input_ids"].to(device), "attention_mask": mask, "position_ids": positions}


@torch.inference_mode()
def z_of(bridge: TransformerBridge, prompts: Sequence[str]) -> list[Tensor]:
    """Z of every layer at all positions, ``(n, tokens, n_heads * d_head)`` each, by ``run_with_cache``."""
    sites = [f"blocks.{layer}.attn.o.hook_in" for layer in range(bridge.cfg.n_layers)]
    _, cache = bridge.run_with_cache(**encode_left_padded(bridge, prompts), names_filter=sites)
    return [cache[site].flatten(2) for site in sites]


@torch.inference_mode()
def full_forward_patch(
    bridge: TransformerBridge, prompts: Sequence[str], clean_z: list[Tensor], patched_z: Tensor, layer: int, head: int
) -> Tensor:
    """Last-token logits when one head's END output is replaced and every other head keeps its clean output.

    Args:
        bridge: The model.
        prompts: The clean prompts.
        clean_z: What ``z_of(bridge, prompts)`` gave.
        patched_z: The head's new END output, ``(n, d_head)``.
        layer: Layer of the head.
        head: Index of the head.

    Returns:
        ``(n, d_vocab)``.
    """
    columns = slice(head * patched_z.shape[1], (head + 1) * patched_z.shape[1])

    def freeze(at: int) -> Any:
        frozen = clean_z[at]
        if at == layer:
            frozen = frozen.clone()
            frozen[:, -1, columns] = patched_z

        def hook(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 (transformer_lens' signature)
            return frozen.reshape(tensor.shape)

        return hook

    hooks: list[tuple[Any, Any]] = [(f"blocks.{at}.attn.o.hook_in", freeze(at)) for at in range(bridge.cfg.n_layers)]
    return bridge.run_with_hooks(**encode_left_padded(bridge, prompts), fwd_hooks=hooks)[:, -1]
