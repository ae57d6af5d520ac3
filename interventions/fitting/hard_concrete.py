"""Learn gates by gradient descent with hard concrete masks, and damage as a constraint.

With s the scales of all gates, s = 1 + m * d:

1. d are free offsets, m are hard concrete gates (Louizos et al. 2018, arXiv 1712.01312): samples of a stretched binary
   concrete distribution, cut off at 0 and 1, so that gates close exactly and still have a gradient.
2. Adam minimises the mean of -log p(wanted answer) over conflict prompts, under two kinds of constraints: each guard's
   KL divergence from the unedited model is at most its budget, and the expected number of open gates is at most the
   wanted one.
3. The constraints are held by multipliers that rise while a constraint is broken and fall while there is room: dual
   ascent, next to Adam's descent.
4. After two thirds of the steps the gates that move most are kept for good, without noise, and only their scales are
   learned on.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from interp.teacher_forcing import Continued, token_batches
from interventions.fitting.scale_data import (
    GUARDS,
    Guard,
    Guarded,
    answer_losses,
    divergences,
    finite,
    guard_count,
    log_probabilities,
    scale_places,
    scaled,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from interventions.fitting.scale_learning import ScaleTraining

# Of the hard concrete distribution: its temperature, and how far it is stretched beyond 0 and 1.
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_GUARD_WEIGHT, _DUAL_RATE, _LARGEST_MULTIPLIER = 0.1, 0.2, 50.0
_SPARSITY_RATE = 0.05
_LEARNING_RATE = 0.05

_T = TypeVar("_T")


class MaskedScales:
    """The numbers that are learned for one direction.

    Args:
        model: The bridge.
        settings: What decides the training.

    Attributes:
        places: ``(layer, head)`` of every gate; head ``None`` is the feed-forward layer.
        offset, location: The learned numbers, ``(n_gates,)``.
        kept: 1 for gates that are kept for good, 0 for others, ``(n_gates,)``; ``None`` before that is decided.
    """

    def __init__(self, model: TransformerBridge, settings: ScaleTraining) -> None:
        self.places = scale_places(model, feed_forward=settings.feed_forward)
        self.offset = torch.zeros(len(self.places), requires_grad=True)
        self.location = torch.full((len(self.places),), 2.0, requires_grad=True)
        self.kept: Tensor | None = None

    def sampled(self, generator: torch.Generator) -> Tensor:
        """Scales with noise, ``(n_gates,)``."""
        if self.kept is not None:
            return 1 + self.kept * self.offset
        uniform = torch.rand(len(self.places), generator=generator).clamp(1e-6, 1 - 1e-6)
        logistic = uniform.log() - (1 - uniform).log()
        return 1 + _stretched((logistic + self.location) / _TEMPERATURE) * self.offset

    def scales(self) -> Tensor:
        """Scales without noise, ``(n_gates,)``; 1 for gates that were not kept, once that is decided."""
        with torch.no_grad():
            opened = _stretched(self.location) if self.kept is None else self.kept
            return 1 + opened * self.offset

    def expected_open(self) -> Tensor:
        """How many gates are open on average."""
        return torch.sigmoid(self.location - _TEMPERATURE * math.log(-_LOW / _HIGH)).sum()

    def keep(self, count: int) -> None:
        """Keep the ``count`` gates that move most for good."""
        moved = (self.scales() - 1).abs()
        with torch.no_grad():
            self.offset.copy_(self.scales() - 1)
        self.kept = torch.zeros(len(self.places))
        self.kept[moved.topk(min(count, len(moved))).indices] = 1


def _stretched(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


class HardConcrete:
    """The gates of one direction, and how far their learning is.

    Args:
        model: The bridge.
        settings: What decides the training.

    Attributes:
        places: ``(layer, head)`` of every gate; head ``None`` is the feed-forward layer.
        step: How many steps were made.
    """

    def __init__(self, model: TransformerBridge, settings: ScaleTraining) -> None:
        self.settings = settings
        self.step = 0
        self._gates = MaskedScales(model, settings)
        self.places = self._gates.places
        self._optimiser = torch.optim.Adam(
            [
                {"params": [self._gates.offset], "lr": _LEARNING_RATE},
                {"params": [self._gates.location], "lr": 3 * _LEARNING_RATE},
            ],
            betas=(0.8, 0.98),
        )
        # One for each guard, then that of the number of open gates.
        self._multipliers = torch.tensor([1.0] * len(GUARDS) + [0.0])

    def scales(self) -> Tensor:
        """The scales without noise, ``(n_gates,)``."""
        return self._gates.scales()

    def descend(
        self, model: TransformerBridge, wanted: Sequence[Continued], guards: Mapping[Guard, Sequence[Guarded]]
    ) -> None:
        """Make one step.

        Raises:
            UserError: If the numbers leave the range of the model's dtype.
        """
        settings = self.settings
        if self.step == settings.steps * 2 // 3:
            self._gates.keep(settings.max_scales)
        rng = random.Random(f"{settings.seed}/{self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        sampled = self._gates.sampled(generator)
        # Passes are made one by one; their gradients meet here.
        scales = sampled.detach().requires_grad_()
        drawn = _drawn(rng, wanted, settings.conflicts)
        counts = {kind: guard_count(kind, settings.guards) for kind in GUARDS}
        guarded: list[tuple[Guard, Guarded]] = [
            (kind, guard) for kind in GUARDS for guard in _drawn(rng, guards[kind], counts[kind])
        ]
        sizes = Counter(kind for kind, _ in guarded)
        multipliers = dict(zip(GUARDS, self._multipliers.tolist(), strict=False))
        weights = [_GUARD_WEIGHT * multipliers[kind] / settings.budgets[kind] / sizes[kind] for kind, _ in guarded]

        def answers(batch: list[int]) -> Tensor:
            items = [drawn[i] for i in batch]
            return answer_losses(log_probabilities(model, items), items)

        def damage(batch: list[int]) -> Tensor:
            chosen = [guarded[i][1] for i in batch]
            return divergences(model, log_probabilities(model, [item for item, _ in chosen]), chosen)

        with scaled(model, self.places, scales):
            _backward(drawn, [1 / len(drawn)] * len(drawn), answers)
            values = _backward([guard.item for _, guard in guarded], weights, damage)
        assert scales.grad is not None
        objective = (sampled * finite(scales.grad).to(sampled)).sum()
        if self._gates.kept is None:
            count = self._gates.expected_open() / settings.max_scales
            objective = objective + float(self._multipliers[-1]) * count
            self._multipliers[-1] = max(0.0, self._multipliers[-1] + _SPARSITY_RATE * (count.item() - 1))
        self._optimiser.zero_grad()
        objective.backward()
        self._optimiser.step()
        for index, kind in enumerate(GUARDS):
            divergence = sum(value for (of, _), value in zip(guarded, values, strict=True) if of == kind) / sizes[kind]
            moved = multipliers[kind] + _DUAL_RATE * (divergence / settings.budgets[kind] - 1)
            self._multipliers[index] = min(max(0.0, moved), _LARGEST_MULTIPLIER)
        self.step += 1

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step needs, but the number of steps."""
        moments = self._optimiser.state_dict()["state"]
        kept = {} if self._gates.kept is None else {"kept": self._gates.kept}
        return {
            "offset": self._gates.offset.detach(),
            "location": self._gates.location.detach(),
            "multipliers": self._multipliers,
            **kept,
            **{f"adam.{number}.{name}": value for number, state in moments.items() for name, value in state.items()},
        }

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on from ``tensors()`` after ``step`` steps.

        Raises:
            KeyError: If one is missing.
            ValueError: If they are of another number of gates.
        """
        offset, location, multipliers = (tensors[name] for name in ("offset", "location", "multipliers"))
        if offset.shape != self._gates.offset.shape:
            raise ValueError("another number of gates")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, moment = name.split(".")
                moments.setdefault(int(number), {})[moment] = value
        with torch.no_grad():
            self._gates.offset.copy_(offset)
            self._gates.location.copy_(location)
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": moments})
        self._gates.kept, self._multipliers, self.step = tensors.get("kept"), multipliers, step


def _backward(items: Sequence[Continued], weights: Sequence[float], loss: Callable[[list[int]], Tensor]) -> list[float]:
    """Add the gradient of the weighted sum of the items' losses, batch by batch; returns the losses."""
    values = [0.0] * len(items)
    for batch in token_batches(items):
        found = loss(batch)
        (found * torch.tensor([weights[i] for i in batch], device=found.device)).sum().backward()
        for i, value in zip(batch, found.tolist(), strict=True):
            values[i] = value
    return values


def _drawn(rng: random.Random, items: Sequence[_T], count: int) -> list[_T]:
    return rng.sample(list(items), min(count, len(items)))
