"""Learn gates by constrained Gauss-Newton steps: every prompt's gradient counts, and damage is a constraint.

With s the scales of all gates, a step does this:

1. Each row of a batch gets scales of its own, so that one backward pass gives the gradient of every prompt's loss.
2. They make local quadratic models. The objective: mean -log p of the wanted answers to conflict prompts, plus the
   same of the right answers to guards. Its curvature is Gauss-Newton's, p (1 - p) times the outer product of the
   gradient of the answer's log-odds. The constraints: for each guard the KL divergence from the unedited model, whose
   curvature is the Fisher information, estimated by answers drawn from the model. All are running averages that move
   along with s, so that prompts of earlier steps count on.
3. The step minimises the objective's model such that each guard's model stays within its budget, by dual ascent on
   the multipliers; the length of the step is limited in the same way. Models flatter the prompts that they were made
   of: their budgets are tightened while fresh prompts diverge by more than the user's, and relaxed while by less.
4. Until two thirds of the steps, gates are closed (scale 1) down to the wanted number, by the same share each time:
   those whose closing costs least once all others make up for it (optimal brain surgeon: Hassibi and Stork 1993,
   equation 5).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from interp.errors import UserError
from interp.teacher_forcing import Continued, token_batches
from interventions.gate_data import (
    GUARDS,
    Guard,
    Guarded,
    Place,
    answer_losses,
    divergences,
    gate_places,
    log_probabilities,
    scaled,
    summed,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from interventions.gate_training import GateTraining

# What each step leaves of the weight of earlier prompts, and how far curvature is drawn towards its diagonal.
_DECAY, _SHRINKAGE = 0.9, 0.2
_POOLED = 0.4
# Pulls scales to 1 where nothing else pulls.
_RIDGE = 0.005
_LARGEST_STEP = 1.0
# Of the right answers to guards, next to the wanted answers to conflict prompts.
_RIGHT_WEIGHT = 1.0
# p / (1 - p) turns a squared gradient of -log p into Gauss-Newton's curvature; beyond these it is all noise.
_FLATTEST, _STEEPEST = 0.3, 20.0
# How fast budgets of the models follow what fresh prompts diverge, and how far.
_REACTION, _TIGHTEST = 0.5, 8.0
# Fisher information of a text is drawn in two halves, every other token each: less noise for one more pass.
_TEXT_DRAWS = 2
_DUAL_STEPS, _DUAL_RATE, _MULTIPLIERS = 150, 0.6, (1e-4, 3e3)

_T = TypeVar("_T")


class Step(NamedTuple):
    """A solved step.

    Attributes:
        scales: Where it leads, ``(n_gates,)``.
        curvature: Of the Lagrangian among the open gates, ``(n_open, n_open)``, float64.
    """

    scales: Tensor
    curvature: Tensor


class Quadratic:
    """A running average of a loss over prompts, as a quadratic function of the way from the present scales.

    Attributes:
        value: Weighted sum of the losses, ``()``.
        gradient: The same of their gradients, ``(n_gates,)``.
        curvature: The same of their curvatures, ``(n_gates, n_gates)``.
        weight: Sum of the weights, ``()``.
    """

    def __init__(self, n_gates: int) -> None:
        self.value = torch.zeros(())
        self.gradient = torch.zeros(n_gates)
        self.curvature = torch.zeros(n_gates, n_gates)
        self.weight = torch.zeros(())

    def add(self, value: Tensor, gradient: Tensor, curvature: Tensor) -> None:
        """Count new prompts' mean loss, gradient and curvature in."""
        self.value = self.value + value
        self.gradient = self.gradient + gradient
        self.curvature = self.curvature + curvature
        self.weight = self.weight + 1

    def move(self, way: Tensor) -> None:
        """Look from scales that lie ``way`` from here, and let what was counted fade."""
        bent = self.curvature @ way
        self.value = _DECAY * (self.value + self.gradient @ way + way @ bent / 2)
        self.gradient = _DECAY * (self.gradient + bent)
        self.curvature = _DECAY * self.curvature
        self.weight = _DECAY * self.weight

    def average(self) -> tuple[float, Tensor, Tensor]:
        """The averages in float64; the curvature is drawn towards its diagonal, which fewer prompts suffice for."""
        value, gradient, curvature = (x.double() / self.weight for x in (self.value, self.gradient, self.curvature))
        return float(value), gradient, curvature.lerp(curvature.diagonal().diag(), _SHRINKAGE)


def constrained_step(
    objective: Sequence[Tensor],
    constraints: Sequence[tuple[float, Tensor, Tensor]],
    budgets: Sequence[float],
    present: Tensor,
    open_gates: Tensor,
) -> Step:
    """Where the objective's model is least while every constraint's model is within its budget.

    Solved by dual ascent: a multiplier is raised by as much as its constraint is broken, in proportion, and lowered
    while there is room; each time the step has a closed form. If the budgets cannot be kept, they are broken little.

    Args:
        objective: Gradient ``(n_gates,)`` and curvature ``(n_gates, n_gates)`` at the present scales.
        constraints: Value, gradient and curvature of each.
        budgets: The largest value of each.
        present: The present scales, ``(n_gates,)``.
        open_gates: Which gates may move, ``(n_gates,)``; the others go to 1.
    """
    gates = open_gates.nonzero().flatten()
    forced = torch.where(open_gates, 0.0, 1 - present).double()
    offset = (present[gates] - 1).double()
    identity = torch.eye(len(gates), dtype=torch.double)

    def among_open(gradient: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        return (gradient + curvature @ forced)[gates], curvature[gates][:, gates]

    gradient, curvature = among_open(*objective)
    gradient, curvature = gradient + _RIDGE * offset, curvature + _RIDGE * identity
    limits = []
    for (value, slope, bend), budget in zip(constraints, budgets, strict=True):
        at_forced = value + float(slope @ forced + forced @ bend @ forced / 2)
        limits.append((at_forced, *among_open(slope, bend), budget))
    # The length of the step is limited like the rest: |step|^2 / 2 is a quadratic too.
    limits.append((0.0, torch.zeros_like(gradient), identity, _LARGEST_STEP / 2))
    multipliers = torch.ones(len(limits), dtype=torch.double)
    step, bent = torch.zeros_like(gradient), curvature
    for _ in range(_DUAL_STEPS):
        bent = curvature + sum(m * limit[2] for m, limit in zip(multipliers, limits, strict=True))
        step = -torch.linalg.solve(
            bent, gradient + sum(m * limit[1] for m, limit in zip(multipliers, limits, strict=True))
        )
        used = torch.tensor([v + float(g @ step + step @ h @ step / 2) for v, g, h, _ in limits], dtype=torch.double)
        share = used / torch.tensor([limit[3] for limit in limits], dtype=torch.double)
        raised = (multipliers * share.clamp(0.5, 2) ** _DUAL_RATE).clamp(*_MULTIPLIERS)
        settled = torch.allclose(raised, multipliers, rtol=2e-3, atol=1e-4)
        multipliers = raised
        if settled:
            break
    scales = torch.ones_like(present)
    scales[gates] = present[gates] + step.to(present)
    return Step(scales, bent)


class GaussNewton:
    """The scales of one direction, and how far their learning is.

    Args:
        model: The bridge.
        settings: What decides the training.

    Attributes:
        places: ``(layer, head)`` of every gate; head ``None`` is the feed-forward layer.
        step: How many steps were made.
    """

    def __init__(self, model: TransformerBridge, settings: GateTraining) -> None:
        self.settings = settings
        self.places = gate_places(model, feed_forward=settings.feed_forward)
        self.step = 0
        n_gates = len(self.places)
        self._scales = torch.ones(n_gates)
        self._open = torch.ones(n_gates, dtype=torch.bool)
        self._answers, self._right = Quadratic(n_gates), Quadratic(n_gates)
        self._guards = {kind: Quadratic(n_gates) for kind in GUARDS}
        self._budgets = torch.tensor([settings.budgets[kind] for kind in GUARDS])

    def scales(self) -> Tensor:
        """The scales as they are, ``(n_gates,)``; exactly 1 for closed gates."""
        return self._scales.clone()

    def descend(
        self, model: TransformerBridge, wanted: Sequence[Continued], guards: Mapping[Guard, Sequence[Guarded]]
    ) -> None:
        """Make one step.

        Raises:
            UserError: If the numbers leave the range of the model's dtype.
        """
        self._look(model, wanted, guards)
        pairs = zip(self._answers.average()[1:], self._right.average()[1:], strict=True)
        objective = [wanted + _RIGHT_WEIGHT * right for wanted, right in pairs]
        constraints = self._constraints()
        budgets = self._budgets.tolist()
        while True:
            found = constrained_step(objective, constraints, budgets, self._scales, self._open)
            surplus = int(self._open.sum()) - self._most_open()
            if surplus <= 0:
                break
            # A third at a time: what is closed changes what the others are worth.
            self._close(found, min(surplus, surplus // 3 + 1))
        moved = found.scales - self._scales
        for quadratic in self._quadratics.values():
            quadratic.move(moved)
        self._scales = found.scales
        self.step += 1

    def _constraints(self) -> list[tuple[float, Tensor, Tensor]]:
        """Value, gradient and curvature of each guard; prompts of each are few, so that guards lend theirs."""
        own = [self._guards[kind].average() for kind in GUARDS]
        sizes = [curvature.trace().clamp(min=1e-12) for _, _, curvature in own]
        shared = sum(curvature / size for (_, _, curvature), size in zip(own, sizes, strict=True)) / len(own)
        return [
            (value, gradient, curvature.lerp(shared * size, _POOLED))
            for (value, gradient, curvature), size in zip(own, sizes, strict=True)
        ]

    def _look(
        self, model: TransformerBridge, wanted: Sequence[Continued], guards: Mapping[Guard, Sequence[Guarded]]
    ) -> None:
        """Add this step's prompts to the running averages."""
        settings = self.settings
        generator = torch.Generator().manual_seed(random.Random(f"{settings.seed}/{self.step}").getrandbits(60))
        items = _turn(wanted, settings.conflicts, self.step, settings.seed)

        def answers(log_p: Tensor, batch: list[int]) -> list[Tensor]:
            return [answer_losses(log_p, [items[i] for i in batch])]

        values, gradients = gradients_by_row(model, self.places, self._scales, items, answers)
        self._answers.add(*_gauss_newton(values[0], gradients[0]))
        for index, kind in enumerate(GUARDS):
            count = settings.guards if kind == "none" else -(-settings.guards // 2)
            guarded = _turn(guards[kind], count, self.step, settings.seed)
            losses = partial(_guard_losses, model, guarded, kind, generator)
            items = [item for item, _ in guarded]
            values, gradients = gradients_by_row(model, self.places, self._scales, items, losses)
            if self.step:
                full = settings.budgets[kind]
                share = full / max(float(values[0].mean()), 1e-9)
                self._budgets[index] = min(full, max(full / _TIGHTEST, float(self._budgets[index]) * share**_REACTION))
            answered = int(kind != "neutral")
            if answered:
                self._right.add(*_gauss_newton(values[1], gradients[1]))
            scores = gradients[1 + answered :].flatten(0, 1)
            self._guards[kind].add(values[0].mean(), gradients[0].mean(0), scores.T @ scores / len(guarded))

    def _most_open(self) -> int:
        """How many gates may be open after this step."""
        share = min(1.0, (self.step + 1) / max(1, self.settings.steps * 2 // 3))
        n_gates = len(self.places)
        return max(self.settings.max_gates, round(n_gates * (self.settings.max_gates / n_gates) ** share))

    def _close(self, found: Step, count: int) -> None:
        gates = self._open.nonzero().flatten()
        cost = (found.scales[gates] - 1).double() ** 2 / torch.linalg.inv(found.curvature).diagonal()
        self._open[gates[cost.topk(count, largest=False).indices]] = False

    @property
    def _quadratics(self) -> dict[str, Quadratic]:
        return {"answers": self._answers, "right": self._right, **self._guards}

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step needs, but the number of steps."""
        return {
            "scales": self._scales,
            "open": self._open,
            "budgets": self._budgets,
            **{
                f"{name}.{key}": value
                for name, quadratic in self._quadratics.items()
                for key, value in vars(quadratic).items()
            },
        }

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on from ``tensors()`` after ``step`` steps.

        Raises:
            KeyError: If one is missing.
            ValueError: If they are of another number of gates.
        """
        if tensors["scales"].shape != self._scales.shape:
            raise ValueError("another number of gates")
        self._scales, self._open = tensors["scales"], tensors["open"]
        self._budgets = tensors["budgets"]
        for name, quadratic in self._quadratics.items():
            for key in list(vars(quadratic)):
                setattr(quadratic, key, tensors[f"{name}.{key}"])
        self.step = step


def gradients_by_row(
    model: TransformerBridge,
    places: Sequence[Place],
    scales: Tensor,
    items: Sequence[Continued],
    losses: Callable[[Tensor, list[int]], list[Tensor]],
) -> tuple[Tensor, Tensor]:
    """Losses of every item, and their gradients by the scales.

    Args:
        model: The bridge.
        places: ``(layer, head)`` of every gate.
        scales: ``(n_gates,)``.
        items: What is run.
        losses: Takes log-probabilities ``(sum of predicted, d_vocab)`` and the numbers of a batch's items; returns
            losses ``(n_items in the batch,)``.

    Returns:
        The losses ``(n_losses, n_items)`` and their gradients ``(n_losses, n_items, n_gates)``.
    """
    values: list[Tensor] = []
    gradients: list[Tensor] = []
    order: list[int] = []
    for batch in token_batches(items):
        rows = scales.repeat(len(batch), 1).requires_grad_()
        with scaled(model, places, rows):
            log_p = log_probabilities(model, [items[i] for i in batch])
        found = losses(log_p, batch)
        gradients.append(torch.stack([torch.autograd.grad(loss.sum(), rows, retain_graph=True)[0] for loss in found]))
        values.append(torch.stack(found).detach().cpu())
        order += batch
    back = torch.tensor(order).argsort()
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise UserError("The gates' gradients are not finite; load the model with --dtype float32 or bfloat16.")
    return torch.cat(values, 1)[:, back], torch.cat(gradients, 1)[:, back]


def _guard_losses(
    model: TransformerBridge,
    guarded: Sequence[Guarded],
    kind: Guard,
    generator: torch.Generator,
    log_p: Tensor,
    batch: list[int],
) -> list[Tensor]:
    """Of a batch of one guard: divergences, -log p of right answers (ordinary text has none), and scores."""
    chosen = [guarded[i] for i in batch]
    items = [item for item, _ in chosen]
    damage = divergences(model, log_p, chosen)
    if kind == "neutral":
        return [damage, *_scores(log_p, items, _TEXT_DRAWS, generator)]
    return [damage, answer_losses(log_p, items), *_scores(log_p, items, 1, generator)]


def _gauss_newton(losses: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean value, gradient and curvature of losses -log p, ``(n_items,)`` and ``(n_items, n_gates)``."""
    p = (-losses).exp()
    odds = (p / (1 - p)).clamp(_FLATTEST, _STEEPEST)
    return losses.mean(), gradients.mean(0), (gradients.T * odds) @ gradients / len(losses)


def _scores(log_p: Tensor, items: Sequence[Continued], draws: int, generator: torch.Generator) -> list[Tensor]:
    """Log p of tokens drawn from the model itself: the squares of the gradients average to the Fisher information.

    Each draw takes every ``draws``-th token of an item, and an item counts as the mean over its tokens.
    """
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
    chosen = log_p.gather(1, drawn).squeeze(1)
    position = torch.cat([torch.arange(item.predicted) for item in items]).to(log_p.device)
    size = torch.tensor([item.predicted for item in items], device=log_p.device).sqrt()
    return [summed(chosen * (position % draws == draw), items) / size for draw in range(draws)]


def _turn(items: Sequence[_T], count: int, step: int, seed: int) -> list[_T]:
    """The items whose turn it is: all come once before any comes again."""
    shuffled = random.Random(seed).sample(list(items), len(items))
    return [shuffled[i % len(shuffled)] for i in range(step * count, step * count + min(count, len(shuffled)))]
