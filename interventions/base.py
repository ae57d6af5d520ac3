"""What all interventions share: patches of a model's modules, the protocol, and ``applied``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy, Part
from interp.errors import Caution
from interventions.replaced import Replaced
from interventions.tokens import TokenTracker


class Removable(Protocol):
    """What was attached to a model and can be taken off again."""

    def remove(self) -> None:
        """Take it off."""
        ...


class Handle:
    """What was attached to a model; ``remove()`` or leaving the ``with`` block restores the model exactly.

    Args:
        hooks: Handles of the hooks that make up the intervention, kept in the attribute of the same name.
    """

    def __init__(self, hooks: Sequence[Removable]) -> None:
        self.hooks = list(hooks)
        _forget_compiled()

    def remove(self) -> None:
        """Take the intervention off the model; calling it again does nothing."""
        if self.hooks:
            while self.hooks:
                self.hooks.pop().remove()
            _forget_compiled()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Patch(NamedTuple):
    """A change of one activation, wherever it passes by.

    Attributes:
        part: The part of a block whose output is changed; of the output projection it is the input, z, as with sites.
        layer: The block.
        change: What becomes of the values, ``(n_rows, n_tokens, width)`` -> the same.
        tracker: What tells ``change`` which tokens are meant, if it needs to know.
    """

    part: Part
    layer: int
    change: Callable[[Tensor], Tensor]
    tracker: TokenTracker | None = None


class Placed:
    """A tensor wherever, and in whatever dtype, it is needed: that is known only when activations come by.

    Args:
        values: The tensor.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, activations: Tensor) -> Tensor:
        """The values on the device of ``activations`` and in their dtype; they are moved once."""
        return self.on(activations.device, activations.dtype)

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The values on a device, in a dtype."""
        if (device, dtype) not in self._kept:
            self._kept[device, dtype] = self._values.to(device, dtype)
        return self._kept[device, dtype]


class Intervention(Protocol):
    """A change of the forward pass that can be attached to a model and taken off again."""

    def attach(self, model: nn.Module) -> Handle:
        """Apply to ``model`` (a transformers model or a ``TransformerBridge``) until the handle is removed.

        Raises:
            UserError: If the model does not have what the intervention changes; the model is then unchanged.
        """
        ...


def attach_patches(model: nn.Module, patches: Sequence[Patch]) -> Handle:
    """Attach patches, in order: those of the same activation act on what earlier ones made of it.

    Meanwhile the model's ``save_pretrained`` says that it saves the weights without them.

    Raises:
        UserError: If the model does not have one of the parts; nothing is attached then.
    """
    anatomy = Anatomy(model)
    modules = [anatomy.module(patch.part, patch.layer) for patch in patches]
    trackers = dict.fromkeys(patch.tracker for patch in patches if patch.tracker is not None)
    hooks: list[Removable] = [tracker.attach(model) for tracker in trackers]
    for module, patch in zip(modules, patches, strict=True):
        if patch.part == "output_projection":
            hooks.append(module.register_forward_pre_hook(_of_input(patch.change)))
        else:
            hooks.append(module.register_forward_hook(_of_output(patch.change)))
    if patches:
        hooks.append(Replaced(anatomy.model, SAVING))
    return Handle(hooks)


@contextmanager
def applied(model: nn.Module, *interventions: Intervention) -> Iterator[None]:
    """Apply interventions, in the order given, for the length of a ``with`` block.

    The model is restored when the block ends, also after an exception. Later interventions act on what earlier
    ones made of the activations.

    Raises:
        UserError: If one of them does not fit the model; none of them stays attached then.
    """
    with ExitStack() as stack:
        for intervention in interventions:
            stack.enter_context(intervention.attach(model))
        yield


def _save_pretrained(_: nn.Module, save_pretrained: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    warnings.warn(
        Caution(
            "The saved weights do not hold the edit that is applied to the model; fold it in with: "
            "conflictscope export MODEL CONFIG OUT --bake"
        ),
        stacklevel=2,
    )
    return save_pretrained(*args, **kwargs)


SAVING: Mapping[str, Callable[..., Any]] = {"save_pretrained": _save_pretrained}


def _of_input(change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(inputs[0]), *inputs[1:])

    return hook


def _of_output(change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


def _forget_compiled() -> None:
    """Make compiled models compile anew: compiled code does not look whether hooks are still the same."""
    # Where nothing was compiled yet this saves the second that importing the compiler takes.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
