"""The trust dial: scales of attention heads and feed-forward layers that move together, from memory to context.

Each has one value for full trust in memory and one for full trust in the context. In between they move on straight
lines through the unchanged model:

    scale(t) = 1 + t (context - 1)     0 <= t <= 1
    scale(t) = 1 - t (memory - 1)     -1 <= t <= 0

so that t = 0 changes nothing, bit for bit. ``interventions.fitting`` learns the scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from interp.anatomy import Anatomy, Blueprint
from interp.answers import Direction
from interp.errors import UserError
from interventions.base import Entry, Intervention, Patch, Place
from interventions.feedforward import FeedForwardScaling
from interventions.fields import Factor, Head, Rate, Trust, check_head
from interventions.folding import Folding
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import Layer, ModelIdentity, Strict


@dataclass(frozen=True)
class DialScale:
    """The scale of one attention head, or of one feed-forward layer, on the dial.

    Attributes:
        layer: The layer.
        head: The head; ``None`` is the feed-forward layer.
        memory: The scale at trust -1.
        context: The scale at trust 1.
    """

    layer: int
    head: int | None
    memory: float = 1.0
    context: float = 1.0

    def at(self, trust: float) -> float:
        """The scale at some trust."""
        return 1 + abs(trust) * ((self.context if trust > 0 else self.memory) - 1)


@dataclass(frozen=True)
class DialPoint:
    """What was measured at one setting of the dial: shares of conflict prompts, by the first token of the answer."""

    trust: float
    memory_rate: float
    context_rate: float


@dataclass(frozen=True)
class TrustDial(Intervention):
    """Scales heads and feed-forward layers at every position, as far as ``trust`` says. Immutable.

    Attributes:
        scales: What moves; each head and each feed-forward layer at most once.
        trust: From -1 (memory) through 0 (the unchanged model) to 1 (context).
        calibration: Measured rates, by rising trust.

    Raises:
        UserError: If trust lies outside, a head or layer occurs twice, or the calibration is out of order.
    """

    scales: tuple[DialScale, ...]
    trust: float = 0.0
    calibration: tuple[DialPoint, ...] = ()

    def __post_init__(self) -> None:
        if not -1 <= self.trust <= 1:
            raise UserError(f"Trust lies between -1 (memory) and 1 (context), not at {self.trust:g}.")
        places = [(scale.layer, scale.head) for scale in self.scales]
        if twice := [place for place, count in Counter(places).items() if count > 1]:
            layer, head = twice[0]
            what = f"feed-forward layer {layer}" if head is None else f"head {layer}.{head}"
            raise UserError(f"The {what} has two scales on the dial; give it one.")
        settings = [point.trust for point in self.calibration]
        if settings != sorted(set(settings)) or any(not -1 <= setting <= 1 for setting in settings):
            raise UserError("The dial's calibration must be ordered by trust, from -1 to 1; fit the dial again.")

    def at(self, trust: float) -> TrustDial:
        """The same dial at another setting.

        Raises:
            UserError: If trust lies outside -1 to 1.
        """
        return replace(self, trust=trust)

    def trust_for(self, towards: Direction, rate: float) -> float:
        """The setting closest to 0 at which, by the calibration, the rate is at least ``rate``.

        Between the measured settings rates are taken to lie on straight lines.

        Raises:
            UserError: If the dial has no calibration or never reaches the rate, or that is no rate.
        """
        sign = 1.0 if towards == "context" else -1.0
        side = sorted((p for p in self.calibration if p.trust * sign >= 0), key=lambda point: point.trust * sign)
        if not side or side[0].trust != 0:
            raise UserError("The dial was not calibrated, so that no setting can be found for a rate; fit it again.")
        rates = [point.memory_rate if towards == "memory" else point.context_rate for point in side]
        if not 0 <= rate <= 1:
            raise UserError(f"A rate lies between 0 and 1, not at {rate:g}.")
        if rate > max(rates):
            raise UserError(
                f"On dev the dial reached a {towards} rate of {max(rates):.2f} at most; ask for no more than that."
            )
        reached = next(i for i, found in enumerate(rates) if found >= rate)
        if reached == 0:
            return 0.0
        share = (rate - rates[reached - 1]) / (rates[reached] - rates[reached - 1])
        before, after = side[reached - 1].trust, side[reached].trust
        return before + share * (after - before)

    def turned(self, trust: float) -> TrustDial:
        """As ``at``."""
        return self.at(trust)

    def scaled(self, strength: float) -> TrustDial:
        """Refuse: how far a dial goes is its setting.

        Raises:
            UserError: Always.
        """
        raise UserError("A dial has no strength; set its trust.")

    def settled(self) -> tuple[HeadScaling | FeedForwardScaling, ...]:
        """What the dial does at its setting, as interventions that have none; nothing at trust 0."""
        scales = [(place, place.at(self.trust)) for place in self.scales]
        heads = HeadScaling(tuple(ScaledHead(p.layer, p.head, scale) for p, scale in scales if p.head is not None))
        layers = FeedForwardScaling(tuple((p.layer, scale) for p, scale in scales if p.head is None))
        return (*heads.settled(), *layers.settled())

    @property
    def edited_layers(self) -> set[int]:
        """The layers that it changes at its setting."""
        return {layer for part in self.settled() for layer in part.edited_layers}

    @property
    def edited_heads(self) -> tuple[tuple[int, int], ...]:
        """``(layer, head)`` of the heads that it moves at its setting, sorted."""
        return tuple(head for part in self.settled() for head in part.edited_heads)

    @property
    def n_moved(self) -> int:
        """How many heads and feed-forward layers it moves at its setting."""
        return sum(part.n_moved for part in self.settled())

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model does not have a head or layer of the dial.
        """
        anatomy = Anatomy(model)
        for scale in self.scales:
            anatomy.checked_head(scale.layer, 0 if scale.head is None else scale.head)
        return [patch for part in self.settled() for patch in part.patches(model)]

    def described(self) -> Iterator[str]:
        """How many scales it has, and where it stands."""
        yield f"a dial of {len(self.scales)} scales, at {self.trust:+g}"

    def entry(self, name: str, tensors: dict[str, Tensor]) -> TrustDialEntry:
        """Its part of the intervention file; it has no tensors."""
        return TrustDialEntry(
            trust=self.trust,
            scales=[DialScaleEntry(**vars(scale)) for scale in self.scales],
            calibration=[DialPointEntry(**vars(point)) for point in self.calibration],
        )

    def folded(self) -> Folding:
        """What it does to weights at its setting."""
        folding = Folding()
        for part in self.settled():
            folding = folding.then(part.folded())
        return folding


class DialScaleEntry(Strict):
    """A ``DialScale``."""

    layer: Layer
    head: Head | None
    memory: Factor
    context: Factor


class DialPointEntry(Strict):
    """A ``DialPoint``."""

    trust: Trust
    memory_rate: Rate
    context_rate: Rate


class TrustDialEntry(Entry):
    """A ``TrustDial``."""

    kind: Literal["trust_dial"] = "trust_dial"
    trust: Trust
    scales: Annotated[list[DialScaleEntry], Field(min_length=1)]
    calibration: list[DialPointEntry] = Field(default_factory=list)

    def build(self, tensors: Mapping[str, Tensor]) -> TrustDial:
        """The intervention that this entry describes."""
        return TrustDial(
            tuple(DialScale(**dict(scale)) for scale in self.scales),
            self.trust,
            tuple(DialPoint(**dict(point)) for point in self.calibration),
        )

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it changes when it is turned."""
        mlp = blueprint.writing_part("mlp")
        return [Place(mlp if scale.head is None else "output_projection", scale.layer) for scale in self.scales]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that the model has its heads."""
        for scale in self.scales:
            check_head(model, scale.layer, scale.head or 0)
