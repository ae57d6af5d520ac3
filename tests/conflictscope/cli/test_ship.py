import json
from dataclasses import MISSING, fields

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conflictscope.cli.options import NamedModel
from conflictscope.serve.engine import Engine
from conflictscope.serve.jobs import Done
from conflictscope.serve.requests import CompletionRequest
from interp.bridges import load_bridge
from interp.generation import greedy_texts
from interp.inputs import encode
from interp.models import decode_plainly, load_checkpoint
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.feedforward import FeedForwardScaling
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.runtime import apply
from interventions.steering import Steering
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence
from tests.tiny import FEW, tiny_conflicts

run = test_cli.run
PROMPTS = [e.prompt for e in tiny_conflicts()][:5]
DIAL = TrustDial((DialScale(1, 1, -1.0, 3.0), DialScale(2, 2, 2.0, -2.0), DialScale(2, None, 0.5, 1.5)), 1.0)


def saved(folder, model, *parts, **about):
    path = folder / "edit.json"
    identity = ModelIdentity.of(model, about.pop("model", "tiny"))
    InterventionFile.of(parts, name="edit", model=identity, **about).save(path)
    return path


# Adapters


def test_an_adapter_is_exported_and_verified(run, tiny_directories, tmp_path):
    name = str(tiny_directories["mistral"])
    path = saved(tmp_path, load_checkpoint(name)[0], TrustDial((DialScale(1, 1, -1.0, 3.0),), 0.5))
    (tmp_path / "asked.txt").write_text("What?\nWhere is it?\n")
    settings = ["--trust", "1", "--trust", "-0.5"]
    assert run("export", name, path, tmp_path / "out", "--lora", *settings, "--prompts", tmp_path / "asked.txt")[0] == 0
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["edit@-0.5", "edit@1"]
    code, printed, _ = run("verify", tmp_path / "out", "--model", name, "--json", "--max-new-tokens", "4")
    findings = json.loads(printed)["findings"]
    assert code == 0
    assert len(findings) == 2 * 3 + 1
    assert all(finding["equal"] == 2 for finding in findings)
    # Of which one is then another's.
    config = tmp_path / "out" / "edit@1" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 0}))
    code, printed, told = run("verify", tmp_path / "out", "--model", name, "--max-new-tokens", "4")
    assert code == 1
    assert "alpha is 0" in told
    assert "weights of the adapter" in printed


def test_forms_that_do_not_go_together_are_refused(run, tiny_directories, tmp_path):
    name = str(tiny_directories["mistral"])
    path = saved(tmp_path, load_checkpoint(name)[0], DIAL)
    assert_one_sentence(run("export", name, path, tmp_path / "out", "--lora", "--bake"), "three forms")
    assert_one_sentence(run("export", name, path, tmp_path / "out", "--gguf"), "--lora as well")
    assert_one_sentence(run("export", name, path, tmp_path / "out", "--vector", "peft"), "--bake instead")
    assert_one_sentence(run("export", name, path, tmp_path / "out", "--trust", "1", "--trust", "0"), "Several settings")
    assert_one_sentence(run("export", name, path, tmp_path / "out", "--lora"), "--bake instead")
    assert_one_sentence(run("verify", tmp_path / "out"), "holds no intervention.json")
    assert not (tmp_path / "out").exists()


# The same tokens from four places


def four_places(folder, model_name, path, prompts, out, tokens):
    """Greedy texts from the bridge with hooks, the plain model with the runtime, the baked one, and the server."""
    bridge = load_bridge(model_name, device="cpu")
    file = InterventionFile.load(path)
    with applied(bridge, file):
        hooked = greedy_texts(bridge.original_model, bridge.tokenizer, prompts, max_new_tokens=tokens)
    plain, tokenizer = load_checkpoint(model_name)
    decode_plainly(plain)
    with apply(plain, path, tokenizer=tokenizer):
        applied_texts = greedy_texts(plain, tokenizer, prompts, max_new_tokens=tokens)
    baked = AutoModelForCausalLM.from_pretrained(out).eval()
    decode_plainly(baked)
    baked_texts = greedy_texts(baked, AutoTokenizer.from_pretrained(out), prompts, max_new_tokens=tokens)
    engine = Engine(plain, tokenizer, name="model", interventions={"edit": file})
    found = {}
    # Together: which ends first is not said.
    asked = CompletionRequest(prompt=prompts, max_tokens=tokens)
    engine.submit(engine.jobs([tokenizer(prompt)["input_ids"] for prompt in prompts], asked, found.__setitem__))
    engine.close()
    served = [found[number].text for number in range(len(prompts)) if isinstance(found[number], Done)]
    inputs = encode(bridge, prompts[:1])
    with torch.inference_mode(), applied(bridge, file):
        distance = (bridge.original_model(**inputs).logits - baked(**inputs).logits).abs().max()
    return {"hooked": hooked, "applied": applied_texts, "baked": baked_texts, "served": served}, float(distance)


@pytest.mark.parametrize("architecture", FEW)
def test_four_places_give_the_same_tokens(run, tiny_directories, tmp_path, architecture):
    name = str(tiny_directories[architecture])
    path = saved(tmp_path, load_checkpoint(name)[0], DIAL, HeadScaling.of([(0, 0)], 0.0))
    assert run("export", name, path, tmp_path / "baked", "--bake")[0] == 0
    texts, distance = four_places(tmp_path, name, path, PROMPTS, tmp_path / "baked", 8)
    assert texts["applied"] == texts["hooked"]
    assert texts["baked"] == texts["hooked"]
    assert texts["served"] == texts["hooked"]
    assert distance < 1e-4


def test_four_places_give_the_same_tokens_on_the_real_model(run, smollm2, tmp_path):
    heads = HeadScaling((ScaledHead(23, 4, 0.0), ScaledHead(23, 5, 0.0), ScaledHead(24, 4, 0.0), ScaledHead(5, 1, 1.3)))
    path = saved(tmp_path, smollm2, heads, FeedForwardScaling(((20, 1.1),)))
    assert run("export", "smollm2-135m", path, tmp_path / "baked", "--bake")[0] == 0
    prompts = ["Fact: the capital of Japan is Lima. Fact: the capital of Japan is"]
    texts, distance = four_places(tmp_path, "smollm2-135m", path, prompts, tmp_path / "baked", 4)
    assert texts["applied"] == texts["hooked"] == texts["baked"] == texts["served"]
    assert "Lima" in texts["hooked"][0]
    assert distance < 1e-4


# Commands


def test_generate_needs_a_model_and_a_prompt(run):
    code, _, error = run("generate", "--config", "edit.json")
    assert code == 2
    assert "MODEL" in error.upper()
    assert fields(NamedModel)[0].default is MISSING


def test_generate_shows_both_answers_side_by_side(run, tiny_directories, tmp_path):
    name = str(tiny_directories["llama"])
    model, tokenizer = load_checkpoint(name)
    path = saved(tmp_path, model, TrustDial(DIAL.scales))
    code, out, _ = run(
        "generate", name, PROMPTS[0], PROMPTS[1], "--config", path, "--trust", "1", "--max-new-tokens", 3
    )
    assert code == 0
    expected = greedy_texts(model, tokenizer, PROMPTS[:2], max_new_tokens=3)
    with applied(model, DIAL):
        expected += greedy_texts(model, tokenizer, PROMPTS[:2], max_new_tokens=3)
    assert all(text.strip() in out for text in expected)


def test_inspect_says_what_is_in_a_file_of_every_kind(run, tiny_llama, tmp_path):
    parts = [
        HeadScaling((ScaledHead(1, 2, 0.0, tuple([0.5] * 8)),)),
        FeedForwardScaling(((1, 0.5),)),
        TrustDial((DialScale(1, 1, 0.0, 2.0),), 0.25),
        ConflictGate("attention", 0, torch.ones(32), 0.0, 1.5, (Steering(1, torch.ones(32), 2.0),)),
    ]
    rate = {"value": 0.125, "low": 0.1, "high": 0.2, "n": 8}
    measured = {"unedited": {"memory_rate": rate, "context_rate": rate}, "test": {"context_rate": rate}}
    path = saved(
        tmp_path,
        tiny_llama,
        *parts,
        towards="context",
        provenance={"method": "by_hand", "seed": 3, "versions": {"torch": "9.9"}},
        measured=measured,
    )
    code, out, _ = run("inspect", path)
    assert code == 0
    for said in (
        "1 head around their means: 1.2 x 0",
        "feed-forward layers: 1 x 0.5",
        "a dial of 1 scales, at +0.25",
        "behind a gate that reads the attention of layer 0, above 1.500",
        "direction after layer 1 (add, strength 2, last_prompt tokens)",
        "LlamaForCausalLM, 3 layers x 4 heads",
        "shape, weights, tokenizer",
        "model.layers.1.self_attn.o_proj",
        "method by_hand, seed 3",
        "torch 9.9",
        "0.125 [0.100, 0.200]",
    ):
        assert said in out


def test_export_writes_an_edit_at_a_strength(run, tiny_directories, tmp_path):
    name = str(tiny_directories["llama"])
    path = saved(tmp_path, load_checkpoint(name)[0], HeadScaling.of([(1, 1)], 0.0), measured={"rate": 1.0})
    assert run("export", name, path, tmp_path / "half.json", "--strength", 0.5)[0] == 0
    half = InterventionFile.load(tmp_path / "half.json")
    assert half.build() == [HeadScaling.of([(1, 1)], 0.5)]
    assert half.measured == {}
    assert half.provenance.details == {"scaled_by": 0.5}


def test_mistakes_get_one_sentence(run, tiny_directories, tiny_llama, tmp_path):
    name = str(tiny_directories["llama"])
    path = saved(tmp_path, tiny_llama, HeadScaling.of([(1, 1)], 0.0))
    assert_one_sentence(run("inspect", tmp_path / "none.json"), "There is no", "none.json")
    assert_one_sentence(run("generate", name, "a", "--config", path, "--trust", 1), "holds no trust dials")
    assert_one_sentence(run("generate", name, "a", "--config", path, "--dtype", "float8"), "'float8' is not known")
    assert_one_sentence(run("generate", str(tiny_directories["gpt2"]), "a", "--config", path), "is for tiny")
    assert_one_sentence(run("serve", path, "--model", name, "--host", "0.0.0.0"), "give --api-key too")
    assert_one_sentence(run("serve", path, path, "--model", name), "Two interventions are called edit")
    record = json.loads(path.read_text()) | {"version": 99}
    (tmp_path / "future.json").write_text(json.dumps(record))
    assert_one_sentence(run("inspect", tmp_path / "future.json"), "has version 99", "pip install --upgrade")
