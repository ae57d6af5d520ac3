"""Learn scales by gradient descent with hard concrete masks, and damage as a constraint.

With s all scales, s = 1 + m * d:

1. d are free offsets, m are hard concrete masks (Louizos et al. 2018, arXiv 1712.01312): samples of a stretched binary
   concrete distribution, cut off at 0 and 1, so that masks close exactly and still have a gradient.
2. Adam minimises the mean of -log p(wanted answer) over conflict prompts, under two kinds of constraints: each guard's
   KL divergence from the unedited model is at most its budget, and the expected number of open masks is at most the
   wanted one.
3. The constraints are held by multipliers that rise while a constraint is broken and fall while there is room: dual
   ascent, next to Adam's descent.
4. After two thirds of the steps the scales that move most are kept for good, without noise, and only these are
   learned on.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from interp.teacher_forcing import Continued, token_batches
from interventions.fitting.scale_data import (
    GUARDS,
    Guard,
    Guarded,
    ScaleData,
    answer_losses,
    divergences,
    finite,
    guard_count,
    log_probabilities,
    scale_places,
    scaled,
)

if TYPE_CHECKING:
    from interventions.fitting.scale_training import ScaleTraining

# Of the hard concrete distribution: its temperature, and how far it is stretched beyond 0 and 1.
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_GUARD_WEIGHT, _DUAL_RATE, _LARGEST_MULTIPLIER = 0.1, 0.2, 50.0
_SPARSITY_RATE = 0.05
_LEARNING_RATE = 0.05

_T = TypeVar("_T")


class MaskedScales:
    """The numbers that are learned for one direction.

    Args:
        model: The model, or a bridge around it.
        settings: What decides the training.

    Attributes:
        places: What has a scale.
        offset, location: The learned numbers, ``(n_scales,)``.
        kept: 1 for scales that are kept for good, 0 for others, ``(n_scales,)``; ``None`` before that is decided.
    """

    def __init__(self, model: nn.Module, settings: ScaleTraining) -> None:
        self.places = scale_places(model, feed_forward=settings.feed_forward, lowest=settings.lowest)
        self.offset = torch.zeros(len(self.places), requires_grad=True)
        self.location = torch.full((len(self.places),), 2.0, requires_grad=True)
        self.kept: Tensor | None = None

    def sampled(self, generator: torch.Generator) -> Tensor:
        """Scales with noise, ``(n_scales,)``."""
        if self.kept is not None:
            return 1 + self.kept * self.offset
        uniform = torch.rand(len(self.places), generator=generator).clamp(1e-6, 1 - 1e-6)
        logistic = uniform.log() - (1 - uniform).log()
        return 1 + _stretched((logistic + self.location) / _TEMPERATURE) * self.offset

    def scales(self) -> Tensor:
        """Scales without noise, ``(n_scales,)``; 1 for those that were not kept, once that is decided."""
        with torch.no_grad():
            opened = _stretched(self.location) if self.kept is None else self.kept
            return 1 + opened * self.offset

    def expected_open(self) -> Tensor:
        """How many masks are open on average."""
        return torch.sigmoid(self.location - _TEMPERATURE * math.log(-_LOW / _HIGH)).sum()

    def keep(self, count: int, per_layer: int | None = None) -> None:
        """Keep the ``count`` scales that move most for good, of the heads of a layer ``per_layer`` at most."""
        moved = (self.scales() - 1).abs()
        with torch.no_grad():
            self.offset.copy_(self.scales() - 1)
        self.kept = torch.zeros(len(self.places))
        heads: Counter[int] = Counter()
        for index in moved.argsort(descending=True).tolist():
            layer, head = self.places[index]
            if self.kept.sum() < count and (head is None or per_layer is None or heads[layer] < per_layer):
                self.kept[index] = 1
                heads[layer] += head is not None


def _stretched(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


class HardConcrete:
    """The scales of one direction, and how far their learning is.

    Args:
        model: The model, or a bridge around it.
        settings: What decides the training.

    Attributes:
        places: What has a scale.
        step: How many steps were made.
    """

    def __init__(self, model: nn.Module, settings: ScaleTraining) -> None:
        self.settings = settings
        self.step = 0
        self._masked = MaskedScales(model, settings)
        self.places = self._masked.places
        self._optimiser = torch.optim.Adam(
            [
                {"params": [self._masked.offset], "lr": _LEARNING_RATE},
                {"params": [self._masked.location], "lr": 3 * _LEARNING_RATE},
            ],
            betas=(0.8, 0.98),
        )
        # One for each guard, then that of the number of open masks.
        self._multipliers = torch.tensor([1.0] * len(GUARDS) + [0.0])

    def scales(self) -> Tensor:
        """The scales without noise, ``(n_scales,)``."""
        return self._masked.scales()

    def descend(self, wanted: Sequence[Continued], data: ScaleData) -> None:
        """Make one step.

        Raises:
            UserError: If the numbers leave the range of the model's dtype.
        """
        model, settings = data.model, self.settings
        if self.step == settings.steps * 2 // 3:
            self._masked.keep(settings.max_scales, settings.max_heads_per_layer)
        rng = random.Random(f"{settings.seed}/{self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        sampled = self._masked.sampled(generator)
        # Passes are made one by one; their gradients meet here.
        scales = sampled.detach().requires_grad_()
        drawn = _drawn(rng, wanted, settings.conflicts)
        counts = {kind: guard_count(kind, settings.guards) for kind in GUARDS}
        guarded: list[tuple[Guard, Guarded]] = [
            (kind, guard) for kind in GUARDS for guard in _drawn(rng, data.guards[kind], counts[kind])
        ]
        sizes = Counter(kind for kind, _ in guarded)
        multipliers = dict(zip(GUARDS, self._multipliers.tolist(), strict=False))
        weights = [_GUARD_WEIGHT * multipliers[kind] / settings.budgets[kind] / sizes[kind] for kind, _ in guarded]

        def answers(batch: list[int]) -> Tensor:
            items = [drawn[i] for i in batch]
            return answer_losses(log_probabilities(model, items, roughly=True), items)

        def damage(batch: list[int]) -> Tensor:
            chosen = [guarded[i][1] for i in batch]
            log_p = log_probabilities(model, [item for item, _ in chosen], roughly=True)
            return divergences(model, log_p, chosen)

        with scaled(model, self.places, scales):
            _backward(model, drawn, [1 / len(drawn)] * len(drawn), answers)
            values = _backward(model, [guard.item for _, guard in guarded], weights, damage)
        assert scales.grad is not None
        objective = (sampled * finite(scales.grad).to(sampled)).sum()
        if self._masked.kept is None:
            count = self._masked.expected_open() / settings.max_scales
            objective = objective + float(self._multipliers[-1]) * count
            self._multipliers[-1] = max(0.0, self._multipliers[-1] + _SPARSITY_RATE * (count.item() - 1))
        self._optimiser.zero_grad()
        objective.backward()
        self._optimiser.step()
        for index, kind in enumerate(GUARDS):
            if not sizes[kind]:
                continue
            divergence = sum(value for (of, _), value in zip(guarded, values, strict=True) if of == kind) / sizes[kind]
            moved = multipliers[kind] + _DUAL_RATE * (divergence / settings.budgets[kind] - 1)
            self._multipliers[index] = min(max(0.0, moved), _LARGEST_MULTIPLIER)
        self.step += 1

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step needs, but the number of steps."""
        moments = self._optimiser.state_dict()["state"]
        kept = {} if self._masked.kept is None else {"kept": self._masked.kept}
        return {
            "offset": self._masked.offset.detach(),
            "location": self._masked.location.detach(),
            "multipliers": self._multipliers,
            **kept,
            **{f"adam.{number}.{name}": value for number, state in moments.items() for name, value in state.items()},
        }

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on from ``tensors()`` after ``step`` steps.

        Raises:
            KeyError: If one is missing.
            ValueError: If they are of another number of scales.
        """
        offset, location, multipliers = (tensors[name] for name in ("offset", "location", "multipliers"))
        if offset.shape != self._masked.offset.shape:
            raise ValueError("another number of scales")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, moment = name.split(".")
                moments.setdefault(int(number), {})[moment] = value
        with torch.no_grad():
            self._masked.offset.copy_(offset)
            self._masked.location.copy_(location)
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": moments})
        self._masked.kept, self._multipliers, self.step = tensors.get("kept"), multipliers, step


def _backward(
    model: nn.Module, items: Sequence[Continued], weights: Sequence[float], loss: Callable[[list[int]], Tensor]
) -> list[float]:
    """Add the gradient of the weighted sum of the items' losses, batch by batch; returns the losses."""
    values = [0.0] * len(items)
    for batch in token_batches(model, items):
        found = loss(batch)
        (found * torch.tensor([weights[i] for i in batch], device=found.device)).sum().backward()
        for i, value in zip(batch, found.tolist(), strict=True):
            values[i] = value
    return values


def _drawn(rng: random.Random, items: Sequence[_T], count: int) -> list[_T]:
    return rng.sample(list(items), min(count, len(items)))
