"""The edit that a harness's options name, and what its passes give where a harness asks for likelihoods.

A harness scores a prompt and its answer in one pass, which does not say where the answer begins. Edits of all tokens
need not know. Edits of certain tokens, and gates, which read the prompt's end, are given the answer token by token, as
while text is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from interp.errors import UserError
from interp.inputs import check_lengths, padded, padding_id
from interventions.config import InterventionFile
from interventions.decoding import DecodingRule
from interventions.gate import ConflictGate


def chosen_edit(config: str | Path | None, *, trust: float | None, strength: float) -> InterventionFile | None:
    """Read an intervention file, at a setting; without a path there is no edit.

    Args:
        config: The path of an intervention file, or of the folder that it is alone in.
        trust: Where its dial is to stand, from -1 (memory) to 1 (context); ``None`` leaves it as it is.
        strength: How far the edit goes: 0 changes nothing, 1 is what the file says.

    Raises:
        UserError: If the file cannot be read or has no such setting, there is a setting of no file, or the edit is a
            rule that needs each prompt without its context, which harnesses do not give.
    """
    if config is None:
        if trust is not None or strength != 1:
            raise UserError("trust and strength are settings of an edit; give its file: config=edit.json.")
        return None
    file = InterventionFile.load(config).at(trust=trust, strength=strength)
    if any(isinstance(part, DecodingRule) for edit in file.build() for part in edit.parts):
        raise UserError(
            f"{file.name} weighs each prompt against the same without its context, which a harness does not give; take "
            "an edit of the forward pass, or measure this one with `conflictscope compare`."
        )
    return file


def follows_prompts(file: InterventionFile) -> bool:
    """Whether an edit has to know where a prompt ends: it acts on certain tokens only, or is behind a gate."""
    return any(isinstance(edit, ConflictGate) or edit.tokens != "all" for edit in file.build())


def check_texts(file: InterventionFile) -> None:
    """Refuse an edit that has to know where a prompt ends, for a task of texts without prompts.

    Raises:
        UserError: If it does.
    """
    if follows_prompts(file):
        raise UserError(
            f"{file.name} acts at certain tokens of a prompt or its answer, or behind a gate that reads a prompt, and "
            "this task scores texts that have none (loglikelihood_rolling); take tasks of output_type multiple_choice, "
            "loglikelihood or generate_until, or an edit of all tokens."
        )


@torch.inference_mode()
def answer_logits(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
    """Read prompts, then their answers token by token, as generating does.

    Args:
        model: The transformers model, with whatever is applied to it.
        prompts: Token ids of each prompt.
        answers: Token ids of what follows each; one token at least.

    Returns:
        The logits that each answer's tokens are predicted by, ``(n, longest answer, d_vocab)``; those after the end of
        a shorter answer are of no use.

    Raises:
        UserError: If a prompt has no tokens, or does not fit into the model with its answer.
    """
    longest = max(map(len, answers))
    check_lengths(model, prompts, new_tokens=longest)
    inputs = padded(model, prompts)
    mask, fill = inputs["attention_mask"], padding_id(model)
    # An empty one tells a prompt from what goes on with the last one.
    cache = DynamicCache(config=model.config)
    found = [model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
    for step in range(longest - 1):
        tokens = torch.tensor([[*answer, *[fill] * longest][step] for answer in answers], device=mask.device)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = mask.sum(-1, keepdim=True) - 1
        step_inputs = {"input_ids": tokens[:, None], "attention_mask": mask, "position_ids": positions}
        found.append(model(**step_inputs, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(found, 1)
