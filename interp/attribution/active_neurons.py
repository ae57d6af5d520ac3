"""Count the neurons that are active in every feed-forward layer while an answer is predicted.

What feed-forward layers store is read by neurons that fire: where an answer comes from memory, more of them are active
in some layers than where it is read off the prompt (PIP-KAG and ParamMute: Huang et al. 2025, arXiv 2502.15543).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.doubled import check_single
from interp.inputs import padded
from interp.progress import tracked
from interp.teacher_forcing import Continued, token_batches

ACTIVE_NEURONS_VERSION = 1
"""Version of the shares: raise it when the same items would have others."""


@torch.inference_mode()
def active_shares(model: nn.Module, items: Sequence[Continued], *, progress: str | None = None) -> Tensor:
    """Share of every feed-forward layer's neurons that are above 0 where the looked-at tokens are predicted.

    Args:
        model: The model, or a bridge around it, with whatever is applied to it.
        items: Prompts with their answers, see ``interp.teacher_forcing.continued``.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        ``(n, n_layers)`` float32 on the CPU: means over neurons and over the positions that predict the answer, from
        the prompt's last token on.

    Raises:
        UserError: If a layer has experts, of which each token sees a few.
    """
    check_single(model)
    anatomy = Anatomy(model)
    shares = torch.zeros(len(items), anatomy.n_layers)
    for batch in tracked(token_batches(model, items), progress):
        inputs = padded(model, [items[i].tokens for i in batch])
        shape = inputs["input_ids"].shape
        width = shape[1]
        seen: dict[int, Tensor] = {}

        def see(layer: int, _: nn.Module, __: Any, neurons: Tensor, *, seen: Any = seen, shape: Any = shape) -> None:
            seen[layer] = (neurons > 0).float().mean(-1).reshape(shape)

        with ExitStack() as hooks:
            for layer in range(anatomy.n_layers):
                handle = anatomy.mlp_activation(layer).register_forward_hook(partial(see, layer))
                hooks.callback(handle.remove)
            anatomy.body(**inputs, use_cache=False)
        active = torch.stack([seen[layer] for layer in range(anatomy.n_layers)], -1).cpu()
        for row, index in enumerate(batch):
            shares[index] = active[row, width - 1 - items[index].predicted : width - 1].mean(0)
    return shares
