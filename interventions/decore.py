"""Contrast what a model says with what it says without its retrieval heads: DeCoRe (Gema et al. 2024, 2410.18860).

Heads that copy from the prompt are left out of a second reading, which then says what the model makes up. With z the
logits of a prompt and z' those without these heads, the next token is chosen by

    (1 + a) z - a z',   a = strength * H(softmax z)

where H is the entropy in nats: the less sure the model is, the more the contrast counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from interp.anatomy import Blueprint
from interp.errors import UserError
from interp.pairs import Combined
from interventions.base import Entry, Intervention, Patch, Place, finite_strength
from interventions.fields import Factor, Head, check_each_once, check_head
from interventions.heads import HeadScaling
from interventions.identity import Layer, ModelIdentity, Strict
from interventions.side_by_side import SecondHead, second_reading


@dataclass(frozen=True)
class DeCoRe(Intervention):
    """Chooses next tokens by the contrast with a reading in which some heads write nothing. Immutable.

    Every pass costs two, and ``generate`` works as without it, but for beams.

    Attributes:
        heads: ``(layer, head)`` of the heads that are left out of the second reading; each at most once.
        strength: Factor on the entropy: 1 as published, 0 is the model as it is, below 0 goes towards memory, which the
            paper does not have.

    Raises:
        UserError: If a head occurs twice, there is none, or the strength is not finite.
    """

    heads: tuple[tuple[int, int], ...]
    strength: float = 1.0

    in_one_pass = True

    def __post_init__(self) -> None:
        if not self.heads:
            raise UserError("DeCoRe leaves heads out of the second reading; give it one at least.")
        check_each_once(self.heads)
        finite_strength(self.strength)

    @property
    def edited_layers(self) -> set[int]:
        """The layers that it changes in the second reading."""
        return {layer for layer, _ in self.heads}

    @property
    def edited_heads(self) -> tuple[tuple[int, int], ...]:
        """``(layer, head)`` of the heads that are left out of the second reading, sorted."""
        return tuple(sorted(self.heads)) if self.strength else ()

    @property
    def n_moved(self) -> int:
        """How many heads are left out."""
        return len(self.edited_heads)

    @property
    def contrast(self) -> tuple[Intervention, Combined]:
        """The heads scaled to 0, and ``scores``."""
        return HeadScaling.of(self.heads, 0.0), self.scores

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model does not have one of the heads.
        """
        left_out = SecondHead(own=0.0, other=0.0)
        return second_reading(model, dict.fromkeys(self.heads, left_out), self.scores)

    def scores(self, whole: Tensor, without: Tensor) -> Tensor:
        """Scores of the next token from the logits of both readings, each ``(n, d_vocab)``."""
        log_probs = whole.log_softmax(-1)
        alpha = self.strength * torch.special.entr(log_probs.exp()).sum(-1, keepdim=True)
        return whole + alpha * (whole - without)

    def scaled(self, strength: float) -> DeCoRe:
        """The same with its strength multiplied."""
        return replace(self, strength=self.strength * finite_strength(strength))

    def settled(self) -> tuple[DeCoRe, ...]:
        """Itself, unless it has no strength."""
        return (self,) if self.strength else ()

    def described(self) -> Iterator[str]:
        """Its heads and its strength."""
        listed = ", ".join(f"{layer}.{head}" for layer, head in self.heads)
        count = f"{len(self.heads)} head{'s' * (len(self.heads) != 1)}"
        yield f"next token by contrast with a reading without {count}, strength {self.strength:g}: {listed}"

    def entry(self, name: str, tensors: dict[str, Tensor]) -> DeCoReEntry:
        """Its part of the intervention file; it has no tensors."""
        heads = [{"layer": layer, "head": head} for layer, head in self.heads]
        return DeCoReEntry.model_validate({"heads": heads, "strength": self.strength})


class LeftOutHeadEntry(Strict):
    """One head that is left out of the second reading."""

    layer: Layer
    head: Head


class DeCoReEntry(Entry):
    """A ``DeCoRe``."""

    kind: Literal["decore"] = "decore"
    heads: Annotated[list[LeftOutHeadEntry], Field(min_length=1)]
    strength: Factor

    def build(self, tensors: Mapping[str, Tensor]) -> DeCoRe:
        """The intervention that this entry describes."""
        return DeCoRe(tuple((h.layer, h.head) for h in self.heads), self.strength)

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it changes."""
        return [Place("output_projection", h.layer) for h in self.heads]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that the model has its heads."""
        for h in self.heads:
            check_head(model, h.layer, h.head)
