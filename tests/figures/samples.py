"""Estimates and scores that figures are tested with."""

from typing import Any

import torch

from interp.attribution.scores import HeadScores
from interp.statistics import Estimate


def rates(memory: float, context: float, **more: float) -> dict[str, Estimate]:
    values = {"memory_rate": memory, "context_rate": context, "other_rate": 1 - memory - context, **more}
    return {name: Estimate(value, value - 0.02, value + 0.03, 120) for name, value in values.items()}


def head_scores(mean: list[list[float]]) -> HeadScores:
    """Scores of two subjects that spread by 0.1 around ``mean``."""
    spread = torch.tensor([-0.1, 0.1])[:, None, None]
    return HeadScores(
        torch.tensor(mean) + spread, ("a", "b"), ("A", "B"), "path_patching", "logit_diff", "m", "d", {"unit": "logits"}
    )


MAP = head_scores([[0.0, -3.0], [0.5, 0.05], [0.0, 2.0]])


def trace(figure: Any, **properties: Any) -> Any:
    return next(t for t in figure.data if all(getattr(t, name) == value for name, value in properties.items()))
