import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from conflictscope.cli import app
from interp import corpus
from interp.activation_store import ActivationStore
from interp.conflicts import ConflictSet, split_of
from interp.facts import HELD_OUT_PHRASING, relations, usable_facts
from interp.inputs import tokenizer_of
from interp.models import load_model
from interp.sae import load_sae, load_saes
from probes import sae_data, sae_making
from probes.sae_data import check_unseen
from probes.sae_quality import measure_saes
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run, tiny, data = test_cli.run, test_cli.tiny, test_cli.data
SHORT = [
    "--features",
    "48",
    "--active",
    "4",
    "--tokens",
    "1280",
    "--batch-size",
    "64",
    "--texts",
    "40",
    "--prompts",
    "60",
]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("_HELD_OUT_TEXTS", "_HELD_OUT_PROMPTS"):
        monkeypatch.setattr(sae_data, name, 6)
    monkeypatch.setattr(corpus, "_BATCH_SIZE", 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_directories):
    """Autoencoders of two layers of the tiny Llama, from nothing, by the command line."""
    from typer.testing import CliRunner

    out = tmp_path_factory.mktemp("trained") / "saes"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_HELD_OUT_TEXTS", "_HELD_OUT_PROMPTS"):
            patch.setattr(sae_data, name, 6)
        patch.setattr(corpus, "_BATCH_SIZE", 20)
        command = ["sae", "train", "--model", tiny_directories["llama"], "--layers", "0,2", *SHORT, "--out", out]
        result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    return out


def train(run, tiny_directories, out, *options):
    return run("sae", "train", "--model", tiny_directories["llama"], *SHORT, "--out", out, *options)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: (path / "sae_weights.safetensors").read_bytes() for path in folder.glob("layer_*")}


def test_training_from_nothing_writes_an_autoencoder_and_its_card_for_each_layer(trained, tiny_llama):
    found = load_saes(trained)
    assert [(sae.layer, sae.d_in, sae.d_sae, sae.architecture) for sae in found] == [
        (layer, 32, 48, "jumprelu") for layer in (0, 2)
    ]
    for sae in found:
        sae.check(tiny_llama)
        assert sae.card["settings"]["active"] == 4
        assert sae.card["data"]["conflict_prompts"] == 60
        assert sae.card["data"]["digest"] == ActivationStore(trained / "activations").basis["data"]["digest"]
        for part in ("text", "conflict_prompts"):
            assert {"active", "explained_variance", "loss_recovered", "dead_features"} <= sae.card["quality"][
                part
            ].keys()


def test_the_card_says_what_measuring_the_written_file_says(trained, tiny_llama):
    (sae, _) = load_saes(trained)
    again = measure_saes(tiny_llama, [sae], trained)
    assert again.keys() == sae.card["quality"].keys()
    # A bridge's attention is eager; that of the model that was trained on is fused.
    for part, (found, *_) in again.items():
        assert flat(found.to_record()) == pytest.approx(flat(sae.card["quality"][part]), rel=1e-4, abs=1e-7)


def flat(record: dict[str, Any]) -> dict[str, float]:
    """Its numbers, and those of the records in it."""
    records = {name: value for name, value in record.items() if isinstance(value, dict)}
    inside = {f"{name} {key}": number for name, value in records.items() for key, number in value.items()}
    return {name: record[name] for name in record.keys() - records} | inside


def test_training_text_holds_no_subject_and_no_phrasing_that_is_held_out(trained):
    texts = ActivationStore(trained / "activations").index["text"].unique().to_list()
    (batch, _) = sorted(trained.glob("texts/train-*/*.json"))
    sampled = [text for path in batch.parent.glob("*.json") for text in json.loads(path.read_text())]
    assert len(sampled) == 40
    subjects = {fact.subject for name in relations() for fact in usable_facts(name)}
    train = {subject for subject in subjects if split_of(subject, 0) == "train"}
    assert all(any(text.startswith(subject) for subject in train) for text in sampled[1::2])
    prompts = set(texts) - set(sampled)
    assert len(prompts) == 60
    # Each prompt ends by asking about its subject; names that are parts of others are left out of the search.
    apart = {s for s in subjects if not any(s in other for other in subjects if other != s)}
    answers = {answer for name in relations() for fact in usable_facts(name) for answer in fact.answers}
    for prompt in prompts:
        asked = re.split(r"[.?:]\s|\n", prompt)[-1]
        assert not [s for s in apart - train - answers if re.search(rf"\b{re.escape(s)}\b", asked)], prompt
        assert "According to" not in prompt


def test_a_second_call_trains_nothing(run, trained, tiny_directories, monkeypatch):
    before = weights(trained)
    monkeypatch.setattr(sae_making, "train_sae", None)
    code, out, _ = train(run, tiny_directories, trained, "--layers", "0,2")
    assert code == 0
    assert "explained variance" in out
    assert weights(trained) == before


def test_a_training_that_was_killed_between_layers_goes_on(run, trained, tiny_directories, tmp_path, monkeypatch):
    train_one = sae_making.train_sae

    def killed_in_the_second(store, site, settings, **options):
        if site.startswith("blocks.2"):
            raise KeyboardInterrupt
        return train_one(store, site, settings, **options)

    monkeypatch.setattr(sae_making, "train_sae", killed_in_the_second)
    code, _, error = train(run, tiny_directories, tmp_path / "again", "--layers", "0,2")
    assert code == 130
    assert "run the same command again" in error
    assert [sae.layer for sae in load_saes(tmp_path / "again")] == [0]
    monkeypatch.setattr(sae_making, "train_sae", train_one)
    code, _, _ = train(run, tiny_directories, tmp_path / "again", "--layers", "0,2")
    assert code == 0
    # The same seed gives the same weights, in another folder too.
    assert weights(tmp_path / "again") == weights(trained)


def test_other_settings_in_the_same_folder_are_refused(run, trained, tiny_directories):
    result = train(run, tiny_directories, trained, "--layers", "0,2", "--learning-rate", "0.5")
    assert_one_sentence(result, "holds something else, or an SAE of another model, other settings or data")


def test_given_text_takes_the_place_of_sampled_text(run, tiny_directories, tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(f"Rome is the capital of Italy {i}" for i in range(200)))
    settings = [part for part in SHORT if part not in ("--texts", "40", "--prompts", "60")]
    command = ["sae", "train", "--model", tiny_directories["llama"], "--layers", "1", *settings, "--out", "mine"]
    assert_one_sentence(run(*command, "--text", "nowhere.txt"), "nowhere.txt")
    code, _, error = run(*command, "--text", "mine.txt", "--prompts", "0")
    assert code == 0, error
    assert load_sae(tmp_path / "mine").card["data"]["sampled"] is False
    assert set(ActivationStore(tmp_path / "mine" / "activations").index["text"]) == set(
        (tmp_path / "mine.txt").read_text().splitlines()
    )


def test_a_recording_of_all_tokens_can_be_trained_on(run, trained, tiny_directories, tmp_path):
    code, _, error = record_trained(run, tiny_directories, trained / "activations", "2")
    assert code == 0, error
    assert weights(tmp_path / "other")["layer_2"] == weights(trained)["layer_2"]


def record_trained(run, tiny_directories, recording, layer):
    settings = [part for part in SHORT if part not in ("--texts", "40", "--prompts", "60")]
    model = ["--model", tiny_directories["llama"], "--layers", layer, "--out", "other"]
    return run("sae", "train", *model, *settings, "--recording", recording)


def test_of_a_recording_of_conflicts_only_the_train_split_without_the_held_out_phrasing_is_trained_on(
    run, tiny_directories, tiny_llama, capital_conflicts, tmp_path, monkeypatch
):
    site = "blocks.1.hook_out"
    store = ActivationStore.record(tmp_path / "rec", tiny_llama, capital_conflicts, [site], "all", name="tiny")
    used = []
    monkeypatch.setattr(sae_making, "train_sae", lambda *_, rows, **__: used.append(rows) or sys.exit(7))
    assert record_trained(run, tiny_directories, tmp_path / "rec", "1")[0] == 7
    rows = store.index.filter(pl.Series(used[0].numpy()))
    assert set(rows["split"]) == {"train"}
    assert set(rows["template"]) == set(store.index["template"]) - {HELD_OUT_PHRASING}
    expected = store.index.filter((pl.col("split") == "train") & (pl.col("template") != HELD_OUT_PHRASING))
    assert rows.equals(expected)
    assert_one_sentence(record_trained(run, tiny_directories, tmp_path / "rec", "2"), "lacks blocks.2.hook_out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "3"], "Layer 3 does not exist"),
        (["--layers", "x"], "--layers takes numbers"),
        (["--layers", "0", "--l1", "2"], "--l1 belongs to --architecture standard"),
        (["--layers", "0", "--architecture", "standard"], "--active to all others"),
        (["--layers", "0", "--prompts", "1000000"], "fewer than 1000000"),
        (["--layers", "0", "--text", "nowhere.txt"], "--text takes the place of --texts"),
        (["--layers", "0", "--recording", "nowhere"], "--recording takes the place of"),
        (["--layers", "0", "--active", "48"], "48 active of 48 features"),
        (["--layers", "0", "--tokens", "100"], "fewer than 20 steps"),
    ],
)
def test_input_that_cannot_work_is_refused_before_anything_is_trained(
    run, tiny_directories, tmp_path, options, message
):
    assert_one_sentence(train(run, tiny_directories, "saes", *options), message)
    assert not list(tmp_path.glob("saes/layer_*"))


def test_evaluate_measures_what_it_is_given(run, trained, tiny_directories, tmp_path):
    code, out, _ = run("sae", "evaluate", "--sae", trained, "--model", tiny_directories["llama"], "--out", "q")
    assert code == 0
    assert "loss recovered" in out
    found = json.loads((tmp_path / "q" / "quality.json").read_text())
    assert found["layers"] == [0, 2]
    assert found["text"][0] == load_saes(trained)[0].card["quality"]["text"]


def test_another_seed_whose_test_subjects_were_trained_on_is_refused(run, trained, tiny_directories):
    result = run("sae", "evaluate", "--sae", trained, "--model", tiny_directories["llama"], "--seed", "1")
    assert_one_sentence(result, "of the subjects that are held out here", "--seed 0")
    check_unseen(load_saes(trained), sae_data.test_subjects(0))


def test_features_are_looked_at_with_a_recording_of_answers(run, trained, tiny_directories, tmp_path, tiny_llama):
    model = tiny_directories["llama"]
    record = ["record", "--model", model, "--layers", "2", "--site", "residual", "--out", "rec", "--data"]
    from tests.tiny import tiny_conflicts

    tiny_conflicts().save(tmp_path / "data.jsonl")
    assert run(*record, "data.jsonl")[0] == 0
    look = ["sae", "features", "--sae", trained, "--model", model, "--recording", "rec", "--out", "looks"]
    assert_one_sentence(run(*look, "--feature", "3"), "has several SAEs; give --layer, one of 0, 2")
    assert_one_sentence(run(*look, "--layer", "1", "--feature", "3"), "has no SAE of layer 1; it has 0, 2")
    assert_one_sentence(run(*look, "--layer", "2", "--feature", "99"), "99")
    code, out, error = run(*look, "--layer", "2", "--feature", "3", "--feature", "5")
    assert code == 0, error
    assert "promotes" in out
    assert {path.name for path in (tmp_path / "looks").glob("*.html")} == {
        f"layer_2-feature_{feature}.html" for feature in (3, 5)
    }


def test_differences_with_and_without_a_context_are_an_edit_that_can_be_evaluated(run, trained, tmp_path, tiny, data):
    saes = ("--sae", trained, "--count", "3", "--out", "diff")
    code, output, _ = run("sae", "diff", "--model", tiny, "--data", data, *saes)
    assert code == 0
    assert "difference" in output
    table = pl.read_parquet(tmp_path / "diff" / "differences.parquet")
    assert table["layer"].to_list() == [0, 0, 0, 2, 2, 2]
    pictures = {f"layer_{layer}.{kind}" for layer in (0, 2) for kind in ("html", "json")}
    assert pictures <= {path.name for path in (tmp_path / "diff").iterdir()}
    edit = json.loads((tmp_path / "diff" / "layer_2.json").read_text())
    assert edit["towards"] == "context"
    assert edit["provenance"]["data"] == ConflictSet.load(data).select(kind="conflict", split="train").digest
    evaluated = run("evaluate", "--model", tiny, "--data", data, "--split", "all", "--config", "diff/layer_2.json")
    assert evaluated[0] == 0


def test_differences_to_another_model(run, trained, tmp_path, tiny, data, tiny_directories):
    arguments = ("sae", "diff", "--model", tiny, "--data", data, "--sae", trained, "--out", "diff")
    assert_one_sentence(run(*arguments, "--other", tiny), "No feature differs")
    assert_one_sentence(run(*arguments, "--layer", "1"), "has no SAE of layer 1")
    assert_one_sentence(run(*arguments, "--other", tiny_directories["mistral"]), "another architecture")
    tuned = load_model(str(tiny), device="cpu")
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight.mul_(3)
    for part in (tuned, tokenizer_of(tuned)):
        part.save_pretrained(tmp_path / "tuned")
    assert run(*arguments, "--other", "tuned")[0] == 0
    # Below the layer that was tuned nothing differs.
    assert set(pl.read_parquet(tmp_path / "diff" / "differences.parquet")["layer"]) == {2}
    assert json.loads((tmp_path / "diff" / "layer_2.json").read_text())["towards"] is None


def test_several_autoencoders_of_a_layer_are_refused_before_anything_runs(run, trained, tmp_path, tiny, data):
    for number in (1, 2):
        shutil.copytree(trained / "layer_0", tmp_path / "two" / f"layer_0_{number}")
    result = run("sae", "diff", "--model", tiny, "--data", data, "--sae", "two", "--out", "diff")
    assert_one_sentence(result, "several SAEs of one layer")
