"""A request on its way through the queue, and the end of its answer."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from conflictscope.serve.requests import AnswerRequest
from interventions.base import Acting


class TokenScore(NamedTuple):
    """How probable a token of an answer was.

    Attributes:
        token: Its id.
        logprob: Its log probability, natural, before temperature and top-p.
        top: Ids and log probabilities of the most probable tokens there, most probable first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """New text of an answer.

    Attributes:
        text: The text.
        scores: Of the tokens since the last piece, if they are wanted.
    """

    text: str
    scores: list[TokenScore]


class Done(NamedTuple):
    """The end of an answer.

    Attributes:
        text: The whole answer.
        reason: ``stop`` (the model or a stop text ended it) or ``length``.
        tokens: How many tokens were generated.
        scores: Of all tokens, if they are wanted.
    """

    text: str
    reason: Literal["stop", "length"]
    tokens: int
    scores: list[TokenScore]


Event = Piece | Done | Exception
"""What becomes of a job: new text of a stream, the end, or what went wrong."""


@dataclass(eq=False)
class Job:
    """An answer that is asked for, on its way through the queue.

    Attributes:
        prompt: Token ids.
        bare: Token ids of the prompt without its context, for a rule for the next token.
        asked: The request.
        intervention: The name of what is applied.
        acting: What is applied.
        send: Takes new text of a stream, the end, or an error; called in the generating thread.
        max_tokens: Longest answer.
        seed: Of its random numbers; ``None`` takes one that nobody knows.
        index: Its number among the answers to the request.
        id: Of the request.
        cancelled: Set by whoever no longer wants the answer.
    """

    prompt: list[int]
    asked: AnswerRequest
    intervention: str
    acting: Acting
    send: Callable[[Event], None]
    max_tokens: int
    bare: list[int] | None = None
    seed: int | None = None
    index: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def prompts(self) -> list[list[int]]:
        """What is read: the prompt, and the one without context if there is one."""
        return [self.prompt] if self.bare is None else [self.prompt, self.bare]

    @property
    def longest(self) -> int:
        """How many tokens each row of it may come to."""
        return max(map(len, self.prompts)) + self.max_tokens


class QueueFull(Exception):
    """More requests wait than may."""
