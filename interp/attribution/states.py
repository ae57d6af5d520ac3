"""What the last prompt position holds: the heads' z of every layer, and the residual stream at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.doubled import check_single
from interp.inputs import padded, prompt_batches
from interp.progress import tracked

STATES_VERSION = 1
"""Version of ``last_token_states``: raise it when the same prompts would give others."""


@dataclass(frozen=True)
class LastTokenStates:
    """The last prompt position (END) of ``n`` prompts, on the model's device and in its dtype.

    Attributes:
        z: Head outputs before the output projection, ``(n, n_layers, n_heads, d_head)``.
        embedding: The residual stream that enters the first block, ``(n, d_model)``.
        final: The residual stream that leaves the last block, ``(n, d_model)``.
    """

    z: Tensor
    embedding: Tensor
    final: Tensor

    def __getitem__(self, rows: slice | Sequence[int]) -> LastTokenStates:
        return LastTokenStates(self.z[rows], self.embedding[rows], self.final[rows])


def last_token_states(
    model: nn.Module, prompts: Sequence[str], *, batch_size: int = 32, progress: str | None = None
) -> LastTokenStates:
    """Run every prompt once and keep only what its last position holds.

    Args:
        model: The model, or a bridge around it; interventions that are applied to it are seen.
        prompts: Full prompts.
        batch_size: Prompts per batch.
        progress: Label of a progress bar; ``None`` shows none.
    """
    check_single(model)
    anatomy = Anatomy(model)
    n, dtype = len(prompts), anatomy.dtype
    states = LastTokenStates(
        torch.empty(n, anatomy.n_layers, anatomy.n_heads, anatomy.d_head, device=anatomy.device, dtype=dtype),
        torch.empty(n, anatomy.d_model, device=anatomy.device, dtype=dtype),
        torch.empty(n, anatomy.d_model, device=anatomy.device, dtype=dtype),
    )
    for batch in tracked(prompt_batches(model, prompts, batch_size), progress):
        rows = torch.tensor(batch.numbers, device=anatomy.device)

        def keep_z(layer: int, rows: Tensor = rows) -> Any:
            def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
                z = inputs[0][:, -1].to(rows.device)
                states.z[rows, layer] = z.unflatten(-1, (anatomy.n_heads, anatomy.d_head))

            return hook

        def keep(target: Tensor, rows: Tensor = rows) -> Any:
            def hook(_: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                target[rows] = (inputs[0] if inputs else named["hidden_states"])[:, -1].to(rows.device)

            return hook

        with ExitStack() as stack, torch.inference_mode():
            handles = [
                anatomy.module("output_projection", layer).register_forward_pre_hook(keep_z(layer))
                for layer in range(anatomy.n_layers)
            ]
            first, last = anatomy.module("block", 0), anatomy.final_norm
            handles.append(first.register_forward_pre_hook(keep(states.embedding), with_kwargs=True))
            handles.append(last.register_forward_pre_hook(keep(states.final), with_kwargs=True))
            for handle in handles:
                stack.callback(handle.remove)
            anatomy.body(**padded(model, batch.tokens), use_cache=False)
    return states
