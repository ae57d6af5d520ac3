"""The thread that answers: it lets jobs into the batch as there is room, and goes on token by token.

Between two steps of the batch prompts of bounded length are read at most, and one token of an answer that cannot be in
it is found, so that no stream waits long for another one's start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from conflictscope.serve.alone import Alone
from conflictscope.serve.answers import Answer
from conflictscope.serve.batch import Batch, can_batch
from conflictscope.serve.jobs import Done, Job, QueueFull
from conflictscope.serve.journal import Journal
from conflictscope.serve.metrics import Metrics
from conflictscope.serve.requests import Limits
from interventions.rows import shares_passes

_log = logging.getLogger(__name__)


class Worker:
    """Answers jobs in a thread of its own.

    Args:
        model: The transformers model.
        tokenizer: Its tokenizer.
        limits: How many rows and tokens are worked on at once, and how many jobs may wait.
        metrics: What is counted.
        journal: Where answers are written before they are sent; ``None`` keeps none.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, limits: Limits, metrics: Metrics, journal: Journal | None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._limits = limits
        self._metrics = metrics
        self._journal = journal
        own = model.generation_config.eos_token_id
        self._ends = frozenset(own if isinstance(own, list) else [own])
        self._can_batch = can_batch(model)
        if not self._can_batch:
            _log.warning(
                "%s has a cache of its own kind, so that answers are given one at a time", type(model).__name__
            )
        self._batch = Batch(model)
        self._alone: Alone | None = None
        self._waiting: deque[Job] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="conflictscope-generate", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their turn, all or none.

        Raises:
            QueueFull: If too many wait already.
        """
        with self._changed:
            if len(self._waiting) + len(jobs) > self._limits.waiting:
                raise QueueFull
            self._waiting += jobs
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def close(self) -> None:
        """Answer what waits, then end; calling it again does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self._journal is not None:
            self._journal.close()

    def _work(self) -> None:
        joining: list[Answer] | None = []
        while joining is not None:
            try:
                joining = self._next()
                self._turn(joining or [])
            except Exception as error:
                _log.exception("answering failed, and begins anew")
                self._fail(error, joining or [])
                joining = []

    def _turn(self, joining: Sequence[Answer]) -> None:
        """Let answers join, and go on with a token of each."""
        if joining and not _tried(partial(self._batch.join, joining), joining):
            self._end(joining)
        self._end(self._batch.leave())
        if self._batch.answers:
            _tried(self._batch.step, self._batch.answers)
            self._end(self._batch.leave())
        if self._alone is not None:
            self._batch.pause()
            _tried(self._alone.step, [self._alone.answer])
            if self._alone.answer.ended:
                self._end([self._alone.answer])
                self._alone = None
        self._metrics.batch.set(self._batch.n_rows)

    def _fail(self, error: Exception, joining: Sequence[Answer]) -> None:
        """Tell all who wait that their answers failed, and begin with an empty batch."""
        begun = [*self._batch.answers, *joining, *([] if self._alone is None else [self._alone.answer])]
        with self._changed:
            jobs = [*(answer.job for answer in begun), *self._waiting]
            self._waiting.clear()
        with suppress(Exception):
            self._batch.pause()
        self._batch, self._alone = Batch(self._model), None
        # An answer that has just joined is in the batch as well.
        for job in dict.fromkeys(jobs):
            job.send(error)

    def _next(self) -> list[Answer] | None:
        """Wait until there is something to do, and give the answers that join the batch; ``None`` ends."""
        with self._changed:
            while True:
                joining = self._admitted()
                self._metrics.waiting.set(len(self._waiting))
                if joining or self._batch.answers or self._alone is not None:
                    return joining
                if self._closing:
                    return None
                self._changed.wait()

    def _admitted(self) -> list[Answer]:
        """Take those of the waiting jobs that can begin, in the order in which they came."""
        joining: list[Answer] = []
        left: deque[Job] = deque()
        full = False
        for job in self._waiting:
            if job.cancelled.is_set():
                continue
            if not (self._can_batch and shares_passes(job.acting.patches)):
                if self._alone is None:
                    self._alone = Alone(self._model, self._begun(job))
                else:
                    left.append(job)
            elif full or not self._fits([*(answer.job for answer in joining), job]):
                # Who came first is answered first, also where a shorter prompt would still fit.
                full = True
                left.append(job)
            else:
                joining.append(self._begun(job))
        self._waiting = left
        return joining

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether there is room for some jobs in the batch, and in one pass; for one there is if nothing else runs."""
        limits = self._limits
        rows = sum(len(job.prompts) for job in jobs)
        if len(jobs) > 1 and rows * max(len(prompt) for job in jobs for prompt in job.prompts) > limits.prefill_tokens:
            return False
        every = [*(answer.job for answer in self._batch.answers), *jobs]
        rows += self._batch.n_rows
        room = rows <= limits.rows and rows * max(job.longest for job in every) <= limits.cache_tokens
        return room or len(every) == 1

    def _begun(self, job: Job) -> Answer:
        return Answer(job, self._tokenizer, self._ends, self._model.device)

    def _end(self, answers: Sequence[Answer]) -> None:
        """Write the answers down, then send them."""
        if not answers:
            return
        events = [_event(answer) for answer in answers]
        kept = [
            (answer.job, event)
            for answer, event in zip(answers, events, strict=True)
            if isinstance(event, Done) and not answer.job.cancelled.is_set()
        ]
        if self._journal is not None and kept:
            try:
                self._journal.append(kept)
            except OSError as error:
                events = [error] * len(answers)
        for answer, event in zip(answers, events, strict=True):
            if isinstance(event, Exception):
                _log.error("request %s failed", answer.job.id, exc_info=event)
            self._metrics.tokens.labels(answer.job.intervention).inc(len(answer.tokens))
            self._metrics.seconds.observe(time.perf_counter() - answer.started)
            answer.job.send(event)


def _event(answer: Answer) -> Done | Exception:
    try:
        return answer.error or answer.done()
    except Exception as error:
        return error


def _tried(work: Callable[[], None], answers: Sequence[Answer]) -> bool:
    """Do something for answers, all of which fail if it does."""
    try:
        work()
    except Exception as error:
        for answer in answers:
            answer.error = error
        return False
    return True
