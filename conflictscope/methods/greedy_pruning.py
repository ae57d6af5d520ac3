"""Prune heads one after the other, each the best one given those that are gone.

The discrete baseline between pruning by a ranking (PH3: Jin et al. 2024, arXiv 2402.18154) and scales that are learned
together. What is raised is the mean log-probability of the wanted answers to some of train's prompts;
``interventions.fitting.greedy`` states the search.
"""

from __future__ import annotations

from collections.abc import Sequence

from conflictscope.methods._heads import HeadMethod, Heads, scaling
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from interp.answers import Direction
from interp.teacher_forcing import FORCING_VERSION
from interventions.fitting.greedy import GREEDY_VERSION, greedy_heads
from interventions.fitting.scale_data import SCALE_DATA_VERSION

COUNTS = (1, 2, 4, 8)
"""How many heads are pruned."""

_PROMPTS, _SHORTLIST = 48, 6


class GreedyPruning(HeadMethod):
    """Prune the heads that greedy selection removes first."""

    name = "greedy_pruning"
    needs = "search"
    starts_from = ("texts",)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """Each number of heads, up to those whose removal helped.

        Raises:
            UserError: If the data lacks a kind of prompts, or numbers leave the range of the model's dtype.
        """
        removed = _removed(lab, towards)
        return [
            Condition(self.name, towards, {"heads": count}, (scaling(dict.fromkeys(removed[:count], 0.0)),))
            for count in sorted({min(count, len(removed)) for count in COUNTS} - {0})
        ]


def _removed(lab: Lab, towards: Direction) -> Heads:
    """``(layer, head)`` in the order of removal."""
    most = min(max(COUNTS), len(lab.anatomy.heads))

    def compute() -> list[list[int]]:
        wanted = lab.scale_data["train"].wanted(towards)[:_PROMPTS]
        label = f"Greedy selection towards {towards}"
        steps = greedy_heads(lab.model, wanted, count=most, shortlist=_SHORTLIST, progress=label)
        return [[step.layer, step.head] for step in steps]

    found = lab.records.json(
        f"greedy-{towards}",
        [lab.scale_basis, _PROMPTS, most, _SHORTLIST],
        compute,
        version=(GREEDY_VERSION, SCALE_DATA_VERSION, FORCING_VERSION),
    )
    return tuple((layer, head) for layer, head in found)
