"""Greedy answers and last-token logits of many prompts, in batches.

Prompts of similar length share a batch, padded on the left with an attention mask and the position ids that
go with it, so that a prompt's answer does not depend on its batch (up to float rounding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from interp.anatomy import transformers_model

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BATCH_SIZE = 32


def encode(model: TransformerBridge, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Left-padded model inputs on the model's device.

    Returns:
        ``input_ids``, ``attention_mask`` and ``position_ids``, each ``(n_prompts, n_tokens)``.
    """
    tokens = model.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    mask = tokens["attention_mask"]
    device = next(transformers_model(model).parameters()).device
    return {
        "input_ids": tokens["input_ids"].to(device),
        "attention_mask": mask.to(device),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0).to(device),
    }


def length_batches(model: TransformerBridge, prompts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Indices of ``prompts`` in batches of similar token length, longest first."""
    lengths = [len(ids) for ids in model.tokenizer(list(prompts))["input_ids"]] if prompts else []
    order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class _AnswerEnded(StoppingCriteria):
    """Stops a row once its answer is over: a line break or a full stop after some text."""

    def __init__(self, tokenizer: Any, prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        return torch.tensor([first_line(text) != text.strip() for text in texts], device=input_ids.device)


def first_line(text: str) -> str:
    """The answer in a continuation: its first non-empty line."""
    return text.strip().split("\n", 1)[0].strip()


def greedy_answers(
    model: TransformerBridge,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 12,
    batch_size: int = BATCH_SIZE,
    progress: str | None = None,
) -> list[str]:
    """The model's greedy continuation of each prompt, up to the first line break.

    Args:
        model: The bridge.
        prompts: Full prompts.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts per batch.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        One answer per prompt, in the order of ``prompts``.
    """
    answers = [""] * len(prompts)
    network: Any = transformers_model(model)
    for batch in _tracked(length_batches(model, prompts, batch_size), progress):
        inputs = encode(model, [prompts[i] for i in batch])
        prompt_length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = network.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=model.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([_AnswerEnded(model.tokenizer, prompt_length)]),
            )
        texts = model.tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = first_line(text)
    return answers


def _tracked(batches: list[list[int]], label: str | None) -> Iterator[list[int]]:
    return iter(track(batches, description=label)) if label else iter(batches)
