"""Prune the first heads of any way to score heads: what a way finds is worth what pruning it does.

Towards a source the heads that push hardest to the other one go first; of scores without a sign, which do not tell
towards which source a head pushes, those that have most to do with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from conflictscope.methods._heads import HeadMethod, distinct, scaling, strongest
from conflictscope.methods.pruning import COUNTS
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from interp.answers import OPPOSITE, Direction
from interp.attribution.scores import HeadScores
from interp.attribution.ways import WAYS_VERSION, scored
from interp.conflicts import ConflictSet


@dataclass(frozen=True)
class _PruningBy(HeadMethod):
    """Prune the first heads by one way's scores."""

    starts_from = ()
    way: str

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """Each number of heads.

        Raises:
            UserError: If the way cannot score heads on this model or these prompts.
        """
        scores = way_scores(lab, self.way)
        ranking = scores.ranked(OPPOSITE[towards] if scores.signed else "context")
        return distinct(
            Condition(self.name, towards, {"heads": count}, (scaling(dict.fromkeys(strongest(ranking, count), 0.0)),))
            for count in COUNTS
        )

    def details(self, lab: Lab, chosen: Condition) -> Mapping[str, Any]:
        """The first heads, with their scores."""
        assert chosen.towards is not None
        scores = way_scores(lab, self.way)
        ranking = scores.ranked(OPPOSITE[chosen.towards] if scores.signed else "context")
        return {"first_heads": [[f"{head.layer}.{head.head}", head.score] for head in ranking[: max(COUNTS)]]}


@cache
def pruning_by(way: str) -> HeadMethod:
    """The method that prunes what one way to score heads finds; its name says by which."""
    named = type("PruningBy", (_PruningBy,), {"name": f"pruning_by_{way.replace('-', '_')}"})
    return named(way)


def way_scores(lab: Lab, way: str) -> HeadScores:
    """One way's scores on those of the lab's prompts that it can score; computed once.

    Raises:
        UserError: If the way cannot score heads on this model or these prompts.
    """
    about = {(e.subject, e.relation, e.template) for e in lab.scored}
    aligned = lab.prompts.train.select(kind="aligned")
    agreeing = [e for e in aligned if (e.subject, e.relation, e.template) in about]
    prompts = ConflictSet(lab.scored.name, (*lab.scored, *agreeing))

    def compute() -> dict[str, HeadScores]:
        said = f"Scoring heads by {way.replace('-', ' ')}"
        return {way: scored(way, lab.model, prompts, name=lab.name, seed=lab.seed, progress=said)}

    return lab.records.head_scores("way", [way, prompts.digest, lab.seed], compute, version=WAYS_VERSION)[way]
