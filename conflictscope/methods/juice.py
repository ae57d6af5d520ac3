"""Add to heads what they write without the edit, read in a first pass.

JuICE (Li et al. 2025, arXiv 2503.10996; see ``interventions.juice``) scores heads by what the wanted answer gains where
they write more, and where they write less. A head counts if it helps on prompts of all kinds: towards the context
those with one that contradicts or agrees, towards memory those with one that contradicts or is about something else,
and those without. The first few of either ranking compete on dev, with factors above and below 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from conflictscope.methods._heads import DRAWS, distinct, elsewhere
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interp.attribution.head_gains import HEAD_GAINS_VERSION, head_gains
from interp.conflicts import ConflictExample, ContextKind, evenly
from interp.errors import UserError
from interp.inputs import first_token_id
from interventions.juice import AddedHead, JuICE

_PROMPTS = 8
# The kinds of prompts on which a head has to help, and that have an answer of the wanted source.
_KINDS: dict[Direction, tuple[ContextKind, ...]] = {
    "context": ("conflict", "aligned"),
    "memory": ("conflict", "irrelevant", "none"),
}


@dataclass(frozen=True)
class JudgeHeads(Method):
    """Add and take away outputs of heads that decide for the wanted answer.

    Attributes:
        up: Factors that heads which help are scored by; the paper has 1, 3, 5, 10 and 30.
        down: The same for heads that stand in the way; the paper has -1, -2 and -5.
        counts: How many heads of each ranking compete; the paper takes 5.
        factors: Factors on the first output of heads that help, and of those that stand in the way, that compete.
    """

    name: ClassVar[str] = "juice"
    needs = "search"
    starts_from = ()
    up: tuple[float, ...] = (1.0, 5.0)
    down: tuple[float, ...] = (-1.0, -2.0)
    counts: tuple[int, ...] = (2, 5)
    factors: tuple[tuple[float, float], ...] = ((1.0, 0.0), (3.0, 0.0), (0.0, -1.0), (1.0, -1.0))

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """Every number of heads with every pair of factors.

        Raises:
            UserError: If no head helps on all these kinds of prompts.
        """
        helpful, hindering = (self._ranked(lab, towards, factors) for factors in (self.up, self.down))
        found = []
        for count in self.counts:
            for up, down in self.factors:
                more = [AddedHead(*head, up) for head in helpful[:count] if up]
                taken = {head[:2] for head in more}
                less = [AddedHead(*head, down) for head in hindering[:count] if down and head not in taken]
                if more or less:
                    settings = {"more": len(more), "up": up, "less": len(less), "down": down}
                    found.append(Condition(self.name, towards, settings, (JuICE(tuple(sorted([*more, *less]))),)))
        if not found:
            kinds = ", ".join(_KINDS[towards])
            raise UserError(f"No head helps the wanted answer on prompts of all these kinds: {kinds}.")
        return distinct(found)

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """As many other heads at random, with the same factors."""
        (edit,) = chosen.edits
        assert isinstance(edit, JuICE)
        taken = [(h.layer, h.head) for h in edit.heads]
        controls = []
        for draw in range(DRAWS):
            drawn = elsewhere(lab.rng(chosen.name, draw), lab.anatomy.heads, taken)
            heads = [AddedHead(*place, h.factor) for place, h in zip(drawn, edit.heads, strict=True)]
            edits = (JuICE(tuple(sorted(heads))),)
            controls.append(
                Condition("random_additions", chosen.towards, {"draw": draw}, edits, control_of=chosen.method)
            )
        return controls

    def _ranked(self, lab: Lab, towards: Direction, factors: Sequence[float]) -> list[tuple[int, int]]:
        """Heads that help on all kinds of prompts that there are, by their mean gain over the kinds."""
        by_kind = torch.stack([gains(lab, towards, kind, factors) for kind in _KINDS[towards] if _asked(lab, kind)])
        helps = (by_kind > 0).all(0)
        mean = by_kind.mean(0).masked_fill(~helps, -torch.inf)
        order = mean.flatten().argsort(descending=True, stable=True)[: int(helps.sum())].tolist()
        return [divmod(index, mean.shape[1]) for index in order]


def gains(lab: Lab, towards: Direction, kind: ContextKind, factors: Sequence[float]) -> Tensor:
    """What the wanted answer gains on some of train's prompts of a kind, ``(n_layers, n_heads)``; computed once."""
    asked = _asked(lab, kind)
    wanted = [(e.context_answers if towards == "context" else e.memory_answers)[0] for e in asked]

    def compute() -> list[list[float]]:
        prompts = [e.prompt for e in asked]
        tokens = [first_token_id(lab.model, e.prompt, answer) for e, answer in zip(asked, wanted, strict=True)]
        progress = f"Heads that help: {kind}"
        return head_gains(lab.model, prompts, tokens, factors, progress=progress).mean(0).tolist()

    depends_on = [[e.prompt, answer] for e, answer in zip(asked, wanted, strict=True)]
    return torch.tensor(lab.records.json("head_gains", [depends_on, factors], compute, version=HEAD_GAINS_VERSION))


def _asked(lab: Lab, kind: ContextKind) -> list[ConflictExample]:
    return evenly(lab.prompts.train.select(kind=kind), 2 if lab.quick else _PROMPTS, lab.seed)
