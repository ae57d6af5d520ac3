"""Prompts of a study: what a quick one asks."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from pydantic import ValidationError

from conflictscope.study import setting
from conflictscope.study.data import Prompts, fact_prompts, file_prompts
from conflictscope.study.lab import Lab
from conflictscope.study.setting import DataSetting, digest_of
from interp.attribution.examples import with_partners
from interp.conflicts import SPLITS, ConflictSet
from interp.documents import Documents
from interp.errors import UserError
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


def test_prompts_of_a_file_are_bounded_in_words(tmp_path):
    facts = build_conflicts({"capital": usable_facts("capital")})
    file, how = tmp_path / "facts.jsonl", {"subjects": 40, "seed": 0, "unknown_too": True}
    facts.save(file)
    longest, most = max(len(e.prompt.split()) for e in facts), 15
    shortest = {
        subject: max(
            min(len(e.prompt.split()) for e in facts.select(kind=kind) if e.subject == subject)
            for kind in ("conflict", "aligned", "irrelevant", "none")
        )
        for subject in facts.subjects
    }
    prompts = file_prompts(None, file, Records(tmp_path), most_words=most, **how)
    every = [e for split in SPLITS for e in prompts.part(split)]
    assert {e.kind for e in every} == {"conflict", "aligned", "irrelevant", "none"}
    assert max(len(e.prompt.split()) for e in every) == most < longest
    # Subjects are drawn among those that are left, not before: as many as there are in train.
    fitting = {subject for subject, words in shortest.items() if words <= most}
    assert {e.subject for e in every} <= fitting < set(facts.subjects)
    assert len(prompts.train.subjects) == min(40, len(fitting & set(facts.select(split="train").subjects)))
    unbounded = file_prompts(None, file, Records(tmp_path), most_words=longest, **how)
    assert unbounded.digest == file_prompts(None, file, Records(tmp_path), **how).digest != prompts.digest
    least = min(shortest.values())
    with pytest.raises(UserError, match=rf"every kind of 3 words or fewer; allow {least} words or more"):
        file_prompts(None, file, Records(tmp_path), most_words=3, **how)


def test_a_study_is_the_same_for_a_copy_of_its_data_and_another_for_other_data(tmp_path):
    file = tmp_path / "facts.jsonl"
    file.write_text("one\n")
    first = digest_of(["said"], [file])
    file.unlink()
    file.write_text("one\n")
    os.utime(file, (0, 0))
    assert digest_of(["said"], [file]) == first
    file.write_text("two\n")
    os.utime(file, (0, 0))
    assert digest_of(["said"], [file]) != first


def test_of_weights_a_study_looks_at_size_and_time(tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_text("one")
    monkeypatch.setattr(setting, "_READ_BYTES", 2)
    first = digest_of([], [weights])
    os.utime(weights / "model.safetensors", (0, 0))
    assert digest_of([], [weights]) != first


def test_data_is_called_by_its_bound():
    bounded = DataSetting.model_validate({"data": "own.jsonl", "most_words": 60})
    assert bounded.name == "own, up to 60 words"
    with pytest.raises(ValidationError, match="most_words belong to data"):
        DataSetting.model_validate({"relations": ["capital"], "most_words": 60})


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
