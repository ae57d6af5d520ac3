"""A model provider of Inspect whose answers are those of an edited model.

    inspect eval task.py --model conflictscope/smollm2-135m -M edit=edit.json

Inspect finds it by an entry point (``providers``). Answers come from the engine of ``conflictscope serve``: samples
that are asked at the same time share passes, and each is answered as if it were alone, greedily unless a temperature is
set.
"""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import anyio
from inspect_ai.model import (  # pyright: ignore[reportMissingImports]
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from pydantic import ValidationError

from conflictscope.elsewhere.edits import chosen_edit
from conflictscope.serve.engine import Engine
from conflictscope.serve.jobs import Done, Event
from conflictscope.serve.requests import CompletionRequest, Limits
from interp.chat import Message, chat_text
from interp.errors import UserError
from interp.inputs import most_positions, token_ids
from interp.models import load_model

# Settings that a request can make, and that would change answers or ask for more than text.
_REFUSED = (
    *("best_of", "frequency_penalty", "logit_bias", "logprobs", "num_choices", "presence_penalty", "prompt_logprobs"),
    *("response_schema", "top_k", "top_logprobs"),
)


class EditedModel(ModelAPI):
    """Answers Inspect's chats with a transformers model and an intervention.

    Args:
        model_name: A registered name, a local directory or a hub id.
        base_url: Not used: the model runs in this process.
        api_key: Not used either.
        config: Inspect's settings of generation.
        edit: The path of an intervention file, ``-M edit=edit.json``; ``None`` is the unedited model.
        trust: Where the file's dial is to stand, from -1 (memory) to 1 (context).
        strength: How far the edit goes; not for a dial.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        device: ``auto``, ``cpu``, ``cuda``, ...

    Raises:
        UserError: If the model or the file cannot be loaded, do not fit each other or a harness, or the model has no
            chat template.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        edit: str | None = None,
        trust: float | None = None,
        strength: float = 1.0,
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        super().__init__(model_name, base_url, api_key, config=config or GenerateConfig())
        chosen = chosen_edit(edit, trust=trust, strength=strength)
        model: Any = load_model(model_name, device=device, dtype=dtype)
        if not model.tokenizer.chat_template:
            raise UserError(f"{model_name} has no chat template, and Inspect asks in chats; take an instructed model.")
        longest = most_positions(model) or Limits.cache_tokens
        self._engine = Engine(
            model,
            model.tokenizer,
            name=model_name,
            interventions={} if chosen is None else {chosen.name: chosen},
            limits=Limits(prompt_tokens=longest, new_tokens=longest, waiting=2**20),
        )

    def max_connections(self) -> int:
        """How many samples are asked at once: as many as share a pass."""
        return Limits.rows

    def max_tokens(self) -> int:
        """How many tokens an answer may have, where a task does not say."""
        return Limits.new_tokens

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[Any],
        tool_choice: Any,  # noqa: ARG002 (Inspect's signature)
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer a chat.

        Args:
            input: What was said.
            tools: Tools to call; there may be none.
            tool_choice: Which of them to call.
            config: Settings of generation: tokens, temperature, top-p, seed and stop sequences.

        Raises:
            UserError: If tools or settings are asked for that there are none of, or the chat does not fit.
        """
        if tools:
            raise UserError("A model that is asked here calls no tools; take a task, or an agent, without them.")
        prompt = _prompt(self._engine.tokenizer, input)
        done = await self._answered(prompt, _request(config))
        message = ChatMessageAssistant(content=done.text, model=self.model_name, source="generate")
        reason = "stop" if done.reason == "stop" else "max_tokens"
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=ModelUsage(
                input_tokens=len(prompt), output_tokens=done.tokens, total_tokens=len(prompt) + done.tokens
            ),
        )

    async def _answered(self, prompt: list[int], asked: CompletionRequest) -> Done:
        answered: Future[Done] = Future()

        def send(_: int, event: Event) -> None:
            # Who no longer waits has cancelled it.
            with suppress(InvalidStateError):
                if isinstance(event, Exception):
                    answered.set_exception(event)
                elif isinstance(event, Done):
                    answered.set_result(event)

        (job,) = self._engine.jobs([prompt], asked, send)
        self._engine.submit([job])
        try:
            # A limiter of its own: who waits here must not take threads from others.
            limiter = anyio.CapacityLimiter(1)
            return await anyio.to_thread.run_sync(answered.result, limiter=limiter, abandon_on_cancel=True)
        finally:
            job.cancelled.set()
            answered.cancel()


def _prompt(tokenizer: Any, messages: list[ChatMessage]) -> list[int]:
    """A chat as the model reads it."""
    turns: list[Message] = []
    for message in messages:
        parts = [] if isinstance(message.content, str) else message.content
        if any(part.type not in ("text", "reasoning") for part in parts):
            raise UserError("The model reads text alone; take a task without images, sounds or files.")
        turns.append({"role": message.role, "content": message.text})
    (ids,) = token_ids(tokenizer, [chat_text(tokenizer, turns)])
    return ids


def _request(config: GenerateConfig) -> CompletionRequest:
    """What is asked of the engine.

    Raises:
        UserError: If a setting is not one that it has, or out of range.
    """
    if asked := [name for name in _REFUSED if getattr(config, name, None) not in (None, False)]:
        raise UserError(f"A model that is asked here has no setting {asked[0]}; leave it out.")
    said = {"max_tokens": config.max_tokens, "temperature": config.temperature, "top_p": config.top_p}
    try:
        # The prompt is given as tokens.
        return CompletionRequest.model_validate({"prompt": "-", **said, "seed": config.seed, "stop": config.stop_seqs})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}; set it otherwise.") from error
