"""Scale attention heads: pruning, value scaling and mean ablation.

Pruning (PH3: Jin et al. 2024, arXiv 2402.18154), value scaling (Yu et al. 2023, arXiv 2310.15910) and mean
ablation are one operation on a head's output z, before the output projection:

    z' = mean + scale * (z - mean)

with mean 0 unless it is given. Scale 0 prunes (or ablates to the mean), 1 changes nothing, a negative scale
turns the head around. Attention is linear in its values, so scaling z scales the head's value vectors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from interp.anatomy import Anatomy, Blueprint
from interp.errors import UserError
from interventions.base import Entry, Intervention, Patch, Place, Placed, finite_strength
from interventions.fields import Factor, Head, check_each_once, check_head
from interventions.folding import Folding, HeadMap
from interventions.identity import Layer, ModelIdentity, Strict


@dataclass(frozen=True)
class ScaledHead:
    """One head and what happens to it.

    Attributes:
        layer: Layer of the head.
        head: Index of the head in its layer.
        scale: Factor on (the deviation from the mean of) its output.
        mean: ``d_head`` numbers to scale around; ``None`` is zero.
    """

    layer: int
    head: int
    scale: float
    mean: tuple[float, ...] | None = None


@dataclass(frozen=True)
class HeadScaling(Intervention):
    """Scales heads at every position, of prompt and answer alike. Immutable; attach it as often as you like.

    Attributes:
        heads: The heads; each at most once.

    Raises:
        UserError: If a head occurs twice.
    """

    heads: tuple[ScaledHead, ...]

    def __post_init__(self) -> None:
        check_each_once((h.layer, h.head) for h in self.heads)

    @classmethod
    def of(cls, heads: Iterable[tuple[int, int]], scale: float) -> HeadScaling:
        """Scale the given ``(layer, head)`` by one factor; 0 prunes them."""
        return cls(tuple(ScaledHead(layer, head, scale) for layer, head in heads))

    @classmethod
    def mean_ablation(cls, heads: Iterable[tuple[int, int]], means: Tensor) -> HeadScaling:
        """Replace the given heads' outputs by their means.

        Args:
            heads: ``(layer, head)`` pairs.
            means: Mean z of every head, ``(n_layers, n_heads, d_head)``, for example
                ``last_token_states(model, prompts).z.mean(0)``.
        """
        return cls(tuple(ScaledHead(layer, head, 0.0, tuple(means[layer, head].tolist())) for layer, head in heads))

    @property
    def edited_layers(self) -> set[int]:
        """The layers that it changes."""
        return {head.layer for head in self.heads}

    @property
    def head_scales(self) -> dict[tuple[int, int], float]:
        """The scales of the heads whose scale is not 1, by ``(layer, head)``."""
        return {(head.layer, head.head): head.scale for head in self.heads if head.scale != 1}

    @property
    def n_moved(self) -> int:
        """How many heads have a scale other than 1."""
        return len(self.edited_heads)

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model does not have one of the heads, or a mean has the wrong length.
        """
        anatomy = Anatomy(model)
        by_layer: dict[int, list[ScaledHead]] = defaultdict(list)
        for head in self.heads:
            anatomy.checked_head(head.layer, head.head)
            if head.mean is not None and len(head.mean) != anatomy.d_head:
                raise UserError(
                    f"The mean of head {head.layer}.{head.head} has {len(head.mean)} numbers, but this model's heads "
                    f"have {anatomy.d_head}; compute it on this model."
                )
            by_layer[head.layer].append(head)
        return [Patch("output_projection", layer, _scaled(anatomy, heads)) for layer, heads in sorted(by_layer.items())]

    def scaled(self, strength: float) -> HeadScaling:
        """The same with every scale ``strength`` times as far from 1."""
        factor = finite_strength(strength)
        return HeadScaling(tuple(replace(head, scale=1 + factor * (head.scale - 1)) for head in self.heads))

    def settled(self) -> tuple[HeadScaling, ...]:
        """The heads whose scale is not 1, if there are any."""
        moved = tuple(head for head in self.heads if head.scale != 1)
        return (HeadScaling(moved),) if moved else ()

    def described(self) -> Iterator[str]:
        """Its heads and their scales."""
        around = " around their means" if any(head.mean is not None for head in self.heads) else ""
        listed = ", ".join(f"{head.layer}.{head.head} x {head.scale:g}" for head in self.heads)
        yield f"{len(self.heads)} head{'s' * (len(self.heads) != 1)}{around}: {listed}"

    def entry(self, name: str, tensors: dict[str, Tensor]) -> HeadScalingEntry:
        """Its part of the intervention file; it has no tensors."""
        return HeadScalingEntry(
            heads=[
                HeadEntry(layer=h.layer, head=h.head, scale=h.scale, mean=None if h.mean is None else list(h.mean))
                for h in self.heads
            ]
        )

    def folded(self) -> Folding:
        """Scales of the heads' output matrices, and shifts of the bias for means."""
        return Folding(heads={(h.layer, h.head): HeadMap.around(h.scale, h.mean) for h in self.heads})


class HeadEntry(Strict):
    """One scaled head, as ``ScaledHead``; JSON's lists stand for tuples."""

    layer: Layer
    head: Head
    scale: Factor
    mean: list[Factor] | None = None


class HeadScalingEntry(Entry):
    """A ``HeadScaling``."""

    kind: Literal["head_scaling"] = "head_scaling"
    heads: Annotated[list[HeadEntry], Field(min_length=1)]

    def build(self, tensors: Mapping[str, Tensor]) -> HeadScaling:
        """The intervention that this entry describes."""
        return HeadScaling(
            tuple(ScaledHead(h.layer, h.head, h.scale, None if h.mean is None else tuple(h.mean)) for h in self.heads)
        )

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it changes."""
        return [Place("output_projection", head.layer) for head in self.heads]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that the model has its heads, as wide as their means."""
        for head in self.heads:
            check_head(model, head.layer, head.head)
            if head.mean is not None and len(head.mean) != model.d_head:
                raise UserError(
                    f"the mean of head {head.layer}.{head.head} has {len(head.mean)} numbers, but heads have "
                    f"{model.d_head}"
                )


def _scaled(anatomy: Anatomy, heads: list[ScaledHead]) -> Callable[[Tensor], Tensor]:
    """What becomes of the z of all heads of a layer, ``(..., n_heads * d_head)``."""
    factor = torch.ones(anatomy.n_heads, anatomy.d_head)
    shift = torch.zeros(anatomy.n_heads, anatomy.d_head)
    for head in heads:
        factor[head.head] = head.scale
        if head.mean is not None:
            shift[head.head] = torch.tensor(head.mean) * (1 - head.scale)
    factors, shifts = Placed(factor.flatten()), Placed(shift.flatten()) if shift.any() else None

    def scale(z: Tensor) -> Tensor:
        scaled = z * factors.like(z)
        return scaled if shifts is None else scaled + shifts.like(z)

    return scale
