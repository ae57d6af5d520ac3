"""Suppress the feed-forward layers that are more active where an answer comes from memory.

PIP-KAG and ParamMute (Huang et al. 2025, arXiv 2502.15543). With R the share of a layer's neurons that are active where
an answer is predicted, layers are ranked by

    R without the context, on the memory answer  -  R with it, on the context answer

over train's conflict prompts, and what the first N write is scaled: down towards the context, 0 takes a layer out; up
towards memory. N and scale compete on dev; the published layers are 19 to 26 of Llama-3-8B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from conflictscope.methods._heads import HeadMethod
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from interp.answers import Direction
from interp.attribution.active_neurons import ACTIVE_NEURONS_VERSION, active_shares
from interp.conflicts import evenly
from interp.errors import UserError
from interp.teacher_forcing import FORCING_VERSION, continued
from interventions.feedforward import FeedForwardScaling

_PROMPTS = 96


@dataclass(frozen=True)
class FeedForwardSuppression(HeadMethod):
    """Scale what the feed-forward layers of memory write.

    Attributes:
        counts: How many layers are scaled.
        down: The scales that compete towards the context.
        up: The scales that compete towards memory.
    """

    name: ClassVar[str] = "feed_forward_suppression"
    needs = "states"
    starts_from = ()
    counts: tuple[int, ...] = (1, 2, 4, 8)
    down: tuple[float, ...] = (0.0, 0.5)
    up: tuple[float, ...] = (1.5, 2.0)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """Every number of layers with every scale.

        Raises:
            UserError: If no conflict prompt of train is known without its context.
        """
        layers = shifts(lab).argsort(descending=True).tolist()
        return [
            Condition(
                self.name,
                towards,
                {"layers": count, "scale": scale},
                (FeedForwardScaling(tuple((layer, scale) for layer in sorted(layers[:count]))),),
            )
            for count in sorted({min(count, len(layers)) for count in self.counts})
            for scale in (self.down if towards == "context" else self.up)
        ]


def shifts(lab: Lab) -> Tensor:
    """How much more of each layer is active without the context, ``(n_layers,)``; computed once.

    Raises:
        UserError: If no conflict prompt of train is known without its context.
    """
    known = [example for example in lab.prompts.train.select(kind="conflict") if example.bare_prompt]
    if not known:
        raise UserError("No conflict prompt of train is known without its context; give examples a bare_prompt.")
    some = evenly(known, _PROMPTS, lab.seed)

    def compute() -> list[float]:
        model = lab.model
        without = [continued(model, e.bare_prompt, e.memory_answers[0]) for e in some]
        with_context = [continued(model, e.prompt, e.context_answers[0]) for e in some]
        shares = active_shares(model, [*without, *with_context], progress="Active neurons")
        return (shares[: len(some)].mean(0) - shares[len(some) :].mean(0)).tolist()

    depends_on = [[e.id, e.prompt, e.bare_prompt, *e.memory_answers[:1], *e.context_answers[:1]] for e in some]
    version = (ACTIVE_NEURONS_VERSION, FORCING_VERSION)
    return torch.tensor(lab.records.json("active_neurons", depends_on, compute, version=version))
