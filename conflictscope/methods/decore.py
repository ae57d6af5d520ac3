"""Contrast what the model says with what it says without its retrieval heads.

DeCoRe (Gema et al. 2024, arXiv 2410.18860; see ``interventions.decore``) leaves out the heads that copy from the prompt
the most, by their retrieval scores on train's conflict prompts, and moves away from what is said then. Number of heads
and strength compete on dev. Of the way to memory the paper says nothing: here the strength is negative then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from conflictscope.methods._heads import DRAWS, elsewhere, strongest
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interp.attribution.retrieval import RETRIEVAL_VERSION, retrieval_scores
from interp.attribution.scores import HeadScores
from interp.conflicts import ConflictSet, evenly
from interventions.decore import DeCoRe

_PROMPTS, _FEW = 96, 24


@dataclass(frozen=True)
class RetrievalHeadContrast(Method):
    """Decode by the contrast with a reading without retrieval heads.

    Attributes:
        counts: How many heads are left out.
        strengths: Those that compete; towards memory with the opposite sign.
    """

    name: ClassVar[str] = "decore"
    needs = "head_scores"
    starts_from = ()
    counts: tuple[int, ...] = (4, 8, 16)
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """Every number of heads with every strength.

        Raises:
            UserError: If no prompt holds its context's answer, or the model keeps no attention weights.
        """
        ranking = scores(lab).ranked("context")
        sign = 1 if towards == "context" else -1
        return [
            Condition(
                self.name,
                towards,
                {"heads": count, "strength": sign * strength},
                (DeCoRe(strongest(ranking, count), sign * strength),),
            )
            for count in sorted({min(count, len(ranking)) for count in self.counts})
            for strength in self.strengths
        ]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """As many other heads at random, left out alike."""
        (edit,) = chosen.edits
        assert isinstance(edit, DeCoRe)
        drawn = [elsewhere(lab.rng(chosen.name, draw), lab.anatomy.heads, edit.heads) for draw in range(DRAWS)]
        return [
            Condition(
                "random_contrast",
                chosen.towards,
                {"draw": draw},
                (replace(edit, heads=tuple(sorted(heads))),),
                control_of=chosen.method,
            )
            for draw, heads in enumerate(drawn)
        ]


def scores(lab: Lab) -> HeadScores:
    """Retrieval scores of all heads on some of train's conflict prompts; computed once.

    Raises:
        UserError: If no prompt holds its context's answer, or the model keeps no attention weights.
    """
    train = evenly(lab.prompts.train.select(kind="conflict"), _FEW if lab.quick else _PROMPTS, lab.seed)
    some = ConflictSet(lab.prompts.train.name, tuple(train))

    def compute() -> dict[str, HeadScores]:
        return {"retrieval": retrieval_scores(lab.model, some, name=lab.name, progress="Retrieval heads")}

    return lab.records.head_scores("retrieval", some.digest, compute, version=RETRIEVAL_VERSION)["retrieval"]
