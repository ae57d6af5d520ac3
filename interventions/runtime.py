"""Apply an intervention file to a plain transformers model: all that a serving program needs.

    from interventions.runtime import apply

    with apply(model, "towards_context.json"):
        model.generate(...)

Nothing but torch, transformers, safetensors and pydantic is needed. The edits are hooks on the model's own modules and
act in every forward pass until the handle is removed, in all threads, on any device and in any dtype.

- batches, padding on either side, KV caches, beams, sampling: as without an edit
- ``torch.compile``: apply and remove at any time; what was compiled is compiled anew
- ``device_map``: edits go where the activations are; where too many weights are offloaded to be read, the model cannot
  be recognised and is refused
- assisted decoding, chunked prompts and continuous batching: served by edits of all tokens (scaled heads and
  feed-forward layers); an edit of certain tokens, or behind a gate, refuses them in one sentence
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from interventions.base import Handle
from interventions.config import InterventionFile


def apply(
    model: nn.Module,
    file: str | Path | InterventionFile,
    *,
    tokenizer: Any = None,
    trust: float | None = None,
    strength: float = 1.0,
) -> Handle:
    """Apply an intervention to a model, until the handle is removed or its ``with`` block ends.

    Args:
        model: A transformers causal language model, compiled or not, or a ``TransformerBridge``.
        file: The path of an intervention file, or of the folder that it is alone in; or the file itself.
        tokenizer: The tokenizer that prompts are made with, to be checked as well.
        trust: Where the file's dial is to stand, from -1 (memory) to 1 (context); ``None`` leaves it as it is.
        strength: How far the edit goes: 0 changes nothing, 1 is what the file says. Not for a file with a dial.

    Raises:
        UserError: If the file cannot be read or is for another model or tokenizer; nothing is attached then.
    """
    loaded = file if isinstance(file, InterventionFile) else InterventionFile.load(file)
    chosen = loaded.at(trust=trust, strength=strength)
    network = getattr(model, "_orig_mod", model)
    if tokenizer is not None:
        chosen.model.check(network, tokenizer)
    return chosen.attach(network)


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """What a transformers model says greedily, prompt by prompt, without any penalty that its checkpoint may ship.

    Args:
        model: The transformers model.
        tokenizer: Its tokenizer.
        prompts: Texts.
        max_new_tokens: Longest answer, in tokens.
    """
    own = model.generation_config
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else tokenizer.pad_token_id,
    )
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids, mask = (
            inputs[name].to(model.get_input_embeddings().weight.device) for name in ("input_ids", "attention_mask")
        )
        with torch.inference_mode():
            written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        answers.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return answers
