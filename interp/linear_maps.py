"""Read what a linear map does, whatever holds its weights: plain, quantised, offloaded or with an adapter.

A map whose weight is a plain tensor is read from it. Any other is asked: it is given rows, as the model gives it some.
Its own forward pass is run, without the hooks on it: they are what edits do, and no part of the map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PLAIN = (Tensor, nn.Parameter)
"""Types of weights that are read: other ones are quantised."""


def inner(module: nn.Module) -> nn.Module:
    """The module that computes: inside a bridge's component, or the copy that an adapter trained in its place."""
    found: Any = module
    while True:
        if (wrapped := getattr(found, "original_component", None)) is not None:
            found = wrapped
        elif isinstance(getattr(found, "modules_to_save", None), nn.ModuleDict):
            copies: Any = found.modules_to_save
            active = [] if found.disable_adapters else found.active_adapters
            name = next((name for name in active if name in copies), None)
            found = found.original_module if name is None else copies[name]
        else:
            return found


def plain_weight(module: nn.Module) -> Tensor | None:
    """The weight of a linear map as ``(d_in, d_out)``, a view, or ``None`` where the map is more than its weight.

    It is more where the weight is quantised or elsewhere, or where an adapter adds to what it does.
    """
    module = inner(module)
    weight = module._parameters.get("weight")
    if type(weight) not in PLAIN or weight is None or weight.is_meta:
        return None
    if not weight.is_floating_point() or weight.element_size() < 2:
        return None
    own = type(module)
    if own.forward is Conv1D.forward:
        return weight
    # Architectures may have linear maps of their own; what quantises lies elsewhere.
    is_own = issubclass(own, nn.Linear) and own.__module__.startswith("transformers.models.")
    return weight.T if is_own or own.forward is nn.Linear.forward else None


def mapped(module: nn.Module, values: Tensor) -> Tensor:
    """What a module makes of ``(..., d_in)``, without the hooks on it."""
    # Kernels of quantised maps take rows, not blocks of them.
    return inner(module).forward(values.flatten(0, -2)).unflatten(0, values.shape[:-1])


def linear_part(module: nn.Module, values: Tensor) -> Tensor:
    """What a linear map makes of ``(..., d_in)`` without its bias."""
    return mapped(module, values) - mapped(module, torch.zeros_like(values[..., :1, :]))


def matrix_of(module: nn.Module, d_in: int, dtype: torch.dtype) -> Tensor:
    """The matrix of a linear map, ``(d_in, d_out)``: a view of its weight, or what it makes of unit vectors."""
    weight = plain_weight(module)
    if weight is not None:
        return weight
    with torch.no_grad():
        return linear_part(module, torch.eye(d_in, dtype=dtype, device=device_of(module)))


def bias_of(module: nn.Module, d_in: int, dtype: torch.dtype) -> Tensor | None:
    """The bias of a linear map, ``(d_out,)``, or ``None`` where it adds nothing."""
    if plain_weight(module) is not None:
        return inner(module)._parameters.get("bias")
    with torch.no_grad():
        bias = mapped(module, torch.zeros(1, d_in, dtype=dtype, device=device_of(module)))[0]
    return bias if bias.any() else None


def own_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a module that is no linear map, read from where it is offloaded to, if it is."""
    module = inner(module)
    found = module._parameters.get(name)
    if found is None or not found.is_meta:
        return found
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return module.get_parameter(name).detach().clone()


def offloaded_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights that a model keeps elsewhere, by their names, as they lie there."""
    return {
        f"{path}.{name}" if path else name: hook.weights_map[name]
        for path, module in network.named_modules()
        for hook in _hooks(module)
        if getattr(hook, "weights_map", None) is not None
        for name, weight in module.named_parameters()
        if weight.is_meta
    }


def _hooks(module: nn.Module) -> list[Any]:
    """What accelerate hangs on a module to move it and what it reads."""
    hook: Any = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", [] if hook is None else [hook])


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes, wherever its weights lie meanwhile."""
    module = inner(module)
    for one in _hooks(module):
        if (device := getattr(one, "execution_device", None)) is not None:
            return torch.device(device)
    found = next((p.device for p in module.parameters() if not p.is_meta), None)
    return torch.device("cpu") if found is None else found
