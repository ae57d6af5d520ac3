"""Learn scales by constrained Gauss-Newton steps: every prompt's gradient counts, and damage is a constraint.

With s all scales, a step does this:

1. Each row of a batch gets scales of its own, so that one backward pass gives the gradient of every prompt's loss.
2. They make local quadratic models. The objective: mean -log p of the wanted answers to conflict prompts, plus the
   same of the right answers to guards. Its curvature is Gauss-Newton's, p (1 - p) times the outer product of the
   gradient of the answer's log-odds. The constraints: for each guard the KL divergence from the unedited model, whose
   curvature is the Fisher information, estimated by answers drawn from the model. All are running averages that move
   along with s, so that prompts of earlier steps count on.
3. The step minimises the objective's model such that each guard's model stays within its budget, by dual ascent on
   the multipliers; the length of the step is limited in the same way. Models flatter the prompts that they were made
   of: their budgets are tightened while fresh prompts diverge by more than the user's, and relaxed while by less.
4. Until two thirds of the steps, scales are closed (1 for good) down to the wanted number, by the same share each
   time, in all and in a layer: those whose closing costs least once all others make up for it (optimal brain surgeon:
   Hassibi and Stork 1993, equation 5).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from interp.teacher_forcing import Continued, token_batches
from interventions.fitting.scale_data import (
    GUARDS,
    Guard,
    Guarded,
    HeadOrLayer,
    ScaleData,
    answer_losses,
    divergences,
    finite,
    guard_count,
    log_probabilities,
    scale_places,
    scaled,
    summed,
)

if TYPE_CHECKING:
    from interventions.fitting.scale_training import ScaleTraining

# What each step leaves of the weight of earlier prompts; how far curvature is drawn towards its diagonal, and towards
# that of all guards.
_DECAY, _SHRINKAGE, _POOLED = 0.9, 0.2, 0.4
# Pulls scales to 1 where nothing else pulls.
_RIDGE = 0.005
_LARGEST_STEP = 1.0
# p / (1 - p) turns a squared gradient of -log p into Gauss-Newton's curvature; beyond these it is all noise.
_FLATTEST, _STEEPEST = 0.3, 20.0
# How fast budgets of the models follow what fresh prompts diverge, and how far.
_REACTION, _TIGHTEST = 0.5, 8.0
_DUAL_STEPS, _DUAL_RATE, _MULTIPLIERS = 150, 0.6, (1e-4, 3e3)

_T = TypeVar("_T")


class Model(NamedTuple):
    """A quadratic function of the way ``d`` from the present scales: value + gradient . d + d . curvature . d / 2.

    Attributes:
        value: At the present scales.
        gradient: ``(n,)`` float64.
        curvature: ``(n, n)`` float64.
    """

    value: float
    gradient: Tensor
    curvature: Tensor

    def at(self, way: Tensor) -> Model:
        """The same function, seen from ``way``."""
        bent = self.curvature @ way
        value = self.value + float(self.gradient @ way + way @ bent / 2)
        return Model(value, self.gradient + bent, self.curvature)

    def among(self, scales: Tensor) -> Model:
        """The same function of some scales, while the others stay."""
        return Model(self.value, self.gradient[scales], self.curvature[scales][:, scales])


class Step(NamedTuple):
    """A solved step.

    Attributes:
        scales: Where it leads, ``(n_scales,)``.
        curvature: Of the Lagrangian among the open scales, ``(n_open, n_open)``, float64.
    """

    scales: Tensor
    curvature: Tensor


class Average:
    """A running average of models of one loss, each of some prompts; later prompts count more.

    Attributes:
        value, gradient, curvature: The average, at the present scales, in float32 to be kept.
        weight: Sum of the weights of what was counted, ``()``.
    """

    def __init__(self, n_scales: int) -> None:
        self.value = torch.zeros(())
        self.gradient = torch.zeros(n_scales)
        self.curvature = torch.zeros(n_scales, n_scales)
        self.weight = torch.zeros(())

    def add(self, value: Tensor, gradient: Tensor, curvature: Tensor) -> None:
        """Count new prompts' mean loss, gradient and curvature in."""
        self.weight = _DECAY * self.weight + 1
        for name, new in (("value", value), ("gradient", gradient), ("curvature", curvature)):
            setattr(self, name, torch.lerp(getattr(self, name), new, 1 / self.weight))

    def model(self) -> Model:
        """The average; its curvature is drawn towards its diagonal, for which fewer prompts are enough."""
        curvature = self.curvature.double()
        return Model(float(self.value), self.gradient.double(), curvature.lerp(curvature.diagonal().diag(), _SHRINKAGE))

    def move(self, model: Model, way: Tensor) -> None:
        """Look from scales that lie ``way`` from the present ones, as ``model``, which the step went by, has it."""
        seen = model.at(way)
        self.value, self.gradient = torch.tensor(seen.value), seen.gradient.float()


def constrained_step(
    objective: Model, constraints: Sequence[Model], budgets: Sequence[float], present: Tensor, open_scales: Tensor
) -> Step:
    """Where the objective's model is least while every constraint's model is within its budget.

    Solved by dual ascent: a multiplier is raised by as much as its constraint is broken, in proportion, and lowered
    while there is room; each time the step has a closed form. If the budgets cannot be kept, they are broken little.

    Args:
        objective: Its model; the value does not matter.
        constraints: The models of what is limited.
        budgets: The largest value of each.
        present: The present scales, ``(n_scales,)``.
        open_scales: Which scales may move, ``(n_scales,)``; the others go to 1.
    """
    free = open_scales.nonzero().flatten()
    forced = torch.where(open_scales, 0.0, 1 - present).double()
    identity = torch.eye(len(free), dtype=torch.double)
    nothing = torch.zeros(len(free), dtype=torch.double)
    goal = objective.at(forced).among(free)
    goal = Model(
        goal.value,
        goal.gradient + _RIDGE * (present[free] - 1).double(),
        goal.curvature + _RIDGE * identity,
    )
    # The length of the step is limited like the rest: |step|^2 / 2 is a quadratic too.
    limits = [*(model.at(forced).among(free) for model in constraints), Model(0.0, nothing, identity)]
    largest = torch.tensor([*budgets, _LARGEST_STEP**2 / 2], dtype=torch.double)
    gradients = torch.stack([limit.gradient for limit in limits])
    curvatures = torch.stack([limit.curvature for limit in limits])
    multipliers = torch.ones(len(limits), dtype=torch.double)
    step, curvature = nothing, goal.curvature
    for _ in range(_DUAL_STEPS):
        curvature = goal.curvature + torch.einsum("l,lij->ij", multipliers, curvatures)
        step = -torch.linalg.solve(curvature, goal.gradient + multipliers @ gradients)
        used = torch.tensor([limit.at(step).value for limit in limits], dtype=torch.double)
        raised = (multipliers * (used / largest).clamp(0.5, 2) ** _DUAL_RATE).clamp(*_MULTIPLIERS)
        settled = torch.allclose(raised, multipliers, rtol=2e-3, atol=1e-4)
        multipliers = raised
        if settled:
            break
    scales = torch.ones_like(present)
    scales[free] = present[free] + step.to(present)
    return Step(scales, curvature)


def closing_costs(found: Step, open_scales: Tensor) -> Tensor:
    """What closing each open scale would add to the Lagrangian once all others make up for it, ``(n_open,)``."""
    away = (found.scales[open_scales] - 1).double()
    return away**2 / (2 * torch.linalg.inv(found.curvature).diagonal())


def followed(budget: float, full: float, seen: float) -> float:
    """The next budget of a model, of which ``full`` is the user's, when fresh prompts diverged by ``seen``."""
    moved = budget * (full / max(seen, 1e-9)) ** _REACTION
    return min(full, max(full / _TIGHTEST, moved))


class GaussNewton:
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
        self.places = scale_places(model, feed_forward=settings.feed_forward, lowest=settings.lowest)
        self.step = 0
        n_scales = len(self.places)
        self._scales = torch.ones(n_scales)
        self._open = torch.ones(n_scales, dtype=torch.bool)
        self._budgets = torch.tensor([settings.budgets[kind] for kind in GUARDS])
        self._averages = {name: Average(n_scales) for name in ("wanted", "right", *GUARDS)}

    def scales(self) -> Tensor:
        """The scales as they are, ``(n_scales,)``; exactly 1 where closed."""
        return self._scales.clone()

    def descend(self, wanted: Sequence[Continued], data: ScaleData) -> None:
        """Make one step.

        Raises:
            UserError: If the numbers leave the range of the model's dtype.
        """
        self._look(wanted, data)
        models = {name: average.model() for name, average in self._averages.items()}
        models |= zip(GUARDS, pooled([models[kind] for kind in GUARDS]), strict=True)
        _, gradient, curvature = models["wanted"]
        if not self.settings.shuffled:
            gradient, curvature = gradient + models["right"].gradient, curvature + models["right"].curvature
        objective = Model(0.0, gradient, curvature)
        constraints, budgets = [models[kind] for kind in GUARDS], self._budgets.tolist()
        while True:
            found = constrained_step(objective, constraints, budgets, self._scales, self._open)
            closing = self._surplus(closing_costs(found, self._open))
            if not closing.any():
                break
            self._open &= ~closing
        way = (found.scales - self._scales).double()
        for name, average in self._averages.items():
            average.move(models[name], way)
        self._scales = found.scales
        self.step += 1

    def _look(self, wanted: Sequence[Continued], data: ScaleData) -> None:
        """Add this step's prompts to the running averages."""
        settings = self.settings
        asked = _turn(wanted, settings.conflicts, self.step, settings.seed)

        def answers(log_p: Tensor, batch: list[int]) -> list[Tensor]:
            return [answer_losses(log_p, [asked[i] for i in batch])]

        values, gradients = gradients_by_row(data.model, self.places, self._scales, asked, answers)
        self._averages["wanted"].add(*gauss_newton(values[0], gradients[0]))
        for kind, (values, gradients) in self._of_guards(data).items():
            divergence = values[0].mean()
            if self.step:
                index, full = GUARDS.index(kind), settings.budgets[kind]
                self._budgets[index] = followed(float(self._budgets[index]), full, float(divergence))
            scores = gradients[1:]
            if kind != "neutral":
                self._averages["right"].add(*gauss_newton(values[1], gradients[1]))
                scores = gradients[2:]
            outer = torch.einsum("dig,dih->gh", scores, scores)
            self._averages[kind].add(divergence, gradients[0].mean(0), outer / values.shape[1])

    def _of_guards(self, data: ScaleData) -> dict[Guard, tuple[Tensor, Tensor]]:
        """``gradients_by_row`` of the guards whose turn it is; those of the first step are kept with the data."""
        settings = self.settings
        depends_on = (settings.guards, settings.seed, tuple(self.places))
        if self.step == 0 and depends_on in data.unedited_gradients:
            return data.unedited_gradients[depends_on]
        generator = torch.Generator().manual_seed(random.Random(f"{settings.seed}/{self.step}").getrandbits(60))
        turns = [
            _turn(data.guards[kind], guard_count(kind, settings.guards), self.step, settings.seed) for kind in GUARDS
        ]
        # All kinds together need less padding.
        guarded = [guard for turn in turns for guard in turn]
        if not guarded:
            return {}
        is_text = torch.tensor([kind == "neutral" for kind, turn in zip(GUARDS, turns, strict=True) for _ in turn])
        losses = partial(_guard_losses, data.model, guarded, is_text, generator)
        items = [item for item, _ in guarded]
        values, gradients = gradients_by_row(data.model, self.places, self._scales, items, losses)
        sizes = [len(turn) for turn in turns]
        parts = zip(GUARDS, values.split(sizes, 1), gradients.split(sizes, 1), strict=True)
        found: dict[Guard, tuple[Tensor, Tensor]] = {
            kind: (value, gradient) for kind, value, gradient in parts if value.shape[1]
        }
        if self.step == 0:
            data.unedited_gradients[depends_on] = found
        return found

    def _surplus(self, costs: Tensor) -> Tensor:
        """Which scales to close next, ``(n_scales,)``: the cheapest of those that are too many, in all or in a layer.

        Args:
            costs: What closing each open scale costs, in their order.
        """
        everywhere = torch.full((len(self.places),), math.inf, dtype=costs.dtype)
        everywhere[self._open] = costs
        closing = _cheapest(everywhere, self._most_open(self.settings.max_scales, len(self.places)))
        if (most := self.settings.max_heads_per_layer) is not None:
            heads: dict[int, list[int]] = defaultdict(list)
            for index, (layer, head) in enumerate(self.places):
                if head is not None:
                    heads[layer].append(index)
            for indices in heads.values():
                closing[indices] |= _cheapest(everywhere[indices], self._most_open(most, len(indices)))
        return closing

    def _most_open(self, at_last: int, n_scales: int) -> int:
        """How many of some scales may be open after this step, if so many may be at last."""
        share = min(1.0, (self.step + 1) / max(1, self.settings.steps * 2 // 3))
        return max(at_last, round(n_scales * (at_last / n_scales) ** share))

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step needs, but the number of steps."""
        averages = {f"{name}.{key}": t for name, average in self._averages.items() for key, t in vars(average).items()}
        return {"scales": self._scales, "open": self._open, "budgets": self._budgets, **averages}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on from ``tensors()`` after ``step`` steps.

        Raises:
            KeyError: If one is missing; nothing is restored then.
            ValueError: If they are of another number of scales; likewise.
        """
        found = {name: tensors[name] for name in self.tensors()}
        if found["scales"].shape != self._scales.shape:
            raise ValueError("another number of scales")
        self._scales, self._open, self._budgets = found["scales"], found["open"], found["budgets"]
        for name, average in self._averages.items():
            vars(average).update({key: found[f"{name}.{key}"] for key in vars(average)})
        self.step = step


def _cheapest(costs: Tensor, most: int) -> Tensor:
    """Which of some scales to close first, if so many may stay open; a closed one costs infinity.

    A third of the surplus at a time: what is closed changes what the others are worth.
    """
    surplus = int(costs.isfinite().sum()) - most
    closing = torch.zeros(len(costs), dtype=torch.bool)
    if surplus > 0:
        closing[costs.topk(min(surplus, surplus // 3 + 1), largest=False).indices] = True
    return closing


def pooled(models: Sequence[Model]) -> list[Model]:
    """Models of the guards that lend each other some of their curvature: prompts of each are few."""
    sizes = [model.curvature.trace().clamp(min=1e-12) for model in models]
    shared = torch.stack([model.curvature / size for model, size in zip(models, sizes, strict=True)]).mean(0)
    return [
        model._replace(curvature=model.curvature.lerp(shared * size, _POOLED))
        for model, size in zip(models, sizes, strict=True)
    ]


def gradients_by_row(
    model: nn.Module,
    places: Sequence[HeadOrLayer],
    scales: Tensor,
    items: Sequence[Continued],
    losses: Callable[[Tensor, list[int]], list[Tensor]],
) -> tuple[Tensor, Tensor]:
    """Losses of every item, and their gradients by the scales.

    Args:
        model: The model, or a bridge around it.
        places: What has a scale.
        scales: ``(n_scales,)``.
        items: What is run.
        losses: Takes log-probabilities ``(sum of predicted, d_vocab)`` and the numbers of a batch's items; returns
            losses ``(n_items in the batch,)``.

    Returns:
        The losses ``(n_losses, n_items)`` and their gradients ``(n_losses, n_items, n_scales)``.
    """
    values: list[Tensor] = []
    gradients: list[Tensor] = []
    order: list[int] = []
    for batch in token_batches(model, items):
        rows = scales.repeat(len(batch), 1).requires_grad_()
        with scaled(model, places, rows):
            log_p = log_probabilities(model, [items[i] for i in batch], roughly=True)
        found = losses(log_p, batch)
        gradients.append(torch.stack([torch.autograd.grad(loss.sum(), rows, retain_graph=True)[0] for loss in found]))
        values.append(torch.stack(found).detach().cpu())
        order += batch
    back = torch.tensor(order).argsort()
    return torch.cat(values, 1)[:, back], finite(torch.cat(gradients, 1))[:, back]


def _guard_losses(
    model: nn.Module,
    guarded: Sequence[Guarded],
    is_text: Tensor,
    generator: torch.Generator,
    log_p: Tensor,
    batch: list[int],
) -> list[Tensor]:
    """Of a batch of guards: divergences, -log p of right answers, and scores; of ordinary text two kinds of scores.

    A score is log p of tokens drawn from the model itself: the squares of its gradients average to the Fisher
    information. Of ordinary text each takes every other token: less noise. An item counts as the mean over its tokens.
    """
    chosen = [guarded[i] for i in batch]
    items = [item for item, _ in chosen]
    drawn = log_p.gather(1, _drawn(log_p.detach(), generator)).squeeze(1)
    is_odd = torch.cat([torch.arange(item.predicted) % 2 for item in items]).bool().to(log_p.device)
    size = torch.tensor([item.predicted for item in items], device=log_p.device).sqrt()
    even, odd = (summed(drawn * mask, items) / size for mask in (~is_odd, is_odd))
    of_text = is_text[batch].to(log_p.device)
    answers = answer_losses(log_p, items)
    return [
        divergences(model, log_p, chosen),
        torch.where(of_text, even, answers),
        torch.where(of_text, odd, even + odd),
    ]


def _drawn(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each distribution, ``(n, 1)``; the generator's device has nothing to do with that of ``log_p``."""
    below = log_p.exp().cumsum(-1)
    drawn = torch.rand(len(log_p), 1, generator=generator).to(log_p.device) * below[:, -1:]
    return torch.searchsorted(below, drawn, right=True).clamp(max=log_p.shape[1] - 1)


def gauss_newton(losses: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean value, gradient and curvature of losses -log p, ``(n_items,)`` and ``(n_items, n_scales)``."""
    p = (-losses).exp()
    odds = (p / (1 - p)).clamp(_FLATTEST, _STEEPEST)
    return losses.mean(), gradients.mean(0), (gradients.T * odds) @ gradients / len(losses)


def _turn(items: Sequence[_T], count: int, step: int, seed: int) -> list[_T]:
    """The items whose turn it is: all come once before any comes again."""
    shuffled = random.Random(seed).sample(list(items), len(items))
    return [shuffled[i % len(shuffled)] for i in range(step * count, step * count + min(count, len(shuffled)))]
