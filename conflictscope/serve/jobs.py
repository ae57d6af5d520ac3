"""A request on its way through the queue, and the end of its answer."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from conflictscope.serve.requests import AnswerRequest


class Done(NamedTuple):
    """The end of an answer.

    Attributes:
        text: The whole answer.
        reason: ``stop`` (the model or a stop text ended it) or ``length``.
        tokens: How many tokens were generated.
    """

    text: str
    reason: Literal["stop", "length"]
    tokens: int


@dataclass(eq=False)
class Job:
    """A request on its way through the queue.

    Attributes:
        prompt: Token ids.
        asked: What was asked.
        intervention: The name of what is applied.
        send: Takes new text, the end, or an error; called in the generating thread.
        max_tokens: Longest answer.
        bare: Token ids of the prompt without its context, for a rule for the next token.
        cancelled: Set by whoever no longer wants the answer.
    """

    prompt: list[int]
    asked: AnswerRequest
    intervention: str
    send: Callable[[str | Done | Exception], None]
    max_tokens: int
    bare: list[int] | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    cancelled: threading.Event = field(default_factory=threading.Event)


class QueueFull(Exception):
    """More requests wait than may."""
