"""The trust dial: gates of attention heads and feed-forward layers that move together, from memory to context.

Each gate has one scale for full trust in memory and one for full trust in the context. In between they move on
straight lines through the unchanged model:

    scale(t) = 1 + t (context - 1)     0 <= t <= 1
    scale(t) = 1 - t (memory - 1)     -1 <= t <= 0

so that t = 0 changes nothing, bit for bit. ``interventions.gate_training`` learns the scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interventions.base import Handle, Patch, attach_patches
from interventions.feedforward import FeedForwardScaling
from interventions.heads import HeadScaling, ScaledHead


@dataclass(frozen=True)
class Gate:
    """One attention head, or one feed-forward layer, on the dial.

    Attributes:
        layer: The layer.
        head: The head; ``None`` is the feed-forward layer.
        memory: Its scale at trust -1.
        context: Its scale at trust 1.
    """

    layer: int
    head: int | None
    memory: float = 1.0
    context: float = 1.0

    def scale(self, trust: float) -> float:
        """Its scale at some trust."""
        return 1 + abs(trust) * ((self.context if trust > 0 else self.memory) - 1)


@dataclass(frozen=True)
class DialPoint:
    """What was measured at one setting of the dial: shares of conflict prompts, by the first token of the answer."""

    trust: float
    memory_rate: float
    context_rate: float


@dataclass(frozen=True)
class TrustDial:
    """Scales heads and feed-forward layers at every position, as far as ``trust`` says. Immutable.

    Attributes:
        gates: What moves; each head and each feed-forward layer at most once.
        trust: From -1 (memory) through 0 (the unchanged model) to 1 (context).
        calibration: Measured rates, by rising trust.

    Raises:
        UserError: If trust lies outside, a gate occurs twice, or the calibration is out of order.
    """

    gates: tuple[Gate, ...]
    trust: float = 0.0
    calibration: tuple[DialPoint, ...] = ()

    def __post_init__(self) -> None:
        if not -1 <= self.trust <= 1:
            raise UserError(f"Trust lies between -1 (memory) and 1 (context), not at {self.trust:g}.")
        places = [(gate.layer, gate.head) for gate in self.gates]
        if twice := [place for place, count in Counter(places).items() if count > 1]:
            layer, head = twice[0]
            what = f"feed-forward layer {layer}" if head is None else f"head {layer}.{head}"
            raise UserError(f"The {what} has two gates; give it one.")
        settings = [point.trust for point in self.calibration]
        if settings != sorted(set(settings)) or any(not -1 <= setting <= 1 for setting in settings):
            raise UserError("The dial's calibration must be ordered by trust, from -1 to 1; fit the dial again.")

    def at(self, trust: float) -> TrustDial:
        """The same dial at another setting.

        Raises:
            UserError: If trust lies outside -1 to 1.
        """
        return replace(self, trust=trust)

    def trust_for(self, towards: Literal["context", "memory"], rate: float) -> float:
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

    def interventions(self) -> list[HeadScaling | FeedForwardScaling]:
        """What the dial does at its setting, as interventions that have none; nothing at trust 0."""
        scales = [(gate, gate.scale(self.trust)) for gate in self.gates]
        moved = [(gate, scale) for gate, scale in scales if scale != 1]
        heads = [ScaledHead(gate.layer, gate.head, scale) for gate, scale in moved if gate.head is not None]
        layers = [(gate.layer, scale) for gate, scale in moved if gate.head is None]
        parts: Sequence[HeadScaling | FeedForwardScaling] = (
            HeadScaling(tuple(heads)),
            FeedForwardScaling(tuple(layers)),
        )
        return [part for part in parts if len(part)]

    @property
    def edited_layers(self) -> set[int]:
        """The layers that it changes at its setting."""
        return {layer for part in self.interventions() for layer in part.edited_layers}

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model does not have a head or layer of the dial.
        """
        anatomy = Anatomy(model)
        for gate in self.gates:
            anatomy.checked_head(gate.layer, 0 if gate.head is None else gate.head)
        return [patch for part in self.interventions() for patch in part.patches(model)]

    def attach(self, model: nn.Module) -> Handle:
        """Apply to a transformers model or a ``TransformerBridge`` until the handle is removed.

        Raises:
            UserError: As ``patches``.
        """
        return attach_patches(model, self.patches(model))

    def __len__(self) -> int:
        return len(self.gates)
