"""An answer under way: its next token, its text as soon as that is certain, and its end."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from conflictscope.serve.jobs import Done, Job, Piece, TokenScore

# Colder logits leave the range of float32.
COLDEST = 0.01
_INCOMPLETE = "\ufffd"


class Answer:
    """The answer to a job, token by token.

    Attributes:
        job: The job.
        started: When it began, by ``time.perf_counter``.
        tokens: Its tokens so far.
        reason: Why it has ended; ``None`` while it goes on.
        error: What went wrong with it, which ends it too.

    Args:
        job: The job.
        tokenizer: Of the model.
        ends: Tokens that end an answer.
        device: Where scores are.
    """

    def __init__(self, job: Job, tokenizer: Any, ends: Collection[int], device: torch.device) -> None:
        self.job = job
        self.started = time.perf_counter()
        self.tokens: list[int] = []
        self.reason: Literal["stop", "length"] | None = None
        self.error: Exception | None = None
        self._tokenizer = tokenizer
        self._ends = ends
        self._sent = ""
        self._scores: list[TokenScore] = []
        self._scores_sent = 0
        self._random: torch.Generator | None = None
        if job.asked.temperature >= COLDEST:
            self._random = torch.Generator(device)
            _ = self._random.seed() if job.seed is None else self._random.manual_seed(job.seed)

    @property
    def ended(self) -> bool:
        """Whether it gets no further tokens: it is complete, unwanted, or failed."""
        return self.reason is not None or self.error is not None or self.job.cancelled.is_set()

    def take(self, scores: Tensor, best: int) -> None:
        """Go on with one token.

        Args:
            scores: Its scores, ``(d_vocab,)`` float32.
            best: The token with the highest one.
        """
        token = best if self._random is None else self._sampled(scores, self._random)
        self.tokens.append(token)
        if (count := self.job.asked.n_scores) is not None:
            self._scores.append(_scored(scores, token, count))
        if token in self._ends:
            self.reason = "stop"
        elif len(self.tokens) == self.job.max_tokens:
            self.reason = "length"
        if self.job.asked.stream or self.job.asked.stops:
            self._look_at_text()

    def done(self) -> Done:
        """The end of it, after what was left of its text is sent."""
        text, _ = self._text()
        self._send(text)
        if self.job.asked.stream and (rest := self._scores[self._scores_sent :]):
            # Of tokens without a text, as the one that ends an answer.
            self.job.send(Piece("", rest))
        return Done(text, self.reason or "stop", len(self.tokens), self._scores)

    def _sampled(self, scores: Tensor, random: torch.Generator) -> int:
        asked = self.job.asked
        # They look at scores alone.
        nothing: Any = None
        scores = TemperatureLogitsWarper(asked.temperature)(nothing, scores[None])
        if asked.top_p < 1:
            scores = TopPLogitsWarper(asked.top_p)(nothing, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=random))

    def _look_at_text(self) -> None:
        text, stopped = self._text()
        if stopped:
            self.reason = "stop"
        elif self.job.asked.stream:
            # No half characters, and nothing that may turn out to be a stop text.
            held = max(map(len, self.job.asked.stops), default=1) - 1
            certain = text.rstrip(_INCOMPLETE)
            self._send(certain[:-held] if held else certain)

    def _text(self) -> tuple[str, bool]:
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        found = [place for stop in self.job.asked.stops if (place := text.find(stop)) >= 0]
        return (text[: min(found)], True) if found else (text, False)

    def _send(self, text: str) -> None:
        if self.job.asked.stream and len(text) > len(self._sent) and text.startswith(self._sent):
            self.job.send(Piece(text[len(self._sent) :], self._scores[self._scores_sent :]))
            self._sent, self._scores_sent = text, len(self._scores)


def _scored(scores: Tensor, token: int, count: int) -> TokenScore:
    logprobs = scores.log_softmax(-1)
    top = logprobs.topk(count)
    return TokenScore(token, float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
