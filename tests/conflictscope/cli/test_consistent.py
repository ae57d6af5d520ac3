"""One question in many words, on the command line."""

import polars as pl
import pytest

from interp import facts
from interp.consistency import closed_book
from interp.facts import usable_facts
from tests.conflictscope.cli.test_cli import assert_one_sentence, run

run = run


@pytest.fixture
def few(monkeypatch):
    some = usable_facts("capital")[:4]
    monkeypatch.setattr(facts, "usable_facts", lambda _: some)
    return some


def test_all_facts_of_a_relation_are_asked_in_every_wording(run, few, tiny_directories):
    model = ("--model", tiny_directories["llama"], "--max-new-tokens", 3)
    code, out, error = run("consistency", *model, "--samples", 2)
    assert code == 0
    assert all(measure in out for measure in ("unanimous", "consistency", "agreement", "semantic_entropy", "right"))
    assert "Answers to 4 questions in 28 wordings are in out/consistency.parquet" in error
    frame = pl.read_parquet("out/consistency.parquet")
    assert frame["subject"].to_list() == [fact.subject for fact in few]
    code, out, _ = run("consistency", *model, "--relation", "capital", "--by", "split,right", "--out", "again.parquet")
    assert code == 0
    assert "split" in out
    again = pl.read_parquet("again.parquet")
    assert again["answers"].to_list() == frame["answers"].to_list()
    assert "semantic_entropy" not in again.columns


def test_a_file_is_asked_as_it_is(run, few, tiny_directories):
    closed_book({"capital": few[:2]}).save("two.jsonl")
    code, _, error = run("consistency", "--model", tiny_directories["llama"], "--data", "two.jsonl")
    assert code == 0
    assert "Answers to 2 questions in 14 wordings" in error


def test_wrong_wishes_are_told(run):
    assert_one_sentence(run("consistency", "--by", "kind"), "cannot break down by 'kind'; choose among relation")
    assert_one_sentence(run("consistency", "--samples", 1), "two answers or more")
    assert_one_sentence(run("consistency", "--temperature", 1), "give --samples 10")
    assert_one_sentence(run("consistency", "--relation", "capitol"), "'capitol' is not known")
