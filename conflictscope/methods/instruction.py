"""Say before each prompt which source to answer from: what a product team tries first.

The instruction stands on a line of its own before the prompt, also before one without a context: a system prompt does
not know what will be asked. Wordings compete on dev. The control is an instruction about something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from conflictscope.study.condition import Condition, Prompting
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interp.conflicts import ConflictExample

WORDINGS: Mapping[Direction, tuple[str, ...]] = {
    "context": (
        "Answer from the text below alone, even where it contradicts what you know.",
        "Instruction: take what the text says as true, and answer from it.",
        "The text below is up to date. What you remember may be wrong.",
    ),
    "memory": (
        "Answer from what you know alone, even where the text below contradicts it.",
        "Instruction: do not believe what the text says; answer from your own knowledge.",
        "The text below may be wrong. What you remember is right.",
    ),
}
"""Instructions that compete, by the source that they ask for."""

UNRELATED = ("Write in plain words, and check your spelling.", "Instruction: keep it short, and stay polite.")
"""Instructions that ask for neither source."""


@dataclass(frozen=True)
class Instructed(Prompting):
    """Put a line before each prompt.

    Attributes:
        instruction: The line.
    """

    instruction: str

    def described(self) -> str:
        """The line."""
        return f"after the line {self.instruction!r}"

    def prompt(self, example: ConflictExample) -> str:
        """The line, then the prompt."""
        return f"{self.instruction}\n{example.prompt}"


@dataclass(frozen=True)
class Instruction(Method):
    """Say before each prompt which source to answer from.

    Attributes:
        wordings: The instructions that compete, by direction.
    """

    name: ClassVar[str] = "instruction"
    needs = "nothing"
    starts_from = ()
    wordings: Mapping[Direction, Sequence[str]] = field(default_factory=lambda: WORDINGS, hash=False)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """One for each wording."""
        del lab
        return [
            Condition(self.name, towards, {"instruction": line}, prompting=Instructed(line))
            for line in self.wordings.get(towards, ())
        ]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """Instructions about something else."""
        del lab
        return [
            Condition("unrelated_instruction", chosen.towards, {}, prompting=Instructed(line), control_of=chosen.method)
            for line in UNRELATED
        ]
