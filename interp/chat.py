"""Lay out documents and a question as messages of a chat, and write them through a model's own template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, str]
"""``role`` and ``content``, as chat templates take them."""

_SHORTLY = "Answer in a few words."
_NOTED = "Thank you, I have read it."


@dataclass(frozen=True)
class Layout:
    """How a chat lays out documents and a question: a family of prompts.

    Attributes:
        documents: What is written around the text of one document, ``{text}``.
        question: What is written around a question, ``{question}``.
        place: Where the document stands: before or after the question, in the system message, or in an earlier turn
            that the assistant thanks for.
        label: What the document's text begins with in a completion and not in a chat.
    """

    documents: str = "Context:\n{text}"
    question: str = "Question: {question}"
    place: Literal["before", "after", "system", "earlier"] = "before"
    label: str = ""

    def messages(self, question: str, documents: Sequence[str], *, is_stem: bool = False) -> list[Message]:
        """What is said up to the answer. Several documents are numbered and stand before the question, in any layout.

        Args:
            question: The question, or the start of a sentence.
            documents: The documents; there may be none.
            is_stem: Whether the question is the start of a sentence, which is to be completed.
        """
        asked = f"{self.question.format(question=question)}\n{_SHORTLY}"
        if is_stem:
            asked = f"Complete the sentence in a few words: {question}"
        if not documents:
            return [_user(asked)]
        if len(documents) > 1:
            numbered = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(documents, 1))
            return [_user(f"Documents:\n{numbered}\n\n{asked}")]
        given = self.documents.format(text=documents[0].removeprefix(self.label))
        return {
            "before": [_user(f"{given}\n\n{asked}")],
            "after": [_user(f"{asked}\n\n{given}")],
            "system": [{"role": "system", "content": given}, _user(asked)],
            "earlier": [_user(given), answered(_NOTED), _user(asked)],
        }[self.place]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def answered(content: str) -> Message:
    """What the assistant says."""
    return {"role": "assistant", "content": content}


def chat_text(tokenizer: Any, messages: Sequence[Message], system: str = "") -> str:
    """The text of a chat up to where the assistant begins, by the tokenizer's template.

    A template's text is tokenised as any other: what it begins with is not put before it again (``interp.inputs``).

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: What is said; system messages, wherever they are, become one at the beginning.
        system: What the system message begins with; empty, and without others, leaves the template's own.
    """
    told = [system, *(message["content"] for message in messages if message["role"] == "system")]
    head: list[Message] = [{"role": "system", "content": "\n\n".join(filter(None, told))}] if any(told) else []
    rest = [message for message in messages if message["role"] != "system"]
    # Models that think at length are asked not to, where their template can say so.
    return tokenizer.apply_chat_template(
        [*head, *rest], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
