"""Write why a context contradicts memory: it is wrong, time has passed, or it speaks of a namesake.

The three causes are those of ConflictBank (Su et al. 2024, arXiv 2408.12076):

    misinformation   the context states another answer
    temporal         it says that this changed in 2031, and to what; what was true until then is not named
    semantic         it says so of another thing with the same name

How plausible that is can be varied (Sun et al. 2025, arXiv 2506.06485): ``high`` adds why the usual answer no longer
holds, or why most sources have another one; ``low`` gives a source that nobody would trust.

Contexts of all kinds have the same words around the relation's own sentence, in which the answer stands once. So
nothing but the answer tells a conflict from an aligned context, and no context but an aligned one names memory's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.facts import PHRASINGS, SOURCE, Fact, Relation, load_facts, relation_named, relations
from interp.files import assets_directory, read_json

CauseName = Literal["misinformation", "temporal", "semantic"]
Plausibility = Literal["high", "low"]
CAUSES: tuple[CauseName, ...] = get_args(CauseName)
PLAUSIBILITIES: tuple[Plausibility, ...] = get_args(Plausibility)

_ASKED = PHRASINGS["document"]
_STATED = PHRASINGS["statement"]

# {fact} is the relation's sentence, without a full stop; {of_namesake} is the same about the namesake. Both are written
# with a capital where they begin a sentence.
_WORDINGS: Mapping[tuple[CauseName, Plausibility | None], str] = {
    ("misinformation", None): "{Fact}.",
    ("misinformation", "high"): "{Fact}. {mistaken}",
    ("misinformation", "low"): "A chain letter that nobody signed says that {fact}. It gives no source.",
    ("temporal", None): "{Since} {fact}; until then it was different.",
    ("temporal", "high"): "{Since} {fact}; until then it was different. {changed}",
    ("temporal", "low"): "A horoscope in a free newspaper says that {since} {fact}; until then it was different.",
    ("semantic", None): "There is also a {namesake} called {subject}. {Of_namesake}.",
    ("semantic", "high"): (
        "There is also a {namesake} called {subject}. {Of_namesake}. "
        "The name is often taken for that of the better known {known}, so that most sources give another answer."
    ),
    ("semantic", "low"): (
        "A child made up a fairy tale about a {namesake} called {subject}. In the tale, {of_namesake}."
    ),
}


@dataclass(frozen=True)
class Cause:
    """Why contexts contradict memory.

    Attributes:
        name: The cause.
        plausibility: ``high`` explains, ``low`` gives a doubtful source; ``None`` just says so.
    """

    name: CauseName
    plausibility: Plausibility | None = None

    @property
    def template(self) -> str:
        """What prompts with such contexts are called, as their phrasing family: ``temporal-high``."""
        return f"{self.name}-{self.plausibility}" if self.plausibility else self.name

    def context(self, relation: Relation, subject: str, answer: str) -> str:
        """The context that gives a subject's answer.

        Raises:
            UserError: If the relation has no wordings for causes.
        """
        words = _words(relation.name)
        namesake = f"{subject}, the {words['namesake']},"
        parts = {
            **words,
            "fact": _fact(relation, subject, answer),
            "of_namesake": _fact(relation, namesake, answer),
        }
        capital = {_capital(name): _capital(text) for name, text in parts.items()}
        return _WORDINGS[self.name, self.plausibility].format(**parts, **capital, subject=subject)

    def of(self, conflicts: ConflictSet) -> ConflictSet:
        """The same facts with such contexts: of each fact one prompt of every kind that the set has.

        Args:
            conflicts: Prompts of facts in the wording ``statement``, among others or alone, as ``build_conflicts``
                makes them. A prompt asks as those of the wording ``document`` do.

        Raises:
            UserError: If there is none, or a relation has no wordings for causes.
        """
        stated = [e for e in conflicts if e.template == _STATED.name and e.source == SOURCE]
        if not stated:
            raise UserError(
                f"{conflicts.name} has no facts in the wording {_STATED.name!r}, whose contexts could be given a "
                "cause; build it from facts."
            )
        return ConflictSet(conflicts.name, tuple(map(self._of_example, stated)))

    def _of_example(self, example: ConflictExample) -> ConflictExample:
        relation = relation_named(example.relation)
        subject = example.subject
        bare = _ASKED.bare(relation).format(subject=subject, answer="")
        context = ""
        if example.kind == "irrelevant":
            other, fact = _told()[example.context]
            context = self.context(other, fact.subject, fact.answers[0])
        elif example.kind != "none":
            context = self.context(relation, subject, example.context_answers[0])
        return replace(
            example,
            id=f"{relation.name}/{subject}/{self.template}/{example.kind}",
            contexts=(context,) if context else (),
            template=self.template,
            prompt=f"{context}\n\n{bare}" if context else bare,
            bare_prompt=bare,
        )


def _fact(relation: Relation, subject: str, answer: str) -> str:
    sentence = f"{relation.stem.format(subject=subject)} {answer}"
    return sentence[:1].lower() + sentence[1:]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@cache
def _words(relation: str) -> dict[str, str]:
    words = read_json(assets_directory() / "facts" / "causes.json")
    if relation not in words:
        raise UserError(
            f"The relation {relation!r} has no wordings in assets/facts/causes.json; add them, or choose among "
            f"{', '.join(sorted(words))}."
        )
    return words[relation]


@cache
def _told() -> dict[str, tuple[Relation, Fact]]:
    """What each statement of the fact tables tells, as an irrelevant context states it."""
    return {
        _STATED.context(relation).format(subject=fact.subject, answer=fact.answers[0]).strip(): (relation, fact)
        for relation in relations().values()
        for fact in load_facts(relation.name)
    }
