"""The commands ``steer fit`` and ``spare fit``."""

import pytest

from conflictscope.study.record import StudyRecord
from tests.conflictscope import small_studies
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run, small = test_cli.run, small_studies.small


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["steer", "fit", "--method", "prayer"], "no steering by 'prayer'; choose among actadd"),
        (["spare", "fit", "--sae", "nowhere"], "There are no SAEs in nowhere"),
        (["spare", "fit", "--layers", "3"], "smollm2-135m has no SAE of layer 3; it has 12"),
        (["spare", "fit", "--relation", "capitol"], "'capitol' is not known"),
        (["spare", "fit", "--relation", "capital", "--data", __file__], "Give --data or --relation, not both"),
        (["spare", "fit", "--share", "1.5"], "--share is a share of the information, between 0 and 1, not 1.5"),
        (["spare", "fit", "--alpha", "nan"], "--alpha is a finite number, not nan"),
    ],
)
def test_a_wrong_input_is_one_sentence(run, command, message):
    assert_one_sentence(run(*command), message)


def test_steer_fit_measures_what_can_run_and_says_why_the_rest_cannot(run, small, tiny_directories, tmp_path):
    """A random model follows no source; the contrast of answers needs none to be followed."""
    arguments = ("--model", tiny_directories["llama"], "--subjects", "5", "--quick", "--out", "s")
    assert_one_sentence(run("steer", "fit", *arguments, "--method", "actadd"), "both sources are needed")
    assert not (tmp_path / "s" / "study.json").exists()
    code, _, error = run("steer", "fit", *arguments, "--method", "task_vector", "--method", "caa")
    assert code == 0
    assert "task vector was not run" in error
    record = StudyRecord.load(tmp_path / "s")
    assert record.kind == "steer"
    assert record.methods == ["caa"]
    assert "task vector" in (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert "both sources are needed" in record.not_run["task_vector"]
    assert {(c.method, c.towards, c.draws) for c in record.conditions if c.is_control} == {
        ("random_direction", towards, 1) for towards in ("context", "memory")
    }
    assert {path.name for path in (tmp_path / "s" / "interventions").glob("caa-*.json")} >= {
        "caa-towards_context.json",
        "caa-towards_memory.json",
    }


def test_spare_of_another_model_is_refused(run, small, tiny_directories):
    arguments = ("--model", tiny_directories["llama"], "--subjects", "5", "--quick")
    assert_one_sentence(run("spare", "fit", *arguments), "give an SAE of this model")
