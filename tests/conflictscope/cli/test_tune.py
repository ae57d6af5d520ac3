"""``tune`` from a table to its sentences, on a tiny model."""

import csv

import pytest

from conflictscope.study.record import StudyRecord
from tests.conflictscope import small_studies
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run, small = test_cli.run, small_studies.small
ASKED = ("--towards", "context", "--shots", 0, "--unknown-too", "--quick", "--out", "there")


@pytest.fixture
def table(tmp_path):
    """Sixty rows about towns; Sofia is what the tiny model says to most of them."""
    with (tmp_path / "mine.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("Frage", "context", "answer", "memory"))
        writer.writerows((f"Where is town{n}?", f"town{n} is in Lima.", "Lima", "Sofia") for n in range(60))
    return tmp_path / "mine.csv"


def test_a_table_is_tuned_on_and_what_came_of_it_is_printed_first(small, run, table, tiny_directories, tmp_path):
    command = ("tune", tiny_directories["gpt2"], table, "--column", "question=Frage", *ASKED)
    code, printed, error = run(
        *command, "--budget", 1e6, "--context-budget", 1e6, "--method", "cad", "--allow", "decoding"
    )
    assert code == 0, error
    assert "question from 'Frage'" in error
    record = StudyRecord.load(tmp_path / "there")
    assert (record.kind, record.methods, record.data["name"]) == ("tune", ["cad"], "mine")
    about = record.details["tune"]
    assert printed.splitlines()[:3] == about["sentences"]
    assert about["recommended"] == (tmp_path / "there" / "edit.json").exists()
    assert about["allow"] == ["decoding"]
    assert (tmp_path / "there" / "report.html").stat().st_size > 1_000_000
    # Again: conflict data is there, and is tuned on as it is.
    (kept,) = (tmp_path / "there" / "records").glob("table-*/mine.jsonl")
    code, again, error = run("tune", tiny_directories["gpt2"], kept, *ASKED, "--method", "cad", "--minutes", 0)
    assert code == 0
    assert "question from" not in error
    assert again.startswith("Nothing was found")


def test_wrong_wishes_are_one_sentence(run, table, tiny_directories, tmp_path):
    def told(*arguments):
        return run("tune", tiny_directories["gpt2"], *arguments, "--towards", "context")

    assert_one_sentence(told(table, "--goal", "context > .9"), 'for example "context >= .9"')
    assert_one_sentence(told(table, "--allow", "lora,magic"), "no kind 'magic'; choose among lora, bake")
    assert_one_sentence(told(table, "--method", "magic"), "no method 'magic'")
    assert_one_sentence(told(table), "column question=NAME")
    assert_one_sentence(told("--column", "question=q"), "--column names columns of a table")
    assert_one_sentence(told(tmp_path / "none.csv"), "There is no")
    assert_one_sentence(told(table, "--goal", "memory >= .5"), "give --towards memory with it")
