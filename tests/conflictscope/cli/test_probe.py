import dataclasses
import io
import json
import sys
from typing import Any

import polars as pl
import pytest
import torch

from interp import activation_store, activations
from interp.activation_store import ActivationStore
from interp.conflicts import ConflictSet
from interp.facts import HELD_OUT_PHRASING, PHRASINGS, build_conflicts, usable_facts
from probes.detector import ConflictDetector
from probes.fitting import EMBEDDING, SHUFFLES, examples_of
from probes.linear import ProbeSet
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence
from tests.probes import test_fitting

run, knows = test_cli.run, test_fitting.knows
RELATIONS = ("capital", "currency")
SITES = ["--layers", "0-1", "--site", "residual", "--site", "attention"]


def conflict_set(n_subjects: int = 25) -> ConflictSet:
    facts = {relation: usable_facts(relation)[:n_subjects] for relation in RELATIONS}
    return build_conflicts(facts, kinds=("conflict", "aligned"), phrasings=tuple(PHRASINGS))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_directories: Any) -> Any:
    """A finished recording without answers, and probes of conflict fitted on it, by the command line."""
    from typer.testing import CliRunner

    from conflictscope.cli import app

    root = tmp_path_factory.mktemp("chain")
    conflict_set().save(root / "data.jsonl")
    arguments = ["record", "--model", tiny_directories["llama"], "--data", root / "data.jsonl", *SITES]
    recorded = CliRunner().invoke(app, [*map(str, arguments), "--out", str(root / "rec"), "--no-answers"])
    assert recorded.exit_code == 0, recorded.output
    arguments = ["probe", "fit", "--recording", root / "rec", "--out", root / "probes", "--label", "conflict"]
    fitted = CliRunner().invoke(app, [*map(str, arguments), "--false-positive-rate", "0.2"])
    assert fitted.exit_code == 0, fitted.output
    return root


@pytest.fixture
def llama(tiny_directories: Any) -> str:
    return str(tiny_directories["llama"])


def contents(folder: Any) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# The whole chain


def test_record_keeps_every_prompt_at_every_site(chain):
    store, data = ActivationStore(chain / "rec"), conflict_set()
    assert store.complete
    blocks = [f"blocks.{layer}.{name}" for layer in (0, 1) for name in ("hook_out", "attn.hook_out")]
    assert list(store) == [EMBEDDING, *blocks]
    assert store.index["id"].to_list() == [e.id for e in data]
    assert store[EMBEDDING].shape == (len(data), 32)


def test_a_second_record_changes_nothing(run, chain, llama):
    before = contents(chain / "rec")
    arguments = ["record", "--model", llama, "--data", chain / "data.jsonl", *SITES, "--out", chain / "rec"]
    code, _, error = run(*arguments, "--no-answers")
    assert code == 0
    assert f"Recorded {len(conflict_set())} tokens of {len(conflict_set())} prompts at 5 sites" in error
    assert contents(chain / "rec") == before


def test_record_with_answers_says_which_source_each_conflict_used(run, tmp_path, llama):
    conflict_set(6).save(tmp_path / "few.jsonl")
    code, _, _ = run("record", "--model", llama, "--data", "few.jsonl", "--layers", "0", "--out", "rec")
    assert code == 0
    index = ActivationStore(tmp_path / "rec").index
    assert index.filter(kind="conflict")["usage"].null_count() == 0
    assert index.filter(kind="aligned")["usage"].null_count() == index.filter(kind="aligned").height > 0


def test_fit_writes_probes_controls_and_a_detector(chain):
    written = contents(chain / "probes")
    parts = [*RELATIONS, *(p for p in PHRASINGS if p != HELD_OUT_PHRASING)]
    numbered = [f"controls/conflict-{i:02d}" for i in range(SHUFFLES + 1 + len(parts))]
    stems = {"conflict", "detector/conflict", *numbered}
    controls = [ProbeSet.load(chain / "probes" / f"{stem}.safetensors").settings for stem in numbered]
    assert [c["control"] for c in controls] == ["shuffled"] * SHUFFLES + ["floor"] + ["left out"] * len(parts)
    assert {c["part"] for c in controls if c["control"] == "left out"} == set(parts)
    alone = {"detector/detector.json", "fit.json"}
    assert set(written) == {f"{s}.{end}" for s in stems for end in ("safetensors", "json")} | alone
    probes = ProbeSet.load(chain / "probes" / "conflict.safetensors")
    assert list(probes) == list(ActivationStore(chain / "rec"))
    expected = conflict_set()
    seen = [e for e in expected if e.template != HELD_OUT_PHRASING]
    assert probes.settings["training_examples"] == sum(e.split == "train" for e in seen)
    assert probes.settings["validation_examples"] == sum(e.split == "dev" for e in seen)
    detector = ConflictDetector.load(chain / "probes" / "detector")
    assert detector.settings["dev_aligned"] == sum(e.split == "dev" and e.kind == "aligned" for e in seen)
    assert torch.equal(detector.conflict.weight, probes[detector.conflict.site].weight)


def test_a_probe_without_a_relation_has_not_seen_it(chain):
    """Fitted here on the other relation alone, by the public interface."""
    controls = [ProbeSet.load(path) for path in (chain / "probes" / "controls").glob("*.safetensors")]
    control = next(c for c in controls if c.settings.get("part") == "capital").best
    store = ActivationStore(chain / "rec")
    known = examples_of(store, "conflict").filter(
        (pl.col("split") != "test") & (pl.col("template") != HELD_OUT_PHRASING) & (pl.col("relation") == "currency")
    )
    expected = ProbeSet.fit(
        {control.site: store.read(control.site, known["row"].to_list())},
        known["label"].to_list(),
        validation=(known["split"] == "dev").to_list(),
        classes=("aligned", "conflict"),
    )[control.site]
    assert control.strength == expected.strength
    torch.testing.assert_close(control.weight, expected.weight, rtol=0, atol=1e-3)


def test_score_writes_scores_of_probes_and_controls_and_figures(run, chain, tmp_path):
    arguments = ["probe", "score", "--recording", chain / "rec", "--probes", chain / "probes", "--out", "scores"]
    code, output, error = run(*arguments)
    assert code == 0, error
    assert "unseen phrasing" in output
    figures = {f"figures/conflict_{name}.html" for name in ("auroc_by_layer", "calibration", "projection", "patterns")}
    assert set(contents(tmp_path / "scores")) == {"scores.parquet", "scores.json", *figures}
    scores = pl.read_parquet(tmp_path / "scores" / "scores.parquet")
    assert set(scores["probe"]) == {
        "fitted",
        "shuffled labels",
        "floor",
        "detector",
        *(f"without relation {r}" for r in RELATIONS),
        *(f"without template {t}" for t in PHRASINGS if t != HELD_OUT_PHRASING),
    }
    test = [e for e in conflict_set() if e.split == "test"]
    whole = scores.filter(probe="fitted", group="test", measure="auroc")
    assert set(whole["site"]) == set(ActivationStore(chain / "rec"))
    assert set(whole["n"]) == {len(test)}
    unseen = scores.filter(probe="fitted", group="unseen phrasing", measure="auroc")
    assert unseen["n"].to_list() == [sum(e.template == HELD_OUT_PHRASING for e in test)]
    left_out = scores.filter(probe="without relation capital", measure="auroc")
    assert left_out["n"].to_list() == [sum(e.relation == "capital" for e in test)]


def test_scores_in_the_file_are_those_of_the_probes(run, chain, tmp_path):
    from sklearn.metrics import roc_auc_score

    arguments = ["probe", "score", "--recording", chain / "rec", "--probes", chain / "probes", "--out", "scores"]
    assert run(*arguments)[0] == 0
    scores = pl.read_parquet(tmp_path / "scores" / "scores.parquet").filter(measure="auroc")
    store = ActivationStore(chain / "rec")
    probes = ProbeSet.load(chain / "probes" / "conflict.safetensors")
    test = examples_of(store, "conflict").filter(split="test")
    parts = {
        "test": test,
        "unseen phrasing": test.filter(template=HELD_OUT_PHRASING),
        "relation capital": test.filter(relation="capital"),
    }
    for group, frame in parts.items():
        site = probes.best.site
        logits = probes[site].logits(store.read(site, frame["row"].to_list()))[:, 0]
        expected = roc_auc_score(frame["label"] == "conflict", logits)
        found = scores.filter(probe="fitted", group=group, site=site)["value"].item()
        assert found == pytest.approx(expected, abs=1e-6)


PROMPTS = ["The capital of Italy is Paris. The capital of Italy is", "Peru, we hear, is"]
LINES = f'{PROMPTS[0]}\n\n{{"id": "mine", "prompt": {json.dumps(PROMPTS[1])}, "more": 1}}\n{{"prompt": "Rome is"}}\nso'


@pytest.mark.parametrize("way", ["file", "-", "nothing"])
def test_detect_writes_a_json_line_for_each_prompt_of_a_file_or_standard_input(
    run, chain, tmp_path, llama, tiny_llama, monkeypatch, way
):
    (tmp_path / "prompts.txt").write_text(LINES)
    monkeypatch.setattr(sys, "stdin", io.StringIO("" if way == "file" else LINES))
    given = {"file": ["prompts.txt"], "-": ["-"], "nothing": []}[way]
    arguments = ["probe", "detect", *given, "--probes", chain / "probes", "--model", llama, "--batch-size", "3"]
    code, output, error = run(*arguments)
    assert code == 0, error
    detector = ConflictDetector.load(chain / "probes" / "detector")
    expected = detector.detect(tiny_llama, [*PROMPTS, "Rome is", "so"])
    assert [row["id"] for row in objects(output)] == ["1", "mine", "4", "5"]
    for row, detection in zip(objects(output), expected, strict=True):
        del row["id"]
        assert row == pytest.approx(dataclasses.asdict(detection), abs=1e-4)


def test_detect_writes_what_came_before_a_broken_line_and_names_it(run, chain, tmp_path, llama):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n{broken\n")
    arguments = ["probe", "detect", "prompts.txt", "--probes", chain / "probes", "--model", llama, "--batch-size", "2"]
    result = run(*arguments)
    assert_one_sentence(result, "Line 3 is not valid JSON")
    assert [row["id"] for row in objects(result[1])] == ["1", "2"]


@pytest.mark.parametrize("option", [["--model", "gpt2"], ["--dtype", "bfloat16"]])
def test_detect_refuses_another_model_or_dtype(run, chain, tmp_path, tiny_directories, option):
    (tmp_path / "prompts.txt").write_text("one\n")
    chosen = {"--model": "llama", **dict([option])}
    chosen["--model"] = tiny_directories[chosen["--model"]]
    options = [part for pair in chosen.items() for part in pair]
    result = run("probe", "detect", "prompts.txt", "--probes", chain / "probes", *options)
    assert_one_sentence(result, "fitted on", "with other weights or in another dtype", "record and fit with this one")


# Wrong inputs


def test_an_unknown_label(run, chain):
    result = run("probe", "fit", "--recording", chain / "rec", "--label", "truth")
    assert_one_sentence(result, "no probe of 'truth'", "conflict, source")


@pytest.mark.parametrize("layers", ["one", "1-", "0,,1", "-1", ""])
def test_layers_that_are_no_numbers_or_ranges(run, chain, llama, layers):
    result = run("record", "--model", llama, "--data", chain / "data.jsonl", f"--layers={layers}")
    assert_one_sentence(result, "--layers takes numbers and ranges like 0-9,12", repr(layers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "2-3"], "Layer 3 does not exist"),
        (["--site", "value"], "The site 'value' does not exist in this model"),
        (["--relation", "capital"], "Give --data or --relation, not both"),
    ],
)
def test_wrong_options_of_record(run, chain, llama, tmp_path, options, message):
    result = run("record", "--model", llama, "--data", chain / "data.jsonl", *options)
    assert_one_sentence(result, message)
    assert not (tmp_path / "out" / "recording").exists()


def test_record_refuses_a_folder_with_another_recording(run, chain, llama):
    arguments = ["record", "--model", llama, "--data", chain / "data.jsonl", "--out", chain / "rec", "--layers", "2"]
    assert_one_sentence(run(*arguments, "--no-answers"), "holds another recording: its sites")


def test_an_unknown_relation_is_refused_before_anything_is_written(run, llama, tmp_path):
    assert_one_sentence(run("record", "--model", llama, "--relation", "capitol"), "'capitol' is not known", "capital")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("command", ["fit", "score"])
def test_a_recording_that_does_not_exist(run, chain, command):
    assert_one_sentence(run("probe", command, "--recording", "nowhere"), "nowhere")


def test_probes_that_do_not_exist(run, chain, tmp_path):
    result = run("probe", "score", "--recording", chain / "rec", "--probes", "nowhere")
    assert_one_sentence(result, "There are no finished probes in nowhere; fit them with `conflictscope probe fit`")
    assert_one_sentence(run("probe", "detect", "--probes", "nowhere"), "There are no finished probes in nowhere")
    result = run("probe", "detect", "missing.txt", "--probes", chain / "probes")
    assert_one_sentence(result, "There is no missing.txt")


@pytest.mark.parametrize("command", ["fit", "score"])
def test_an_unfinished_recording(run, chain, tmp_path, llama, monkeypatch, command):
    monkeypatch.setattr(activation_store, "SHARD_PROMPTS", 100)
    original, calls = activations.observe, []

    def stopped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(activations, "observe", stopped)
    arguments = ["record", "--model", llama, "--data", chain / "data.jsonl", "--layers", "0", "--out", "rec"]
    code, _, error = run(*arguments, "--no-answers")
    assert code == 130
    assert "run the same command again to go on where it stopped" in error
    result = run(
        "probe", command, "--recording", "rec", *(["--probes", chain / "probes"] if command == "score" else [])
    )
    assert_one_sentence(result, "The recording in rec has not finished; run the same `conflictscope record` again")


def test_a_recording_without_answers_has_no_source(run, chain):
    result = run("probe", "fit", "--recording", chain / "rec", "--label", "source")
    assert_one_sentence(result, "lacks usage", "with --answers for the source probe")


def test_an_unknown_or_too_strict_choice_of_fit(run, chain, tmp_path):
    fit = ["probe", "fit", "--recording", chain / "rec", "--label", "conflict", "--no-controls", "--out", "p"]
    assert_one_sentence(run(*fit, "--false-positive-rate", "0.0001"), "too few for a false-positive rate of 0.0001")
    assert_one_sentence(run(*fit, "--false-positive-rate", "1.5"), "must lie between 0 and 1, not 1.5")
    assert not (tmp_path / "p").exists()
    source = ["probe", "fit", "--recording", chain / "rec", "--label", "source", "--false-positive-rate", "0.1"]
    assert_one_sentence(run(*source), "--false-positive-rate belongs to the detector")
    assert_one_sentence(run(*fit, "--held-out", "acording"), "no phrasing 'acording' to hold out", "according_to")


def test_probes_are_not_scored_on_activations_of_another_model(run, chain, tmp_path, tiny_directories):
    record = ["record", "--model", tiny_directories["mistral"], "--data", chain / "data.jsonl", "--out", "rec"]
    assert run(*record, *SITES, "--no-answers")[0] == 0
    result = run("probe", "score", "--recording", "rec", "--probes", chain / "probes")
    assert_one_sentence(result, "were fitted on", "record and fit with the same model")


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_no_prompts_to_detect(run, chain, tmp_path, llama, content):
    (tmp_path / "prompts.txt").write_text(content)
    result = run("probe", "detect", "prompts.txt", "--probes", chain / "probes", "--model", llama)
    assert_one_sentence(result, "There are no prompts; give a file with one a line, or pipe them in")


def test_prompts_that_are_not_utf8(run, chain, tmp_path, llama):
    (tmp_path / "prompts.txt").write_bytes("São".encode("latin-1"))
    result = run("probe", "detect", "prompts.txt", "--probes", chain / "probes", "--model", llama)
    assert_one_sentence(result, "UTF-8")


# Which prompts are asked


def test_record_without_data_asks_what_the_model_knows_once_and_records_it(run, tmp_path, llama, knows):
    arguments = ["record", "--model", llama, "--layers", "0", "--no-answers"]
    code, _, error = run(*arguments)
    assert code == 0, error
    assert knows == ["capital"]
    assert ActivationStore(tmp_path / "out" / "recording").complete
    before = contents(tmp_path / "out")
    assert run(*arguments)[0] == 0
    assert knows == ["capital"]
    assert contents(tmp_path / "out") == before
