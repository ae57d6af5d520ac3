"""ConflictSets from the fact tables in ``assets/facts``.

A fact is a subject and its answers; a relation says how the fact is worded. From the facts that a model
knows (``interp.known``), ``build_conflicts`` makes one prompt for every phrasing family and context kind:

    conflict     the context gives another subject's answer
    aligned      the context gives the right answer
    irrelevant   the context tells a fact of another relation about another subject
    none         no context

A context answer does not give itself away: within a relation and split the conflict answers are a permutation
of the right answers over the subjects, so each answer is stated as often wrongly as rightly.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from interp.answers import contains_answer
from interp.chat import Layout
from interp.conflicts import (
    CONTEXT_KINDS,
    SPLITS,
    ConflictExample,
    ConflictSet,
    ContextKind,
    Split,
    shows_answer,
    split_of,
)
from interp.errors import UserError
from interp.files import assets_directory, read_json

if TYPE_CHECKING:
    from torch import nn


SOURCE = "conflictscope-facts"


@dataclass(frozen=True)
class Fact:
    """A subject and what is true of it: the canonical answer first, then aliases."""

    subject: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """How facts of one relation are worded. ``{subject}`` and ``{answer}`` are filled in.

    Attributes:
        name: The relation, which is also the name of its table.
        stem: A sentence that the answer completes.
        inverse: A clause that starts with the answer.
        question: The question.
        document: A sentence or two of a document that mentions the answer.
        authority: Whom to quote.
    """

    name: str
    stem: str
    inverse: str
    question: str
    document: str
    authority: str


@dataclass(frozen=True)
class Phrasing:
    """A family of prompts: how the context is worded, and how the question is asked after it.

    Both are functions of the relation; their texts still contain ``{subject}`` and, in the context, ``{answer}``.
    ``bare`` asks without a context; ``chat`` says how a chat lays out the same.
    """

    name: str
    context: Callable[[Relation], str]
    ask: Callable[[Relation], str]
    bare: Callable[[Relation], str]
    chat: Layout


def _short_question(relation: Relation) -> str:
    return f"Q: {relation.question}\nA: {relation.stem}"


def _question(relation: Relation) -> str:
    return f"Question: {relation.question}\nAnswer: {relation.stem}"


def _in_short(relation: Relation) -> str:
    return f"In short, {lower_clause(relation.stem)}"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


PHRASINGS: dict[str, Phrasing] = {
    phrasing.name: phrasing
    for phrasing in (
        Phrasing(
            "statement",
            context=lambda r: f"Fact: {r.stem} {{answer}}.\n",
            ask=lambda r: f"Fact: {r.stem}",
            bare=lambda r: f"Fact: {r.stem}",
            chat=Layout(),
        ),
        Phrasing(
            "question",
            context=lambda r: f"{r.stem} {{answer}}. ",
            ask=_short_question,
            bare=_short_question,
            chat=Layout("{text}", "{question}"),
        ),
        Phrasing(
            "document",
            context=lambda r: f"Document: {r.inverse}. {r.document}\n\n",
            ask=_question,
            bare=_question,
            chat=Layout("<document>\n{text}\n</document>", "{question}", label="Document: "),
        ),
        Phrasing(
            "according_to",
            context=lambda r: f"According to {r.authority}, {lower_clause(r.inverse)}. ",
            ask=lambda r: f"{r.question} {r.stem}",
            bare=lambda r: f"{r.question} {r.stem}",
            chat=Layout("I found this: {text}", "Now tell me: {question}"),
        ),
        Phrasing(
            "note",
            context=lambda r: f"Note: {r.inverse}.\n",
            ask=lambda r: r.stem,
            bare=lambda r: r.stem,
            chat=Layout("You have these notes:\n- {text}", "{question}", "system", label="Note: "),
        ),
        Phrasing(
            "dialogue",
            context=lambda r: f"User: I read that {lower_clause(r.inverse)}. ",
            ask=lambda r: f"{r.question}\nAssistant: {r.stem}",
            bare=lambda r: f"User: {r.question}\nAssistant: {r.stem}",
            chat=Layout("{text}", "{question}", "earlier", label="User: "),
        ),
        Phrasing(
            "passage",
            context=lambda r: f"Here is what is known. {r.document}\n",
            ask=_in_short,
            bare=_in_short,
            chat=Layout("Passage:\n{text}", "{question}", "after", label="Here is what is known. "),
        ),
    )
}
HELD_OUT_PHRASING = "according_to"
SEEN_PHRASINGS = ("statement", "question", "document")
STUDY_PHRASINGS = (*SEEN_PHRASINGS, HELD_OUT_PHRASING)
LEARNED_PHRASINGS = tuple(name for name in PHRASINGS if name != HELD_OUT_PHRASING)


def lower_clause(clause: str) -> str:
    """Lower the first letter of a clause with placeholders, unless it starts with the answer or subject itself."""
    return clause if clause.startswith("{") else _lower(clause)


@cache
def relations() -> Mapping[str, Relation]:
    """All relations that the package ships, by name."""
    wording = read_json(assets_directory() / "facts" / "relations.json")
    return {name: Relation(name=name, **fields) for name, fields in wording.items()}


def relation_named(name: str) -> Relation:
    """The relation ``name``.

    Raises:
        UserError: If there is none; the message lists those there are.
    """
    if name not in relations():
        raise UserError(f"The relation {name!r} is not known; known are {', '.join(sorted(relations()))}.")
    return relations()[name]


@cache
def load_facts(relation: str) -> tuple[Fact, ...]:
    """The fact table of ``relation``, in its own order.

    Raises:
        UserError: If the relation is not known.
    """
    path = assets_directory() / "facts" / f"{relation_named(relation).name}.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        return tuple(Fact(row["subject"], tuple(row["answers"].split("|"))) for row in csv.DictReader(stream))


def closed_book_prompt(relation: Relation, subject: str, phrasing: str) -> str:
    """The prompt of one phrasing family without any context."""
    return sentence_case(PHRASINGS[phrasing].bare(relation).format(subject=subject, answer=""))


@cache
def usable_facts(relation: str) -> tuple[Fact, ...]:
    """The facts of ``relation`` whose answer does not show in the subject (as in Singapore or Mexico City).

    Raises:
        UserError: If the relation is not known.
    """
    return tuple(fact for fact in load_facts(relation) if not shows_answer(fact.subject, fact.answers))


def known_facts(
    model: nn.Module, relation: str, *, among: Sequence[Fact] | None = None, progress: str | None = None
) -> tuple[Fact, ...]:
    """Find the facts of a relation that the model knows, by the rule of ``interp.known``.

    Args:
        model: The model, or a bridge around it.
        relation: Name of the relation.
        among: The facts to ask; ``None`` asks all ``usable_facts``.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If the relation is not known.
    """
    # The rule needs what facts are and how they are asked, which is said here.
    from interp.known import ClosedBook, are_known

    wording = relation_named(relation)
    candidates = usable_facts(relation) if among is None else among
    asked = [
        ClosedBook([closed_book_prompt(wording, fact.subject, name) for name in SEEN_PHRASINGS], fact.answers)
        for fact in candidates
    ]
    known = are_known(model, asked, progress=progress)
    return tuple(fact for fact, is_known in zip(candidates, known, strict=True) if is_known)


def build_conflicts(
    facts: Mapping[str, Sequence[Fact]],
    *,
    seed: int = 0,
    kinds: Sequence[ContextKind] = CONTEXT_KINDS,
    phrasings: Sequence[str] = STUDY_PHRASINGS,
) -> ConflictSet:
    """Build prompts for every fact, phrasing family and context kind.

    Args:
        facts: Facts by relation, for example from ``known_facts``.
        seed: Decides the splits and which answer conflicts with which.
        kinds: The context kinds to build.
        phrasings: Names of the phrasing families, out of ``PHRASINGS``.

    Returns:
        The set, ordered by relation, subject, phrasing and kind. Facts that no other fact of their split can
        contradict are left out, for example most of a split that nearly all have the same answer.

    Raises:
        UserError: If a relation or phrasing is not known, or nothing is left.
    """
    if unknown := [name for name in phrasings if name not in PHRASINGS]:
        raise UserError(f"The phrasing {unknown[0]!r} is not known; known are {', '.join(PHRASINGS)}.")
    examples: list[ConflictExample] = []
    for name, known in facts.items():
        relation = relation_named(name)
        conflicting = conflicting_answers(relation, known, seed)
        distractors = _distractors(relation, known, seed)
        for fact in known:
            if fact.subject not in conflicting:
                continue
            for phrasing in (PHRASINGS[name] for name in phrasings):
                for kind in kinds:
                    context, context_answers = {
                        "conflict": (
                            _context(phrasing, relation, fact.subject, conflicting[fact.subject][0]),
                            conflicting[fact.subject],
                        ),
                        "aligned": (_context(phrasing, relation, fact.subject, fact.answers[0]), fact.answers),
                        "irrelevant": (_context(phrasing, *distractors[fact.subject]), ()),
                        "none": ("", ()),
                    }[kind]
                    bare = closed_book_prompt(relation, fact.subject, phrasing.name)
                    ask = phrasing.ask(relation).format(subject=fact.subject, answer="")
                    examples.append(
                        ConflictExample(
                            id=f"{name}/{fact.subject}/{phrasing.name}/{kind}",
                            subject=fact.subject,
                            relation=name,
                            question=relation.question.format(subject=fact.subject),
                            contexts=(context.strip(),) if context else (),
                            memory_answers=fact.answers,
                            context_answers=context_answers,
                            kind=kind,
                            template=phrasing.name,
                            source=SOURCE,
                            prompt=sentence_case(context) + sentence_case(ask) if context else bare,
                            bare_prompt=bare,
                            split=split_of(fact.subject, seed),
                        )
                    )
    if not examples:
        raise UserError(
            f"There are too few different answers among the facts of {', '.join(facts)} to make conflicts from; "
            "choose another relation or a model that knows more."
        )
    return ConflictSet("+".join(facts), tuple(examples))


def _context(phrasing: Phrasing, relation: Relation, subject: str, answer: str) -> str:
    return phrasing.context(relation).format(subject=subject, answer=answer)


def sentence_case(text: str) -> str:
    """Raise the first letter and leave all others as they are."""
    return text[:1].upper() + text[1:]


def conflicting_answers(relation: Relation, known: Sequence[Fact], seed: int) -> dict[str, tuple[str, ...]]:
    """Give each subject the answers of another: a permutation within each split, never an alias of the truth.

    Args:
        relation: The relation.
        known: The facts, among whose answers the wrong ones are.
        seed: Decides the splits and the permutation.

    Returns:
        By subject. Facts that no other of their split can contradict are left out.
    """
    result: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        rng = random.Random(f"{seed}/{relation.name}/{split}")
        members = [fact for fact in known if split_of(fact.subject, seed) == split]
        while members:
            order = _derangement(members, rng)
            if order is not None:
                result |= {fact.subject: members[j].answers for fact, j in zip(members, order, strict=True)}
                break
            # More than half of the facts share one answer, or nearly so: some of these cannot be contradicted.
            frequent, _ = Counter(fact.answers[0] for fact in members).most_common(1)[0]
            members.remove(rng.choice([fact for fact in members if fact.answers[0] == frequent]))
    return result


# Every pair of a split is asked about, and again whenever prompts are made of the same facts: 134,732 pairs of all that
# are shipped. Of fewer that were kept none would still be there when it is asked about again.
@lru_cache(maxsize=2**18)
def _compatible(fact: Fact, other: Fact) -> bool:
    """Whether ``other``'s answers contradict ``fact`` and can be told apart from its answers and its subject."""
    return not (
        any(contains_answer(a, fact.answers) for a in other.answers)
        or any(contains_answer(a, other.answers) for a in fact.answers)
        or contains_answer(fact.subject, other.answers)
    )


def _derangement(facts: Sequence[Fact], rng: random.Random) -> list[int] | None:
    """A random permutation that gives every fact a compatible one, by augmenting paths; ``None`` if there is none."""
    n = len(facts)
    taken_by: dict[int, int] = {}
    candidates = [[j for j in range(n) if _compatible(facts[i], facts[j])] for i in range(n)]
    for choices in candidates:
        rng.shuffle(choices)

    def assign(i: int, visited: set[int]) -> bool:
        for j in candidates[i]:
            if j not in visited:
                visited.add(j)
                if j not in taken_by or assign(taken_by[j], visited):
                    taken_by[j] = i
                    return True
        return False

    if not all(assign(i, set()) for i in rng.sample(range(n), n)):
        return None
    order = {i: j for j, i in taken_by.items()}
    return [order[i] for i in range(n)]


@lru_cache(maxsize=2**12)
def _wordings(relation: Relation, fact: Fact) -> str:
    return " ".join(_context(phrasing, relation, fact.subject, fact.answers[0]) for phrasing in PHRASINGS.values())


def _distractors(relation: Relation, known: Sequence[Fact], seed: int) -> dict[str, tuple[Relation, str, str]]:
    """For each subject a fact of another relation about another subject of its split, that names neither it nor answer.

    Of its split, because what a prompt tells about a subject counts as seen, in whatever relation.
    """
    rng = random.Random(f"{seed}/{relation.name}/irrelevant")
    pools = _facts_by_split(relation.name, seed)
    result: dict[str, tuple[Relation, str, str]] = {}
    for fact in known:
        avoid = (fact.subject, *fact.answers)
        pool = pools[split_of(fact.subject, seed)]
        other, distractor = rng.choice(pool)
        while contains_answer(_wordings(other, distractor), avoid):
            other, distractor = rng.choice(pool)
        result[fact.subject] = (other, distractor.subject, distractor.answers[0])
    return result


@lru_cache(maxsize=64)
def _facts_by_split(without: str, seed: int) -> Mapping[Split, list[tuple[Relation, Fact]]]:
    """The facts of all relations but one."""
    pools: dict[Split, list[tuple[Relation, Fact]]] = {split: [] for split in SPLITS}
    for name, relation in relations().items():
        if name != without:
            for fact in load_facts(name):
                pools[split_of(fact.subject, seed)].append((relation, fact))
    return pools
