import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, NemotronConfig, NemotronForCausalLM

from interp.anatomy import BLUEPRINTS
from interp.attribution.scores import HeadScores
from interp.errors import Caution
from interp.models import load_model, save_checkpoint
from interventions.config import InterventionFile
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence
from tests.tiny import tiny_conflicts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("architectures_are_left_as_they_were")
run = test_cli.run
FIELDS = {name: f"attn.attention.{name[0]}_proj" for name in ("query", "key", "value")}


def saved_neo(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    shape: dict[str, Any] = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48}
    config = GPTNeoConfig(**shape, vocab_size=len(tokenizer), attention_types=[[["global"], 3]], bos_token_id=0)
    save_checkpoint(GPTNeoForCausalLM(config), tokenizer, folder)


def test_a_model_of_an_unknown_architecture_is_attributed_with_its_blueprint(run, tmp_path):
    saved_neo(tmp_path / "neo")
    tiny_conflicts().save(tmp_path / "tiny.jsonl")
    asked = ["--data", tmp_path / "tiny.jsonl", "--split", "all", "--baseline", "zero", "--model", tmp_path / "neo"]
    out = ["--out", tmp_path / "heads.parquet"]
    with warnings.catch_warnings():
        warnings.simplefilter("always", Caution)
        code, _, error = run("attribute", *asked, "--out", tmp_path / "proposed.parquet")
    assert code == 0, error
    assert "Note: The architecture GPTNeoForCausalLM is not known here; a blueprint that is proposed" in error
    del BLUEPRINTS["GPTNeoForCausalLM"]
    fields = {**FIELDS, "output_projection": "attn.attention.out_proj", "mlp_output": "mlp.c_proj"}
    blueprint = {"architecture": "GPTNeoForCausalLM", "like": "GPT2LMHeadModel", "fields": fields}
    (tmp_path / "neo.json").write_text(json.dumps(blueprint))
    code, _, error = run("attribute", *asked, *out, "--blueprint", tmp_path / "neo.json")
    assert code == 0, error
    scores = HeadScores.load(tmp_path / "heads.parquet").values
    assert scores.shape[1:] == (3, 4)
    torch.testing.assert_close(HeadScores.load(tmp_path / "proposed.parquet").values, scores)


def test_an_edit_of_an_unknown_architecture_is_exported_and_imported_with_its_blueprint(run, tmp_path):
    saved_neo(tmp_path / "neo")
    run("doctor", tmp_path / "neo", "--out", tmp_path / "neo.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Caution)
        model = load_model(str(tmp_path / "neo"), device="cpu")
        identity = ModelIdentity.of(model, str(tmp_path / "neo"), model.tokenizer)
    edit = HeadScaling.of([(1, 2)], 0.0)
    InterventionFile.of([edit], name="edit", model=identity).save(tmp_path / "edit.json")
    del BLUEPRINTS["GPTNeoForCausalLM"]
    given = ("--blueprint", tmp_path / "neo.json")
    code, _, error = run("export", tmp_path / "neo", tmp_path / "edit.json", tmp_path / "lora", "--lora", *given)
    assert code == 0, error
    assert "proposed" not in error
    (tmp_path / "lora" / "intervention.json").unlink()
    del BLUEPRINTS["GPTNeoForCausalLM"]
    found = ("--out", tmp_path / "found.json", *given)
    code, _, error = run("import", tmp_path / "lora", "--model", tmp_path / "neo", *found)
    assert code == 0, error
    assert "proposed" not in error
    assert list(InterventionFile.load(tmp_path / "found.json").build()) == [edit]


def test_doctor_writes_the_blueprint_of_an_unknown_architecture_and_says_how_well_it_fits(run, tmp_path):
    saved_neo(tmp_path / "neo")
    code, said, error = run("doctor", tmp_path / "neo", "--out", tmp_path / "neo.json")
    assert code == 0, error
    assert said.startswith("GPTNeoForCausalLM: proposed from its modules")
    assert '"query": "attn.attention.q_proj"' in said
    assert re.search(r"^stream +\d+e[-+]\d+ +\d+e[-+]\d+$", said, re.MULTILINE)
    del BLUEPRINTS["GPTNeoForCausalLM"]
    code, said, error = run("doctor", tmp_path / "neo", "--blueprint", tmp_path / "neo.json")
    assert code == 0, error
    assert said.startswith("GPTNeoForCausalLM: given with --blueprint")


def test_doctor_says_what_of_a_given_blueprint_does_not_fit(run, tmp_path):
    saved_neo(tmp_path / "neo")
    fields = {**FIELDS, "output_projection": "attn.attention.out_proj", "mlp_output": "mlp.c_proj", "parallel": True}
    blueprint = {"architecture": "GPTNeoForCausalLM", "like": "GPT2LMHeadModel", "fields": fields}
    (tmp_path / "neo.json").write_text(json.dumps(blueprint))
    result = run("doctor", tmp_path / "neo", "--blueprint", tmp_path / "neo.json", "--out", tmp_path / "out.json")
    assert_one_sentence(result, "GPTNeoForCausalLM does not fit", "what the MLP of block 0 adds is not what follows")
    assert not (tmp_path / "out.json").exists()


def test_doctor_of_a_model_that_no_blueprint_describes_is_one_sentence(run, tmp_path):
    config = NemotronConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=1500
    )
    save_checkpoint(NemotronForCausalLM(config), tiny_tokenizer(), tmp_path / "nemotron")
    assert_one_sentence(
        run("doctor", tmp_path / "nemotron"), "NemotronForCausalLM is not known", "no norm with a weight"
    )


def test_doctor_writes_no_blueprint_of_no_model(run, tmp_path):
    assert_one_sentence(run("doctor", "--out", tmp_path / "b.json"), "name the model too")
