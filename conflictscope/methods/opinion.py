"""Ask what a speaker says instead of what is so: opinion-based prompts.

Zhou et al. 2023 (arXiv 2303.11315) put the context into somebody's mouth and ask for that person's opinion, so that
an answer from memory is off the point. Towards memory the same claim is put down as false. Frames compete on dev. The
control quotes the context without anybody's opinion. Prompts without a context stay as they are.
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
from interp.errors import UserError

Frame = tuple[str, str]
"""What stands before the context, and what stands between it and the question."""

FRAMES: Mapping[Direction, tuple[Frame, ...]] = {
    "context": (
        ('Bob said: "', '"\nIn the opinion of Bob: '),
        ('The passage says: "', '"\nAccording to the passage: '),
    ),
    "memory": (
        ('Bob falsely claimed: "', '"\nBob is wrong. In truth: '),
        ('The passage says by mistake: "', '"\nAs everybody knows: '),
    ),
}
"""Frames that compete, by the source that they ask for."""

PLAIN: tuple[Frame, ...] = (('"', '"\n'),)
"""Frames that ask for neither source."""


@dataclass(frozen=True)
class Framed(Prompting):
    """Put text around the context, before the prompt as it is without one.

    Attributes:
        before: What stands before the context.
        after: What stands between it and the prompt without it.
    """

    before: str
    after: str

    def described(self) -> str:
        """What stands around the context."""
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"context after {before!r}, question after {after!r}"

    def prompt(self, example: ConflictExample) -> str:
        """The framed context, then the bare prompt.

        Raises:
            UserError: If it is not known how the prompt is without its context.
        """
        if not example.contexts:
            return example.prompt
        if not example.bare_prompt:
            raise UserError(f"It is not known how {example.id} asks without its context; give it a bare_prompt.")
        return f"{self.before}{example.context}{self.after}{example.bare_prompt}"


@dataclass(frozen=True)
class Opinion(Method):
    """Ask what a speaker says instead of what is so.

    Attributes:
        frames: Those that compete, by direction.
    """

    name: ClassVar[str] = "opinion"
    needs = "nothing"
    starts_from = ()
    frames: Mapping[Direction, Sequence[Frame]] = field(default_factory=lambda: FRAMES, hash=False)

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """One for each frame.

        Raises:
            UserError: If it is not known how a prompt of dev or test is without its context.
        """
        framed = [Framed(*frame) for frame in self.frames.get(towards, ())]
        for one in framed[:1]:
            # Refused here, where the record says why, and not while it is measured.
            one.asked([*lab.prompts.dev, *lab.asked])
        return [
            Condition(self.name, towards, {"before": one.before, "after": one.after}, prompting=one) for one in framed
        ]

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """The context in quotes, without an opinion."""
        del lab
        return [
            Condition("plain_quotes", chosen.towards, {}, prompting=Framed(*frame), control_of=chosen.method)
            for frame in PLAIN
        ]
