"""Generate from prompts with and without their contexts, with a rule for the next token.

    from interventions.decoding import CAD
    from interventions.two_streams import generate

    prompts = tokenizer(["Lima is in Chile. Lima is in"], return_tensors="pt")
    bare = tokenizer(["Lima is in"], return_tensors="pt")
    answer = generate(model, CAD(1.0), **prompts, without=bare, max_new_tokens=8)

Nothing but torch, transformers, safetensors and pydantic is needed. Both prompts of a row are read in one batch, with
one KV cache, and go on with the same token; what comes back is what ``model.generate(**prompts)`` would give.

- batches of prompts of any lengths, padding on either side: each prompt as if it were alone
- temperature, top-k, top-p, penalties and logits processors act on the rule's scores; several answers to a prompt,
  stopping criteria, streamers: as with ``generate``
- beams, assistants and prompts that were read before are refused in one sentence
- edits in the same file, and those applied before, act on both prompts; behind a gate, so does the rule
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp.anatomy import transformers_model
from interp.errors import UserError
from interp.inputs import padded
from interp.pairs import generate_pairs
from interventions.base import Acting, Intervention, attach_patches
from interventions.config import InterventionFile

_REFUSED = {
    "max_length": "max_new_tokens, since the two prompts differ in length",
    "min_length": "min_new_tokens, since the two prompts differ in length",
    "inputs_embeds": "input_ids, which tell the two prompts apart",
    "past_key_values": "whole prompts, since both have to be read",
    "position_ids": "an attention_mask, from which they follow",
    "token_type_ids": "input_ids and an attention_mask alone",
}


def generate(
    model: nn.Module,
    intervention: Intervention | InterventionFile | str | Path,
    *,
    input_ids: Tensor,
    without: Mapping[str, Tensor],
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """Generate with a rule for the next token.

    Args:
        model: A transformers causal language model, compiled or not, or a ``TransformerBridge``.
        intervention: The rule, or a gate that lets one through; or an intervention file with one, or its path.
        input_ids: Tokens of the prompts with their contexts, ``(n, n_tokens)``.
        without: ``input_ids`` and ``attention_mask`` of the same prompts without their contexts, as the tokenizer gives
            them: as many rows, of any length.
        attention_mask: Which of ``input_ids`` are no padding; ``None`` is all.
        options: Others of ``model.generate``.

    Returns:
        What ``model.generate`` would: tokens ``(n, n_tokens + n_new)``, or a record of them, without a cache.

    Raises:
        UserError: If there is no rule or more than one, a prompt has no context, the file is for another model, or
            text is to be found by beams or in another way that cannot be.
    """
    for name in _REFUSED.keys() & {name for name, value in options.items() if value is not None}:
        raise UserError(f"Generating from two prompts cannot take {name}; give {_REFUSED[name]}.")
    network: Any = transformers_model(getattr(model, "_orig_mod", model))
    first = _rows(input_ids, attention_mask)
    second = _rows(without["input_ids"], without.get("attention_mask"))
    _check(first, second)
    acting = _acting(network, intervention)
    if acting.rule is None:
        raise UserError("The intervention has no rule for the next token; apply it with interventions.runtime.apply.")
    inputs = padded(network, [*first, *second])
    width = inputs["input_ids"].shape[1]
    pairs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with attach_patches(network, acting.patches):
        output = generate_pairs(network, pairs, acting.rule, **options)
    if isinstance(output, Tensor):
        return _after(input_ids, output[:, width:])
    output["sequences"] = _after(input_ids, output["sequences"][:, width:])
    return output


def _acting(network: nn.Module, intervention: Intervention | InterventionFile | str | Path) -> Acting:
    if isinstance(intervention, Intervention):
        return intervention.acting(network)
    file = intervention if isinstance(intervention, InterventionFile) else InterventionFile.load(intervention)
    file.check(network)
    return Acting.together(part.acting(network) for part in file.build())


def _rows(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row without padding."""
    real = torch.ones_like(ids) if mask is None else mask
    return [row[kept.bool()].tolist() for row, kept in zip(ids, real, strict=True)]


def _check(first: list[list[int]], second: list[list[int]]) -> None:
    if len(first) != len(second):
        raise UserError(
            f"There are {len(first)} prompts, but {len(second)} without a context; give each prompt without its own."
        )
    for number, (prompt, bare) in enumerate(zip(first, second, strict=True)):
        if not prompt or not bare:
            raise UserError(f"Prompt {number} has no tokens; leave out empty prompts.")
        if prompt == bare:
            raise UserError(
                f"Prompt {number} is the same with and without a context, so that a rule has nothing to weigh; answer "
                "prompts without a context with model.generate."
            )


def _after(prompts: Tensor, new: Tensor) -> Tensor:
    """Prompts as they were given, several times if there are several answers to each, and what follows."""
    return torch.cat([prompts.to(new.device).repeat_interleave(len(new) // len(prompts), 0), new], dim=1)
