"""The command that fits a dial, on a tiny model that is taken to know all that it is asked."""

import json

from conflictscope.methods.learned_scales import ENDS
from conflictscope.study.record import StudyRecord
from interp.conflicts import ConflictSet
from interventions.config import InterventionFile
from tests.conflictscope import small_studies
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run, small = test_cli.run, small_studies.small
SETTINGS = "--relation capital --relation language --subjects 5 --steps 3 --max-scales 3"
BUDGETS = "--budget 0.5 --context-budget 0.4 --seed 3"


def test_a_dial_is_fitted_and_tested_on_what_it_was_not_learned_from(small, run, tiny_directories, tmp_path):
    options = [*SETTINGS.split(), *BUDGETS.split(), "--leave-one-out", "--out", "there"]
    code, printed, error = run("dial", "fit", "--model", tiny_directories["llama"], *options)
    assert code == 0, error
    record = StudyRecord.load(tmp_path / "there")
    assert record.kind == "dial"
    assert (tmp_path / "there" / "report.html").stat().st_size > 1_000_000
    assert record.settings["budgets"] == {"none": 0.5, "neutral": 0.5, "aligned": 0.4, "irrelevant": 0.4}
    assert record.details["learned_scales"]["towards_context"]["training"]["max_scales"] == 3
    assert [point["trust"] for point in record.lines["trust"]] == [-1.0, 0.0, 1.0]
    assert set(record.details["dial"]) == {"towards_memory", "towards_context"}
    file = InterventionFile.load(tmp_path / "there" / "dial.json")
    for towards, trust in ENDS.items():
        (end,) = record.chosen(towards)
        assert file.dial.at(trust).head_scales == {(layer, head): scale for layer, head, scale in end.heads}
        assert file.measured[f"trust {trust:+g}"] == json.loads(json.dumps(end.test))
        (control,) = record.controls_of(end)
        assert control.draws == 2
    assert "towards context" in printed
    for left_out, other in (("capital", "language"), ("language", "capital")):
        below = tmp_path / "there" / f"without-{left_out}"
        part = StudyRecord.load(below)
        assert set(part.methods) == {"learned_scales", "dial"}
        learned = ConflictSet.load(below / "prompts" / "train.jsonl")
        assert {e.relation for e in learned if e.kind == "conflict"} == {other}
        assert {e.relation for e in ConflictSet.load(below / "prompts" / "test.jsonl")} == {left_out}
        for towards in ENDS:
            given = next(c for c in part.chosen(towards) if c.method == "dial")
            (end,) = record.chosen(towards)
            assert given.heads == end.heads


def test_wrong_settings_are_one_sentence(run, tiny_directories):
    fit = ["dial", "fit", "--model", tiny_directories["llama"]]
    assert_one_sentence(run(*fit, "--relation", "colour"), "'colour' is not known")
    assert_one_sentence(run(*fit, "--budget", "0"), "above 0")
    assert_one_sentence(run(*fit, "--relation", "capital", "--leave-one-out"), "needs two relations at least")
    assert_one_sentence(run(*fit, "--counterfact", "nowhere.json"), "nowhere.json")


def test_counterfact_is_tested_at_both_ends_of_the_dial(small, run, tiny_directories, tmp_path, monkeypatch):
    items = [
        {
            "base_prompt": f"The capital of {land} is",
            "template": "Redefine: {prompt}",
            "target_true": f" {true}",
            "target_new": f" {new}",
            "prompt": f"Redefine: The capital of {land} is {new}. The capital of {land} is",
            "subject": land,
        }
        for land, true, new in (
            (f"{first}{second}", true, new)
            for first in ("Bel", "Mor", "Tan", "Sil", "Kar", "Lun", "Ver", "Nor", "Gal", "Pom", "Dra", "Zel", "Hib")
            for second, true, new in (("ia", "Rome", "Paris"), ("land", "Oslo", "Lima"), ("stan", "Cairo", "Quito"))
        )
    ]
    (tmp_path / "cf.json").write_text(json.dumps(items))
    monkeypatch.setattr("conflictscope.study.data.known_part", lambda _, conflicts, **__: conflicts)
    options = [*SETTINGS.split(), *BUDGETS.split(), "--counterfact", "cf.json", "--out", "there"]
    code, _, error = run("dial", "fit", "--model", tiny_directories["llama"], *options)
    assert code == 0, error
    record = StudyRecord.load(tmp_path / "there" / "counterfact")
    assert record.methods == ["dial"]
    asked = ConflictSet.load(tmp_path / "there" / "counterfact" / "prompts" / "test.jsonl")
    assert {e.source for e in asked} == {"counterfact-competition"}
    (home,) = StudyRecord.load(tmp_path / "there").chosen("memory")
    (end,) = record.chosen("memory")
    assert end.heads == home.heads
