"""Hold the heads that stand in the way at their mean outputs, alone or with the strongest supporter strengthened.

Heads are ranked as by PH3 (Jin et al. 2024, arXiv 2402.18154), by how much the wanted answer's probability gains
without them, and ablated to their mean instead of zero (Wang et al. 2023, arXiv 2211.00593). The mean is that at the
end of closed-book prompts; it is held at every position.
"""

from __future__ import annotations

from collections.abc import Sequence

from conflictscope.methods._heads import HeadMethod, distinct, obstacles, scaling, strongest
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from interp.answers import Direction

COUNTS = (4, 8)
"""How many heads are held."""
STRENGTHENED = 1.5
"""The scale of the supporter, around its mean."""


class MeanAblation(HeadMethod):
    """Hold heads at their mean outputs."""

    name = "mean_ablation"
    needs = "head_scores"
    starts_from = ("head_scores", "mean_outputs")

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """Each number of heads, with and without the strongest supporter strengthened, unless that is held itself."""
        (supporter,) = strongest(lab.head_scores["logit_diff"].ranked(towards), 1)
        ranking = obstacles(lab, towards)

        def condition(count: int, stronger: bool) -> Condition:
            held = dict.fromkeys(strongest(ranking, count), 0.0)
            scales = {supporter: STRENGTHENED, **held} if stronger else held
            settings = {"heads": count, "supporter": STRENGTHENED if stronger else 1.0}
            return Condition(self.name, towards, settings, (scaling(scales, lab.mean_outputs),))

        return distinct(condition(count, stronger) for stronger in (False, True) for count in COUNTS)
