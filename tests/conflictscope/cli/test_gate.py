"""``gate`` on a tiny model that is taken to know all it is asked."""

from conflictscope.study.record import StudyRecord
from interp.families import UNSEEN_FAMILIES
from interventions.config import InterventionFile
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from tests.conflictscope import small_studies
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run, small = test_cli.run, small_studies.small
OPTIONS = ("--relation", "capital", "--relation", "language", "--keep", 0.8, "--subjects", 6, "--out", "gate")


def file_of(model, edit):
    return InterventionFile.of([edit], name="edit", towards="context", model=ModelIdentity.of(model, "tiny"))


def test_the_gated_file_and_the_record_are_written(small, run, tiny_directories, tiny_llama, tmp_path):
    edit = HeadScaling.of([(2, 1), (2, 3)], -3.0)
    file_of(tiny_llama, edit).save(tmp_path / "edit.json")
    code, _, error = run("gate", "fit", "edit.json", "--model", tiny_directories["llama"], *OPTIONS)
    assert code == 0, error
    gated, record = InterventionFile.load(tmp_path / "gate/gated.json"), StudyRecord.load(tmp_path / "gate")
    (gate,) = gated.build()
    assert isinstance(gate, ConflictGate)
    assert (gate.edits, gated.towards, gated.name) == ((edit,), "context", "edit, gated")
    assert [row.method for row in record.conditions] == ["unedited", "given", "gate", "random_gate"]
    assert record.details["gate"]["towards_context"]["threshold"] == gate.threshold
    assert gated.measured["test"] == record.conditions[2].test
    assert "it opens for conflict" in error
    assert gate.part in (tmp_path / "gate/report.html").read_text(encoding="utf-8")


def test_an_edit_that_cannot_be_gated_is_refused_in_a_sentence(small, run, tiny_directories, tiny_llama, tmp_path):
    file_of(tiny_llama, HeadScaling.of([(0, 1)], 0.0)).save(tmp_path / "edit.json")
    assert_one_sentence(
        run("gate", "fit", "edit.json", "--model", tiny_directories["llama"], *OPTIONS), "Layer 0 is edited"
    )


def test_a_dial_is_learned_behind_a_gate_in_families_and_tested_in_others(small, run, tiny_directories, tmp_path):
    options = (*OPTIONS[:-2], "--families", 1, "--budget", 1, "--context-budget", 1, "--out", "dial")
    code, _, error = run("gate", "dial", "--model", tiny_directories["llama"], *options)
    assert code == 0, error
    assert "Towards memory the gate keeps, of what the scales do without it: gain" in error
    file, record = InterventionFile.load(tmp_path / "dial/gated_dial.json"), StudyRecord.load(tmp_path / "dial")
    (gate,) = file.build()
    assert isinstance(gate, ConflictGate)
    assert min(gate.turned(1.0).edited_layers) > gate.layer
    assert set(file.measured) == {"unedited", "trust -1", "trust +1"}
    assert [row["trust"] for row in record.lines["trust"]] == sorted(row["trust"] for row in record.lines["trust"])
    asked = record.data["phrasings"]
    assert set(asked["tested"]) == {family.name for family in UNSEEN_FAMILIES if not family.is_chat}
    assert not set(asked["tested"]) & set(asked["learned"])


def test_families_with_a_form_are_one_sentence(run):
    assert_one_sentence(run("gate", "dial", "--families", 2, "--format", "chat"), "leave out --data, --format")
