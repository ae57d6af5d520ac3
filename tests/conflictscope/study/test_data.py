"""Prompts of a study: what a quick one asks."""

from __future__ import annotations

from collections import Counter

from conflictscope.study.data import Prompts, fact_prompts, file_prompts
from conflictscope.study.lab import Lab
from interp.attribution.examples import with_partners
from interp.conflicts import ConflictSet
from interp.documents import Documents
from interp.facts import build_conflicts, usable_facts
from interp.families import LEARNED_FAMILIES, UNSEEN_FAMILIES
from interp.records import Records


def test_a_quick_study_asks_few_of_every_relation_and_kind_and_learns_from_the_same():
    everything = build_conflicts({name: usable_facts(name) for name in ("capital", "continent")})
    train, dev, test = (ConflictSet(name, everything.select(split=name).examples) for name in ("train", "dev", "test"))
    prompts = Prompts(train, dev, test, "two", ("capital", "continent"))
    few = prompts.few(0)
    assert (few.train, few.dev) == (train, dev)
    asked = [example.id for example in few.test]
    assert len(set(asked)) == len(asked)
    assert set(asked) <= {example.id for example in test}
    for relation in ("capital", "continent"):
        asked_of = few.left_out(relation).test
        counts = {kind: len(asked_of.select(kind=kind)) for kind in ("conflict", "aligned", "irrelevant", "none")}
        assert counts == {"conflict": 6, "aligned": 2, "irrelevant": 2, "none": 3}
    assert prompts.few(0).test.digest == few.test.digest != prompts.few(1).test.digest


def test_facts_with_several_documents_are_tested_too(tmp_path, tiny_plain):
    """Only phrasings of the fact tables are thinned out for the test."""
    several = Documents(1, 1).of(build_conflicts({"capital": usable_facts("capital")}))
    several.save(tmp_path / "several.jsonl")
    how = {"subjects": 20, "seed": 0, "unknown_too": True}
    prompts = file_prompts(tiny_plain("llama"), tmp_path / "several.jsonl", Records(tmp_path), **how)
    asked = {kind: prompts.test.select(kind=kind) for kind in ("conflict", "none")}
    assert {len(part) for part in asked.values()} == {len(prompts.test.subjects)} != {0}


def test_families_are_tested_in_others_on_other_subjects(tmp_path):
    prompts = fact_prompts(None, ["capital", "currency"], Records(tmp_path), subjects=10, seed=0, families=2)
    learned, tested = ({e.template for e in part} for part in (prompts.train, prompts.test))
    assert tested <= {family.name for family in UNSEEN_FAMILIES}
    assert learned <= {family.name for family in LEARNED_FAMILIES}
    assert not set(prompts.train.subjects) & set(prompts.test.subjects)
    for part, each in ((prompts.train, 2), (prompts.dev, 2), (prompts.test, 2)):
        counts = Counter((e.relation, e.subject) for e in part.select(kind="conflict"))
        # Without a tokenizer two of the three unseen families can be asked, those that are no chats.
        assert set(counts.values()) == {each}
    bare = Counter((e.relation, e.subject) for e in prompts.test.select(kind="none"))
    assert set(bare.values()) == {1}


def test_in_families_most_conflicts_have_another_that_heads_can_be_patched_from(tmp_path):
    prompts = fact_prompts(None, ["capital", "currency"], Records(tmp_path), subjects=30, seed=0, families=2)
    conflicts = prompts.train.select(kind="conflict").examples
    assert len(with_partners(conflicts)) > 0.8 * len(conflicts)


def test_heads_are_scored_on_prompts_with_partners_where_phrasings_are_many(tiny_llama, tmp_path):
    """More phrasings than there are prompts to score on: one of each would leave none a partner."""
    records = Records(tmp_path)
    prompts = fact_prompts(None, ["capital", "currency"], records, subjects=30, seed=0, families=30)
    lab = Lab(tiny_llama, "tiny", prompts, records, seed=0)
    some = lab.scored.examples
    assert len({e.template for e in prompts.train.select(kind="conflict")}) > 48
    assert 48 < len(some) <= 96
    assert len(with_partners(some)) == len(some)
