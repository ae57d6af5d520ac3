"""A model with its interventions: what of it a request may ask for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from conflictscope.serve.answers import COLDEST
from conflictscope.serve.jobs import Event, Job
from conflictscope.serve.journal import Journal
from conflictscope.serve.metrics import Metrics
from conflictscope.serve.requests import AnswerRequest, Limits
from conflictscope.serve.worker import Worker
from interp.errors import UserError
from interp.inputs import most_positions
from interp.models import decode_plainly
from interventions.base import Acting
from interventions.config import UNEDITED, InterventionFile, check_choice, chosen_file

_USUAL_TOKENS = 64


class Engine:
    """A model, its interventions, and what answers with them.

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
        # As many settings as may be in use at once.
        self.acting = lru_cache(maxsize=64)(self._acting)
        self._n_embedded = model.get_input_embeddings().weight.shape[0]
        self._worker = Worker(
            model,
            tokenizer,
            limits=self.limits,
            metrics=self.metrics,
            journal=None if journal is None else Journal(journal),
        )

    @property
    def default(self) -> str:
        """The intervention of a request that names none."""
        return next(iter(self.interventions), UNEDITED)

    @property
    def longest(self) -> int:
        """How many tokens prompt and answer may have together."""
        return most_positions(self.model) or 2**62

    def jobs(
        self,
        prompts: Sequence[list[int]],
        asked: AnswerRequest,
        send: Callable[[int, Event], None],
        *,
        bare: Sequence[list[int]] | None = None,
    ) -> list[Job]:
        """The answers that a request asks for, or what is wrong with it.

        Several greedy answers to a prompt are the same one, which is asked for once. Without ``max_tokens`` an answer
        has 64 tokens at most. The ``i``-th answer of a request with a seed has that seed plus ``i``.

        Args:
            prompts: Token ids of each prompt.
            asked: What was asked.
            send: Takes the number of an answer and new text of it, its end, or an error; called in the generating
                thread.
            bare: Token ids of the prompts without their contexts, for a rule for the next token.

        Raises:
            UserError: If it names another model or intervention, sets what that does not have, is too long, or gives
                no prompt without a context where one is needed, or one where none is.
        """
        intervention = self._chosen(asked)
        max_tokens = min(_USUAL_TOKENS, self.limits.new_tokens) if asked.longest is None else asked.longest
        if max_tokens > self.limits.new_tokens:
            raise UserError(f"max_tokens is {max_tokens}, but this server gives {self.limits.new_tokens} at most.")
        acting = self.acting(intervention, asked.trust, asked.strength)
        if bare is not None and len(bare) != len(prompts):
            raise UserError(f"There are {len(prompts)} prompts, but {len(bare)} without_context; give one for each.")
        each = 1 if asked.temperature < COLDEST else asked.n
        if each * len(prompts) > self.limits.waiting:
            raise UserError(
                f"The request asks for {each * len(prompts)} answers, but this server lets {self.limits.waiting} wait; "
                "ask for fewer at a time."
            )
        name, jobs = uuid.uuid4().hex, []
        for number, prompt in enumerate(prompts):
            without = None if bare is None else bare[number]
            for tokens in (prompt,) if without is None else (prompt, without):
                self._check_length(tokens, max_tokens)
            self._check_pair(intervention, acting, prompt, without)
            for index in range(number * each, (number + 1) * each):
                seed = None if asked.seed is None else (asked.seed + index) % 2**63
                sender = partial(send, index)
                jobs.append(Job(prompt, asked, intervention, acting, sender, max_tokens, without, seed, index, name))
        return jobs

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put the answers that a request asks for into the queue, all or none.

        Raises:
            QueueFull: If too many wait already.
        """
        self._worker.submit(jobs)

    def close(self) -> None:
        """Answer what waits, then end; calling it again does nothing."""
        self._worker.close()

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
        if max(prompt) >= self._n_embedded:
            raise UserError(
                f"The prompt has the token {max(prompt)}, but the model knows those below {self._n_embedded}; take the "
                "ids of its own tokenizer."
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
