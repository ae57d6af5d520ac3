from collections import Counter

import pytest

from interp.answers import contains_answer
from interp.conflicts import SPLITS, split_of
from interp.errors import UserError
from interp.facts import (
    HELD_OUT_PHRASING,
    PHRASINGS,
    SEEN_PHRASINGS,
    build_conflicts,
    load_facts,
    relation_named,
    relations,
    usable_facts,
)

ALL_RELATIONS = sorted(relations())


@pytest.fixture(scope="module")
def everything():
    return build_conflicts({name: usable_facts(name) for name in ALL_RELATIONS}, seed=1)


def test_there_are_enough_relations_and_facts():
    assert len(ALL_RELATIONS) >= 8
    assert sum(len(load_facts(name)) for name in ALL_RELATIONS) >= 1000


def test_every_sovereign_state_has_a_capital():
    states = {fact.subject for fact in load_facts("capital")}
    # 193 members of the United Nations, its two observers, Kosovo and Taiwan.
    assert len(states) == 197
    assert {"Vatican City", "Palestine", "Tuvalu", "Nauru", "the United States"} <= states


@pytest.mark.parametrize("relation", ALL_RELATIONS)
def test_tables_are_clean(relation):
    table = load_facts(relation)
    subjects = [fact.subject for fact in table]
    assert len(set(subjects)) == len(subjects)
    for fact in table:
        assert fact.answers
        assert all(text == text.strip() != "" for text in (fact.subject, *fact.answers))


@pytest.mark.parametrize("relation", ["language", "continent", "currency"])
def test_country_tables_name_countries_alike(relation):
    assert {f.subject for f in load_facts(relation)} <= {f.subject for f in load_facts("capital")}


def test_a_context_answer_is_stated_as_often_wrongly_as_rightly(everything):
    for relation in ALL_RELATIONS:
        for split in SPLITS:
            part = everything.select(relation=relation, split=split)
            wrong, right = (
                Counter(e.context_answers for e in part.select(kind=kind)) for kind in ("conflict", "aligned")
            )
            assert wrong == right


def test_a_conflicting_answer_never_is_an_answer_of_memory(everything):
    for example in everything.select(kind="conflict"):
        assert not any(contains_answer(answer, example.memory_answers) for answer in example.context_answers)
        assert not any(contains_answer(answer, example.context_answers) for answer in example.memory_answers)


def test_the_prompt_of_a_conflict_states_the_context_answer_and_hides_memory(everything):
    for example in everything.select(kind="conflict"):
        assert contains_answer(example.prompt, example.context_answers[:1])
        assert not contains_answer(example.prompt, example.memory_answers[:1])


def test_an_irrelevant_context_names_neither_subject_nor_answer(everything):
    for example in everything.select(kind="irrelevant"):
        assert not contains_answer(example.context, [example.subject, *example.memory_answers])


def test_an_irrelevant_context_tells_of_a_subject_of_the_same_split(everything):
    stems = [(relation_named(name).stem, load_facts(name)) for name in ALL_RELATIONS]
    splits = {
        f"Fact: {stem.format(subject=fact.subject)} {fact.answers[0]}.": split_of(fact.subject, 1)
        for stem, facts in stems
        for fact in facts
    }
    irrelevant = everything.select(kind="irrelevant", templates=["statement"])
    assert [splits[example.context] for example in irrelevant] == [example.split for example in irrelevant]


def test_no_subject_is_in_two_splits(everything):
    split_of_subject = {}
    for example in everything:
        assert split_of_subject.setdefault(example.subject, example.split) == example.split


def test_every_split_kind_and_phrasing_has_every_subject(everything):
    counts = everything.counts()
    assert len(set(counts["by_kind"].values())) == 1
    assert len(set(counts["by_template"].values())) == 1
    assert set(counts["by_template"]) == {*SEEN_PHRASINGS, HELD_OUT_PHRASING}


def test_the_same_seed_gives_the_same_set(everything):
    facts = {"capital": usable_facts("capital")}
    assert build_conflicts(facts, seed=4).digest == build_conflicts(facts, seed=4).digest
    assert build_conflicts(facts, seed=4).digest != build_conflicts(facts, seed=5).digest


def test_every_phrasing_asks_in_its_own_words():
    capital = relation_named("capital")
    assert len({phrasing.bare(capital) for phrasing in PHRASINGS.values()}) == len(PHRASINGS)


def test_the_phrasings_asked_for_are_built():
    facts = {"capital": usable_facts("capital")[:20]}
    assert set(build_conflicts(facts, phrasings=tuple(PHRASINGS)).counts()["by_template"]) == set(PHRASINGS)
    with pytest.raises(UserError, match="'poem' is not known; known are statement, question"):
        build_conflicts(facts, phrasings=("note", "poem"))


@pytest.mark.parametrize("name", PHRASINGS)
def test_every_phrasing_states_the_context_and_ends_with_the_question(name):
    facts = {relation: usable_facts(relation)[:20] for relation in relations()}
    for example in build_conflicts(facts, kinds=("conflict", "none"), phrasings=(name,)):
        stem = relation_named(example.relation).stem.format(subject=example.subject)
        assert example.prompt.lower().endswith(stem.lower())
        if example.kind == "conflict":
            assert example.context_answers[0] in example.context
            assert example.context.lower() in example.prompt.lower()
        assert "{" not in example.prompt


def test_the_bare_prompt_of_every_kind_is_the_prompt_of_kind_none():
    conflicts = build_conflicts({"capital": usable_facts("capital")[:20]}, phrasings=tuple(PHRASINGS))
    alone = {(e.subject, e.template): e.prompt for e in conflicts.select(kind="none")}
    assert all(e.bare_prompt == alone[e.subject, e.template] for e in conflicts)
    assert all(e.contexts == ((e.context,) if e.kind != "none" else ()) for e in conflicts)


def test_unknown_relation_lists_the_known_ones():
    with pytest.raises(UserError, match="'capitol' is not known; known are author, capital"):
        relation_named("capitol")


def test_facts_that_none_can_contradict_are_left_out():
    """Of many countries in Africa and few elsewhere, as many of the former stay as there are of the latter."""
    facts = usable_facts("continent")
    lopsided = [f for f in facts if f.answers == ("Africa",)] + [f for f in facts if f.answers == ("Europe",)][:9]
    conflicts = build_conflicts({"continent": lopsided}).select(kind="conflict", templates=["question"])
    answers = Counter(e.memory_answers for e in conflicts)
    assert answers["Africa",] == answers["Europe",] == 9


def test_too_few_facts_for_a_conflict_are_an_error():
    with pytest.raises(UserError, match="too few different answers"):
        build_conflicts({"capital": usable_facts("capital")[:1]})
