"""What decides how scales are learned: budgets, how many may move, by whom, and from how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from interp.errors import UserError
from interventions.fitting.scale_data import GUARDS, Guard

LearnerName = Literal["gauss_newton", "hard_concrete"]


@dataclass(frozen=True)
class ScaleTraining:
    """What decides a training.

    Attributes:
        budget: Largest mean KL divergence (nats) from the unedited model on prompts without a context, and on text that
            it sampled.
        context_budget: The same on prompts with a context that agrees, or is about something else.
        max_scales: Most heads (and feed-forward layers) that may move, in each direction.
        max_heads_per_layer: Most heads of one layer that may move, in each direction: an engine that serves the dial as
            an adapter may take so many. ``None`` is no bound.
        feed_forward: Whether feed-forward layers have scales too.
        learner: Who learns.
        steps: Steps of the learner. Up to the default, every step sees fresh prompts.
        conflicts: Conflict prompts a step.
        guards: Prompts without a context a step; half as many of every other guard.
        lowest: The lowest layer of which anything may move.
        open_shares: By guard, the share of prompts on which the edit acts, below 1 behind a gate; ``None`` is all.
            Budgets are of all prompts, also those that a closed gate protects.
        shuffled: Whether wanted answers are those of other prompts, and right answers to guards count for nothing: a
            control, which should gain nothing.
        seed: Of noise and order.
    """

    budget: float = 0.02
    context_budget: float = 0.2
    max_scales: int = 40
    max_heads_per_layer: int | None = None
    feed_forward: bool = False
    learner: LearnerName = "gauss_newton"
    steps: int = 7
    conflicts: int = 36
    guards: int = 16
    lowest: int = 0
    open_shares: Mapping[Guard, float] | None = None
    shuffled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("budget", "context_budget"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"The {name.replace('_', ' ')} is a number above 0, not {getattr(self, name):g}.")
        bounds = (("max_scales", 1), ("max_heads_per_layer", 1), ("steps", 3), ("conflicts", 1), ("guards", 1))
        for name, least in bounds:
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UserError(f"Learning scales needs {name} of at least {least}, not {getattr(self, name)}.")
        if self.learner not in get_args(LearnerName):
            raise UserError(f"There is no learner {self.learner!r}; choose among {', '.join(get_args(LearnerName))}.")

    @property
    def budgets(self) -> dict[Guard, float]:
        """The budget of each guard, for the prompts on which the edit acts."""
        whole = {kind: self.context_budget if kind in ("aligned", "irrelevant") else self.budget for kind in GUARDS}
        shares = self.open_shares or dict.fromkeys(GUARDS, 1.0)
        return {kind: whole[kind] / shares[kind] if shares[kind] else math.inf for kind in GUARDS}
