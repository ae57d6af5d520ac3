"""Scale one head's values: the strongest opponent down and below zero, or the strongest supporter up.

Yu, Merullo & Pavlick 2023 (arXiv 2310.15910) scale one head by alpha, which may be negative.
"""

from __future__ import annotations

from collections.abc import Sequence

from conflictscope.methods._heads import HeadMethod, opponents, scaling, strongest
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from interp.answers import Direction

DOWN, UP = (0.0, -1.0), (2.0, 4.0)
"""The scales that compete, of the strongest opponent and of the strongest supporter."""


class ValueScaling(HeadMethod):
    """Scale the one head that matters most."""

    name = "value_scaling"
    needs = "head_scores"
    starts_from = ("head_scores",)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """Each scale of the strongest opponent and of the strongest supporter."""
        ((opponent),) = strongest(opponents(lab, towards), 1)
        ((supporter),) = strongest(lab.head_scores["logit_diff"].ranked(towards), 1)
        tries = [*((opponent, scale) for scale in DOWN), *((supporter, scale) for scale in UP)]
        return [
            Condition(self.name, towards, {"head": f"{head[0]}.{head[1]}", "scale": scale}, (scaling({head: scale}),))
            for head, scale in tries
        ]
