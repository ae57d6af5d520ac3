"""Scale what feed-forward layers write to the residual stream: x' = x + scale * mlp_write.

Scale 0 takes a layer's MLP out, 1 changes nothing. Where the architecture normalises the MLP's output before it joins
the residual stream (Gemma), what the norm made of it is scaled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interventions.base import Handle, Patch, attach_patches


@dataclass(frozen=True)
class FeedForwardScaling:
    """Scales the MLPs of some layers at every position. Immutable; attach it as often as you like.

    Attributes:
        scales: ``(layer, scale)`` pairs; each layer at most once.

    Raises:
        UserError: If a layer occurs twice.
    """

    scales: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        layers = [layer for layer, _ in self.scales]
        if twice := [layer for layer, count in Counter(layers).items() if count > 1]:
            raise UserError(f"The feed-forward layer {twice[0]} is listed twice; give each layer once.")

    @property
    def edited_layers(self) -> set[int]:
        """The layers that it changes."""
        return {layer for layer, _ in self.scales}

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model does not have one of the layers.
        """
        anatomy = Anatomy(model)
        part = anatomy.writing_part("mlp")
        return [Patch(part, anatomy.checked_layer(layer), _scaled(scale)) for layer, scale in sorted(self.scales)]

    def attach(self, model: nn.Module) -> Handle:
        """Apply to a transformers model or a ``TransformerBridge`` until the handle is removed.

        Raises:
            UserError: As ``patches``.
        """
        return attach_patches(model, self.patches(model))

    def __len__(self) -> int:
        return len(self.scales)


def _scaled(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda written: written * scale
