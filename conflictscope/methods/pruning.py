"""Prune the heads that stand in the way: set their outputs to zero.

PH3 (Jin et al. 2024, arXiv 2402.18154) ranks heads by path patching and prunes the first k. Two rankings compete: by
the logit difference, and by how much the wanted answer's probability gains without a head.
"""

from __future__ import annotations

from collections.abc import Sequence

from conflictscope.methods._heads import HeadMethod, distinct, obstacles, opponents, scaling, strongest
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from interp.answers import Direction

COUNTS = (1, 2, 4, 8)
"""How many heads are pruned."""


class Pruning(HeadMethod):
    """Prune the first heads of a ranking."""

    name = "pruning"
    needs = "head_scores"
    starts_from = ("head_scores",)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """Each number of heads, by each ranking."""
        rankings = {"opponents": opponents(lab, towards), "obstacles": obstacles(lab, towards)}
        return distinct(
            Condition(
                self.name,
                towards,
                {"heads": count, "ranking": name},
                (scaling(dict.fromkeys(strongest(ranking, count), 0.0)),),
            )
            for count in COUNTS
            for name, ranking in rankings.items()
        )
