import json
from typing import Any

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from interp.anatomy import BLUEPRINTS
from interp.attribution.scores import HeadScores
from interp.models import save_checkpoint
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence
from tests.tiny import tiny_conflicts, tiny_tokenizer

run = test_cli.run
FIELDS = {name: f"attn.attention.{name[0]}_proj" for name in ("query", "key", "value")}


@pytest.fixture(autouse=True)
def architectures_are_left_as_they_were():
    before = dict(BLUEPRINTS)
    yield
    BLUEPRINTS.clear()
    BLUEPRINTS.update(before)


def test_a_model_of_an_unknown_architecture_is_attributed_with_its_blueprint(run, tmp_path):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    shape: dict[str, Any] = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48}
    config = GPTNeoConfig(**shape, vocab_size=len(tokenizer), attention_types=[[["global"], 3]], bos_token_id=0)
    save_checkpoint(GPTNeoForCausalLM(config), tokenizer, tmp_path / "neo")
    tiny_conflicts().save(tmp_path / "tiny.jsonl")
    asked = ["--data", tmp_path / "tiny.jsonl", "--split", "all", "--baseline", "zero", "--model", tmp_path / "neo"]
    out = ["--out", tmp_path / "heads.parquet"]
    assert_one_sentence(run("attribute", *asked, *out), "GPTNeoForCausalLM is not known")
    fields = {**FIELDS, "output_projection": "attn.attention.out_proj", "mlp_output": "mlp.c_proj"}
    blueprint = {"architecture": "GPTNeoForCausalLM", "like": "GPT2LMHeadModel", "fields": fields}
    (tmp_path / "neo.json").write_text(json.dumps(blueprint))
    code, _, error = run("attribute", *asked, *out, "--blueprint", tmp_path / "neo.json")
    assert code == 0, error
    assert HeadScores.load(tmp_path / "heads.parquet").values.shape[1:] == (3, 4)
