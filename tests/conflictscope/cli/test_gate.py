"""``gate fit`` on a tiny model that is taken to know all it is asked."""

from conflictscope.study.record import StudyRecord
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
