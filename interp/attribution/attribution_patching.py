"""Attribution patching: the first-order estimate of patching every head, from two forwards and one backward.

score = -(z_corrupted - z_clean) . d(metric)/dz at the last prompt position (Nanda 2023; Kramar et al. 2024,
arXiv 2403.00745). The gradient runs through everything above the head, later heads included, so this
estimates activation patching; path patching holds later heads frozen.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.attribution.examples import check_attributed, corrupted_partners, scorable
from interp.attribution.scores import HeadScores
from interp.attribution.states import last_token_states
from interp.conflicts import ConflictSet
from interp.inputs import padded, prompt_batches
from interp.progress import tracked


def attribution_patching(
    model: nn.Module,
    conflicts: ConflictSet,
    *,
    name: str,
    batch_size: int = 16,
    seed: int = 0,
    progress: str | None = None,
) -> HeadScores:
    """Estimate every head's patching effect on the logit difference.

    Args:
        model: The model, or a bridge around it.
        conflicts: Conflict prompts. Those whose two answers start with the same token are left out.
        name: Name of the model, for the record.
        batch_size: Prompts per backward pass.
        seed: Decides the corrupted prompts, the same as in ``path_patching``.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If no example can be scored.
    """
    examples, token_ids = scorable(model, conflicts)
    Anatomy(model).check_differentiable()
    partners = corrupted_partners(examples, seed)
    prompts = [example.prompt for example in examples]
    anatomy = Anatomy(model)
    states = last_token_states(model, prompts)
    check_attributed(anatomy, states.final, token_ids)
    z = states.z
    change = z[partners] - z
    values = torch.empty(z.shape[:3])
    for numbers, tokens in tracked(prompt_batches(model, prompts, batch_size), progress):
        gradient = _gradient(anatomy, padded(model, tokens), token_ids[numbers])
        values[numbers] = -(gradient.float() * change[numbers].float()).sum(-1).cpu()
    return HeadScores.of(
        values,
        examples,
        conflicts,
        method="attribution_patching",
        metric="logit_diff",
        model=name,
        settings={
            "unit": "first-order change of (logit context - logit memory)",
            "baseline": "corrupted",
            "seed": seed,
        },
    )


def _gradient(anatomy: Anatomy, inputs: dict[str, Tensor], token_ids: Tensor) -> Tensor:
    """d(logit context - logit memory)/dz at END, ``(n, n_layers, n_heads, d_head)``."""
    network: Any = anatomy.model
    n = len(token_ids)
    offset = torch.zeros(
        n,
        anatomy.n_layers,
        anatomy.n_heads * anatomy.d_head,
        device=anatomy.device,
        dtype=anatomy.dtype,
        requires_grad=True,
    )

    def add_offset(layer: int) -> Any:
        own = offset[:, layer : layer + 1]

        def hook(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            moved = torch.cat([inputs[0][:, :-1], inputs[0][:, -1:] + own.to(inputs[0].device)], dim=1)
            return (moved, *inputs[1:])

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for layer in range(anatomy.n_layers):
            module = anatomy.module("output_projection", layer)
            stack.callback(module.register_forward_pre_hook(add_offset(layer)).remove)
        logits = network(**inputs, logits_to_keep=1).logits[:, -1]
        answer_logits = logits.gather(1, token_ids.to(logits.device))
        (answer_logits[:, 0] - answer_logits[:, 1]).sum().backward()
    assert offset.grad is not None
    return offset.grad.unflatten(-1, (anatomy.n_heads, anatomy.d_head))
