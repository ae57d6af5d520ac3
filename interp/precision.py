"""Let a CPU multiply in bfloat16, where that takes half the time, for numbers that are compared and not shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from interp.anatomy import Anatomy


def can_be_rough(model: nn.Module) -> bool:
    """Whether ``rough`` changes anything: for a plain float32 model with eager attention on a CPU that can.

    A bridge's mask leaves the range of bfloat16, and the gradient of fused attention can.
    """
    anatomy = Anatomy(model)
    is_plain = model is anatomy.model and getattr(anatomy.model.config, "_attn_implementation", None) == "eager"
    return is_plain and anatomy.device.type == "cpu" and anatomy.dtype == torch.float32 and _multiplies_bfloat16()


def rounding(model: nn.Module) -> list[str]:
    """What records of rough numbers depend on besides what was asked, for their keys."""
    return ["bfloat16"] if can_be_rough(model) else []


@contextmanager
def rough(model: nn.Module) -> Iterator[None]:
    """Run a model's blocks in bfloat16, where ``can_be_rough``; the residual stream and the logits stay float32.

    Enough to choose by, and for the gradients of noisy steps: next-token distributions move by some 0.001 nats.
    """
    if not can_be_rough(model):
        yield
        return
    precisely = torch.autocast("cpu", enabled=False)
    unembedding: Any = Anatomy(model).model.get_output_embeddings()  # pyright: ignore[reportCallIssue]

    def enter(*_: Any) -> None:
        precisely.__enter__()

    def leave(*_: Any) -> None:
        precisely.__exit__(None, None, None)

    hooks = [
        unembedding.register_forward_pre_hook(enter),
        unembedding.register_forward_hook(leave, always_call=True),
    ]
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16; False where torch does not say."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)
