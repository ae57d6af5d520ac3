"""Answers in the shapes of OpenAI's completions and chats: choices, chunks of streams, log probabilities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from conflictscope.serve.jobs import Done, Piece, TokenScore

# What OpenAI writes for a token that cannot come; JSON has no infinity.
_LOWEST = -9999.0
_INCOMPLETE = "\ufffd"


class Shape(ABC):
    """How the answers to one request are written.

    Attributes:
        kind: The name of a whole answer.
        chunk: The name of a part of one.

    Args:
        tokenizer: Of the model.
        scored: Whether log probabilities are wanted.
    """

    kind: ClassVar[str]
    chunk: ClassVar[str]

    def __init__(self, tokenizer: Any, *, scored: bool) -> None:
        self._tokenizer = tokenizer
        self._scored = scored

    def whole(self, index: int, done: Done) -> dict[str, Any]:
        """A choice."""
        return self._choice(index, self._text(done.text), done.scores, done.reason)

    def part(self, index: int, piece: Piece | None, reason: Literal["stop", "length"] | None = None) -> dict[str, Any]:
        """A choice of a chunk: new text, or at the end ``None`` with the reason."""
        return self._choice(index, self._new_text(index, piece), [] if piece is None else piece.scores, reason)

    def _choice(
        self, index: int, text: dict[str, Any], scores: Sequence[TokenScore], reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, scores) if self._scored and (scores or reason is None) else None
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": reason}

    def _token(self, token: int) -> str:
        return self._tokenizer.decode([token])

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _new_text(self, index: int, piece: Piece | None) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> dict[str, Any]: ...


class CompletionShape(Shape):
    """Of ``/v1/completions``."""

    kind = "text_completion"
    chunk = "text_completion"

    def __init__(self, tokenizer: Any, *, scored: bool) -> None:
        super().__init__(tokenizer, scored=scored)
        # How many characters of each answer were told of.
        self._told: dict[int, int] = {}

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _new_text(self, index: int, piece: Piece | None) -> dict[str, Any]:  # noqa: ARG002 (chats tell of each beginning)
        return {"text": "" if piece is None else piece.text}

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> dict[str, Any]:
        tokens = [self._token(score.token) for score in scores]
        offsets = []
        for token in tokens:
            offsets.append(self._told.setdefault(index, 0))
            self._told[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(score.logprob, _LOWEST) for score in scores],
            "top_logprobs": [
                {self._token(token): max(logprob, _LOWEST) for token, logprob in score.top} for score in scores
            ],
            "text_offset": offsets,
        }


class ChatShape(Shape):
    """Of ``/v1/chat/completions``."""

    kind = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, tokenizer: Any, *, scored: bool) -> None:
        super().__init__(tokenizer, scored=scored)
        self._begun: set[int] = set()

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _new_text(self, index: int, piece: Piece | None) -> dict[str, Any]:
        delta = {} if index in self._begun else {"role": "assistant", "content": ""}
        self._begun.add(index)
        return {"delta": delta if piece is None else delta | {"content": piece.text}}

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> dict[str, Any]:  # noqa: ARG002 (completions count)
        told = [
            {
                **self._said(score.token, score.logprob),
                "top_logprobs": [self._said(token, logprob) for token, logprob in score.top],
            }
            for score in scores
        ]
        return {"content": told, "refusal": None}

    def _said(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        # Of a token that is no whole character the text does not say which bytes it has.
        known = None if _INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": known}
