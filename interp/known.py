"""The one rule for what a model knows.

A fact is a relation, a subject and the answers of memory. It is **known** if, to more than half of its distinct bare
prompts, the model's greedy answer contains one of these answers as whole words (``interp.answers.contains_answer``).
It is asked

1. in the seen phrasings (``SEEN_PHRASINGS``), if it is of the fact tables that the package ships;
2. else in every phrasing that its examples have but ``HELD_OUT_PHRASING``; in that one if there is no other.

A single bare prompt decides alone. What is known does not depend on the context kinds that a set has.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from interp.answers import CHAT_TOKENS, COMPLETION_TOKENS, contains_answer
from interp.conflicts import CONTEXT_KINDS, ConflictExample, ConflictSet, ContextKind
from interp.errors import Caution, UserError
from interp.evaluation import ANSWERS_VERSION, answer_length
from interp.facts import (
    HELD_OUT_PHRASING,
    PHRASINGS,
    SEEN_PHRASINGS,
    SOURCE,
    Fact,
    build_conflicts,
    closed_book_prompt,
    known_facts,
    relation_named,
    relations,
    usable_facts,
)
from interp.fingerprints import fingerprint
from interp.generation import continue_greedily
from interp.models import cache_directory
from interp.records import Records

KNOWN_VERSION = 2
"""Version of the rule: raise it when it would keep other facts."""


class ClosedBook(NamedTuple):
    """A fact as it is asked.

    Attributes:
        prompts: Its bare prompts.
        answers: What memory answers, with aliases.
    """

    prompts: Sequence[str]
    answers: Sequence[str]


def are_known(
    model: nn.Module, facts: Sequence[ClosedBook], *, least_tokens: int = COMPLETION_TOKENS, progress: str | None = None
) -> list[bool]:
    """Say of each fact whether the model knows it, by the rule of this module.

    Args:
        model: The model, or a bridge around it.
        facts: The facts; a prompt that several of them share is asked once.
        least_tokens: Tokens that the model may answer with, or as many as the longest answer takes, if that is more.
        progress: Label of a progress bar; ``None`` shows none.
    """
    prompts = list(dict.fromkeys(prompt for fact in facts if fact.answers for prompt in fact.prompts))
    lengths = (answer_length(model, fact.prompts[0], fact.answers, least_tokens) for fact in facts)
    room = max(least_tokens, min(max(lengths, default=0), CHAT_TOKENS))
    found = continue_greedily(model, prompts, max_new_tokens=room, progress=progress)
    answered = dict(zip(prompts, found.answers, strict=True))

    def is_known(fact: ClosedBook) -> bool:
        distinct = set(fact.prompts)
        return 2 * sum(contains_answer(answered[prompt], fact.answers) for prompt in distinct) > len(distinct)

    return [bool(fact.answers) and is_known(fact) for fact in facts]


def known_part(
    model: nn.Module, conflicts: ConflictSet, *, least_tokens: int = COMPLETION_TOKENS, progress: str | None = None
) -> ConflictSet:
    """The examples, of every kind, about facts that the model knows, by the rule of this module.

    Args:
        model: The model, or a bridge around it.
        conflicts: The examples. Facts that none of them asks closed-book (``bare_prompt`` is empty, as in old files)
            are left out, and a ``Caution`` says how many examples that are.
        least_tokens: As for ``are_known``.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        A set with the same name, in the same order; empty if the model knows none of the facts.

    Raises:
        UserError: If no fact can be asked.
    """
    members: dict[_Fact, list[ConflictExample]] = {}
    for example in conflicts:
        members.setdefault(_fact_of(example), []).append(example)
    asked = {fact: ClosedBook(prompts, fact[2]) for fact, some in members.items() if (prompts := _bare_prompts(some))}
    again = "write the file again with `conflictscope data build` or `convert`"
    if not asked:
        raise UserError(
            f"No prompt of {conflicts.name} can be asked without its context, as no example has a bare_prompt; {again}."
        )
    if missing := sum(len(some) for fact, some in members.items() if fact not in asked):
        warnings.warn(
            Caution(
                f"{missing} of {len(conflicts)} examples of {conflicts.name} are left out, as no bare_prompt asks what "
                f"they ask without a context; {again}."
            ),
            stacklevel=2,
        )
    found = are_known(model, list(asked.values()), least_tokens=least_tokens, progress=progress)
    known = dict(zip(asked, found, strict=True))
    return ConflictSet(conflicts.name, tuple(e for e in conflicts if known.get(_fact_of(e), False)))


def kept_known_facts(
    model: nn.Module, facts: Mapping[str, Sequence[Fact]], records: Records
) -> dict[str, tuple[Fact, ...]]:
    """Those of some facts that the model knows, by relation.

    Args:
        model: The model, or a bridge around it.
        facts: Facts of the fact tables by relation.
        records: Where it is kept what the model knows, so that it is asked once.
    """
    known = {}
    for relation, some in facts.items():

        def ask(relation: str = relation, some: Sequence[Fact] = some) -> list[str]:
            return [f.subject for f in known_facts(model, relation, among=some, progress=f"Closed-book: {relation}")]

        depends_on = [[fact.subject, fact.answers] for fact in some]
        subjects = records.json(f"known-{relation}", depends_on, ask, version=(KNOWN_VERSION, ANSWERS_VERSION))
        known[relation] = tuple(fact for fact in some if fact.subject in subjects)
    return known


def remembered_facts(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[Fact, ...]]:
    """Those facts of some relations that the model knows; what it said is kept in the user's cache directory.

    Args:
        model: The model, or a bridge around it.
        names: The relations.

    Raises:
        UserError: If a relation is not known.
    """
    known, prints = {}, fingerprint(model)
    for name in names:
        # The tables' questions may be put in other words some day.
        asked = [closed_book_prompt(relation_named(name), "", family) for family in SEEN_PHRASINGS]
        records = Records(_cache(), model=prints, asked=asked)
        known |= kept_known_facts(model, {name: usable_facts(name)}, records)
    return known


def _cache() -> Path:
    return cache_directory() / "known"


def conflicts_about_known(
    model: nn.Module,
    facts: Mapping[str, Sequence[Fact]],
    records: Records,
    *,
    seed: int,
    kinds: Sequence[ContextKind] = CONTEXT_KINDS,
) -> ConflictSet:
    """Build prompts, in every phrasing family, about those of some facts that the model knows.

    Args:
        model: The model, or a bridge around it.
        facts: Facts of the fact tables by relation.
        records: Where it is kept what the model knows, so that it is asked once.
        seed: Decides the splits and which answer conflicts with which.
        kinds: The context kinds to build.

    Raises:
        UserError: If it knows too few facts for conflicts.
    """
    known = kept_known_facts(model, facts, records)
    return build_conflicts(known, seed=seed, kinds=kinds, phrasings=tuple(PHRASINGS))


_Fact = tuple[str, str, tuple[str, ...]]


def _fact_of(example: ConflictExample) -> _Fact:
    return example.relation, example.subject, example.memory_answers


def _bare_prompts(examples: Sequence[ConflictExample]) -> list[str]:
    """What asks the one fact of these examples closed-book; empty if nothing does."""
    example = examples[0]
    if example.source == SOURCE and example.relation in relations():
        return [closed_book_prompt(relations()[example.relation], example.subject, name) for name in SEEN_PHRASINGS]
    asking = [e for e in examples if e.bare_prompt]
    return [e.bare_prompt for e in asking if e.template != HELD_OUT_PHRASING] or [e.bare_prompt for e in asking]
