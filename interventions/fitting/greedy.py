"""Remove heads one after the other, each the best one given those that are gone: exact greedy selection.

The discrete baseline between ranking all heads once, each on its own (PH3: Jin et al. 2024, arXiv 2402.18154), and
scales that are learned together (``scale_learning``). The objective is the mean log-probability of the wanted answers,
teacher forced, over conflict prompts. Each step:

1. One forward and backward pass with a scale for every head, 0 for those that are gone and 1 for the others: minus the
   gradient of the objective is the first-order effect of removing a head next.
2. The heads with the largest effects are shortlisted, and each is scored exactly: a forward pass without it too.
3. The best of them is removed if that raises the objective. If it does not, the search is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.progress import tracked
from interp.reading import recalled
from interp.teacher_forcing import Continued, token_batches
from interventions.fitting.scale_data import answer_losses, log_probabilities, scaled

GREEDY_VERSION = 3
"""Version of the search: raise it when the same answers would have other heads removed."""


@dataclass(frozen=True)
class GreedyStep:
    """A head that was removed, and what that did.

    Attributes:
        layer: Layer of the head.
        head: Index of the head in its layer.
        gain: By how many nats the mean log p of the wanted answers rose, with the heads of earlier steps gone before
            and after; above 0.
    """

    layer: int
    head: int
    gain: float


def greedy_heads(
    model: nn.Module,
    wanted: Sequence[Continued],
    *,
    count: int,
    shortlist: int = 8,
    progress: str | None = None,
) -> list[GreedyStep]:
    """Choose heads to remove (scale 0), so that the wanted answers become likelier with every one.

    A step costs one forward and backward pass over the prompts, and ``shortlist`` forward passes from the layer of the
    shortlisted head upwards: below it nothing changes.

    Args:
        model: The model, or a bridge around it; it is as before afterwards.
        wanted: Conflict prompts with the answers that should follow.
        count: Most heads to remove.
        shortlist: Heads that are scored exactly at each step, those with the largest first-order effect. As many as the
            model has, or more, score every head that remains: greedy selection without any approximation.
        progress: Label of a progress bar over the steps; ``None`` shows none.

    Returns:
        The removed heads in the order of removal; fewer than ``count`` if no shortlisted head helped any more.

    Raises:
        UserError: If there are no prompts, ``count`` is not between 1 and the number of heads, ``shortlist`` is below
            1, or the numbers leave the range of the model's dtype.
    """
    anatomy = Anatomy(model)
    n_heads = anatomy.n_layers * anatomy.n_heads
    if not 1 <= count <= n_heads:
        raise UserError(f"Between 1 and {n_heads} heads of this model can be removed, not {count}.")
    if shortlist < 1:
        raise UserError(f"Greedy selection needs a shortlist of at least 1 head, not {shortlist}.")
    if not wanted:
        raise UserError("Greedy selection needs conflict prompts with their wanted answers, but there are none.")
    places = anatomy.heads
    steps: list[GreedyStep] = []
    present = _mean_log_p(model, wanted)
    for _ in tracked(range(count), progress):
        gone = [(step.layer, step.head) for step in steps]
        effects = _first_order(model, wanted, places, gone)
        remaining = sorted((i for i, place in enumerate(places) if place not in gone), key=lambda i: -effects[i])
        candidates = [places[i] for i in remaining[:shortlist]]
        scores = _exact(model, wanted, gone, candidates)
        if not torch.tensor([present, *effects, *scores]).isfinite().all():
            raise UserError("Scores of heads are not finite; load the model with --dtype float32 or bfloat16.")
        score, (layer, head) = max(zip(scores, candidates, strict=True), key=lambda scored: scored[0])
        if score <= present:
            break
        steps.append(GreedyStep(layer, head, score - present))
        present = score
    return steps


def _first_order(
    model: nn.Module,
    wanted: Sequence[Continued],
    places: Sequence[tuple[int, int]],
    gone: Sequence[tuple[int, int]],
) -> list[float]:
    """Each head's effect on the mean log p of the wanted answers if removed, where some are gone, to first order."""
    scales = torch.tensor([float(place not in gone) for place in places], requires_grad=True)
    gradient = torch.zeros(len(places))
    with scaled(model, places, scales):
        for batch in token_batches(model, wanted):
            items = [wanted[i] for i in batch]
            loss = answer_losses(log_probabilities(model, items, roughly=True), items).sum()
            gradient += torch.autograd.grad(loss, scales)[0]
    return (gradient / len(wanted)).tolist()


def _mean_log_p(model: nn.Module, wanted: Sequence[Continued]) -> float:
    """The mean log p of the wanted answers."""
    total = 0.0
    for batch in token_batches(model, wanted):
        items = [wanted[i] for i in batch]
        with torch.no_grad():
            total -= answer_losses(log_probabilities(model, items), items).sum().item()
    return total / len(wanted)


def _exact(
    model: nn.Module,
    wanted: Sequence[Continued],
    gone: Sequence[tuple[int, int]],
    candidates: Sequence[tuple[int, int]],
) -> list[float]:
    """For each candidate the mean log p of the wanted answers without it and without the heads that are gone."""
    anatomy = Anatomy(model)
    totals = [0.0] * len(candidates)
    for batch in token_batches(model, wanted):
        items = [wanted[i] for i in batch]
        outputs: dict[int, Any] = {}
        for number, (layer, head) in enumerate(candidates):
            removed = scaled(model, [*gone, (layer, head)], torch.zeros(len(gone) + 1))
            with torch.no_grad(), removed, recalled(anatomy, layer, outputs):
                totals[number] -= answer_losses(log_probabilities(model, items), items).sum().item()
    return [total / len(wanted) for total in totals]
