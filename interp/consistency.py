"""Ask one question in many words, closed-book: does a model always say the same? Conflict within its memory.

Every subject is asked in each of its wordings without a context. Answers belong together if they say the same
(``interp.persuasion.clustered``). Of a subject's n greedy answers, in clusters of c₁, c₂, ... answers:

    meanings           how many clusters there are
    consistency        the share of the largest, max c / n
    agreement          the share of pairs of wordings that agree, Σ c (c - 1) / (n (n - 1)): the consistency of ParaRel
                       (Elazar et al. 2021, arXiv 2102.01017)
    right              whether more than half of the answers name what is true, as in ``interp.known``
    semantic entropy   of answers that are sampled to one wording, nats (``interp.persuasion``); the mean over wordings
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import polars as pl
from torch import nn

from interp.answers import contains_answer, normalise
from interp.conflicts import ConflictExample, ConflictSet, Split, split_of
from interp.errors import Caution, UserError
from interp.facts import PHRASINGS, SOURCE, Fact, closed_book_prompt, load_facts, relation_named, relations
from interp.generation import MAX_NEW_TOKENS, continue_greedily
from interp.persuasion import Same, Sampling, clustered, semantic_entropy
from interp.progress import tracked
from interp.statistics import Estimate, bootstrap_mean, rate

PARTS = ("relation", "split", "right")
"""Columns that estimates can be broken down by."""


def closed_book(facts: Mapping[str, Sequence[Fact]], *, seed: int = 0) -> ConflictSet:
    """Ask every fact without a context, in every phrasing family.

    Args:
        facts: Facts by relation. What the model gets wrong belongs to them, unlike in ``build_conflicts``.
        seed: Decides the splits.

    Raises:
        UserError: If a relation is not known.
    """
    examples = []
    for name, some in facts.items():
        relation = relation_named(name)
        for fact in some:
            for phrasing in PHRASINGS:
                prompt = closed_book_prompt(relation, fact.subject, phrasing)
                examples.append(
                    ConflictExample(
                        id=f"{name}/{fact.subject}/{phrasing}/none",
                        subject=fact.subject,
                        relation=name,
                        question=relation.question.format(subject=fact.subject),
                        contexts=(),
                        memory_answers=fact.answers,
                        context_answers=(),
                        kind="none",
                        template=phrasing,
                        source=SOURCE,
                        prompt=prompt,
                        bare_prompt=prompt,
                        split=split_of(fact.subject, seed),
                    )
                )
    return ConflictSet("+".join(facts), tuple(examples))


class _Asked(NamedTuple):
    """A question in several wordings; ``known`` are answers that it may get, each with its aliases."""

    subject: str
    relation: str
    split: Split
    truth: tuple[str, ...]
    prompts: list[str]
    known: list[tuple[str, ...]]


def consistency(
    model: nn.Module,
    conflicts: ConflictSet,
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    same: Same | None = None,
    progress: str | None = None,
) -> pl.DataFrame:
    """Measure of each subject whether its answers depend on the wording.

    Args:
        model: The model, or a bridge around it; interventions that are applied to it are seen.
        conflicts: Prompts of any kind, for example from ``closed_book``; what is asked is each distinct bare prompt.
            Questions that have only one are left out, and a ``Caution`` says how many.
        sampling: How answers are sampled besides; ``None`` samples none.
        max_new_tokens: Longest greedy answer, in tokens.
        same: Tells which answers belong together; see ``interp.persuasion.clustered``. ``None`` compares texts, with
            what the fact table says of any subject, or else with what the examples' memory and context say.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        A row a question: ``subject, relation, split``, ``meanings``, ``consistency``, ``agreement``, ``right`` (null
        where what is true is not known), ``most_said`` (the first answer of the largest cluster; of several that are
        as large, of the one that comes first), ``prompts`` and ``answers``; with sampling ``semantic_entropy``, and
        ``samples``, a list for each prompt.

    Raises:
        UserError: If no question has two wordings.
    """
    questions = _questions(conflicts)
    prompts = list(dict.fromkeys(prompt for one in questions for prompt in one.prompts))
    found = continue_greedily(model, prompts, max_new_tokens=max_new_tokens, progress=progress)
    answers = dict(zip(prompts, found.answers, strict=True))
    rows = [_row(one, [answers[prompt] for prompt in one.prompts], same) for one in questions]
    if sampling is not None:
        for one, row in zip(tracked(questions, progress), rows, strict=True):
            row |= _sampled(model, one, sampling, same)
    return pl.DataFrame(rows, infer_schema_length=None)


def agreement(clusters: Sequence[Sequence[int]]) -> float:
    """The share of pairs of answers that are in one cluster, of two answers or more."""
    sizes = [len(group) for group in clusters]
    return sum(size * (size - 1) for size in sizes) / (sum(sizes) * (sum(sizes) - 1))


def estimates(frame: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """Give the mean of each measure of ``consistency`` with its interval by subject, in every group.

    Args:
        frame: What ``consistency`` returned.
        by: Columns out of ``PARTS`` to break down by.

    Returns:
        Columns ``by``, ``measure``, ``value``, ``low``, ``high``, ``n``; ``unanimous`` is the share of questions with
        one meaning.

    Raises:
        UserError: If a column is none of ``PARTS``.
    """
    if unknown := [column for column in by if column not in PARTS]:
        raise UserError(f"Consistency cannot be broken down by {unknown[0]!r}; choose among {', '.join(PARTS)}.")
    groups = frame.group_by(list(by), maintain_order=True) if by else [((), frame)]
    rows = [
        {**dict(zip(by, key, strict=True)), "measure": measure, **estimate.to_record()}
        for key, part in groups
        for measure, estimate in _measured(part)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _measured(part: pl.DataFrame) -> Iterator[tuple[str, Estimate]]:
    subjects = part["subject"].to_list()
    yield "unanimous", rate((part["meanings"] == 1).to_numpy(), subjects)
    for measure in ("consistency", "agreement", "meanings", "semantic_entropy"):
        if measure in part.columns:
            yield measure, bootstrap_mean(part[measure].to_list(), subjects)
    judged = part.drop_nulls("right")
    if len(judged):
        yield "right", rate(judged["right"].to_numpy(), judged["subject"].to_list())


def _questions(conflicts: ConflictSet) -> list[_Asked]:
    members: dict[tuple[str, str, tuple[str, ...]], list[ConflictExample]] = {}
    for example in conflicts:
        members.setdefault((example.relation, example.subject, example.memory_answers), []).append(example)
    asked = []
    for some in members.values():
        prompts = list(dict.fromkeys(example.bare_prompt for example in some if example.bare_prompt))
        if len(prompts) > 1:
            one = some[0]
            asked.append(_Asked(one.subject, one.relation, one.split, one.memory_answers, prompts, _known(some)))
    if not asked:
        raise UserError(
            f"{conflicts.name} asks nothing in two wordings without a context; ask facts (--relation), or data that "
            "has several templates for one subject."
        )
    if left_out := len(members) - len(asked):
        warnings.warn(
            Caution(f"{left_out} of {len(members)} questions of {conflicts.name} have one wording, and are left out."),
            stacklevel=3,
        )
    return asked


def _known(some: Sequence[ConflictExample]) -> list[tuple[str, ...]]:
    """Answers that one question may get: the true one first, no two with a name in common."""
    one = some[0]
    others = (
        _answers_of(one.relation)
        if one.source == SOURCE and one.relation in relations()
        else dict.fromkeys(example.context_answers for example in some if example.kind == "conflict")
    )
    true = {normalise(answer) for answer in one.memory_answers}
    return [one.memory_answers, *(other for other in others if not true & {normalise(answer) for answer in other})]


@cache
def _answers_of(relation: str) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, dict[str, None]] = {}
    for fact in load_facts(relation):
        groups.setdefault(normalise(fact.answers[0]), {}).update(dict.fromkeys(fact.answers))
    return tuple(tuple(group) for group in groups.values())


def _row(one: _Asked, answers: list[str], same: Same | None) -> dict[str, Any]:
    clusters = clustered(answers, one.known, same)
    largest = max(clusters, key=len)
    naming = sum(contains_answer(answer, one.truth) for answer in answers)
    return {
        **{name: getattr(one, name) for name in ("subject", "relation", "split")},
        "meanings": len(clusters),
        "consistency": len(largest) / len(answers),
        "agreement": agreement(clusters),
        "right": 2 * naming > len(answers) if one.truth else None,
        "most_said": answers[largest[0]],
        "prompts": one.prompts,
        "answers": answers,
    }


def _sampled(model: nn.Module, one: _Asked, sampling: Sampling, same: Same | None) -> dict[str, Any]:
    drawn = [sampling.sampled(model, prompt) for prompt in one.prompts]
    entropies = [semantic_entropy(some, clustered(some.answers, one.known, same)) for some in drawn]
    return {"semantic_entropy": sum(entropies) / len(entropies), "samples": [some.answers for some in drawn]}
