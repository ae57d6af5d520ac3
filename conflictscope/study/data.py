"""Get a study's prompts: from the fact tables, a file of conflict data or a public format, split by subject.

Only what the model knows is asked (``interp.known`` states the rule), unless all is wanted. Methods learn from train,
are chosen on dev, and are shown on test, where one phrasing family appears that neither train nor dev has.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from interp.answers import COMPLETION_TOKENS
from interp.conflicts import SPLITS, ConflictExample, ConflictSet, ContextKind, Split, evenly, split_of
from interp.errors import UserError
from interp.evaluation import ANSWERS_VERSION
from interp.facts import (
    HELD_OUT_PHRASING,
    PHRASINGS,
    SOURCE,
    STUDY_PHRASINGS,
    Fact,
    build_conflicts,
    relation_named,
    usable_facts,
)
from interp.families import UNSEEN_FAMILIES, VARIANTS, worded_conflicts
from interp.formats import load_dataset
from interp.inputs import tokenizer_of
from interp.known import KNOWN_VERSION, conflicts_about_known, kept_known_facts, known_part
from interp.records import Records

RELATIONS = ("capital", "language", "continent", "manufacturer")

# Where an edit could do damage is asked in fewer words than where it should do good: answers cost most of the time.
TESTED_PHRASINGS: Mapping[ContextKind, Sequence[str]] = {
    "conflict": STUDY_PHRASINGS,
    **dict.fromkeys(("aligned", "irrelevant", "none"), ("question", HELD_OUT_PHRASING)),
}
_FEW: Mapping[ContextKind, int] = {"conflict": 6, "aligned": 2, "irrelevant": 2, "none": 3}


@dataclass(frozen=True)
class Prompts:
    """The prompts of a study, of every kind that the data has.

    Attributes:
        train: What methods learn from.
        dev: What candidates compete on.
        test: What is asked to be shown.
        name: What the data is called.
        relations: The relations that are learned from.
        held_out: The phrasing family that test alone has; ``None`` where the data has no such.
        asked: How many facts the model was asked about closed-book, to find those it knows.
        known: How many of them it knows.
    """

    train: ConflictSet
    dev: ConflictSet
    test: ConflictSet
    name: str
    relations: tuple[str, ...]
    held_out: str | None = None
    asked: int = 0
    known: int = 0

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not len(self.part(split).select(kind="conflict")):
                raise UserError(
                    f"The model knows too little of {self.name} for a {split} split, which has no conflict prompts; "
                    "give more of it (--relation, --subjects, rows of --data), --unknown-too with --data, another "
                    "--seed, or a model that knows more."
                )

    def part(self, split: Split) -> ConflictSet:
        """The prompts of one split."""
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]

    @property
    def digest(self) -> str:
        """A hash of all prompts."""
        return hashlib.sha256("".join(self.part(split).digest for split in SPLITS).encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        """What a record says of them."""
        every = [e for split in SPLITS for e in self.part(split)]
        return {
            "name": self.name,
            "relations": list(self.relations),
            "asked": self.asked,
            "counts": ConflictSet(self.name, tuple(every)).counts(),
            "phrasings": {
                "learned": list(dict.fromkeys(e.template for e in self.train)),
                "tested": list(dict.fromkeys(e.template for e in self.test)),
                "held_out": self.held_out,
            },
            "digest": self.digest,
        }

    def few(self, seed: int) -> Prompts:
        """The same with few test prompts of every relation: to check that all runs."""
        some = [
            example
            for relation in dict.fromkeys(e.relation for e in self.test)
            for kind, count in _FEW.items()
            for example in evenly(self.test.select(kind=kind, relation=relation), count, seed)
        ]
        return replace(self, test=ConflictSet(self.test.name, tuple(some)))

    def tested_on(self, other: Prompts) -> Prompts:
        """The same to learn from and to choose on, with the test prompts of others."""
        return replace(self, test=other.test, name=f"{self.name}, tested on {other.name}")

    def left_out(self, relation: str) -> Prompts:
        """Learn from all relations but one, and test on that one.

        Raises:
            UserError: If it is none of them, or nothing is left of a split.
        """
        if relation not in self.relations or len(self.relations) < 2:
            raise UserError(f"{relation} cannot be left out of {', '.join(self.relations)}; give one of two or more.")
        others = tuple(name for name in self.relations if name != relation)
        train, dev = (_only(self.part(split), others) for split in ("train", "dev"))
        return replace(
            self,
            train=train,
            dev=dev,
            test=self.test.select(relation=relation),
            relations=others,
            name=f"{'+'.join(others)}, tested on {relation}",
        )


def fact_prompts(
    model: nn.Module | None,
    relations: Sequence[str],
    records: Records,
    *,
    subjects: int,
    seed: int,
    families: int = 0,
    asked: Callable[[ConflictSet], ConflictSet] = lambda conflicts: conflicts,
) -> Prompts:
    """Prompts of every kind and phrasing about the facts of some relations that the model knows.

    Args:
        model: The model, or a bridge around it; ``None`` takes all facts as known.
        relations: Relations of the fact tables.
        records: Where what is known is kept.
        subjects: How many subjects of each relation are asked about at most, to learn from and to test on; three fifths
            as many to choose on.
        seed: Decides splits, subjects and conflicts.
        families: How many families that are made from parts (``interp.families``) each fact is learned from in, of each
            variant; test is then in the unseen ones. 0 takes the phrasings of the fact tables instead.
        asked: Asks the prompts in another form; what is known is asked in the form of the fact tables.

    Raises:
        UserError: If a relation is not known, or the model knows too little for one of the splits.
    """
    facts: dict[str, list[Fact]] = {}
    for relation in dict.fromkeys(relation_named(name).name for name in relations):
        usable = usable_facts(relation)
        facts[relation] = []
        for split, most in _subjects(subjects).items():
            members = [fact for fact in usable if split_of(fact.subject, seed) == split]
            rng = random.Random(f"{seed}/{relation}/{split}")
            facts[relation] += rng.sample(members, min(most, len(members)))
    n_asked = sum(map(len, facts.values()))
    if families:
        known = facts if model is None else kept_known_facts(model, facts, records)
        return _in_families(None if model is None else tokenizer_of(model), known, families, seed, n_asked)
    if model is None:
        conflicts = build_conflicts(facts, seed=seed, phrasings=tuple(PHRASINGS))
    else:
        conflicts = conflicts_about_known(model, facts, records, seed=seed)
    return _split(asked(conflicts), tuple(facts), n_asked)


def _in_families(
    tokenizer: Any, known: Mapping[str, Sequence[Fact]], families: int, seed: int, n_asked: int
) -> Prompts:
    """Prompts in families that are made from parts; those of test share no part with the others.

    Where an edit could do damage each fact is tested in one of the unseen families, where it should do good in all.
    """

    def written(split: Split, **options: Any) -> ConflictSet:
        return worded_conflicts(known, tokenizer, splits=[split], seed=seed, **options)

    train, dev = (written(split, each=families) for split in ("train", "dev"))
    guards = [variant for variant in VARIANTS if variant != "conflict"]
    tests = (
        written("test", families=UNSEEN_FAMILIES, variants=["conflict"]),
        written("test", families=UNSEEN_FAMILIES, variants=guards, each=1),
    )
    test = ConflictSet(train.name, tuple(e for part in tests for e in part))
    n_known = sum(map(len, known.values()))
    return Prompts(train, dev, test, train.name, tuple(known), None, n_asked, n_known)


def file_prompts(
    model: nn.Module | None,
    file: Path,
    records: Records,
    *,
    subjects: int,
    seed: int,
    format: str | None = None,
    unknown_too: bool = False,
    most_words: int | None = None,
    least_tokens: int = COMPLETION_TOKENS,
    asked: Callable[[ConflictSet], ConflictSet] = lambda conflicts: conflicts,
) -> Prompts:
    """Prompts from a file.

    Args:
        model: The model, or a bridge around it; ``None`` takes all facts as known.
        file: JSON lines of conflict data, or a public data set.
        records: Where what is known is kept.
        subjects: As for ``fact_prompts``.
        seed: Decides which subjects are asked, and the splits of a public data set.
        format: The public format (see ``conflictscope data convert``); ``None`` is conflict data.
        unknown_too: Whether facts that the model does not know are used too.
        most_words: Words of a prompt at most; a subject is asked about where that leaves a prompt of each kind of it.
        least_tokens: As for ``interp.known.are_known``.
        asked: Asks the prompts, and what is known, in another form.

    Raises:
        UserError: If the file cannot be read, all of it is too long, or the model knows too little of it.
    """
    loaded = ConflictSet.load(file) if format is None else load_dataset(file, format, seed=seed).conflicts
    if most_words is not None:
        loaded = _short(loaded, file, most_words)
    kept: set[tuple[str, str]] = set()
    for split, most in _subjects(subjects).items():
        for relation in dict.fromkeys(e.relation for e in loaded):
            part = loaded.select(split=split, relation=relation).subjects
            chosen = random.Random(f"{seed}/{relation}/{split}").sample(part, min(most, len(part)))
            kept |= {(relation, subject) for subject in chosen}
    conflicts = asked(ConflictSet(loaded.name, tuple(e for e in loaded if (e.relation, e.subject) in kept)))
    if model is not None and not unknown_too:

        def ask() -> list[str]:
            known = known_part(model, conflicts, least_tokens=least_tokens, progress=f"Closed-book: {conflicts.name}")
            return [e.id for e in known]

        version = (KNOWN_VERSION, ANSWERS_VERSION)
        # Prompts in another form are other prompts, so that their digest says the tokens too.
        known = set(records.json("known-file", conflicts.digest, ask, version=version))
        conflicts = ConflictSet(conflicts.name, tuple(e for e in conflicts if e.id in known))
    return _split(conflicts, tuple(dict.fromkeys(e.relation for e in conflicts)), len(kept))


def _subjects(most: int) -> dict[Split, int]:
    return {"train": most, "dev": max(1, most * 3 // 5), "test": most}


def _split(conflicts: ConflictSet, relations: tuple[str, ...], asked: int) -> Prompts:
    def is_tested(e: ConflictExample) -> bool:
        return e.source != SOURCE or e.template not in PHRASINGS or e.template in TESTED_PHRASINGS[e.kind]

    train, dev = (
        ConflictSet(conflicts.name, tuple(e for e in conflicts.select(split=split) if e.template != HELD_OUT_PHRASING))
        for split in ("train", "dev")
    )
    test = ConflictSet(conflicts.name, tuple(e for e in conflicts.select(split="test") if is_tested(e)))
    held_out = HELD_OUT_PHRASING if any(e.template == HELD_OUT_PHRASING for e in test) else None
    known = sum(len(part.subjects) for part in (train, dev, test))
    return Prompts(train, dev, test, conflicts.name, relations, held_out, asked, known)


def _short(conflicts: ConflictSet, file: Path, most_words: int) -> ConflictSet:
    """The prompts of so many words at most, about subjects that have one of each kind that there is of them."""
    shortest: dict[tuple[str, str], dict[ContextKind, int]] = defaultdict(dict)
    lengths = {e.id: len(e.prompt.split()) for e in conflicts}
    for e in conflicts:
        of_subject = shortest[e.relation, e.subject]
        of_subject[e.kind] = min(lengths[e.id], of_subject.get(e.kind, lengths[e.id]))
    needed = {subject: max(kinds.values()) for subject, kinds in shortest.items() if "conflict" in kinds}
    if min(needed.values(), default=0) > most_words:
        raise UserError(
            f"{file} has no subject with prompts of every kind of {most_words} words or fewer; allow "
            f"{min(needed.values())} words or more."
        )
    short = (e for e in conflicts if lengths[e.id] <= most_words)
    return ConflictSet(
        conflicts.name, tuple(e for e in short if needed.get((e.relation, e.subject), math.inf) <= most_words)
    )


def _only(conflicts: ConflictSet, relations: Sequence[str]) -> ConflictSet:
    return ConflictSet(conflicts.name, tuple(e for e in conflicts if e.relation in relations))
