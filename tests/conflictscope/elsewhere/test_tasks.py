"""Tasks for lm-evaluation-harness: what their files say, read with nothing of ours."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import yaml

from conflictscope.elsewhere.tasks import write_tasks
from interp.conflicts import ConflictSet
from interp.errors import UserError

KINDS = {"closed_book": "none", "aligned": "aligned", "irrelevant": "irrelevant", "conflict": "conflict"}


@pytest.fixture
def folder(tmp_path, capital_conflicts):
    write_tasks(tmp_path / "tasks", capital_conflicts)
    return tmp_path / "tasks"


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"conflictscope_{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", KINDS)
def test_the_right_answer_is_that_of_the_data_and_no_other_choice_is(folder, capital_conflicts, name):
    examples = {example.id: example for example in capital_conflicts.select(kind=KINDS[name])}
    asked = rows(folder, name)
    assert asked
    assert {row["id"] for row in asked} <= examples.keys()
    for row in asked:
        example = examples[row["id"]]
        right = example.context_answers if name == "conflict" else example.memory_answers
        choices = [choice.strip() for choice in row["choices"]]
        assert row["prompt"] == example.prompt
        assert choices[row["right"]] == right[0]
        assert set(choices) & set(right) == {right[0]}
        assert len(set(choices)) == len(choices) > 1
        if name == "conflict":
            assert example.memory_answers[0] in choices


def test_the_right_answer_stands_anywhere(folder):
    places = Counter(row["right"] for row in rows(folder, "conflict"))
    assert len(places) > 1


def test_files_name_each_other(folder):
    group = yaml.safe_load((folder / "conflictscope.yaml").read_text())
    assert group["task"] == [*(f"conflictscope_{name}" for name in KINDS), "conflictscope_text"]
    for name in group["task"]:
        task = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert task["task"] == name
        assert task["dataset_kwargs"]["data_files"]["test"] == str(folder.resolve() / f"{name}.jsonl")


def test_a_seed_gives_the_same_files(folder, capital_conflicts, tmp_path):
    write_tasks(tmp_path / "again", capital_conflicts)
    write_tasks(tmp_path / "other", capital_conflicts, seed=1)
    assert rows(tmp_path / "again", "conflict") == rows(folder, "conflict")
    assert rows(tmp_path / "other", "conflict") != rows(folder, "conflict")


def test_a_choice_follows_its_prompt_as_text_does(capital_conflicts, tmp_path):
    examples = list(capital_conflicts)
    examples[0] = replace(examples[0], prompt=f"{examples[0].prompt}\n")
    write_tasks(tmp_path / "tasks", ConflictSet("set", tuple(examples)))
    by_id = {row["id"]: row for name in KINDS for row in rows(tmp_path / "tasks", name)}
    for example in examples:
        if example.id in by_id:
            spaced = [choice.startswith(" ") for choice in by_id[example.id]["choices"]]
            assert spaced == [not example.prompt.endswith("\n")] * len(spaced)


def test_data_without_answers_to_choose_from_is_refused(capital_conflicts, tmp_path):
    alone = capital_conflicts.select(kind="none").examples[0]
    with pytest.raises(UserError, match="give data with more questions"):
        write_tasks(tmp_path / "tasks", ConflictSet("one", (alone,)))
    assert not (tmp_path / "tasks").exists()
