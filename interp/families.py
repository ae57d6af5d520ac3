"""Make conflict prompts in many phrasing families, put together from parts.

A probe that is fitted on few wordings may learn these words, and not what a conflict is. A family here is one choice
each of

1. a layout: how context and question stand in a completion, or in a chat through the model's own template;
2. a telling: how the context words the fact: as the answer begins, turned round, quoted, or by implication, in a
   sentence about something else that would make no sense if the fact were not so;
3. a wording of the question;
4. what stands around the sentence: nothing, or sentences about other things before it, on both sides, or between it
   and the question.

The families that nothing is fitted on (``UNSEEN_FAMILIES``) share no layout, no telling and no wording of the question
with those to learn from (``LEARNED_FAMILIES``). Each prompt is of one variant: a conflict, an aligned context, three
kinds of irrelevant ones (another fact of the same subject, the same relation of another subject, another relation of
another subject), or no context.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

from interp.answers import contains_answer
from interp.chat import Layout, chat_text
from interp.conflicts import ConflictExample, ConflictSet, ContextKind, Split, split_of
from interp.errors import UserError
from interp.facts import (
    SOURCE,
    Fact,
    Relation,
    conflicting_answers,
    load_facts,
    lower_clause,
    relation_named,
    relations,
    sentence_case,
)
from interp.files import assets_directory, read_json
from interp.inputs import joined

Variant = Literal[
    "conflict", "aligned", "irrelevant_same_subject", "irrelevant_same_relation", "irrelevant_other", "none"
]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
Around = Literal["alone", "after", "between", "far"]
AROUND: tuple[Around, ...] = get_args(Around)

_KINDS: Mapping[Variant, ContextKind] = {
    "conflict": "conflict",
    "aligned": "aligned",
    "irrelevant_same_subject": "irrelevant",
    "irrelevant_same_relation": "irrelevant",
    "irrelevant_other": "irrelevant",
    "none": "none",
}
_SHARES = 8
"""How often families are drawn for the facts of a relation."""
_BESIDE: Mapping[Around, tuple[int, int]] = {"alone": (0, 0), "after": (2, 0), "between": (1, 1), "far": (0, 3)}
"""How many sentences about other things stand before the context's and after it."""

_COMPLETIONS: Mapping[str, tuple[str, str]] = {
    "plain": ("{context} ", "{stem}"),
    "short": ("{context}\n", "Q: {question}\nA: {stem}"),
    "labelled": ("Context: {context}\n", "Question: {question}\nAnswer: {stem}"),
    "tagged": ("<document>\n{context}\n</document>\n", "{question}\n{stem}"),
    "note": ("Note: {context}\n\n", "{stem}"),
    "dialogue": ("Anna: {context}\n", "Ben: {question}\nAnna: {stem}"),
    "list": ("What is known:\n- {context}\n\n", "In short: {stem}"),
    "quiz": ("{context}\n\n", "Quiz, first question. {question} {stem}"),
    "results": ("Search results:\n1. {context}\n", "Query: {question}\nResult: {stem}"),
    "letter": ("Dear Sam,\n{context}\nYours, Kim\n\n", "Sam asked himself: {question} {stem}"),
    "comment": ('> "{context}"\n\n', "# {question}\n{stem}"),
}
_CHATS: Mapping[str, tuple[Layout, bool]] = {
    "chat": (Layout(), True),
    "chat_tagged": (Layout("<document>\n{text}\n</document>", "{question}"), True),
    "chat_system": (Layout("You have these notes:\n- {text}", "{question}", "system"), True),
    "chat_earlier": (Layout("{text}", "{question}", "earlier"), True),
    "chat_after": (Layout("Passage:\n{text}", "{question}", "after"), True),
    "chat_open": (Layout("I found this: {text}", "Now tell me: {question}"), False),
    "chat_colleague": (Layout("A colleague wrote to me: {text}", "I am not sure. {question}"), True),
}
"""Layouts of chats, and whether the assistant's answer begins with the question's stem."""


@dataclass(frozen=True)
class Family:
    """One choice of every part.

    Attributes:
        layout: Name of a layout of completions or of chats.
        telling: How the context's sentence is worded.
        asked: Which wording of the question: 0 is that of the fact tables.
        around: Where sentences about other things stand.
    """

    layout: str
    telling: str
    asked: int
    around: Around

    @property
    def name(self) -> str:
        """Its parts in one word."""
        return f"{self.layout}-{self.telling}-{self.asked}-{self.around}"

    @property
    def is_chat(self) -> bool:
        """Whether it is asked through a chat template."""
        return self.layout in _CHATS


def _implied(number: int) -> Callable[[Relation], str]:
    return lambda relation: _wordings(relation.name)["implied"][number]


_TELLINGS: Mapping[str, Callable[[Relation], str]] = {
    "stem": lambda r: f"{r.stem} {{answer}}.",
    "inverse": lambda r: f"{r.inverse}.",
    "implied_1": _implied(0),
    "authority": lambda r: f"According to {r.authority}, {lower_clause(r.inverse)}.",
    "document": lambda r: r.document,
    "implied_2": _implied(1),
    "confirmed": lambda r: f"It has been confirmed that {lower_clause(r.inverse)}.",
    "implied_3": _implied(2),
    "answered": lambda r: f"{r.question} {r.stem} {{answer}}.",
    "implied_4": _implied(3),
    "rumour": lambda r: f"Word has it that {lower_clause(r.inverse)}.",
    "replied": lambda r: f"They say {{answer}} when one asks them: {r.question}",
}
_BESIDE_TELLINGS = ("stem", "inverse", "document", "implied_1", "implied_2")
"""How sentences about other things are worded, in every family."""
_PASSING = (
    "Many people have asked about {subject} this year.",
    "Last spring an exhibition showed pictures of {subject}.",
    "A radio programme about {subject} was heard by thousands.",
    "There is a long article about {subject} in the library.",
)
"""What is told of a subject of which no other table has a fact."""
_DRAWS = 1000
_UNSEEN_WORDING = 3
UNSEEN_FAMILIES = (
    Family("letter", "rumour", _UNSEEN_WORDING, "alone"),
    Family("comment", "implied_4", _UNSEEN_WORDING, "between"),
    Family("chat_colleague", "replied", _UNSEEN_WORDING, "far"),
)
"""Families that are only asked, never learned from or chosen on."""


def _learned() -> tuple[Family, ...]:
    unseen = {part for family in UNSEEN_FAMILIES for part in (family.layout, family.telling)}
    layouts = [name for name in (*_COMPLETIONS, *_CHATS) if name not in unseen]
    tellings = [name for name in _TELLINGS if name not in unseen]
    return tuple(Family(*parts) for parts in product(layouts, tellings, range(_UNSEEN_WORDING), AROUND))


LEARNED_FAMILIES = _learned()
"""Families to learn from: every part in every other's company."""
FAMILIES: Mapping[str, Family] = {family.name: family for family in (*LEARNED_FAMILIES, *UNSEEN_FAMILIES)}


@cache
def _all_wordings() -> Mapping[str, Any]:
    return read_json(assets_directory() / "facts" / "wordings.json")


def _wordings(relation: str) -> Mapping[str, Any]:
    return _all_wordings()[relation]


def can_be_asked(families: Sequence[Family], tokenizer: Any) -> tuple[Family, ...]:
    """The families that a tokenizer can ask: without a chat template those of completions."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    return tuple(family for family in families if has_template or not family.is_chat)


def variant_of(example: ConflictExample) -> Variant:
    """Which variant a prompt of ``worded_conflicts`` is.

    Raises:
        UserError: If it is of other data.
    """
    last = example.id.rpartition("/")[2]
    if last not in VARIANTS or example.template.count("-") != len(fields(Family)) - 1:
        raise UserError(f"{example.id} is of no phrasing family that is made from parts; make prompts that are.")
    return last


def worded_conflicts(
    facts: Mapping[str, Sequence[Fact]],
    tokenizer: Any,
    *,
    families: Sequence[Family] = LEARNED_FAMILIES,
    variants: Sequence[Variant] = VARIANTS,
    each: int | None = None,
    splits: Sequence[Split] = ("train", "dev", "test"),
    seed: int = 0,
) -> ConflictSet:
    """Build prompts of every variant in many families about some facts.

    Args:
        facts: Facts by relation, for example from ``known_facts``.
        tokenizer: Writes chats; families of chats are left out where it has no template.
        families: The families.
        variants: The variants to build.
        each: How many families are drawn for each fact, the same in every variant; ``None`` takes all.
        splits: Of which splits.
        seed: Decides the splits, the draws, what conflicts with what, and what else is told.

    Raises:
        UserError: If a relation is not known, no family can be asked, every context that can be drawn names what it is
            not to name, or nothing is left.
    """
    askable = can_be_asked(families, tokenizer)
    if not askable:
        raise UserError(
            "There is no family that can be asked: chats need a tokenizer with a chat template; give families of "
            "completions, or another model's tokenizer."
        )
    writer = _Writer(facts, tokenizer, seed)
    examples = [
        writer.example(relation, fact, family, variant)
        for relation, fact in writer.known(splits)
        for variant in variants
        for family in writer.drawn(askable, relation, fact, each)
    ]
    if not examples:
        raise UserError(
            f"There are too few different answers among the facts of {', '.join(facts)} to make conflicts from; "
            "choose another relation or a model that knows more."
        )
    return ConflictSet("+".join(facts), tuple(examples))


class Told(NamedTuple):
    """What a context tells: that a subject has some answers, of which the first is named."""

    relation: Relation
    subject: str
    answers: tuple[str, ...]

    def worded(self, telling: str) -> str:
        """The sentence."""
        text = _TELLINGS[telling](self.relation)
        return sentence_case(text.format(subject=self.subject, answer=self.answers[0]))


class _Writer:
    """Writes prompts about facts; what is drawn depends on the seed, the fact, the family and the variant alone."""

    def __init__(self, facts: Mapping[str, Sequence[Fact]], tokenizer: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._known = [(relation_named(name), fact) for name, some in facts.items() for fact in some]
        self._conflicting = {
            name: conflicting_answers(relation_named(name), some, seed) for name, some in facts.items()
        }
        self._all = [Told(r, fact.subject, fact.answers) for r in relations().values() for fact in load_facts(r.name)]
        self._splits = {told.subject: split_of(told.subject, seed) for told in self._all}
        self._by_subject: dict[str, list[Told]] = {}
        self._by_relation: dict[str, list[Told]] = {}
        for told in self._all:
            self._by_subject.setdefault(told.subject, []).append(told)
            self._by_relation.setdefault(told.relation.name, []).append(told)
        self._same_relation: dict[tuple[str, str], list[Told]] = {}
        self._told: Mapping[Variant, Callable[[Relation, Fact, random.Random], Told | None]] = {
            "conflict": lambda r, fact, _: Told(r, fact.subject, self._conflicting[r.name][fact.subject]),
            "aligned": lambda r, fact, _: Told(r, fact.subject, fact.answers),
            "irrelevant_same_subject": self._of_same_subject,
            "irrelevant_same_relation": self._of_same_relation,
            "irrelevant_other": lambda r, fact, rng: self._of_another(r, fact, (fact.subject, *fact.answers), rng),
        }

    def known(self, splits: Sequence[Split]) -> list[tuple[Relation, Fact]]:
        """The facts of some splits that can be contradicted."""
        return [
            (relation, fact)
            for relation, fact in self._known
            if fact.subject in self._conflicting[relation.name] and split_of(fact.subject, self._seed) in splits
        ]

    def drawn(self, families: Sequence[Family], relation: Relation, fact: Fact, each: int | None) -> Sequence[Family]:
        """The families that a fact is asked in: the same in every variant, so that none tells what its prompts are.

        Some facts share theirs, as patching needs prompts that are alike.
        """
        if each is None or each >= len(families):
            return families
        sharing = random.Random(f"{self._seed}/{relation.name}/{fact.subject}").randrange(_SHARES)
        return random.Random(f"{self._seed}/{relation.name}/{sharing}").sample(families, each)

    def example(self, relation: Relation, fact: Fact, family: Family, variant: Variant) -> ConflictExample:
        """The prompt."""
        context, answers = self._context(relation, fact, family, variant)
        question, stem = _question(relation, fact.subject, family.asked)
        kind = _KINDS[variant]
        bare = self._prompt(family, "", question, stem)
        return ConflictExample(
            id=f"{relation.name}/{fact.subject}/{family.name}/{variant}",
            subject=fact.subject,
            relation=relation.name,
            question=question,
            contexts=(context,) if context else (),
            memory_answers=fact.answers,
            context_answers=answers if kind in ("conflict", "aligned") else (),
            kind=kind,
            template=family.name,
            source=SOURCE,
            prompt=self._prompt(family, context, question, stem) if context else bare,
            bare_prompt=bare,
            split=split_of(fact.subject, self._seed),
        )

    def _context(self, relation: Relation, fact: Fact, family: Family, variant: Variant) -> tuple[str, tuple[str, ...]]:
        """The context and the answers that it tells."""
        if variant == "none":
            return "", ()
        rng = random.Random(f"{self._seed}/{relation.name}/{fact.subject}/{family.name}/{variant}")

        def draw() -> tuple[str, tuple[str, ...]]:
            told = self._told[variant](relation, fact, rng)
            if told is None:
                return rng.choice(_PASSING).format(subject=fact.subject), ()
            return told.worded(family.telling), told.answers

        avoid = fact.answers if variant == "irrelevant_same_subject" else (fact.subject, *fact.answers)
        sentence, answers = _drawn(draw, avoid if _KINDS[variant] == "irrelevant" else ())
        avoid = (fact.subject, *fact.answers, *answers)

        def draw_other() -> tuple[str, tuple[str, ...]]:
            told = self._of_another(relation, fact, avoid, rng)
            return told.worded(rng.choice(_BESIDE_TELLINGS)), told.answers

        before, after = _BESIDE[family.around]
        others = [_drawn(draw_other, avoid)[0] for _ in range(before + after)]
        return " ".join([*others[:before], sentence, *others[before:]]), answers

    def _of_same_subject(self, relation: Relation, fact: Fact, rng: random.Random) -> Told | None:
        """Another fact of the subject; ``None`` if no table has one."""
        pool = [
            told
            for told in self._by_subject.get(fact.subject, ())
            if told.relation.name != relation.name and not contains_answer(told.answers[0], fact.answers)
        ]
        return rng.choice(pool) if pool else None

    def _of_same_relation(self, relation: Relation, fact: Fact, rng: random.Random) -> Told:
        """The same relation of another subject of the split, with another answer."""
        key = (relation.name, fact.subject)
        if key not in self._same_relation:
            split = split_of(fact.subject, self._seed)
            avoid = (fact.subject, *fact.answers)
            self._same_relation[key] = [
                told
                for told in self._by_relation[relation.name]
                if self._splits[told.subject] == split
                and not contains_answer(f"{told.answers[0]} {told.subject}", avoid)
            ]
        return rng.choice(self._same_relation[key])

    def _of_another(self, relation: Relation, fact: Fact, avoid: Sequence[str], rng: random.Random) -> Told:
        """Another relation of a subject of the split that names nothing to be avoided."""
        split = split_of(fact.subject, self._seed)
        while True:
            told = rng.choice(self._all)
            if (
                told.relation.name != relation.name
                and self._splits[told.subject] == split
                and not contains_answer(f"{told.subject} {told.answers[0]}", avoid)
            ):
                return told

    def _prompt(self, family: Family, context: str, question: str, stem: str) -> str:
        if family.is_chat:
            layout, begins = _CHATS[family.layout]
            text = chat_text(self._tokenizer, layout.messages(question, (context,) if context else ()))
            return joined(self._tokenizer, text, stem) if begins else text
        given, asked = _COMPLETIONS[family.layout]
        return (given.format(context=context) if context else "") + asked.format(question=question, stem=stem)


def _question(relation: Relation, subject: str, asked: int) -> tuple[str, str]:
    """The question and the start of the sentence that answers it."""
    question, stem = (relation.question, relation.stem) if asked == 0 else _wordings(relation.name)["asked"][asked - 1]
    return sentence_case(question.format(subject=subject)), sentence_case(stem.format(subject=subject))


def _drawn(draw: Callable[[], tuple[str, tuple[str, ...]]], avoid: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Draw until the sentence names nothing to be avoided: in "won the greatest prizes", a currency is named."""
    for _ in range(_DRAWS):
        sentence, answers = draw()
        if not contains_answer(sentence, avoid):
            return sentence, answers
    raise UserError(f"No context leaves out {' and '.join(avoid)}; leave this fact out.")
