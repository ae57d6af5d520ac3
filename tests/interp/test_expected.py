"""What is expected of answers to each type of conflict, judged by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl
import pytest

from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.expected import (
    DIRECT,
    NEWEST,
    RELIABLE,
    SIDES,
    TOGETHER,
    as_expected,
    expected_behaviour,
    expected_rates,
    with_expected,
)
from interp.formats import load_dataset

FIXTURE = Path(__file__).parent / "fixtures" / "formats" / "conflicts.jsonl"


@pytest.mark.parametrize(
    ("template", "behaviour"),
    [
        ("conflicts-no-conflict", DIRECT),
        ("conflicts-complementary-information", TOGETHER),
        ("conflicts-conflicting-opinions-and-research-outcomes", SIDES),
        ("conflicts-conflicting-opinions-or-research-outcomes", SIDES),
        ("conflicts-conflict-due-to-outdated-information", NEWEST),
        ("conflicts-conflict-due-to-misinformation", RELIABLE),
        ("conflicts", None),
        ("nq-swap", None),
        ("conflictbank-misinformation", None),
    ],
)
def test_each_type_has_its_behaviour_and_other_templates_none(template: str, behaviour: str | None) -> None:
    assert expected_behaviour(template) == behaviour


@pytest.mark.parametrize(
    ("behaviour", "answer", "correct", "others", "verdict"),
    [
        (DIRECT, "Ida Fenn designed it.", ["Ida Fenn"], [], True),
        (DIRECT, "Otto Brandt.", ["Ida Fenn"], [], False),
        (DIRECT, "It is unclear, perhaps Ida Fenn.", ["Ida Fenn"], [], False),
        (DIRECT, "Otto Brandt.", [], [], None),
        (DIRECT, "I don't know.", [], [], False),
        (NEWEST, "Seven, since 2023.", ["Seven"], ["Six"], True),
        (NEWEST, "Six.", ["Seven"], ["Six"], False),
        (NEWEST, "Seven now; it had six before.", ["Seven"], ["Six"], None),
        (NEWEST, "It is unclear, perhaps seven.", ["Seven"], [], None),
        (NEWEST, "Not mentioned.", ["Seven"], [], False),
        (NEWEST, "New York.", ["New York"], ["York"], True),
        (NEWEST, "New York.", ["York"], ["New York"], False),
        (RELIABLE, "Seven.", ["Seven"], [], True),
        (RELIABLE, "Eight.", ["Seven"], [], False),
        (RELIABLE, "Eight.", [], [], None),
        (TOGETHER, "Tea, and also coffee.", [], [], None),
        (TOGETHER, "Tea.", ["Coffee"], [], None),
        (TOGETHER, "There is no information.", [], [], False),
        (SIDES, "Some say tea, others coffee.", [], [], None),
        (SIDES, "Yes.", [], [], False),
        (SIDES, "No, coffee is better.", [], [], None),
        (SIDES, "I cannot say.", [], [], False),
        (SIDES, "...", [], [], False),
        (DIRECT, "", ["Ida Fenn"], [], False),
    ],
)
def test_an_answer_is_judged_as_far_as_its_text_tells(
    behaviour: str, answer: str, correct: list[str], others: list[str], verdict: bool | None
) -> None:
    assert as_expected(behaviour, answer, correct, others) is verdict


def report_of(conflicts: ConflictSet, answers: dict[str, str]) -> pl.DataFrame:
    rows = [{"id": e.id, "subject": e.subject, "template": e.template, "answer": answers[e.kind]} for e in conflicts]
    return pl.DataFrame(rows)


def test_reports_say_what_was_expected_of_prompts_of_the_data_and_of_no_others() -> None:
    conflicts = load_dataset(FIXTURE, "conflicts").conflicts
    rows = with_expected(
        report_of(conflicts, {"conflict": "Seven bridges.", "aligned": "Ida Fenn.", "none": "Ida Fenn."}), conflicts
    )
    found = {row["template"]: (row["expected"], row["as_expected"]) for row in rows.to_dicts()}
    assert found == {
        "conflicts-conflict-due-to-outdated-information": (NEWEST, True),
        "conflicts-conflicting-opinions-and-research-outcomes": (SIDES, None),
        "conflicts-no-conflict": (DIRECT, True),
        "conflicts": (None, None),
    }


def test_memory_answers_are_those_of_another_document_unless_the_context_agrees() -> None:
    conflicts = load_dataset(FIXTURE, "conflicts").conflicts
    some = tuple(
        dataclasses.replace(e, memory_answers=("six",)) if e.context_answers == ("Seven",) else e for e in conflicts
    )
    told = report_of(conflicts, {"conflict": "Seven, not six.", "aligned": "Ida Fenn.", "none": ""})
    rows = with_expected(told, ConflictSet("some", some)).drop_nulls("expected")
    assert rows["as_expected"].to_list() == [None, None, True]


def test_rates_are_shares_of_all_prompts_of_a_type() -> None:
    told = [True, True, False, None, False, None]
    rows = pl.DataFrame(
        {
            "subject": [f"s{i}" for i in range(7)],
            "template": ["a"] * 4 + ["b"] * 2 + ["c"],
            "expected": [NEWEST] * 4 + [SIDES] * 2 + [None],
            "as_expected": [*told, None],
        }
    )
    newest, sides = expected_rates(rows).to_dicts()
    assert (newest["as_expected"], newest["against"], newest["untold"], newest["n"]) == (0.5, 0.25, 0.25, 4)
    assert newest["low"] < 0.5 < newest["high"]
    assert (sides["as_expected"], sides["low"], sides["against"], sides["untold"]) == (None, None, 0.5, 0.5)


def test_data_without_types_has_no_rates_and_other_prompts_are_told() -> None:
    conflicts = load_dataset(FIXTURE.parent / "popqa.tsv", "popqa").conflicts
    rows = with_expected(report_of(conflicts, {"none": "painter"}), conflicts)
    assert expected_rates(rows).is_empty()
    with pytest.raises(UserError, match="is not in none; give the prompts that were answered"):
        with_expected(rows, ConflictSet("none", ()))
