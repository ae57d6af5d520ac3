"""Add to heads what they write without the edit: JuICE (Li et al. 2025, arXiv 2503.10996).

A head that is scaled changes what heads above it see, so that scaling several does something else than scaling each.
JuICE reads a prompt twice, and adds to what chosen heads write the second time what they wrote the first time:

    z' = z + factor * z_first

Factors above 0 strengthen what a head does, those below take it away. The next token is that of the second reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from interp.anatomy import Blueprint
from interventions.base import Entry, Intervention, Patch, Place, finite_strength
from interventions.fields import Factor, Head, check_each_once, check_head
from interventions.identity import Layer, ModelIdentity, Strict
from interventions.side_by_side import SecondHead, second_reading


class AddedHead(NamedTuple):
    """One head, and how much of what it wrote at first is added to it.

    Attributes:
        layer: Layer of the head.
        head: Index of the head in its layer.
        factor: Factor on its first output.
    """

    layer: int
    head: int
    factor: float


@dataclass(frozen=True)
class JuICE(Intervention):
    """Adds heads' own outputs, as they are without the edit, at every position. Immutable.

    Every pass costs two, and ``generate`` works as without it, but for beams.

    Attributes:
        heads: The heads; each at most once.

    Raises:
        UserError: If a head occurs twice.
    """

    heads: tuple[AddedHead, ...]

    in_one_pass = True

    def __post_init__(self) -> None:
        check_each_once((h.layer, h.head) for h in self.heads)

    @property
    def edited_layers(self) -> set[int]:
        """The layers that it changes."""
        return {h.layer for h in self.heads}

    @property
    def edited_heads(self) -> tuple[tuple[int, int], ...]:
        """``(layer, head)`` of the heads that something is added to, sorted."""
        return tuple(sorted((h.layer, h.head) for h in self.heads if h.factor != 0))

    @property
    def n_moved(self) -> int:
        """How many heads something is added to."""
        return len(self.edited_heads)

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model does not have one of the heads.
        """
        return second_reading(
            model,
            {(h.layer, h.head): SecondHead(own=1.0, other=h.factor) for h in self.heads},
            lambda _, second: second,
        )

    def scaled(self, strength: float) -> JuICE:
        """The same with every factor multiplied."""
        by = finite_strength(strength)
        return replace(self, heads=tuple(h._replace(factor=by * h.factor) for h in self.heads))

    def settled(self) -> tuple[JuICE, ...]:
        """The heads that something is added to, if there are any."""
        moved = tuple(h for h in self.heads if h.factor != 0)
        return (JuICE(moved),) if moved else ()

    def described(self) -> Iterator[str]:
        """Its heads and their factors."""
        listed = ", ".join(f"{h.layer}.{h.head} x {h.factor:+g}" for h in self.heads)
        yield f"outputs of a first reading added to {len(self.heads)} head{'s' * (len(self.heads) != 1)}: {listed}"

    def entry(self, name: str, tensors: dict[str, Tensor]) -> JuICEEntry:
        """Its part of the intervention file; it has no tensors."""
        return JuICEEntry.model_validate({"heads": [h._asdict() for h in self.heads]})


class AddedHeadEntry(Strict):
    """One head, as ``AddedHead``."""

    layer: Layer
    head: Head
    factor: Factor


class JuICEEntry(Entry):
    """A ``JuICE``."""

    kind: Literal["juice"] = "juice"
    heads: Annotated[list[AddedHeadEntry], Field(min_length=1)]

    def build(self, tensors: Mapping[str, Tensor]) -> JuICE:
        """The intervention that this entry describes."""
        return JuICE(tuple(AddedHead(h.layer, h.head, h.factor) for h in self.heads))

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it changes."""
        return [Place("output_projection", h.layer) for h in self.heads]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that the model has its heads."""
        for h in self.heads:
            check_head(model, h.layer, h.head)
