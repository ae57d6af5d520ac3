"""Ask the same questions in another form: through a chat template, after answered examples, up to the answer itself.

A set of prompts becomes another one with the same ids, answers and splits; whatever reads prompts works on it. In a
chat every phrasing family of facts has a layout of its own (``interp.facts.PHRASINGS``); other data has the usual one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from interp.answers import CHAT_TOKENS, COMPLETION_TOKENS
from interp.chat import Layout, Message, answered, chat_text
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.facts import PHRASINGS, SOURCE
from interp.generation import continue_greedily
from interp.inputs import continuation_ids, joined, tokenizer_of

Form = Literal["completion", "chat", "auto"]
FORMS: tuple[Form, ...] = get_args(Form)

# What names of models that were taught to follow instructions have in them.
_INSTRUCTED = re.compile(r"(?:^|[-_/ .])(?:instruct|chat|it|sft|dpo|rlhf)(?:[-_/ .]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        form: ``completion`` leaves prompts as they are; ``chat`` asks through the tokenizer's chat template; ``auto``
            takes that where there is one and the model's name says that it was taught to follow instructions.
        system: The system message of a chat; empty leaves the template's own.
        prefix: What the answer begins with, which the model goes on from.
        shots: How many answered examples of the train split are shown before each prompt: about other subjects, with
            contexts that agree; without contexts before a prompt that has none.
        seed: Decides which.
    """

    form: Form = "completion"
    system: str = ""
    prefix: str = ""
    shots: int = 0
    seed: int = 0

    def settled(self, model: nn.Module, name: str) -> Asking:
        """The same with ``auto`` decided for a model.

        Raises:
            UserError: If a chat is wanted, and there is no template for it, or a system message and no chat.
        """
        has_template = bool(getattr(tokenizer_of(model), "chat_template", None))
        form = self.form
        if form == "auto":
            form = "chat" if has_template and is_instructed(name) else "completion"
        if form == "chat" and not has_template:
            raise UserError(f"The tokenizer of {name} has no chat template; ask with --format completion.")
        if form != "chat" and self.system:
            raise UserError("A system message belongs to a chat; add --format chat, or leave it out.")
        return replace(self, form=form)

    def answer_tokens(self, model: nn.Module, name: str) -> int:
        """How many tokens an answer may take at least: more in a chat, where it is a sentence.

        Raises:
            UserError: As ``settled``.
        """
        return CHAT_TOKENS if self.settled(model, name).form == "chat" else COMPLETION_TOKENS

    def asked(self, model: nn.Module, name: str, conflicts: ConflictSet) -> ConflictSet:
        """The prompts in this form; examples are taken from the set's train split.

        Args:
            model: The model, or a bridge around it.
            name: What it was loaded by.
            conflicts: The prompts.

        Raises:
            UserError: As ``settled``, or if there are too few examples to show.
        """
        settled = self.settled(model, name)
        if replace(settled, seed=0) == Asking():
            return conflicts
        writer = _Writer(tokenizer_of(model), settled, conflicts)
        return ConflictSet(conflicts.name, tuple(writer.written(example) for example in conflicts))

    def prompt(self, model: nn.Module, question: str, documents: Sequence[str] = ()) -> str:
        """One question in this form, which is settled: a line each in a completion.

        Args:
            model: The model, or a bridge around it.
            question: A question that ends with a question mark, or the start of a sentence.
            documents: What is put before it.
        """
        tokenizer, is_question = tokenizer_of(model), question.endswith("?")
        if self.form == "chat":
            text = chat_text(tokenizer, Layout().messages(question, documents, is_stem=not is_question), self.system)
        elif is_question:
            text = f"User: {' '.join([*documents, question])}\nAssistant:"
        else:
            text = "\n".join([*documents, question])
        return self.begun(tokenizer, text)

    def said(self, model: nn.Module, text: str) -> str:
        """A prompt of one's own in this form, which is settled: in a chat the user says it, word for word."""
        tokenizer = tokenizer_of(model)
        if self.form == "chat":
            text = chat_text(tokenizer, [{"role": "user", "content": text}], self.system)
        return self.begun(tokenizer, text)

    def begun(self, tokenizer: Any, prompt: str) -> str:
        """A prompt with what the answer begins with."""
        return joined(tokenizer, prompt, self.prefix) if self.prefix else prompt


def is_instructed(name: str) -> bool:
    """Whether a model's name, or what is registered under it, says that it was taught to follow instructions."""
    from interp.models import REGISTERED

    known = f" {REGISTERED[name].description}" if name in REGISTERED else ""
    return _INSTRUCTED.search(f"{name}{known}") is not None


class _Writer:
    """Writes prompts in one form."""

    def __init__(self, tokenizer: Any, asking: Asking, conflicts: ConflictSet) -> None:
        self._tokenizer = tokenizer
        self._asking = asking
        self._shown: dict[tuple[bool, str], list[ConflictExample]] = {}
        if asking.shots:
            train = [e for e in conflicts.select(split="train") if e.memory_answers]
            mixed = random.Random(asking.seed).sample(train, len(train))
            for has_context, kind in ((True, "aligned"), (False, "none")):
                some = [example for example in mixed if example.kind == kind]
                for template in ("", *dict.fromkeys(example.template for example in some)):
                    worded = {e.subject: e for e in some if template in ("", e.template)}
                    # One more than is shown, since nobody is shown what he is asked.
                    self._shown[has_context, template] = [*worded.values()][: asking.shots + 1]

    def written(self, example: ConflictExample) -> ConflictExample:
        """The example, asked in this form, with its context and without."""
        bare = self._prompt(replace(example, contexts=()), example.bare_prompt) if example.bare_prompt else ""
        prompt = bare if not example.contexts else self._prompt(example, example.prompt)
        return replace(example, prompt=prompt, bare_prompt=bare)

    def _prompt(self, example: ConflictExample, text: str) -> str:
        shown = self._examples(example)
        if self._asking.form == "chat":
            turns: list[Message] = []
            for one in shown:
                turns += [*_messages(one, is_shown=True), answered(one.memory_answers[0])]
            text = chat_text(self._tokenizer, [*turns, *_messages(example)], self._asking.system)
        else:
            before = (joined(self._tokenizer, one.prompt, one.memory_answers[0]) for one in shown)
            text = "\n\n".join([*before, text])
        return self._asking.begun(self._tokenizer, text)

    def _examples(self, example: ConflictExample) -> list[ConflictExample]:
        """What is shown before an example: others, with contexts if it has one, in its wording if there are enough."""
        count, has_context = self._asking.shots, bool(example.contexts)
        others: list[ConflictExample] = []
        for template in (example.template, ""):
            shown = self._shown.get((has_context, template), ())
            others = [one for one in shown if one.subject != example.subject][:count]
            if len(others) == count:
                return others
        kind = "with an agreeing context" if has_context else "without a context"
        raise UserError(
            f"The train split has {len(others)} other subjects {kind} to show, not {count}; give fewer --shots."
        )


def _messages(example: ConflictExample, *, is_shown: bool = False) -> list[Message]:
    """What is said up to an example's answer: of facts by their phrasing's layout, where it needs no system message."""
    layout = (
        PHRASINGS[example.template].chat if example.source == SOURCE and example.template in PHRASINGS else Layout()
    )
    if is_shown and layout.place == "system":
        layout = Layout()
    is_stem = not example.question.rstrip().endswith("?") and example.bare_prompt == example.question
    return layout.messages(example.question, example.contexts, is_stem=is_stem)


class AtAnswers(NamedTuple):
    """What ``at_answers`` gives back.

    Attributes:
        conflicts: The examples whose prompts go up to the answer.
        left_out: How many answers name neither source.
    """

    conflicts: ConflictSet
    left_out: int


def at_answers(
    model: nn.Module, conflicts: ConflictSet, *, max_new_tokens: int = 24, progress: str | None = None
) -> AtAnswers:
    """Let each prompt go on with what the model says itself, up to where the answers of the two sources part.

    A model that answers in a sentence ("The capital of Japan is ...") decides late: what is measured at the prompt's
    end is then not which source it follows. The model's greedy continuation is searched for an answer of either source;
    the prompt ends before it, and after the tokens that both answers begin with.

    Args:
        model: The model, or a bridge around it.
        conflicts: Prompts of kind conflict, whose answers of both sources are known.
        max_new_tokens: Longest continuation, in tokens.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If no continuation names an answer.
    """
    examples = [e for e in conflicts if e.memory_answers and e.context_answers]
    found = continue_greedily(model, [e.prompt for e in examples], max_new_tokens=max_new_tokens, progress=progress)
    moved = [
        one
        for example, said in zip(examples, found.answers, strict=True)
        if (one := _at_answer(model, example, said)) is not None
    ]
    if not moved:
        raise UserError(
            f"None of the {len(examples)} answers of {conflicts.name} names what memory or context says; ask in "
            "another form (--format, --shots), or score at the prompt's end."
        )
    return AtAnswers(ConflictSet(conflicts.name, tuple(moved)), len(examples) - len(moved))


def _at_answer(model: nn.Module, example: ConflictExample, said: str) -> ConflictExample | None:
    """The example with its prompt up to the answer in what was said; ``None`` if none is in it."""
    answers = sorted({*example.memory_answers, *example.context_answers}, key=len, reverse=True)
    named = re.search("|".join(rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in answers), said, re.IGNORECASE)
    if named is None:
        return None
    before = said[: named.start()].rstrip()
    prompt = joined(tokenizer_of(model), example.prompt, before) if before else example.prompt
    context, memory = (
        continuation_ids(model, prompt, answers[0])[1] for answers in (example.context_answers, example.memory_answers)
    )
    shared = next((i for i, pair in enumerate(zip(context, memory, strict=False)) if pair[0] != pair[1]), None)
    if shared is None:
        return None
    if not shared:
        return replace(example, prompt=prompt)
    tokenizer = tokenizer_of(model)
    start = tokenizer.decode(context[:shared])
    rest = [_after(answers, start.strip()) for answers in (example.context_answers, example.memory_answers)]
    return replace(example, prompt=prompt + start, context_answers=rest[0], memory_answers=rest[1])


def _after(answers: Sequence[str], start: str) -> tuple[str, ...]:
    """The answers, the first of them without what it begins with."""
    return (answers[0].removeprefix(start).lstrip() or answers[0], *answers)
