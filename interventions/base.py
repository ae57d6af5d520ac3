"""The one protocol that all interventions share, and the context manager that applies them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle


class Handle:
    """What was attached to a model; ``remove()`` or leaving the ``with`` block restores the model exactly.

    Args:
        hooks: Handles of the hooks that make up the intervention, kept in the attribute of the same name.
    """

    def __init__(self, hooks: list[RemovableHandle]) -> None:
        self.hooks = hooks

    def remove(self) -> None:
        """Take the intervention off the model; calling it again does nothing."""
        while self.hooks:
            self.hooks.pop().remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Intervention(Protocol):
    """A change of the forward pass that can be attached to a model and taken off again."""

    def attach(self, model: nn.Module) -> Handle:
        """Apply to ``model`` (a transformers model or a ``TransformerBridge``) until the handle is removed.

        Raises:
            UserError: If the model does not have what the intervention changes; the model is then unchanged.
        """
        ...


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
