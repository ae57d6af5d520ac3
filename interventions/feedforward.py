"""Scale what feed-forward layers write to the residual stream: x' = x + scale * mlp_write.

Scale 0 takes a layer's MLP out, 1 changes nothing. Where the architecture normalises the MLP's output before it joins
the residual stream (Gemma), what the norm made of it is scaled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from interp.anatomy import Anatomy, Blueprint
from interp.errors import UserError
from interventions.base import Entry, Intervention, Patch, Place, finite_strength
from interventions.fields import Factor
from interventions.folding import Folding
from interventions.identity import Layer, ModelIdentity, Strict


@dataclass(frozen=True)
class FeedForwardScaling(Intervention):
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

    @property
    def n_moved(self) -> int:
        """How many layers have a scale other than 1."""
        return sum(scale != 1 for _, scale in self.scales)

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model does not have one of the layers.
        """
        anatomy = Anatomy(model)
        part = anatomy.writing_part("mlp")
        return [Patch(part, anatomy.checked_layer(layer), _scaled(scale)) for layer, scale in sorted(self.scales)]

    def scaled(self, strength: float) -> FeedForwardScaling:
        """The same with every scale ``strength`` times as far from 1."""
        factor = finite_strength(strength)
        return FeedForwardScaling(tuple((layer, 1 + factor * (scale - 1)) for layer, scale in self.scales))

    def settled(self) -> tuple[FeedForwardScaling, ...]:
        """The layers whose scale is not 1, if there are any."""
        moved = tuple((layer, scale) for layer, scale in self.scales if scale != 1)
        return (FeedForwardScaling(moved),) if moved else ()

    def described(self) -> Iterator[str]:
        """Its layers and their scales."""
        yield "feed-forward layers: " + ", ".join(f"{layer} x {scale:g}" for layer, scale in self.scales)

    def entry(self, name: str, tensors: dict[str, Tensor]) -> FeedForwardScalingEntry:
        """Its part of the intervention file; it has no tensors."""
        return FeedForwardScalingEntry(
            layers=[ScaledLayerEntry(layer=layer, scale=scale) for layer, scale in self.scales]
        )

    def folded(self) -> Folding:
        """Scales of what the layers' last maps write."""
        return Folding(layers=dict(self.scales))


class ScaledLayerEntry(Strict):
    """One scaled feed-forward layer."""

    layer: Layer
    scale: Factor


class FeedForwardScalingEntry(Entry):
    """A ``FeedForwardScaling``."""

    kind: Literal["feed_forward_scaling"] = "feed_forward_scaling"
    layers: Annotated[list[ScaledLayerEntry], Field(min_length=1)]

    def build(self, tensors: Mapping[str, Tensor]) -> FeedForwardScaling:
        """The intervention that this entry describes."""
        return FeedForwardScaling(tuple((entry.layer, entry.scale) for entry in self.layers))

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it changes."""
        return [Place(blueprint.writing_part("mlp"), entry.layer) for entry in self.layers]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """Every layer of every model fits it."""


def _scaled(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda written: written * scale
