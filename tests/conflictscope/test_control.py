import dataclasses
import json

import numpy as np
import polars as pl
import pytest
import torch

from conflictscope import control as job
from conflictscope import demo_study as study
from conflictscope.control import METHODS, Control, fit_spare, fit_steering, results_table
from interp.activations import record
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import AnswerStarts, answer_starts, measure_usage, neutral_kl, neutral_texts
from interp.facts import HELD_OUT_PHRASING
from interp.sae import load_saes
from interventions.base import applied
from interventions.config import InterventionFile, effect_digest
from interventions.steering import Steering
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence
from tests.tiny import tiny_conflicts

run = test_cli.run


@pytest.fixture(scope="module", autouse=True)
def few_neutral_texts():
    with pytest.MonkeyPatch.context() as patch:
        few = neutral_texts()[:2]
        patch.setattr("interp.evaluation.neutral_texts", lambda: few)
        yield


@pytest.fixture(scope="module")
def conflicts(capital_conflicts):
    """Twelve capitals, with test prompts in two of the phrasings that a study has."""
    tested = {"question", HELD_OUT_PHRASING}
    kept = (e for e in capital_conflicts if e.split != "test" or e.template in tested & {*study.TEST_PHRASINGS[e.kind]})
    return ConflictSet("capitals", tuple(kept))


@pytest.fixture(scope="module")
def fitted(smollm2, conflicts, tmp_path_factory):
    """Every method on SmolLM2 and twelve capitals, with few candidates, by the functions that the commands call."""
    out = tmp_path_factory.mktemp("control")
    control = Control(smollm2, "smollm2-135m", relations=[], out=out, conflicts=conflicts)
    fit_steering(control, layers=(16, 18), strengths=(1.0, 4.0))
    saes = [sae for sae in load_saes("smollm2-135m") if sae.layer in (16, 18)]
    results = fit_spare(control, saes, shares=(0.1,), alphas=(2.0,))
    return control, results


def test_every_method_is_measured_in_both_directions_on_held_out_subjects_alone(fitted, conflicts):
    control, results = fitted
    assert set(results["methods"]) == set(METHODS)
    test = {e.id for e in conflicts if e.split == "test"}
    files = (control.out / "interventions").glob("*.json")
    effects = {effect_digest(InterventionFile.load(path).build()) for path in files}
    reports = list((control.out / "records").glob("test-*.parquet"))
    # The unedited model, every edit that differs from the others, and the second draw of random features.
    assert 1 + len(effects) <= len(reports) <= 1 + len(effects) + 2
    for path in reports:
        assert set(pl.read_parquet(path)["id"]) <= test
    table = results_table(results)
    assert table["method"].to_list() == ["unedited", *METHODS, *METHODS]


def test_changes_are_those_of_the_same_prompts(fitted):
    control, results = fitted
    answers = pl.read_parquet(control.out / "examples.parquet").filter(kind="conflict")
    by_condition = {name: answers.filter(condition=name) for name in ("unedited", "actadd, towards context")}
    follows = [dict(zip(f["id"], f["usage"] == "context", strict=True)) for f in by_condition.values()]
    expected = np.mean([int(follows[1][name]) - int(follows[0][name]) for name in follows[0]])
    change = results["methods"]["actadd"]["towards_context"]["test"]["change"]["context_rate"]
    assert change["value"] == pytest.approx(expected)
    assert change["low"] <= change["value"] <= change["high"]
    assert "change" not in results["unedited"]


def test_nothing_is_fitted_or_chosen_on_test_subjects_or_the_held_out_phrasing(fitted):
    control, _ = fitted
    assert not control.answered.filter((pl.col("split") == "test") | (pl.col("template") == HELD_OUT_PHRASING)).height
    assert {e.split for e in control._dev("conflict", "none", "aligned")} == {"dev"}
    assert HELD_OUT_PHRASING not in {e.template for e in control._dev("conflict", "none", "aligned")}
    assert HELD_OUT_PHRASING in {e.template for e in control._test()}


def test_the_file_of_an_edit_does_what_the_results_say(fitted, smollm2):
    control, results = fitted
    for method in ("spare", "caa", "constant"):
        file = InterventionFile.load(control.out / "interventions" / f"{method}-towards_context.json")
        with applied(smollm2, file):
            report = measure_usage(smollm2, control._test())
        test = results["methods"][method]["towards_context"]["test"]
        assert report.select(kind="conflict").rate("context").value == pytest.approx(test["context_rate"]["value"])
        kl = neutral_kl(smollm2, lambda file=file: applied(smollm2, file), position="last")
        assert kl.mean() == pytest.approx(test["neutral_kl"]["value"], rel=1e-4, abs=1e-8)


def test_activation_addition_adds_the_difference_of_the_means_by_answered_source(fitted, smollm2, conflicts):
    """Means taken here from a fresh recording and answers, and the vector as it lies in the file."""
    control, results = fitted
    train = [e for e in conflicts.select(kind="conflict", split="train") if e.template != HELD_OUT_PHRASING]
    prompts = ConflictSet("train", tuple(train))
    usage = measure_usage(smollm2, prompts).frame["usage"].to_list()
    layer = results["methods"]["actadd"]["towards_memory"]["settings"]["layer"]
    states = record(smollm2, prompts, [f"blocks.{layer}.hook_out"])[f"blocks.{layer}.hook_out"]
    context, memory = (states[[u == source for u in usage]].mean(0) for source in ("context", "memory"))
    (steering,) = InterventionFile.load(control.out / "interventions" / "actadd-towards_memory.json").build()
    assert isinstance(steering, Steering)
    torch.testing.assert_close(steering.vector, memory - context, atol=1e-4, rtol=1e-4)
    assert (steering.tokens, steering.mode) == ("last_prompt", "add")


def test_the_winner_is_as_good_on_dev_as_any_candidate_in_full_passes(fitted, smollm2):
    """Within the paired standard error of the best, by ``answer_starts`` on all dev prompts."""
    control, results = fitted
    dev = control._dev("conflict")
    candidates = job._steering_candidates(control, "actadd", (16, 18), (1.0, 4.0))["context"]
    hits = {}
    for edit in candidates:
        with applied(smollm2, *edit.interventions):
            usage = answer_starts(smollm2, dev).frame["usage"]
        hits[edit.settings["layer"], edit.settings["strength"]] = (usage == "context").to_numpy().astype(float)
    settings = results["methods"]["actadd"]["towards_context"]["settings"]
    chosen, best = hits[settings["layer"], settings["strength"]], max(hits.values(), key=np.mean)
    assert best.mean() - chosen.mean() <= 1.5 * (best - chosen).std() / len({e.subject for e in dev}) ** 0.5 + 1e-9


def test_answer_starts_of_read_prompts_equal_those_of_full_passes(fitted, smollm2):
    control, _ = fitted
    dev = control._dev("conflict")
    starts = AnswerStarts(smollm2, dev)
    file = InterventionFile.load(control.out / "interventions" / "spare-towards_memory.json")
    assert starts.report().frame.equals(answer_starts(smollm2, dev).frame)
    with applied(smollm2, file):
        assert starts.report().frame.equals(answer_starts(smollm2, dev).frame)


def test_random_features_are_as_many_and_none_of_the_selected(fitted):
    control, _ = fitted
    for towards in ("context", "memory"):
        spare, random = (
            json.loads((control.out / "interventions" / f"{method}-towards_{towards}.json").read_text())
            for method in ("spare", "random_features")
        )
        for ours, theirs in zip(spare["interventions"][0]["layers"], random["interventions"][0]["layers"], strict=True):
            assert len(ours["removed"]) == len(theirs["removed"])
            assert len(ours["added"]) == len(theirs["added"])
            assert not {*ours["removed"], *ours["added"]} & {*theirs["removed"], *theirs["added"]}


def test_a_second_fit_measures_nothing_again(fitted, monkeypatch):
    control, results = fitted
    monkeypatch.setattr(study, "measure_usage", None)
    again = fit_steering(control, ["actadd"], layers=(16, 18), strengths=(1.0, 4.0))
    assert again["methods"]["actadd"] == results["methods"]["actadd"]


def test_another_autoencoder_is_measured_anew(fitted, monkeypatch):
    """The same layer, width and name, one weight changed: nothing kept of the old one is taken."""
    control, _ = fitted
    monkeypatch.setattr(job, "DIRECTIONS", ("context",))
    monkeypatch.setattr(job, "_ablations", lambda *_: {})
    # Of all results there, those of one direction alone would be left.
    monkeypatch.setattr(control, "add_results", lambda results: results)
    (sae,) = (sae for sae in load_saes("smollm2-135m") if sae.layer == 16)
    changed = dataclasses.replace(sae, weights={**sae.weights, "W_dec": -sae.weights["W_dec"]})
    assert changed.digest != sae.digest
    before = set((control.out / "records").iterdir())
    fit_spare(control, [changed], shares=(0.1,), alphas=(2.0,))
    new = {path.name.split("-")[0] for path in set((control.out / "records").iterdir()) - before}
    assert {"dev", "test", "neutral_kl"} <= new


def test_a_selection_of_one_source_alone_still_gives_all_results(smollm2, conflicts, tmp_path, monkeypatch):
    """So small a share that a single feature is edited: one of the halves is empty."""
    monkeypatch.setattr(job, "DIRECTIONS", ("context",))
    control = Control(smollm2, "m", relations=[], out=tmp_path, conflicts=conflicts)
    (sae,) = (sae for sae in load_saes("smollm2-135m") if sae.layer == 16)
    results = fit_spare(control, [sae], shares=(1e-6,), alphas=(2.0,))
    assert results["methods"]["spare"]["towards_context"]["settings"]["features"] == [1]
    sizes = {
        results["methods"][name]["towards_context"]["settings"]["features"][0] for name in ("add_only", "remove_only")
    }
    assert sizes == {0, 1}


def test_results_on_other_data_are_not_mixed(fitted, smollm2, conflicts):
    control, _ = fitted
    with pytest.raises(UserError, match="holds results of another model, other data or settings"):
        Control(smollm2, "m", relations=[], out=control.out, conflicts=conflicts, tokens="answer")


def test_autoencoders_of_another_split_or_model_are_refused(fitted, smollm2, tiny_llama, tmp_path):
    control, _ = fitted
    saes = load_saes("smollm2-135m")
    moved = {"train": "test", "test": "train", "dev": "dev"}
    swapped = tuple(dataclasses.replace(e, split=moved[e.split]) for e in control.conflicts)
    other = Control(smollm2, "m", relations=[], out=tmp_path, conflicts=ConflictSet("swapped", swapped))
    with pytest.raises(UserError, match=r"was trained on prompts about \d+ of the subjects that are held out here"):
        fit_spare(other, saes)
    with pytest.raises(UserError, match="several SAEs of layer 12"):
        fit_spare(control, [saes[0], *saes])
    tiny = Control(tiny_llama, "tiny", relations=[], out=tmp_path, conflicts=control.conflicts)
    with pytest.raises(UserError, match="give an SAE of this model"):
        fit_spare(tiny, saes)


def test_apply_answers_prompts_without_and_with_the_edit(run, fitted, smollm2, tmp_path):
    control, _ = fitted
    config = control.out / "interventions" / "actadd-towards_context.json"
    prompts = [e.prompt for e in control._test().select(kind="conflict")][:3]
    (tmp_path / "prompts.txt").write_text("\n".join(p.replace("\n", " ") for p in prompts))
    code, out, _ = run("steer", "apply", config, "prompts.txt", "--strength", "0", "--save", "off.json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 3
    assert all(line["unedited"] == line["edited"] for line in lines)
    (steering,) = InterventionFile.load(tmp_path / "off.json").build()
    assert isinstance(steering, Steering)
    assert steering.strength == 0
    assert not InterventionFile.load(tmp_path / "off.json").measured
    code, out, _ = run("spare", "apply", control.out / "interventions" / "spare-towards_context.json", "prompts.txt")
    assert code == 0
    with applied(smollm2, InterventionFile.load(control.out / "interventions" / "spare-towards_context.json")):
        from interp.generation import continue_greedily

        expected = continue_greedily(smollm2, (tmp_path / "prompts.txt").read_text().splitlines()).answers
    assert [json.loads(line)["edited"] for line in out.splitlines()] == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["steer", "fit", "--method", "prayer"], "no steering by 'prayer'; choose among actadd"),
        (["spare", "fit", "--sae", "nowhere"], "There are no SAEs in nowhere"),
        (["spare", "fit", "--layers", "3"], "smollm2-135m has no SAE of layer 3; it has 12"),
        (["spare", "fit", "--relation", "capitol"], "'capitol' is not known"),
        (["spare", "fit", "--relation", "capital", "--data", "x.jsonl"], "Give --data or --relation, not both"),
        (["spare", "fit", "--share", "1.5"], "--share is a share of the information, between 0 and 1, not 1.5"),
        (["spare", "fit", "--alpha", "nan"], "--alpha is a finite number, not nan"),
        (["spare", "apply", "nowhere.json"], "Could not read the intervention file nowhere.json"),
    ],
)
def test_a_wrong_input_is_one_sentence(run, command, message):
    assert_one_sentence(run(*command), message)


def test_a_model_that_never_follows_one_of_the_sources_is_told_so(run, tiny_directories, tmp_path, conflicts):
    conflicts.save(tmp_path / "data.jsonl")
    arguments = ("--model", tiny_directories["llama"], "--data", "data.jsonl", "--out", "c")
    assert_one_sentence(run("steer", "fit", *arguments, "--method", "actadd"), "both sources are needed")
    assert not (tmp_path / "c" / "results.json").exists()
    # The contrast of answers needs none to be followed.
    code, out, _ = run("steer", "fit", *arguments, "--method", "task_vector", "--method", "caa")
    assert code == 0
    methods = json.loads((tmp_path / "c" / "results.json").read_text())["methods"]
    assert "both sources are needed" in methods["task_vector"]["not_run"]
    assert set(methods["caa"]) == {"towards_context", "towards_memory"}
    assert "not run" in out


def test_data_without_a_kind_of_prompts_is_told_so_before_anything_runs(run, tiny_directories, tmp_path):
    tiny_conflicts().save(tmp_path / "data.jsonl")
    result = run("steer", "fit", "--model", tiny_directories["llama"], "--data", "data.jsonl", "--out", "c")
    assert_one_sentence(result, "The dev split has no prompts of the kind 'aligned'")
    assert not (tmp_path / "c").exists()
