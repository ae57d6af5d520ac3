"""Show answers that follow the wanted source before each prompt: in-context examples.

Zhou et al. 2023 (arXiv 2303.11315) show counterfactual demonstrations: prompts whose context contradicts what is
known, answered from the context. Here they are conflict prompts of train's subjects; towards memory they are answered
from memory. How many are shown competes on dev. The control shows as many whose context agrees with memory, so that
their answers say nothing about which source to follow.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from conflictscope.methods._heads import DRAWS
from conflictscope.study.condition import Condition, Prompting
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interp.conflicts import ConflictExample, ContextKind, evenly
from interp.errors import UserError


@dataclass(frozen=True)
class Demonstrated(Prompting):
    """Put answered prompts before each prompt, with empty lines between them.

    Attributes:
        shown: The answered prompts.
    """

    shown: tuple[str, ...]

    def __post_init__(self) -> None:
        # JSON has no tuples.
        object.__setattr__(self, "shown", tuple(self.shown))

    def described(self) -> str:
        """How many are shown."""
        return f"after {len(self.shown)} answered prompt{'s' * (len(self.shown) != 1)}"

    def prompt(self, example: ConflictExample) -> str:
        """The answered prompts, then the prompt."""
        return "\n\n".join((*self.shown, example.prompt))


@dataclass(frozen=True)
class Demonstrations(Method):
    """Show answers that follow the wanted source before each prompt.

    Attributes:
        counts: How many are shown.
    """

    name: ClassVar[str] = "demonstrations"
    needs = "nothing"
    starts_from = ()
    counts: tuple[int, ...] = (1, 3, 6)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """One for each count, up to what train has."""
        available = len(lab.prompts.train.select(kind="conflict"))
        return [
            Condition(
                self.name,
                towards,
                {"shown": count},
                prompting=answered(lab, "conflict", count, towards, lab.seed),
            )
            for count in sorted({min(count, available) for count in self.counts} - {0})
        ]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """As many whose context agrees with memory, drawn several times.

        Raises:
            UserError: If train has too few such prompts.
        """
        return [
            Condition(
                "agreeing_demonstrations",
                chosen.towards,
                {"draw": draw},
                prompting=answered(lab, "aligned", chosen.settings["shown"], "memory", lab.seed + draw),
                control_of=chosen.method,
            )
            for draw in range(DRAWS)
        ]


def answered(lab: Lab, kind: ContextKind, count: int, source: Direction, seed: int) -> Demonstrated:
    """Prompts of one kind of train, drawn evenly from relations and phrasings, each with the answer of a source.

    Raises:
        UserError: If there are too few.
    """
    some = list(lab.prompts.train.select(kind=kind))
    # In another order, or the first relations would be shown alone.
    examples = evenly(random.Random(seed).sample(some, len(some)), count, seed)
    if len(examples) < count:
        raise UserError(f"Train has {len(examples)} prompts of kind {kind} to be shown, not {count}; give more data.")
    answers = [(e.context_answers if source == "context" else e.memory_answers)[0] for e in examples]
    return Demonstrated(tuple(f"{e.prompt} {answer}." for e, answer in zip(examples, answers, strict=True)))
