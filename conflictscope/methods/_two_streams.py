"""What methods share that weigh what a model says with the context against what it says without."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conflictscope.methods._heads import DRAWS
from conflictscope.study.condition import Condition, Prompting
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interp.conflicts import ConflictExample
from interp.errors import UserError
from interventions.decoding import DecodingRule


@dataclass(frozen=True)
class OtherContext(Prompting):
    """Put another prompt's context, drawn at random, where a rule is to read none.

    It is of another subject, where there is one of the same kind in the same phrasing. Prompts without a context, and
    those of which it is not known how they would be without, stay as they are.

    Attributes:
        seed: Decides which.
    """

    seed: int

    def asked(self, examples: Sequence[ConflictExample]) -> list[ConflictExample]:
        """The examples, with the other context in what was the bare prompt.

        Raises:
            UserError: If a prompt does not show its context as it is, or there is no other.
        """
        rng = random.Random(self.seed)
        by_count, alike = defaultdict(list), defaultdict(list)
        for example in examples:
            by_count[len(example.contexts)].append(example)
            alike[_looks(example)].append(example)
        asked = []
        for example in examples:
            if example.contexts and example.bare_prompt:
                groups = (alike[_looks(example)], by_count[len(example.contexts)])
                others = next((found for group in groups if (found := _of_other_subjects(group, example))), None)
                if others is None:
                    raise UserError(f"There is no context of another subject for {example.id}; give more data.")
                example = replace(example, bare_prompt=_exchanged(example, rng.choice(others).contexts))
            asked.append(example)
        return asked


class TwoStreamMethod(Method):
    """Decode with and without the context side by side, by the rules that compete."""

    needs = "nothing"
    starts_from = ()

    @abstractmethod
    def rules(self, towards: Direction) -> Iterable[tuple[Mapping[str, Any], DecodingRule]]:
        """The rules that compete, each with what tells it from the others."""

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """A condition for each rule."""
        del lab
        return [Condition(self.name, towards, about, decoding=rule) for about, rule in self.rules(towards)]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """The same rule, against another prompt's context instead of none."""
        return random_contexts(lab, chosen)


def random_contexts(lab: Lab, chosen: Condition) -> list[Condition]:
    """The same rule, which weighs the context against another prompt's instead of none, drawn several times.

    Raises:
        UserError: As ``OtherContext.asked``.
    """
    controls = []
    for draw in range(DRAWS):
        prompting = OtherContext(lab.rng(chosen.name, draw).randrange(2**31))
        # Refused here, where the record says why, and not while it is measured.
        prompting.asked(lab.asked.examples)
        about = {"method": "random_contexts", "settings": {"draw": draw}, "control_of": chosen.method}
        controls.append(replace(chosen, prompting=prompting, **about))
    return controls


def _looks(example: ConflictExample) -> tuple[str, str, int]:
    return example.kind, example.template, len(example.contexts)


def _of_other_subjects(group: Sequence[ConflictExample], example: ConflictExample) -> list[ConflictExample]:
    return [other for other in group if other.subject != example.subject]


def _exchanged(example: ConflictExample, contexts: Sequence[str]) -> str:
    """The example's prompt with other contexts in the places of its own."""
    text = example.prompt
    for own, other in zip(example.contexts, contexts, strict=True):
        # The prompt may begin a sentence with it.
        place = text.find(own[1:]) - 1
        if place < 0:
            raise UserError(f"The prompt of {example.id} does not show its context as it is, to be exchanged.")
        first = other[:1].upper() if text[place].isupper() else other[:1]
        text = text[:place] + first + other[1:] + text[place + len(own) :]
    return text
