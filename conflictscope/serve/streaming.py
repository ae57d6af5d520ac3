"""Text of an answer, sent as soon as it is certain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from conflictscope.serve.jobs import Done, Job

_INCOMPLETE = "\ufffd"


class Streamer(BaseStreamer):
    """Sends text as soon as it is certain: no half characters, nothing that may turn out to be a stop text.

    Args:
        tokenizer: Of the model that generates.
        stops: Texts that end the answer.
        job: What is told of new text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], job: Job) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._job = job
        self._ids: list[int] = []
        self._sent = ""
        self._prompt_seen = False
        self._stopped = False
        self.stopping = _Stopping(lambda: self._stopped or job.cancelled.is_set())

    def put(self, value: Any) -> None:
        """Take the prompt, then token after token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += value.flatten().tolist()
        text, self._stopped = self._text()
        longest = max(map(len, self._stops), default=1) - 1
        certain = text if self._stopped else text.rstrip(_INCOMPLETE)
        certain = certain if self._stopped or not longest else certain[:-longest]
        self._send(certain)

    def end(self) -> None:
        """The rest is sent by ``done``."""

    def done(self, max_tokens: int, end_tokens: Sequence[int | None]) -> Done:
        """Send what is left, and say how the answer ended."""
        text, stopped = self._text()
        self._send(text)
        ended = stopped or len(self._ids) < max_tokens or self._ids[-1] in end_tokens
        return Done(text, "stop" if ended else "length", len(self._ids))

    def _text(self) -> tuple[str, bool]:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        return (text[: min(found)], True) if found else (text, False)

    def _send(self, text: str) -> None:
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._job.send(text[len(self._sent) :])
            self._sent = text


class _Stopping(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002 (transformers' signature)
        return torch.full((len(input_ids),), self._stopped(), device=input_ids.device)
