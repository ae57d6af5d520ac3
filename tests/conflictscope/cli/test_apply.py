"""The commands that answer prompts with and without an edit, and that export a setting of a dial."""

import json

import pytest
import torch

from interp.generation import continue_greedily
from interp.inputs import encode
from interp.models import load_model
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialPoint, DialScale, TrustDial
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run = test_cli.run


@pytest.fixture
def dial_file(tiny_llama, tmp_path):
    """A dial that turns the first layer around towards memory, with a curve to ask."""
    curve = (DialPoint(-1.0, 0.8, 0.1), DialPoint(0.0, 0.4, 0.4), DialPoint(1.0, 0.1, 0.9))
    dial = TrustDial(tuple(DialScale(0, head, -20.0, 5.0) for head in range(4)), calibration=curve)
    path = tmp_path / "dial.json"
    InterventionFile.of([dial], name="dial", model=ModelIdentity.of(tiny_llama, "tiny")).save(path)
    (tmp_path / "prompts.txt").write_text("The capital of Peru is\nThe capital of Italy is\n")
    return path


def answered(run, tiny_directories, *options):
    command = ["dial", "apply", "dial.json", "prompts.txt", "--model", tiny_directories["llama"]]
    code, printed, error = run(*command, *options)
    assert code == 0, error
    return [json.loads(line) for line in printed.splitlines()]


def test_prompts_are_answered_at_the_wanted_setting(dial_file, run, tiny_directories):
    lines = answered(run, tiny_directories, "--trust", "-1")
    assert [set(line) for line in lines] == [{"id", "unedited", "edited"}] * 2
    assert any(line["unedited"] != line["edited"] for line in lines)
    lines = answered(run, tiny_directories, "--trust", "0")
    assert [line["edited"] for line in lines] == [line["unedited"] for line in lines]


@pytest.mark.parametrize(("options", "trust"), [(("--context-rate", "0.65"), 0.5), (("--memory-rate", "0.6"), -0.5)])
def test_asking_for_a_rate_sets_the_dial(dial_file, run, tiny_directories, tmp_path, options, trust):
    lines = answered(run, tiny_directories, *options, "--save", "dial.json")
    assert len(lines) == 2
    assert InterventionFile.load(dial_file).dial.trust == pytest.approx(trust)
    again = answered(run, tiny_directories)
    assert again == lines


def test_a_setting_is_exported_as_a_file_or_as_a_checkpoint(dial_file, run, tiny_directories, tiny_llama, tmp_path):
    model = str(tiny_directories["llama"])
    assert run("export", model, "dial.json", "half.json", "--trust", "-0.5")[0] == 0
    assert InterventionFile.load(tmp_path / "half.json").dial.trust == -0.5
    assert run("export", model, "half.json", "folded", "--bake")[0] == 0
    folded = load_model(str(tmp_path / "folded"), device="cpu")
    inputs = encode(tiny_llama, ["The capital of Peru is"])
    with torch.inference_mode(), applied(tiny_llama, InterventionFile.load(dial_file).dial.at(-0.5)):
        expected = tiny_llama.original_model(**inputs).logits
    with torch.inference_mode():
        torch.testing.assert_close(folded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert_one_sentence(run("export", model, "half.json", "folded", "--bake"), "folded")
    assert_one_sentence(run("export", model, "dial.json", "unchanged", "--bake"), "changes nothing as it stands")
    assert_one_sentence(
        run("export", str(tiny_directories["gpt2"]), "dial.json", "other.json"), "load the model it was made for"
    )


def test_wrong_settings_are_one_sentence(dial_file, run, tiny_directories):
    command = ["dial", "apply", "dial.json", "prompts.txt", "--model", tiny_directories["llama"]]
    assert_one_sentence(run(*command), "is at 0, which changes nothing")
    assert_one_sentence(run(*command, "--trust", "0.5", "--memory-rate", "0.5"), "Give one of --trust")
    assert_one_sentence(run(*command, "--trust", "1.5"), "between -1")
    assert_one_sentence(run(*command, "--context-rate", "0.95"), "at most; ask for no more")
    fit = ["dial", "fit", "--model", tiny_directories["llama"]]
    assert_one_sentence(run(*fit, "--relation", "colour"), "'colour' is not known")
    assert_one_sentence(run(*fit, "--budget", "0"), "above 0")
    alone = run(*fit, "--relation", "capital", "--leave-one-out")
    assert_one_sentence(alone, "needs two relations at least")
    missing = run(*fit, "--counterfact", "nowhere.json")
    assert_one_sentence(missing, "nowhere.json")


@pytest.mark.parametrize("group", ["steer", "spare"])
def test_apply_answers_prompts_without_and_with_the_edit(group, run, tiny_directories, tiny_llama, tmp_path):
    edit = Steering(1, torch.linspace(-1, 1, 32), 4.0)
    file = InterventionFile.of(
        [edit], name="edit", model=ModelIdentity.of(tiny_llama, "tiny"), measured={"test": {"rate": 0.5}}
    )
    file.save(tmp_path / "edit.json")
    prompts = ["The capital of Peru is", "The capital of Italy is"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    model = ("--model", tiny_directories["llama"])
    code, printed, _ = run(group, "apply", "edit.json", "prompts.txt", *model)
    assert code == 0
    with applied(tiny_llama, edit):
        expected = continue_greedily(tiny_llama, prompts).answers
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["edited"] for line in lines] == expected
    assert [line["unedited"] for line in lines] == continue_greedily(tiny_llama, prompts).answers
    off = ("--strength", "0", "--save", "off.json")
    _, printed, _ = run(group, "apply", "edit.json", "prompts.txt", *off, *model)
    assert all(line["edited"] == line["unedited"] for line in map(json.loads, printed.splitlines()))
    saved = InterventionFile.load(tmp_path / "off.json")
    assert saved.build()[0].settled() == ()
    assert not saved.measured


def test_a_file_that_is_not_there_is_one_sentence(run):
    assert_one_sentence(run("spare", "apply", "nowhere.json"), "There is no nowhere.json")
