"""Replace the last token's activation by the mean one of prompts that were answered from the wanted source.

Hendel et al. 2023 (arXiv 2310.15916) put the activation of demonstrations in the place of a query's; here it is the
mean over train's conflict prompts, put there in full or by half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from conflictscope.methods._steering import SteeringMethod, source_means
from conflictscope.study.lab import Lab
from interp.answers import Direction

REPLACED = (0.5, 1.0)
"""The shares of the activation that compete."""


@dataclass(frozen=True)
class TaskVector(SteeringMethod):
    """Replace the activation by the wanted source's mean."""

    name = "task_vector"
    starts_from = ("store",)
    mode = "replace"
    strengths: tuple[float, ...] = REPLACED

    def vectors(self, lab: Lab, layers: Sequence[int], towards: Direction) -> Tensor:
        """The mean with the wanted source, ``(n_layers, d_model)``."""
        context, memory = source_means(lab, layers)
        return context if towards == "context" else memory
