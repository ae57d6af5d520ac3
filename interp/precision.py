"""Let a CPU multiply in bfloat16, where that takes half the time, for numbers that are compared and not shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from interp.anatomy import Anatomy


def can_be_rough(model: nn.Module) -> bool:
    """Whether ``rough`` changes anything: for a plain float32 model on a CPU that can.

    A bridge's mask leaves the range of bfloat16.
    """
    anatomy = Anatomy(model)
    is_float32 = anatomy.dtype == torch.float32
    return model is anatomy.model and anatomy.device.type == "cpu" and is_float32 and _multiplies_bfloat16()


def rounding(model: nn.Module) -> list[str]:
    """What records of rough numbers depend on besides what was asked, for their keys."""
    return ["bfloat16"] if can_be_rough(model) else []


@contextmanager
def rough(model: nn.Module) -> Iterator[None]:
    """Run a model's blocks in bfloat16, where ``can_be_rough``; the residual stream and the logits stay float32.

    Enough to choose by, and for the gradients of noisy steps: next-token distributions move by some 0.001 nats. The
    gradient of fused attention can leave the range of bfloat16, so that attention is eager where there are gradients.
    """
    if not can_be_rough(model):
        yield
        return
    precisely = torch.autocast("cpu", enabled=False)
    anatomy = Anatomy(model)
    unembedding: Any = anatomy.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]

    def enter(*_: Any) -> None:
        precisely.__enter__()

    def leave(*_: Any) -> None:
        precisely.__exit__(None, None, None)

    hooks = [
        unembedding.register_forward_pre_hook(enter),
        unembedding.register_forward_hook(leave, always_call=True),
    ]
    try:
        attention = anatomy.eager_attention() if torch.is_grad_enabled() else nullcontext()
        with attention, torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16; False where torch does not say."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)
