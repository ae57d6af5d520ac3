"""Put several documents into one prompt: some that contradict memory, some that agree, some beside the point.

The documents are contexts of a set that was built from facts, in different wordings; the question is asked after all of
them. So documents disagree with each other (inter-context conflict), and how many say what, and where, is known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from interp.conflicts import ConflictExample, ConflictSet, ContextKind
from interp.errors import UserError

Position = Literal["first", "last", "mixed"]
POSITIONS: tuple[Position, ...] = get_args(Position)


@dataclass(frozen=True)
class Documents:
    """Which documents a prompt shows.

    Attributes:
        against: How many contradict memory, all with the same answer.
        agreeing: How many agree with memory.
        beside: How many are about something else.
        position: Where those that contradict stand: first, last, or anywhere among the others.
        seed: Decides wordings and order.
    """

    against: int = 1
    agreeing: int = 1
    beside: int = 0
    position: Position = "mixed"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.against, self.agreeing, self.beside) < 0 or self.against + self.agreeing == 0:
            raise UserError("A prompt needs a document that contradicts or agrees; give --against or --agreeing.")

    @property
    def name(self) -> str:
        """What prompts with these documents are called, as their phrasing family."""
        beside = f"-{self.beside}-beside" if self.beside else ""
        where = f"-{self.position}" if self.against and self.agreeing + self.beside else ""
        return f"{self.against}-against-{self.agreeing}{beside}{where}"

    @property
    def kind(self) -> ContextKind:
        """``conflict`` where a document contradicts memory, else ``aligned``."""
        return "conflict" if self.against else "aligned"

    def of(self, conflicts: ConflictSet) -> ConflictSet:
        """A prompt for each fact of a set, and the same question without documents.

        Args:
            conflicts: Prompts of kinds conflict, aligned and irrelevant in several wordings, as ``build_conflicts``
                makes them.

        Raises:
            UserError: If no fact has so many wordings.
        """
        facts: dict[tuple[str, str], list[ConflictExample]] = {}
        for example in conflicts:
            facts.setdefault((example.relation, example.subject), []).append(example)
        made = [one for members in facts.values() for one in self._of_fact(members)]
        if not made:
            raise UserError(
                f"No fact of {conflicts.name} has documents in enough wordings for {self.name}; ask for fewer."
            )
        return ConflictSet(conflicts.name, tuple(made))

    def _of_fact(self, members: Sequence[ConflictExample]) -> list[ConflictExample]:
        one = members[0]
        rng = random.Random(f"{self.seed}/{one.relation}/{one.subject}")
        wanted: list[tuple[ContextKind, int]] = [
            ("conflict", self.against),
            ("aligned", self.agreeing),
            ("irrelevant", self.beside),
        ]
        taken: set[str] = set()
        shown: dict[ContextKind, list[ConflictExample]] = {}
        for kind, count in wanted:
            # No wording twice, or a document would be a copy of another but for its answer.
            free = [e for e in members if e.kind == kind and e.contexts and e.template not in taken]
            if len(free) < count:
                return []
            shown[kind] = rng.sample(free, count)
            taken |= {e.template for e in shown[kind]}
        others = [e.context for kind in ("aligned", "irrelevant") for e in shown[kind]]
        rng.shuffle(others)
        against = [e.context for e in shown["conflict"]]
        documents = {"first": [*against, *others], "last": [*others, *against]}.get(self.position)
        if documents is None:
            documents = rng.sample([*against, *others], len(against) + len(others))
        bare = f"Question: {one.question}\nAnswer:"
        example = replace(
            one,
            id=f"{one.relation}/{one.subject}/{self.name}/{self.kind}",
            contexts=tuple(documents),
            context_answers=shown["conflict"][0].context_answers if against else one.memory_answers,
            kind=self.kind,
            template=self.name,
            prompt="\n\n".join([*documents, bare]),
            bare_prompt=bare,
        )
        name = f"{one.relation}/{one.subject}/{self.name}/none"
        alone = replace(example, id=name, contexts=(), context_answers=(), kind="none", prompt=bare)
        return [example, alone]
