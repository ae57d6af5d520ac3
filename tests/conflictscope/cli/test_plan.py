import json
from typing import Any

import pytest
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig

from conflictscope.plan import Setting, device_bytes, needs
from interp.models import load_config
from interp.plan import Shapes
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_blueprint import FIELDS
from tests.conflictscope.cli.test_cli import assert_one_sentence

run = test_cli.run
pytestmark = pytest.mark.usefixtures("architectures_are_left_as_they_were")
COMMANDS = ("evaluate", "two streams", "ask", "generate", "record", "attribute", "dial fit, step")


@pytest.fixture
def configuration(tmp_path):
    """A directory with nothing but the configuration of a model of two billion parameters."""
    shape: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    shape |= {"num_attention_heads": 16, "vocab_size": 32_000, "max_position_embeddings": 2048}
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "shapes")
    return tmp_path / "shapes"


def test_a_table_for_each_length_in_eighty_columns(run, configuration, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["--memory", "8GiB", "--prompt-tokens", 100, "--prompt-tokens", 2000, "--tflops", 50]
    code, out, error = run("plan", configuration, *asked)
    assert code == 0, error
    assert max(map(len, out.splitlines())) <= 80
    assert "Prompts of 100 tokens" in out
    assert "Prompts of 2,000 tokens" in out
    assert all(out.count(f"{command} ") >= 2 for command in COMMANDS if command != "ask")


def test_json_has_what_the_library_says(run, configuration):
    asked = ["--memory", "24GB", "--dtype", "bfloat16", "--devices", 2, "--tflops", 50, "--prompts", 10, "--json"]
    code, out, error = run("plan", configuration, *asked, "--new-tokens", 5, "--batch-size", 7, "--attention", "eager")
    assert code == 0, error
    found = json.loads(out)
    shapes = Shapes.of(load_config(str(configuration)))
    assert found["parameters"] == shapes.parameters
    assert found["weight_bytes"] == 2 * shapes.parameters
    assert (found["memory"], found["devices"]) == (24 * 10**9, 2)
    # 4096 do not fit into its positions.
    assert [row["prompt_tokens"] for row in found["commands"]] == [128] * len(COMMANDS)
    assert (found["attention"], Setting(128).writes_attention(shapes)) == ("eager", False)
    said = needs(shapes, Setting(128, 2, new_tokens=5, batch_size=7, prompts=10, eager=True))
    assert [row["bytes"] for row in found["commands"]] == [device_bytes(shapes, need, 2) for need in said]
    assert [row["flops"] for row in found["commands"]] == [need.flops for need in said]
    assert found["commands"][0]["batch"] == 7
    assert found["commands"][0]["seconds"] == pytest.approx(10 * said[0].flops / 50e12)
    assert found["commands"][-1]["seconds"] == pytest.approx(said[-1].flops / 50e12)


def test_by_default_it_is_this_machine_that_things_must_fit(run, configuration, monkeypatch):
    monkeypatch.setattr("conflictscope.cli.plan._own", lambda: 3 * 2**30)
    code, out, _ = run("plan", configuration, "--json")
    assert (code, json.loads(out)["memory"]) == (0, 3 * 2**30)
    monkeypatch.setattr("conflictscope.cli.plan._own", lambda: None)
    assert_one_sentence(run("plan", configuration), "does not say how much memory it has", "give --memory")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory", "lots"], "not 'lots'"),
        (["--memory", "0"], "not '0'"),
        (["--dtype", "int3"], "The dtype 'int3' is not known"),
        (["--tflops", "0"], "--tflops is a number above 0, not 0"),
        (["--prompt-tokens", "2048"], "do not fit into the 2048 positions"),
    ],
)
def test_wrong_options_are_one_sentence(run, configuration, options, said):
    assert_one_sentence(run("plan", configuration, *options), said)


def test_a_directory_that_is_not_there(run):
    assert_one_sentence(run("plan", "./nothing"), "There is no model directory ./nothing")


def test_a_model_of_an_unknown_architecture_is_planned_with_its_blueprint(run, tmp_path):
    shape: dict[str, Any] = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48}
    config = GPTNeoConfig(**shape, vocab_size=60, attention_types=[[["global"], 3]], bos_token_id=0, eos_token_id=0)
    config.architectures = ["GPTNeoForCausalLM"]
    config.save_pretrained(tmp_path / "neo")
    asked = ["plan", tmp_path / "neo", "--memory", "1GiB", "--json"]
    assert_one_sentence(run(*asked), "GPTNeoForCausalLM is not known")
    fields = {**FIELDS, "output_projection": "attn.attention.out_proj", "mlp_output": "mlp.c_proj"}
    blueprint = {"architecture": "GPTNeoForCausalLM", "like": "GPT2LMHeadModel", "fields": fields}
    (tmp_path / "neo.json").write_text(json.dumps(blueprint))
    code, out, error = run(*asked, "--blueprint", tmp_path / "neo.json")
    assert code == 0, error
    assert json.loads(out)["parameters"] == sum(p.numel() for p in GPTNeoForCausalLM(config).parameters())
