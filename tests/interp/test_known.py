import dataclasses
from typing import Any

import pytest

from interp import known as known_module
from interp.answers import contains_answer
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import Caution, UserError
from interp.facts import (
    HELD_OUT_PHRASING,
    SEEN_PHRASINGS,
    Fact,
    build_conflicts,
    closed_book_prompt,
    known_facts,
    load_facts,
    relation_named,
    usable_facts,
)
from interp.generation import Continuations, continue_greedily
from interp.known import ClosedBook, are_known, known_part, remembered_facts
from tests.tiny import tiny_conflicts

MODEL: Any = None
"""No model: what it answers is made up."""

TEMPLATE = tiny_conflicts().examples[0]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a model answers, by prompt, and nothing to others; filled by a test."""
    answers: dict[str, str] = {}

    def answered(_model: Any, prompts: Any, **_: Any) -> Continuations:
        assert len(set(prompts)) == len(prompts)
        nothing: Any = None
        return Continuations([answers.get(prompt, "") for prompt in prompts], nothing, nothing)

    monkeypatch.setattr(known_module, "continue_greedily", answered)
    monkeypatch.setattr(known_module, "answer_length", lambda *_: 1)
    return answers


def example(id: str, bare: str, **fields: Any) -> ConflictExample:
    """An example of other people's data about Italy, whose capital is Rome."""
    return dataclasses.replace(TEMPLATE, id=id, bare_prompt=bare, **fields)


def kept(*examples: ConflictExample) -> list[str]:
    return [e.id for e in known_part(MODEL, ConflictSet("some", examples))]


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_a_fact_of_the_tables_is_known_if_right_in_more_than_half_of_the_seen_phrasings(says, right):
    bare = [closed_book_prompt(relation_named("capital"), "Italy", phrasing) for phrasing in SEEN_PHRASINGS]
    says.update(dict.fromkeys(bare[:right], "It is Rome, of course"))
    assert [fact.subject for fact in known_facts(MODEL, "capital")] == (["Italy"] if right > 1 else [])


@pytest.mark.parametrize(
    ("lengths", "least", "room"), [((1, 3), 8, 8), ((2, 11), 8, 11), ((40, 3), 8, 32), ((3, 2), 32, 32)]
)
def test_the_longest_answer_has_room(monkeypatch, lengths, least, room):
    """In eight tokens no model can say a name of eleven, and would not know it."""
    said, found = iter(lengths), []
    monkeypatch.setattr(known_module, "answer_length", lambda *_: next(said))

    def answered(_model: Any, prompts: Any, *, max_new_tokens: int, **_: Any) -> Continuations:
        found.append(max_new_tokens)
        nothing: Any = None
        return Continuations([""] * len(prompts), nothing, nothing)

    monkeypatch.setattr(known_module, "continue_greedily", answered)
    facts = [ClosedBook([f"{number} is"], ("Rome",)) for number in range(2)]
    assert are_known(MODEL, facts, least_tokens=least) == [False, False]
    assert found == [room]


@pytest.mark.parametrize("phrasing", [HELD_OUT_PHRASING, "note"])
def test_a_set_of_the_tables_is_asked_in_the_seen_phrasings_whatever_its_own(says, phrasing):
    facts = usable_facts("capital")
    asked = [closed_book_prompt(relation_named("capital"), "Italy", phrasing) for phrasing in SEEN_PHRASINGS]
    says.update(dict.fromkeys(asked, "Rome"))
    found = known_part(MODEL, build_conflicts({"capital": facts}, phrasings=(phrasing,)))
    assert {(e.subject, e.template) for e in found} == {("Italy", phrasing)}
    assert {e.kind for e in found} == {"conflict", "aligned", "irrelevant", "none"}


@pytest.mark.parametrize("right", [1, 2, 3, 4])
def test_other_data_is_asked_in_all_its_phrasings_but_the_held_out_one(says, right):
    bare = ["One is", "Two is", "Three is", "Four is"]
    says.update(dict.fromkeys(bare[:right], "Rome") | {"Five is": "Rome"})
    asked = [example(name, name, template=name) for name in bare]
    held_out = example("out", "Five is", template=HELD_OUT_PHRASING)
    assert kept(*asked, held_out) == ([*bare, "out"] if right > 2 else [])


def test_a_bare_prompt_that_several_examples_have_counts_once(says):
    says["One is"] = "Rome"
    assert kept(example("1", "One is"), example("2", "One is"), example("3", "Two is")) == []


def test_one_bare_prompt_decides_alone_also_in_the_held_out_phrasing(says):
    says["One is"] = "Rome"
    assert kept(example("1", "One is", template=HELD_OUT_PHRASING)) == ["1"]
    assert kept(example("1", "Two is")) == []


def test_examples_of_one_subject_with_other_answers_are_of_another_fact(says):
    says["One is"] = "Rome"
    other = example("2", "One is", memory_answers=("Milan",), context_answers=("Rome",))
    assert kept(example("1", "One is"), other) == ["1"]


def test_what_memory_answers_nothing_to_is_not_known(says):
    says["One is"] = "Rome"
    assert kept(example("1", "One is", memory_answers=())) == []


def test_examples_that_nothing_asks_are_counted_and_left_out(says):
    says["One is"] = "Rome"
    unasked = [example(str(i), "", subject="Peru") for i in range(3)]
    with pytest.warns(Caution, match="3 of 5 examples of some are left out, as no bare_prompt asks what"):
        assert kept(example("one", "One is"), *unasked, example("same", "")) == ["one", "same"]


def test_a_set_without_bare_prompts_is_refused(says):
    with pytest.raises(UserError, match="No prompt of some can be asked without its context"):
        kept(example("1", ""), example("2", ""))


def test_a_model_that_knows_nothing_leaves_an_empty_set(tiny_llama):
    assert known_part(tiny_llama, tiny_conflicts()).examples == ()
    assert are_known(tiny_llama, [ClosedBook(["It is"], ())]) == [False]


def test_what_a_real_model_knows_is_what_it_answers_right_prompt_by_prompt(smollm2):
    lands = {"France", "Nauru", "Peru"}
    phrasings = (*SEEN_PHRASINGS, "note", HELD_OUT_PHRASING)
    facts = [fact for fact in load_facts("capital") if fact.subject in lands]

    def says_right(fact: Any, phrasing: str) -> bool:
        prompt = closed_book_prompt(relation_named("capital"), fact.subject, phrasing)
        [answer] = continue_greedily(smollm2, [prompt]).answers
        return contains_answer(answer, fact.answers)

    right = {(fact.subject, phrasing): says_right(fact, phrasing) for fact in facts for phrasing in phrasings}
    expected = [fact for fact in facts if sum(right[fact.subject, name] for name in SEEN_PHRASINGS) >= 2]
    assert 0 < len(expected) < len(facts)
    assert list(known_facts(smollm2, "capital", among=facts)) == expected

    ours = build_conflicts({"capital": facts}, phrasings=phrasings)
    subjects = {fact.subject for fact in expected}
    assert known_part(smollm2, ours).examples == tuple(e for e in ours if e.subject in subjects)

    theirs = ConflictSet("theirs", tuple(dataclasses.replace(e, source="theirs") for e in ours))
    counts = {fact.subject: sum(right[fact.subject, name] for name in phrasings[:4]) for fact in facts}
    assert known_part(smollm2, theirs).examples == tuple(e for e in theirs if counts[e.subject] > 2)


def test_what_a_model_knows_is_asked_once_for_all_commands(tiny_llama, tiny_plain, monkeypatch):
    asked = []

    def known(model: Any, relation: str, **_: Any) -> tuple[Fact, ...]:
        asked.append((model, relation))
        return usable_facts(relation)[:3]

    monkeypatch.setattr("interp.known.known_facts", known)
    first = remembered_facts(tiny_llama, ["capital", "language"])
    assert first == {name: usable_facts(name)[:3] for name in ("capital", "language")}
    assert remembered_facts(tiny_llama, ["language"]) == {"language": first["language"]}
    other = tiny_plain("qwen2")
    remembered_facts(other, ["language"])
    assert asked == [(tiny_llama, "capital"), (tiny_llama, "language"), (other, "language")]
