"""Contexts that contradict memory for a reason: what they say of whom, and what they leave unsaid."""

import re
from itertools import product

import pytest

from interp import causes as module
from interp.answers import ambiguous, contains_answer, usage_of
from interp.causes import CAUSES, PLAUSIBILITIES, Cause
from interp.conflicts import CONTEXT_KINDS
from interp.errors import UserError
from interp.facts import build_conflicts, load_facts, relation_named, relations, usable_facts
from tests.tiny import tiny_conflicts

ALL = [Cause(name, plausibility) for name, plausibility in product(CAUSES, (None, *PLAUSIBILITIES))]
EVERY = pytest.mark.parametrize("cause", ALL, ids=[cause.template for cause in ALL])


@pytest.fixture(scope="module")
def facts():
    return build_conflicts({name: usable_facts(name) for name in relations()}, seed=1)


@pytest.mark.parametrize(
    ("cause", "relation", "subject", "answer", "context"),
    [
        (Cause("misinformation"), "capital", "Peru", "Oslo", "The capital of Peru is Oslo."),
        (
            Cause("misinformation", "high"),
            "painter",
            "The Scream",
            "Claude Monet",
            "The painter of The Scream was Claude Monet. Many books name someone else, because a dealer once signed "
            "the picture with a better known name.",
        ),
        (
            Cause("misinformation", "low"),
            "headquarters",
            "NATO",
            "Lima",
            "A chain letter that nobody signed says that the headquarters of NATO are in Lima. It gives no source.",
        ),
        (
            Cause("temporal"),
            "currency",
            "Japan",
            "euro",
            "As of 2031, the currency of Japan is the euro; until then it was different.",
        ),
        (
            Cause("temporal", "high"),
            "author",
            "Emma",
            "Mark Twain",
            "As of 2031 the libraries say that the author of Emma is Mark Twain; until then it was different. An "
            "archive opened the letters of the first publisher, and the catalogues have been corrected.",
        ),
        (
            Cause("temporal", "low"),
            "capital",
            "the United States",
            "Oslo",
            "A horoscope in a free newspaper says that as of 2031, the capital of the United States is Oslo; "
            "until then it was different.",
        ),
        (
            Cause("semantic"),
            "continent",
            "France",
            "Asia",
            "There is also a town called France. The continent on which France, the town, lies is Asia.",
        ),
        (
            Cause("semantic", "high"),
            "sport",
            "Usain Bolt",
            "tennis",
            "There is also a teacher called Usain Bolt. The sport that Usain Bolt, the teacher, is famous for is "
            "tennis. The name is often taken for that of the better known athlete, so that most sources give another "
            "answer.",
        ),
        (
            Cause("semantic", "low"),
            "composer",
            "H.M.S. Pinafore",
            "Erik Satie",
            "A child made up a fairy tale about a television theme called H.M.S. Pinafore. In the tale, the composer "
            "of H.M.S. Pinafore, the television theme, was Erik Satie.",
        ),
    ],
)
def test_every_cause_reads_as_it_should(cause, relation, subject, answer, context):
    assert cause.context(relation_named(relation), subject, answer) == context


@EVERY
def test_each_fact_has_one_prompt_of_every_kind(facts, cause):
    made = cause.of(facts)
    stated = facts.select(templates=["statement"])
    assert made.counts()["by_template"] == {cause.template: len(stated)}
    assert len(made) == 4 * len({(e.relation, e.subject) for e in facts})
    assert set(made.counts()["by_kind"]) == set(CONTEXT_KINDS)
    same = ("subject", "relation", "kind", "memory_answers", "context_answers", "split", "question")
    for example, before in zip(made, stated, strict=True):
        assert all(getattr(example, name) == getattr(before, name) for name in same)


@EVERY
def test_a_conflict_names_its_answer_and_hides_memory(facts, cause):
    made = cause.of(facts)
    for example in made.select(kind="conflict"):
        assert usage_of(example.context, example.memory_answers, example.context_answers) == "context"
    assert ambiguous(made)["both_in_context"] == 0


@EVERY
def test_what_tells_a_conflict_from_an_agreeing_context_is_the_answer(facts, cause):
    made = cause.of(facts)
    agreeing = {(e.relation, e.subject): e for e in made.select(kind="aligned")}
    for example in made.select(kind="conflict"):
        other = agreeing[example.relation, example.subject]
        named = re.compile(rf"(?<!\w){re.escape(example.context_answers[0])}(?!\w)")
        swapped, times = named.subn(lambda _, other=other: other.context_answers[0], example.context)
        assert (swapped, times) == (other.context, 1)


@EVERY
def test_an_irrelevant_context_is_about_something_else_in_the_same_words(facts, cause):
    for example in cause.of(facts).select(kind="irrelevant"):
        assert not contains_answer(example.context, [example.subject, *example.memory_answers])
        assert "{" not in example.context


@EVERY
def test_the_question_is_asked_after_the_context_and_alone(facts, cause):
    for example in cause.of(facts):
        stem = relation_named(example.relation).stem.format(subject=example.subject)
        assert example.bare_prompt == f"Question: {example.question}\nAnswer: {stem}"
        before = f"{example.context}\n\n" if example.contexts else ""
        assert example.prompt == before + example.bare_prompt
        assert (example.contexts == ()) == (example.kind == "none")


def test_what_has_no_such_facts_or_words_is_told(monkeypatch):
    with pytest.raises(UserError, match="tiny has no facts in the wording 'statement'"):
        Cause("temporal").of(tiny_conflicts())
    monkeypatch.setattr(module, "read_json", lambda _: {"author": {}})
    module._words.cache_clear()
    some = build_conflicts({"capital": load_facts("capital")[:30]})
    with pytest.raises(UserError, match=r"'capital' has no wordings in assets/facts/causes\.json; add them, or choose"):
        Cause("temporal").of(some)
    module._words.cache_clear()
