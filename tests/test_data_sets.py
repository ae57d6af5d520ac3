"""The page of facts and public sets: what is drawn, what its rows say, and what of the page is written anew."""

import polars as pl
import pytest

from docs import data_sets
from interp.evaluation import UsageReport


def report(*usages: tuple[str, str, str]) -> UsageReport:
    rows = [
        {"id": str(n), "subject": str(n), "relation": "r", "template": template, "kind": kind, "usage": usage}
        for n, (kind, template, usage) in enumerate(usages)
    ]
    return UsageReport(
        pl.DataFrame(
            [{**row, "split": "test", "prompt": "", "answer": "x", "memory_span_match": False} for row in rows]
        )
    )


def test_a_row_a_kind_and_of_public_sets_a_row_a_template():
    found = report(("conflict", "set-one", "context"), ("conflict", "set-two", "memory"), ("none", "set", "other"))
    public = list(data_sets.rows("Set", "chat", found, has_memory=True))
    assert [(row[2], row[-1]) for row in public] == [("conflict: one", "1"), ("conflict: two", "1"), ("none", "1")]
    (conflict, _) = data_sets.rows("facts, some", "chat", found, has_memory=False)
    assert conflict[:4] == ["facts, some", "chat", "conflict", "not given"]
    assert conflict[4].startswith("0.500 [")
    assert conflict[-1] == "2"


def test_each_table_is_written_between_its_marks(tmp_path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / "page.md"
    marks = "Before.\n<!-- results of {0} -->\nold\n<!-- end of {0} -->\n"
    page.write_text(marks.format("data sets") + marks.format("heads") + "After.\n")
    monkeypatch.setattr(data_sets, "PAGE", page)
    data_sets._write([["a", "b"], ["1", "2"]], "heads", ["NQ-Swap"])
    assert page.read_text() == (
        marks.format("data sets") + "Before.\n<!-- results of heads -->\n\n| a | b |\n| 1 | 2 |\n\n"
        "Not measured, as their files were not there: NQ-Swap.\n\n<!-- end of heads -->\nAfter.\n"
    )
