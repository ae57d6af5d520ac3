"""What a request may say, and how much it may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from interp.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        prompt_tokens: Longest prompt.
        new_tokens: Longest answer.
        waiting: How many requests may wait.
    """

    prompt_tokens: int = 2048
    new_tokens: int = 512
    waiting: int = 256


class AnswerRequest(BaseModel):
    """What completions and chats have in common; fields that this server does not have are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

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
    n: Literal[1] = 1

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(AnswerRequest):
    """The body of ``/v1/completions``; a rule for the next token needs the prompt ``without_context`` too."""

    prompt: str
    without_context: str | None = None


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


Messages = Annotated[list[Message], Field(min_length=1, max_length=1000)]


class ChatRequest(AnswerRequest):
    """The body of ``/v1/chat/completions``; a rule for the next token needs the messages ``without_context`` too."""

    messages: Messages
    without_context: Messages | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def longest(self) -> int | None:
        """What is asked under either name.

        Raises:
            UserError: If it is asked under both.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise UserError("max_tokens and max_completion_tokens mean the same; give one.")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
