"""Decoding from two prompts as simply as it can be written: the reference for what is done in batches."""

from __future__ import annotations

from typing import Any

import torch

from interp.anatomy import transformers_model
from interp.answers import first_sentence, is_complete
from interp.generation import MAX_NEW_TOKENS
from interp.pairs import Combined


def two_passes_a_token(model: Any, prompt: str, bare: str, rule: Combined, longest: int = MAX_NEW_TOKENS) -> str:
    """Answer one pair of prompts without caches and padding: two forward passes for each token.

    The model is a bridge, or a transformers model with a ``tokenizer``, which is much faster.
    """
    tokenizer: Any = model.tokenizer
    network: Any = transformers_model(model)
    streams = [tokenizer(text)["input_ids"] for text in (prompt, bare)]
    new: list[int] = []
    while len(new) < longest:
        with torch.inference_mode():
            first, second = (network(torch.tensor([ids + new])).logits[:, -1].float() for ids in streams)
        new.append(int(rule(first, second).argmax()))
        text = tokenizer.decode(new, skip_special_tokens=True)
        if new[-1] == tokenizer.eos_token_id or is_complete(text):
            break
    return first_sentence(tokenizer.decode(new, skip_special_tokens=True))
