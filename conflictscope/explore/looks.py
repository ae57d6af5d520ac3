"""What ``conflictscope explore`` shows of one prompt, as plain records; ``conflictscope.explore.page`` draws them.

1. The model is asked without the context. Where its answer repeats the question ("The capital of Japan is Tokyo"), what
   it repeats is written into the prompt, so that the next token is the answer itself. In a chat the answer with the
   context, which may begin in other words, says what is written into its own prompt.
2. It is asked with the context, unedited and edited: greedy answers, each with its source, and the logit lens.
3. On the unedited prompt the conflict detector speaks, the heads' direct parts of the logit difference are taken, and
   what heads look at.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch import nn

from interp.anatomy import Anatomy
from interp.answers import Usage, contains_answer, normalise, overlap, usage_of
from interp.asking import Asking
from interp.attention import PromptAttention, attention_from_last
from interp.attribution.direct_logits import direct_logit_attribution
from interp.attribution.scores import HeadScores
from interp.conflicts import ConflictExample, ConflictSet
from interp.doubled import is_doubled
from interp.errors import UserError
from interp.evaluation import answer_token_ids
from interp.facts import load_facts, relation_named
from interp.fingerprints import fingerprint
from interp.generation import AnswerStep, answer_steps, continue_greedily
from interp.inputs import joined, most_positions, token_ids, tokenizer_of
from interp.lens import LogitLens, logit_lens
from interventions.base import Intervention, applied
from interventions.config import UNEDITED, InterventionFile, check_choice, chosen_file
from interventions.heads import HeadScaling
from probes.detector import ConflictDetector, Detection

DETECTOR = Path("out/probes/detector")
"""Where ``conflictscope probe fit`` leaves a detector."""
LONGEST = {"question": 500, "context": 4000, "answer": 100}
"""Most characters of what is typed."""
STRENGTHS = (0.0, 2.0)
SCALES = (-2.0, 3.0)
MAX_NEW_TOKENS, CHAT_TOKENS = 12, 32
"""Longest answer, in tokens; a chat's takes a sentence."""
MOST_TOKENS = 1024
"""Longest prompt, in tokens."""

_AS_THEY_ARE = Asking()
_FEWEST_REPEATED = 3
_SMALL_WORDS = {
    *("the", "a", "an", "it", "is", "was", "are", "were", "by", "in", "of", "at", "from", "called", "named"),
    *("made", "written", "born", "located", "spoken", "painted", "founded", "based"),
}
_HOW_TO_DETECT = "make one with `conflictscope record` and `conflictscope probe fit`, then start explore again"
_EXAMPLES = (
    ("capital", "Japan", "Peru", "question"),
    ("capital", "France", "France", "question"),
    ("language", "Brazil", "France", "question"),
    ("currency", "Japan", "Mexico", "sentence"),
    ("inventor", "the AC induction motor", "the Analytical Engine", "sentence"),
)


@dataclass(frozen=True)
class Asked:
    """What was typed.

    Attributes:
        question: A question, or a sentence that the answer continues.
        context: What is put before it.
        memory_answer: What memory answers; if empty, what the model answers without the context.
        context_answer: What the context answers; if empty, what the model answers with it, if the context says
            so and memory does not.
    """

    question: str
    context: str
    memory_answer: str = ""
    context_answer: str = ""


@dataclass(frozen=True)
class Edit:
    """What is changed.

    Attributes:
        file: Name of an intervention file, or ``UNEDITED``.
        dose: Trust of a dial, strength of any other file; ``None`` leaves the file as it is.
        head: ``(layer, head)`` that is scaled on top of it.
        scale: By what.
    """

    file: str = UNEDITED
    dose: float | None = None
    head: tuple[int, int] | None = None
    scale: float = 1.0


class Dose(NamedTuple):
    """What a file's slider sets: ``trust`` or ``strength``, its range, and the value that is the file as it is."""

    name: str
    low: float
    high: float
    value: float


@dataclass(frozen=True)
class Reading:
    """What the model makes of the prompt, with or without an edit.

    Attributes:
        closed_book: Its greedy answer without the context.
        with_context: Its greedy answer with the context.
        closed_book_usage, with_context_usage: Which source each used.
        steps: The answer with the context token by token.
        lens: The race of the two answers by layer; ``None`` where there is none, or every prompt is read twice.
    """

    closed_book: str
    with_context: str
    closed_book_usage: Usage
    with_context_usage: Usage
    steps: tuple[AnswerStep, ...]
    lens: LogitLens | None


@dataclass(frozen=True)
class Look:
    """All that is shown of a prompt.

    Attributes:
        example: The prompt with the context and the two answers; an answer that is not known is left out.
        unedited: The model as it is.
        edited: The model with the edit; ``None`` without one.
        detection: What the detector says of the unedited model; ``None`` without one.
        heads: The heads' direct parts of the logit difference, unedited; ``None`` where there is no race.
        edited_heads: ``(layer, head)`` that the edit scales.
        no_race: Why there is no race; empty where there is one.
    """

    example: ConflictExample
    unedited: Reading
    edited: Reading | None
    detection: Detection | None
    heads: HeadScores | None
    edited_heads: tuple[tuple[int, int], ...]
    no_race: str

    @property
    def readings(self) -> dict[str, Reading]:
        """``unedited``, and with an edit ``edited``."""
        return {"unedited": self.unedited} | ({"edited": self.edited} if self.edited else {})


class _Case(NamedTuple):
    """A prompt, and why its answers cannot race, if so."""

    example: ConflictExample
    no_race: str


class Explorer:
    """A model with what is loaded for it. It may be asked from several threads: one is answered at a time.

    Args:
        model: The model, or a bridge around it.
        name: What the model is called.
        files: Intervention files by name.
        detector: A conflict detector that was fitted on this model.
        asking: In which form questions are asked; its examples to show are not.
        bounded: Refuse what is longer than a page shows (``LONGEST``, ``MOST_TOKENS``), not only what is longer than
            the model reads.

    Raises:
        UserError: If a file is for another model, or is called ``none``; or the form does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        files: Mapping[str, InterventionFile] | None = None,
        detector: ConflictDetector | None = None,
        asking: Asking = _AS_THEY_ARE,
        bounded: bool = True,
    ) -> None:
        self.model = model
        self.name = name
        self.asking = asking.settled(model, name)
        self.new_tokens = CHAT_TOKENS if self.asking.form == "chat" else MAX_NEW_TOKENS
        self.files = dict(files or {})
        self.detector = detector
        check_choice(self.files, model, tokenizer_of(model))
        self.heads = Anatomy(model).heads
        positions = most_positions(model)
        bounds = [MOST_TOKENS if bounded else None, None if positions is None else positions - self.new_tokens]
        self.most_tokens = min((bound for bound in bounds if bound is not None), default=None)
        self.bounded = bounded
        # Hooks and intervention are the model's, not the thread's.
        self._lock = threading.Lock()
        # Moving a slider must not ask anew what it does not change.
        self._case = lru_cache(maxsize=32)(self._find_case)
        self._reading = lru_cache(maxsize=128)(self._read)
        self._unedited = lru_cache(maxsize=32)(self._look_unedited)
        self._attention = lru_cache(maxsize=128)(self._attend)

    def dose(self, file: str) -> Dose:
        """What the slider of a file sets.

        Raises:
            UserError: If there is no such file.
        """
        chosen = chosen_file(self.files, file)
        if chosen.dials:
            return Dose("trust", -1.0, 1.0, chosen.dial.trust)
        return Dose("strength", *STRENGTHS, 1.0)

    def look(self, asked: Asked, edit: Edit | None = None) -> Look:
        """Look at a prompt, unedited and edited.

        Raises:
            UserError: If something is missing, too long or not there.
        """
        asked = _checked(asked, bounded=self.bounded)
        edits = self._interventions(edit or Edit())
        with self._lock:
            case = self._case(asked)
            detection, heads = self._unedited(case)
            return Look(
                example=case.example,
                unedited=self._reading(case, Edit()),
                edited=self._reading(case, edit) if edit is not None and edits else None,
                detection=detection,
                heads=heads,
                edited_heads=tuple(sorted({head for part in edits for head in part.edited_heads})),
                no_race=case.no_race,
            )

    def attention(self, asked: Asked, heads: Sequence[tuple[int, int]]) -> PromptAttention:
        """What heads of the unedited model look at when it is about to answer with the context.

        Raises:
            UserError: As ``look``; or a head does not exist.
        """
        with self._lock:
            return self._attention(self._case(_checked(asked, bounded=self.bounded)).example.prompt, tuple(heads))

    def _interventions(self, edit: Edit) -> list[Intervention]:
        if not all(math.isfinite(number) for number in (edit.scale, edit.dose or 0.0)):
            raise UserError("A strength, trust or scale is a finite number; give another one.")
        edits: list[Intervention] = []
        if edit.file != UNEDITED:
            file = chosen_file(self.files, edit.file)
            if edit.dose is not None:
                by_trust = self.dose(edit.file).name == "trust"
                file = file.at(trust=edit.dose) if by_trust else file.at(strength=edit.dose)
            # Whether it is for this model was seen when it was taken up.
            edits += file.build()
        if edit.head is not None and edit.scale != 1:
            edits.append(HeadScaling.of([edit.head], edit.scale))
        return edits

    def _find_case(self, asked: Asked) -> _Case:
        self._check_length(self._prompt(asked.question, asked.context))
        bare, prompt = (
            self._prompt(asked.question, context, opening)
            for context, opening in zip(("", asked.context), self._openings(asked), strict=True)
        )
        self._check_length(prompt)
        memory, context = asked.memory_answer, asked.context_answer
        if not (memory and context):
            own = self._answers([bare, prompt])
            memory = memory or short_answer(own[0])
            found = said_by(asked.context, short_answer(own[1]))
            # What the model says is the context's answer only if the context says it.
            is_context = usage_of(found, [memory], []) != "memory"
            context = context or (found if found and is_context else "")
        agrees = overlap((memory,), (context,)) == "same"
        example = ConflictExample(
            id="prompt",
            subject=asked.question,
            relation="asked",
            question=asked.question,
            contexts=(asked.context,),
            memory_answers=(memory,) if memory else (),
            context_answers=(memory,) if agrees else (context,) if context else (),
            kind="aligned" if agrees else "conflict",
            template="asked",
            source="asked",
            prompt=prompt,
            bare_prompt=bare,
            split="test",
        )
        return _Case(example, self._no_race(example))

    def _no_race(self, example: ConflictExample) -> str:
        if not example.memory_answers:
            return (
                "The model gives no answer without the context; type the memory answer to see the race and the heads."
            )
        if not example.context_answers:
            return (
                "The model's answer with the context does not tell what the context says; type the context's answer to "
                "see the race and the heads."
            )
        if example.kind == "aligned":
            return (
                f"Memory and context both answer {example.memory_answers[0]}; give a context that contradicts memory "
                "to see the race and the heads."
            )
        if answer_token_ids(self.model, example) is None:
            return (
                f"The answers {example.context_answers[0]} and {example.memory_answers[0]} start with the same token; "
                "type answers that start with different ones to see the race and the heads."
            )
        return ""

    def _prompt(self, question: str, context: str = "", opening: str = "") -> str:
        """The text that the model continues, which may say how the answer begins."""
        prompt = self.asking.prompt(self.model, question, [context] if context else [])
        return joined(tokenizer_of(self.model), prompt, opening) if opening else prompt

    def _openings(self, asked: Asked) -> list[str]:
        """What the answers without and with the context begin with before they tell anything."""
        is_chat = self.asking.form == "chat"
        if not (is_chat or asked.question.endswith("?")):
            return ["", ""]
        prompts = [self._prompt(asked.question, context) for context in ("", *([asked.context] if is_chat else []))]
        found = [repeated_opening(answer, asked.question) for answer in self._answers(prompts)]
        return found if is_chat else found * 2

    def _answers(self, prompts: list[str]) -> list[str]:
        return continue_greedily(self.model, prompts, max_new_tokens=self.new_tokens).answers

    def _check_length(self, prompt: str) -> None:
        count = len(token_ids(tokenizer_of(self.model), [prompt])[0])
        if self.most_tokens is not None and count > self.most_tokens:
            raise UserError(f"The prompt has {count} tokens, more than the {self.most_tokens} shown here; shorten it.")

    def _read(self, case: _Case, edit: Edit) -> Reading:
        example = case.example
        with applied(self.model, *self._interventions(edit)):
            answers = self._answers([example.bare_prompt, example.prompt])
            steps = answer_steps(self.model, example.prompt, max_new_tokens=self.new_tokens)
            no_lens = case.no_race or is_doubled(self.model)
            lens = None if no_lens else logit_lens(self.model, _alone(example))
        usages: list[Usage] = [usage_of(a, example.memory_answers, example.context_answers) for a in answers]
        return Reading(answers[0], answers[1], usages[0], usages[1], tuple(steps), lens)

    def _look_unedited(self, case: _Case) -> tuple[Detection | None, HeadScores | None]:
        detector, example = self.detector, case.example
        detection = None if detector is None else detector.detect(self.model, [example.prompt])[0]
        if case.no_race:
            return detection, None
        return detection, direct_logit_attribution(self.model, _alone(example), name=self.name).heads

    def _attend(self, prompt: str, heads: tuple[tuple[int, int], ...]) -> PromptAttention:
        return attention_from_last(self.model, prompt, heads)


def examples() -> dict[str, Asked]:
    """Prompts from the fact tables to begin with, by label: one context agrees, all others contradict memory."""
    found = {}
    for name, subject, other, form in _EXAMPLES:
        relation = relation_named(name)
        answers = {fact.subject: fact.answers[0] for fact in load_facts(name)}
        sentence = relation.stem.format(subject=subject)
        question = relation.question.format(subject=subject) if form == "question" else sentence
        label = f"{subject[0].upper()}{subject[1:]}: {name}" + (", agreeing" if subject == other else "")
        found[label] = Asked(question, f"{sentence} {answers[other]}.", answers[subject], answers[other])
    return found


def find_detector(model: nn.Module, folder: Path | None) -> tuple[ConflictDetector | None, str]:
    """The detector in a folder, or with ``None`` the one in ``DETECTOR`` if it is there and fits.

    Returns:
        The detector, or ``None`` and why there is none.

    Raises:
        UserError: If ``folder`` holds none, or one that was fitted on another model.
    """
    if folder is None and not (DETECTOR / "detector.json").is_file():
        return None, f"There is no conflict detector in {DETECTOR}; {_HOW_TO_DETECT}."
    place = folder or DETECTOR
    detector = ConflictDetector.load(place)
    fitted = detector.settings.get("model", {})
    if fingerprint(model) == fitted.get("fingerprint"):
        return detector, ""
    reason = (
        f"The detector in {place} was fitted on {fitted.get('name', 'an unknown model')} with other weights or in "
        f"another dtype; {_HOW_TO_DETECT}."
    )
    if folder is None:
        return None, reason
    raise UserError(reason)


def short_answer(answer: str) -> str:
    """The answer itself, without what a model adds to it: the part before a punctuation mark or a clause about it."""
    return re.split(r"[:;(]|,(?!\d)| (?:is|was|are|were|who|which|that|in \d+)\b", answer.lstrip(" :,;("), maxsplit=1)[
        0
    ].strip()


def said_by(context: str, answer: str) -> str:
    """As many of the answer's first words as stand together in the context; nothing if these tell nothing."""
    words = answer.split()
    counts = [n for n in range(len(words), 0, -1) if contains_answer(context, (" ".join(words[:n]),))]
    found = words[: counts[0]] if counts else []
    return " ".join(found) if {normalise(word) for word in found} - _SMALL_WORDS - {""} else ""


def repeated_opening(answer: str, question: str) -> str:
    """The words that an answer begins with and that stand in the question, and small words among and after them.

    Nothing where they are too few to matter.
    """
    told_nothing = set(normalise(question).split()) | _SMALL_WORDS
    words = answer.split()
    count = next((i for i, word in enumerate(words) if not set(normalise(word).split()) <= told_nothing), 0)
    return " ".join(words[:count]) if count >= _FEWEST_REPEATED else ""


def _checked(asked: Asked, *, bounded: bool) -> Asked:
    """What was typed, without white space around it."""
    stripped = Asked(*(str(getattr(asked, name) or "").strip() for name in Asked.__dataclass_fields__))
    for name, text in vars(stripped).items():
        longest = LONGEST[name.split("_")[-1]]
        if bounded and len(text) > longest:
            raise UserError(f"The {name.replace('_', ' ')} has {len(text)} characters; shorten it to {longest}.")
    if not stripped.question:
        raise UserError('There is no question; type one, or a sentence to continue, such as "The capital of Japan is".')
    if not stripped.context:
        raise UserError("There is no context; type what the model is to read before it answers.")
    return replace(stripped, question=" ".join(stripped.question.split()))


def _alone(example: ConflictExample) -> ConflictSet:
    return ConflictSet("asked", (example,))
