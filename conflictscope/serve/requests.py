"""What a request may say, and how much it may ask for.

Fields that OpenAI's clients send by themselves are taken. Those that ask for what this server does not have are taken
where they say that it is not wanted, and refused in a sentence where it is. ``null`` is as if a field was not there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from interp.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how many are answered at once.

    Attributes:
        prompt_tokens: Longest prompt.
        new_tokens: Longest answer.
        waiting: How many answers may wait.
        rows: How many rows share a pass; an answer has one, or two where a rule weighs two prompts.
        cache_tokens: Tokens that the rows' keys and values are kept of, padding and what is still to come included. One
            answer at a time may have more.
        prefill_tokens: Tokens of prompts, padding included, that are read at once while others wait for their next
            token; a longer prompt is read by itself.
    """

    prompt_tokens: int = 2048
    new_tokens: int = 512
    waiting: int = 256
    rows: int = 32
    cache_tokens: int = 32768
    prefill_tokens: int = 512


def _given(data: Any) -> Any:
    """An object without what is null."""
    return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


def _only(allowed: Any) -> AfterValidator:
    """Take one value alone, which asks for nothing."""

    def check(value: Any) -> Any:
        if value != allowed:
            raise ValueError(f"this server has nothing but {allowed!r} here; leave it out")
        return value

    return AfterValidator(check)


class _Object(BaseModel):
    """An object whose fields are known; null stands for a field that is not there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    _without_null = model_validator(mode="before")(_given)


class StreamOptions(_Object):
    """What a stream tells besides text."""

    include_usage: bool = False


class ResponseFormat(_Object):
    """The form of an answer, which is text."""

    type: Literal["text"]


class AnswerRequest(_Object, ABC):
    """What completions and chats have in common; fields that this server does not have are refused."""

    model: Annotated[str, Field(max_length=1000)] | None = None
    intervention: Annotated[str, Field(max_length=200)] | None = None
    trust: Annotated[float, Field(ge=-1, le=1)] | None = None
    strength: Annotated[float, Field(ge=-100, le=100)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=100)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[int, Field(ge=1, le=16)] = 1

    frequency_penalty: Annotated[float, _only(0)] = 0
    presence_penalty: Annotated[float, _only(0)] = 0
    logit_bias: Annotated[dict[str, float], _only({})] = {}
    response_format: ResponseFormat | None = None

    # What OpenAI keeps for its own books.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    @abstractmethod
    def n_scores(self) -> int | None:
        """How many of the most probable tokens to tell of at each step; ``None`` tells of no log probabilities."""

    @property
    @abstractmethod
    def longest(self) -> int | None:
        """How many tokens an answer may have."""


_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Texts = Annotated[list[str], Field(min_length=1, max_length=64)]
_IdLists = Annotated[list[_Ids], Field(min_length=1, max_length=64)]


def _check_prompt(value: Any) -> Any:
    """Say in one sentence what a prompt can be, where one of four lists of reasons would be all that is said."""
    parts = value if isinstance(value, list) else [value]
    kinds = {"tokens" if isinstance(part, list) else type(part).__name__ for part in parts}
    if len(kinds) != 1 or not kinds <= ({"str", "int", "tokens"} if isinstance(value, list) else {"str"}):
        raise ValueError("give a text, a list of texts, a list of token ids, or a list of such lists")
    return value


Prompt = Annotated[str | _Ids | _Texts | _IdLists, BeforeValidator(_check_prompt)]
"""One prompt or several, as text or token ids."""


class CompletionRequest(AnswerRequest):
    """The body of ``/v1/completions``; a rule for the next token needs the prompt ``without_context`` too."""

    prompt: Prompt
    without_context: Prompt | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Annotated[bool, _only(False)] = False
    best_of: Annotated[int, _only(1)] = 1
    suffix: Annotated[str, _only("")] = ""

    @property
    def n_scores(self) -> int | None:
        """How many of the most probable tokens to tell of at each step; ``None`` tells of no log probabilities."""
        return self.logprobs

    @property
    def longest(self) -> int | None:
        """How many tokens an answer may have."""
        return self.max_tokens


class TextPart(_Object):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _joined(content: Any) -> Any:
    """The text of a message that comes in parts."""
    if isinstance(content, list):
        return "".join(TextPart.model_validate(part).text for part in content)
    return content


def _as_system(role: Any) -> Any:
    """The name that templates know for what OpenAI's newer models call developer."""
    return "system" if role == "developer" else role


class Message(_Object):
    """One turn of a chat."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_as_system)]
    content: Annotated[str, BeforeValidator(_joined)]
    # Whoever speaks, where several speak in one role; most templates do not write it.
    name: Annotated[str, Field(max_length=200)] | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=1000)]


class ChatRequest(AnswerRequest):
    """The body of ``/v1/chat/completions``; a rule for the next token needs the messages ``without_context`` too."""

    messages: Messages
    without_context: Messages | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] = {}

    @property
    def n_scores(self) -> int | None:
        """How many of the most probable tokens to tell of at each step; ``None`` tells of no log probabilities.

        Raises:
            UserError: If these are wanted without log probabilities.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs asks for more log probabilities; set logprobs to true too.")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest(self) -> int | None:
        """What is asked under either name.

        Raises:
            UserError: If it is asked under both.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise UserError("max_tokens and max_completion_tokens mean the same; give one.")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
