"""Prompts of several documents: how many say what, in which order, and what is asked."""

from collections import Counter

import pytest

from interp.answers import contains_answer
from interp.documents import Documents
from interp.errors import UserError
from interp.facts import build_conflicts, load_facts

FACTS = [
    fact for fact in load_facts("capital") if fact.subject in {"France", "Japan", "Italy", "Peru", "Kenya", "Cuba"}
]


@pytest.fixture(scope="module")
def conflicts():
    return build_conflicts({"capital": FACTS})


@pytest.mark.parametrize(("against", "agreeing", "beside"), [(1, 1, 0), (2, 1, 1), (1, 0, 2), (0, 2, 1), (3, 1, 0)])
def test_so_many_documents_say_what_was_asked_for(conflicts, against, agreeing, beside):
    made = Documents(against, agreeing, beside).of(conflicts)
    asked = [e for e in made if e.kind != "none"]
    assert {e.subject for e in asked} == {e.subject for e in conflicts}
    original = {(e.subject, e.context): e for e in conflicts if e.contexts}
    for example in asked:
        kinds = Counter(original[example.subject, text].kind for text in example.contexts)
        assert [kinds[kind] for kind in ("conflict", "aligned", "irrelevant")] == [against, agreeing, beside]
        assert len({original[example.subject, text].template for text in example.contexts}) == len(example.contexts)
        assert example.kind == ("conflict" if against else "aligned")
        assert all(text in example.prompt for text in example.contexts)
        assert example.prompt.endswith(f"\n\n{example.bare_prompt}")
        assert example.bare_prompt == f"Question: {example.question}\nAnswer:"
        if against:
            saying = [text for text in example.contexts if contains_answer(text, example.context_answers)]
            assert len(saying) == against
    assert {e.prompt for e in made if e.kind == "none"} == {e.bare_prompt for e in asked}
    assert len({e.id for e in made}) == len(made)


@pytest.mark.parametrize("position", ["first", "last"])
def test_documents_that_contradict_stand_where_they_are_wanted(conflicts, position):
    for example in Documents(1, 2, position=position).of(conflicts).select(kind="conflict"):
        places = [contains_answer(text, example.context_answers) for text in example.contexts]
        assert places.index(True) == (0 if position == "first" else 2)


def test_mixed_documents_stand_anywhere(conflicts):
    made = [Documents(1, 2, seed=seed).of(conflicts).select(kind="conflict") for seed in range(4)]
    places = {
        [contains_answer(text, e.context_answers) for text in e.contexts].index(True) for part in made for e in part
    }
    assert places == {0, 1, 2}
    again = Documents(1, 2, seed=3).of(conflicts)
    assert again.digest == Documents(1, 2, seed=3).of(conflicts).digest


def test_what_cannot_be_had_is_told(conflicts):
    with pytest.raises(UserError, match="in enough wordings for 3-against-3-mixed; ask for fewer"):
        Documents(3, 3).of(conflicts)
    with pytest.raises(UserError, match="needs a document that contradicts or agrees"):
        Documents(0, 0, 2)
