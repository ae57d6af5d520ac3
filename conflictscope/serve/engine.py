"""A model with its interventions, and the thread that answers with it."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList

from conflictscope.serve.jobs import Done, Job, QueueFull
from conflictscope.serve.journal import Journal
from conflictscope.serve.metrics import Metrics
from conflictscope.serve.requests import AnswerRequest, Limits
from conflictscope.serve.streaming import Streamer
from interp.errors import UserError
from interp.inputs import most_positions, padded
from interp.models import decode_plainly
from interp.pairs import generate_pairs
from interventions.base import Acting, attach_patches
from interventions.config import UNEDITED, InterventionFile, check_choice, chosen_file

_USUAL_TOKENS = 64
# Colder logits leave the range of float32.
_COLDEST = 0.01
_log = logging.getLogger(__name__)


class Engine:
    """A model, its interventions, and the thread that answers.

    Args:
        model: The transformers model, in evaluation mode; it decodes plainly from now on.
        tokenizer: Its tokenizer.
        name: What the model is called.
        interventions: Files by name; the first is what a request gets that names none.
        limits: What requests may ask for.
        journal: File to which every answer is appended, and synced, before it is sent, of a stream its end; ``None``
            keeps none.

    Raises:
        UserError: If a file is for another model or tokenizer, or a name is taken.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        interventions: dict[str, InterventionFile],
        limits: Limits | None = None,
        journal: Path | None = None,
    ) -> None:
        check_choice(interventions, model, tokenizer)
        decode_plainly(model)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.interventions = interventions
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.acting = lru_cache(maxsize=8)(self._acting)
        self._journal = None if journal is None else Journal(journal)
        self._jobs: queue.Queue[Job | None] = queue.Queue(self.limits.waiting)
        self._thread = threading.Thread(target=self._work, name="conflictscope-generate", daemon=True)
        self._thread.start()

    @property
    def default(self) -> str:
        """The intervention of a request that names none."""
        return next(iter(self.interventions), UNEDITED)

    @property
    def longest(self) -> int:
        """How many tokens prompt and answer may have together."""
        return most_positions(self.model) or 2**62

    def job(
        self,
        prompt: list[int],
        asked: AnswerRequest,
        max_tokens: int | None,
        send: Callable[..., None],
        *,
        bare: list[int] | None = None,
    ) -> Job:
        """A job for a request, or what is wrong with it; without ``max_tokens`` an answer has 64 at most.

        Args:
            prompt: Token ids.
            asked: What was asked.
            max_tokens: Longest answer.
            send: Takes new text, the end, or an error; called in the generating thread.
            bare: Token ids of the prompt without its context, for a rule for the next token.

        Raises:
            UserError: If it names another model or intervention, sets what that does not have, is too long, or gives
                no prompt without a context where one is needed, or one where none is.
        """
        intervention = self._chosen(asked)
        max_tokens = min(_USUAL_TOKENS, self.limits.new_tokens) if max_tokens is None else max_tokens
        if max_tokens > self.limits.new_tokens:
            raise UserError(f"max_tokens is {max_tokens}, but this server gives {self.limits.new_tokens} at most.")
        for tokens in (prompt,) if bare is None else (prompt, bare):
            self._check_length(tokens, max_tokens)
        self._check_pair(intervention, self.acting(intervention, asked.trust, asked.strength), prompt, bare)
        return Job(prompt, asked, intervention, send, max_tokens, bare)

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFull: If too many wait already.
        """
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise QueueFull from None
        self.metrics.waiting.set(self._jobs.qsize())

    def close(self) -> None:
        """Answer what waits, then end; calling it again does nothing."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        if self._journal is not None:
            self._journal.close()

    def _check_length(self, prompt: list[int], max_tokens: int) -> None:
        if not prompt:
            raise UserError("The prompt has no tokens; give some text.")
        if len(prompt) > self.limits.prompt_tokens:
            raise UserError(
                f"The prompt has {len(prompt)} tokens, but this server takes {self.limits.prompt_tokens} at most."
            )
        if len(prompt) + max_tokens > self.longest:
            raise UserError(
                f"The prompt's {len(prompt)} tokens and {max_tokens} new ones are more than the {self.longest} that "
                "the model can take; ask for fewer."
            )

    def _check_pair(self, intervention: str, acting: Acting, prompt: list[int], bare: list[int] | None) -> None:
        if acting.rule is None:
            if bare is not None:
                raise UserError(f"{intervention} asks the prompt alone; leave out without_context.")
        elif bare is None or bare == prompt:
            raise UserError(
                f"{intervention} weighs the prompt against the same without its context; give that as without_context, "
                f"or ask a prompt that has none with the intervention {UNEDITED}."
            )

    def _chosen(self, asked: AnswerRequest) -> str:
        base, _, suffix = (asked.model or self.name).partition(":") if asked.model != self.name else (self.name, "", "")
        if base != self.name:
            raise UserError(f"This server has no model {asked.model!r}; it has {', '.join(self.models())}.")
        if suffix and asked.intervention is not None and asked.intervention != suffix:
            raise UserError(f"model names the intervention {suffix!r}, intervention {asked.intervention!r}; name one.")
        chosen = suffix or asked.intervention or self.default
        if chosen != UNEDITED:
            chosen_file(self.interventions, chosen)
        return chosen

    def models(self) -> list[str]:
        """What a request may name as its model: with the default intervention, with each, and unedited."""
        return [self.name, *(f"{self.name}:{name}" for name in (UNEDITED, *self.interventions))]

    def _acting(self, intervention: str, trust: float | None, strength: float) -> Acting:
        if intervention == UNEDITED:
            if trust is not None or strength != 1:
                raise UserError("The unedited model has no trust and no strength; name an intervention.")
            return Acting([])
        chosen = self.interventions[intervention].at(trust=trust, strength=strength)
        return Acting.together(part.acting(self.model) for part in chosen.build())

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.metrics.waiting.set(self._jobs.qsize())
            if job.cancelled.is_set():
                continue
            started = time.perf_counter()
            try:
                done = self._answer(job)
                if self._journal is not None and not job.cancelled.is_set():
                    self._journal.append(job, done)
                self.metrics.tokens.labels(job.intervention).inc(done.tokens)
                job.send(done)
            except Exception as error:
                _log.exception("request %s failed", job.id)
                job.send(error)
            finally:
                self.metrics.seconds.observe(time.perf_counter() - started)

    def _answer(self, job: Job) -> Done:
        asked = job.asked
        acting = self.acting(job.intervention, asked.trust, asked.strength)
        streamer = Streamer(self.tokenizer, asked.stops, job)
        options: dict[str, Any] = {"max_new_tokens": job.max_tokens, "streamer": streamer, "do_sample": False}
        options["stopping_criteria"] = StoppingCriteriaList([streamer.stopping])
        if asked.temperature >= _COLDEST:
            options |= {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}
            torch.manual_seed(int.from_bytes(os.urandom(8), "big") >> 1 if asked.seed is None else asked.seed)
        inputs = padded(self.model, [job.prompt] if job.bare is None else [job.prompt, job.bare])
        prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with attach_patches(self.model, acting.patches), torch.inference_mode():
            if acting.rule is None:
                self.model.generate(**prompts, **options)
            else:
                generate_pairs(self.model, prompts, acting.rule, **options)
        own = self.model.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        return streamer.done(job.max_tokens, ends)
