"""Comparing ways to find heads."""

import json

from conflictscope.report import read_runs
from interp.errors import UserError
from tests.conflictscope import small_studies
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run, tiny, data, small = test_cli.run, test_cli.tiny, test_cli.data, small_studies.small
QUICK = ("--quick", "--relation", "capital", "--relation", "language")


def test_ways_are_compared_by_agreement_and_by_what_pruning_does(run, small, tmp_path, tiny):
    ways = ("--way", "direct-logits", "--way", "retrieval", "--way", "path-patching")
    code, output, _ = run("locate", "--model", tiny, *QUICK, *ways, "--out", "out")
    assert code == 0
    assert "rank correlation" in output
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert list(record["details"]["agreement"]) == ["path-patching", "direct-logits", "retrieval"]
    methods = {"pruning_by_path_patching", "pruning_by_direct_logits", "pruning_by_retrieval"}
    assert methods <= {condition["method"] for condition in record["conditions"]}
    assert any(condition["control_of"] for condition in record["conditions"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "How far ways to find heads agree" in page
    assert read_runs([tmp_path / "out"])[0].record.kind == "locate"


def test_a_way_that_cannot_score_is_said_and_the_others_go_on(run, small, tmp_path, tiny, monkeypatch):
    def refused(*_, **__):
        raise UserError("no")

    monkeypatch.setattr("interp.attribution.ways.retrieval_scores", refused)
    ways = ("--way", "direct-logits", "--way", "retrieval")
    code, _, error = run("locate", "--model", tiny, *QUICK, *ways, "--out", "out")
    assert code == 0
    assert "retrieval cannot score heads here" in error
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert record["not_run"] == {"pruning_by_retrieval": "no"}
    assert list(record["details"]["agreement"]) == ["direct-logits"]


def test_an_unknown_way_is_refused_in_a_sentence(run, tiny):
    assert_one_sentence(run("locate", "--model", tiny, "--way", "guessing"), "'guessing'", "choose among path-patching")
