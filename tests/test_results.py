"""Tables of results in pages: what stands there is what the record says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from conflictscope.study.leaderboard import speed
from conflictscope.study.record import UNEDITED, Measured, StudyRecord
from docs.results import Wanted, filled, main, tables, write_results
from interp.errors import UserError
from interp.files import write_json


def estimate(value: float, low: float, high: float, n: int = 68) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


def measured(name: str, rate: float, gain: float | None, **about: Any) -> Measured:
    """Of 68 conflict prompts; with an edit, half of what is known closed-book is lost."""
    test: dict[str, Any] = {
        "context_rate": estimate(rate, rate - 0.1, rate + 0.1),
        "neutral_kl": estimate(0.0125, 0.01, 0.015, 40),
        "closed_book_accuracy": estimate(0.9, 0.8, 1.0, 34),
        "by_template": {
            "plain": {"context_rate": estimate(rate + 0.05, rate, 1.0, 34)},
            "letter": {"context_rate": estimate(rate - 0.05, 0.0, rate, 34)},
        },
    }
    if gain is not None:
        test["change"] = {
            "context_rate": estimate(gain, gain - 0.2, gain + 0.2),
            "closed_book_accuracy": estimate(-0.5, -0.75, -0.25, 34),
            "aligned_accuracy": estimate(0.0, -0.1, 0.1, 34),
        }
    return Measured(name, name.split(",")[0].replace(" ", "_"), test, **about)


@pytest.fixture
def record() -> StudyRecord:
    """Two methods chosen at their best, one of them within the budget too; one control; one that cannot run."""
    pruning = measured(
        "greedy pruning, towards context",
        0.75,
        0.35,
        towards="context",
        choices=("best", "within_budget"),
        heads=((3, 1, 0.0), (2, 4, 0.0)),
        moved=2,
        cost={"speed": 0.985, "low": 0.95, "high": 1.0},
    )
    random = measured("random heads", 0.45, 0.05, towards="context", control_of=pruning.name, does="2 heads")
    caa = measured("caa, towards context", 0.85, 0.45, towards="context", choices=("best",), does="layer 3 | x 2")
    return StudyRecord(
        kind="compare",
        command="conflictscope compare --seed 7",
        model={"name": "tiny"},
        data={},
        settings={"winners": {"context": pruning.name, "memory": None}, "versions": {"conflictscope": "0.9.0"}},
        conditions=(measured(UNEDITED, 0.4, None), pruning, random, caa),
        not_run={"spare": "There is no autoencoder."},
    )


def test_a_speed_is_told_where_the_rounds_agree_to_a_tenth():
    assert speed({"speed": 0.98, "low": 0.95, "high": 1.0}) == "0.98"
    assert speed({"speed": 0.98, "low": 0.85, "high": 1.0}) == "unclear"
    assert speed(None) == "n/a"


def test_a_row_a_method_with_gain_damage_cost_control_and_n(record):
    assert tables(record, Wanted(["context", "memory"], ["best"])).splitlines() == [
        "| tiny towards context, at its best | context rate | gain | gain at random | closed-book loss | aligned loss "
        "| irrelevant loss | KL on text | speed | n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| unedited | 0.40 [0.30, 0.50] |  |  | of 0.90 [0.80, 1.00] |  |  | 0.013 [0.010, 0.015] | 1 | 68 |",
        r"| caa: layer 3 \| x 2 | 0.85 [0.75, 0.95] | 0.45 [0.25, 0.65] | not drawn | 0.50 [0.25, 0.75] "
        "| 0.00 [-0.10, 0.10] | n/a | 0.013 [0.010, 0.015] | n/a | 68 |",
        "| **greedy pruning: 2 heads pruned** | 0.75 [0.65, 0.85] | 0.35 [0.15, 0.55] | 0.05 [-0.15, 0.25] "
        "| 0.50 [0.25, 0.75] | 0.00 [-0.10, 0.10] | n/a | 0.013 [0.010, 0.015] | 0.98 | 68 |",
        "",
        "spare was not measured: There is no autoencoder.",
        "",
        "Made by `conflictscope compare --seed 7`, conflictscope 0.9.0.",
    ]


def test_ways_to_find_heads_begin_with_how_far_they_agree(record):
    agreement = {"exact": {"exact": 0.9, "estimate": -0.004}, "estimate": {"exact": -0.004}}
    located = replace(record, details={"agreement": agreement})
    first, *_ = tables(located, Wanted(["context"], ["best"])).split("\n\n")
    assert first.splitlines() == [
        "| rank correlation | exact | estimate |",
        "| --- | --- | --- |",
        "| exact | 0.90 | 0.00 |",
        "| estimate | 0.00 |  |",
    ]
    assert "rank correlation" not in tables(located, Wanted(["context"], ["best"], first=3))


def test_only_what_stands_between_marks_is_written_and_twice_is_as_once(record):
    after = "<!-- end of results -->\n\n<!-- results of other -->\nkept\n<!-- end of results -->\nAfter.\n"
    page = f"Before.\n\n<!-- results of mine, towards context, within budget -->\nold\n{after}"
    once, found = filled(page, {"mine": record})
    assert found == {"mine"}
    assert "within the budget" in once
    assert "at its best" not in once
    assert "old" not in once
    assert once.startswith("Before.\n\n<!-- results of mine")
    assert once.endswith(after)
    assert filled(once, {"mine": record}) == (once, {"mine"})


def test_a_mark_may_ask_for_the_methods_with_the_highest_rates_alone(record):
    page = "<!-- results of mine, towards context, best, first 1 -->\n<!-- end of results -->"
    nobody = replace(record, settings={**record.settings, "winners": {"context": None, "memory": None}})
    shown, _ = filled(page, {"mine": nobody})
    assert "tiny towards context, at its best, 1 of 2 methods" in shown
    assert "| unedited |" in shown
    assert "caa" in shown
    assert "greedy pruning" not in shown
    assert "spare was not measured" not in shown
    # What dev prefers stays, wherever it stands.
    assert "**greedy pruning" in filled(page, {"mine": record})[0]


def test_a_mark_may_ask_for_each_phrasings_rates(record):
    page = "<!-- results of mine, towards context, within budget, by phrasing -->\n<!-- end of results -->"
    lines = filled(page, {"mine": record})[0].splitlines()
    start = lines.index("| context rate by phrasing, within the budget | plain | letter |")
    assert lines[start + 2 : start + 4] == [
        "| unedited | 0.45 [0.40, 1.00] | 0.35 [0.00, 0.40] |",
        "| **greedy pruning: 2 heads pruned** | 0.80 [0.75, 1.00] | 0.70 [0.00, 0.75] |",
    ]


def test_a_mark_may_compare_a_method_with_the_others_prompt_by_prompt(record, tmp_path: Path):
    """Of eight conflicts, one a subject, caa has six from the context and pruning four; caa loses a fact of two."""

    def rows(condition, usages, right):
        return [
            {"condition": condition, "id": f"{kind}/{n}", "subject": f"{n}", "kind": kind, "usage": usage, "hit": hit}
            for kind, told in (
                ("conflict", [(usage, 0.0) for usage in usages]),
                ("none", [("memory", r) for r in right]),
            )
            for n, (usage, hit) in enumerate(told)
        ]

    answers = [
        *rows("caa, towards context", ["context"] * 6 + ["memory"] * 2, [1.0, 0.0]),
        *rows("greedy pruning, towards context", ["context"] * 4 + ["memory"] * 4, [1.0, 1.0]),
    ]
    pl.DataFrame(answers).rename({"hit": "memory_span_match"}).write_parquet(tmp_path / "examples.parquet")
    page = "<!-- results of mine, towards context, best, {} against others -->\n<!-- end of results -->"
    with pytest.raises(UserError, match="asks for caa against others"):
        filled(page.format("caa").replace("best", "within budget"), {"mine": record}, {"mine": tmp_path})
    lines = filled(page.format("caa"), {"mine": record}, {"mine": tmp_path})[0].splitlines()
    (line,) = (line for line in lines if line.startswith("| less "))
    assert re.sub(r" \[[^]]*\]", "", line) == "| less greedy pruning | 0.25 | -0.50 | n/a | n/a |"


def test_a_mark_without_an_end_takes_nothing_of_the_next(record):
    page = "<!-- results of mine -->\ntext\n<!-- results of mine -->\nold\n<!-- end of results -->\n"
    assert filled(page, {"mine": record})[0].startswith("<!-- results of mine -->\ntext\n<!-- results of mine -->\n\n|")


def test_a_mark_that_asks_for_what_there_is_not_is_an_error(record):
    with pytest.raises(UserError, match="'towards both'"):
        filled("<!-- results of mine, towards both -->\n<!-- end of results -->", {"mine": record})


def test_of_many_studies_the_leaderboard_is_written_and_where_the_hours_went(tmp_path: Path):
    folder, page = tmp_path / "many", tmp_path / "page.md"
    folder.mkdir()
    (folder / "leaderboard.md").write_text("| rank |\n| --- |\n| 1 |\n")
    spent = [{"step": "choose", "what": "learned_scales", "units": 2, "hours": 1.5}]
    write_json(folder / "hours.json", [*spent, {"step": "test", "what": "", "units": 40, "hours": 0.25}])
    page.write_text("<!-- results of many -->\n<!-- end of results -->\n")
    assert [*write_results([folder], [page])] == [(page, {"many"})]
    assert "| 1 |\n\n1.8 hours of work" in page.read_text()
    assert "choose learned scales 1.50 (2); test 0.25 (40)." in page.read_text()


def test_the_command_writes_pages_and_says_what_it_could_not_place(record, tmp_path: Path):
    page, folder = tmp_path / "page.md", tmp_path / "mine"
    page.write_text("<!-- results of mine -->\n<!-- end of results -->\n")
    record.save(folder)
    record.save(tmp_path / "other")
    assert [*write_results([folder], [page])] == [(page, {"mine"})]
    assert "greedy pruning" in page.read_text()
    with pytest.raises(UserError, match="No page has a mark for other"):
        list(write_results([folder, tmp_path / "other"], [page]))
    with pytest.raises(UserError, match="same name"):
        list(write_results([folder, folder], [page]))
    app = typer.Typer()
    app.command()(main)
    ran = CliRunner().invoke(app, [str(tmp_path / "nothing"), "--page", str(page)])
    assert ran.exit_code == 2


def test_of_detectors_the_tables_are_written_under_smaller_headings(tmp_path: Path):
    (folder := tmp_path / "detectors").mkdir()
    (folder / "detectors.md").write_text("# Of a model\n\n## AUROC\n\n| a |\n| --- |\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("<!-- results of detectors -->\n<!-- end of results -->\n", encoding="utf-8")
    assert dict(write_results([folder], [page])) == {page: {"detectors"}}
    written = page.read_text(encoding="utf-8")
    assert "### AUROC\n\n| a |\n| --- |" in written
    assert "Of a model" not in written
