"""Models in the forms that people have them: quantised, with adapters, offloaded, inside others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    Qwen2VLConfig,
)

from interp.anatomy import BLUEPRINTS, Anatomy, transformers_model
from interp.attribution.direct_logits import direct_logit_attribution
from interp.attribution.edges import edge_attribution
from interp.attribution.examples import corrupted_partners, scorable
from interp.attribution.path_patching import patching_scores
from interp.attribution.states import last_token_states
from interp.errors import UserError
from interp.fingerprints import fingerprint
from interp.fit import checked
from interp.inputs import encode
from interp.linear_maps import offloaded_weights
from interp.models import load_checkpoint, load_model
from interp.plan import Shapes, weight_bytes
from interventions.bake import fold
from interventions.base import applied
from interventions.export.lora import adapter_of
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from tests.full_forwards import difference, effects
from tests.interp.test_models import write_gguf
from tests.tiny import tiny_conflicts

CONFLICTS = tiny_conflicts()
HEADS = [(0, 0), (0, 3), (1, 2), (2, 1)]
EDIT = HeadScaling.of([(0, 1), (2, 3)], -0.5)
LLAMA = {
    "lora": (peft.LoraConfig, {"target_modules": "all-linear", "r": 4, "lora_alpha": 12}),
    "dora": (peft.LoraConfig, {"target_modules": ["q_proj", "o_proj", "down_proj"], "r": 4, "use_dora": True}),
    "bias": (peft.LoraConfig, {"target_modules": ["o_proj"], "r": 4, "lora_bias": True}),
    "saved": (peft.LoraConfig, {"target_modules": ["v_proj"], "r": 4, "modules_to_save": ["lm_head"]}),
    "unembedding": (peft.LoraConfig, {"target_modules": ["o_proj", "lm_head"], "r": 4}),
    "ia3": (peft.IA3Config, {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}


def network_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_adapter(folder: Path, kind: str, settings: dict[str, Any] | None = None) -> Any:
    """A tiny model in PEFT's wrapper, with an adapter that changes what it computes."""
    config, own = LLAMA[kind] if settings is None else (peft.LoraConfig, settings)
    torch.manual_seed(1)
    wrapped: Any = peft.get_peft_model(network_of(folder), config(task_type="CAUSAL_LM", **own)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.05 if "lm_head" in name else 0.3))
    return wrapped


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def logits_of(model: Any, tokenizer: Any, prompt: str = "The capital of Italy is") -> torch.Tensor:
    with torch.inference_mode():
        return model(**tokenizer(prompt, return_tensors="pt")).logits


def check(model: Any, tolerance: float = 1e-4) -> None:
    """One sweep is a full forward for each head, parts sum to the logits, and edits act where the model reads z."""
    anatomy, (examples, answers) = Anatomy(model), scorable(model, CONFLICTS)
    prompts = [example.prompt for example in examples]
    states = last_token_states(model, prompts)
    replacement = states.z[corrupted_partners(examples, 0)]
    inputs = encode(model, prompts)
    expected = effects(model, inputs, answers, replacement, HEADS)
    scores = patching_scores(anatomy, states, replacement, answers)["logit_diff"]
    assert relative_error(torch.stack([scores[:, at, head] for at, head in HEADS], 1), expected) < tolerance
    with torch.inference_mode():
        clean = difference(model(**inputs).logits, answers)
        assert relative_error(direct_logit_attribution(model, CONFLICTS, name="tiny").total, clean) < tolerance
        with applied(model, EDIT):
            edited = difference(model(**inputs).logits, answers)
    assert relative_error(edited, clean) > 1e-3
    assert relative_error(edited, scaled_by_hand(model, inputs, answers)) < 1e-6


@torch.inference_mode()
def scaled_by_hand(model: Any, inputs: dict[str, torch.Tensor], answers: torch.Tensor) -> torch.Tensor:
    anatomy, handles = Anatomy(model), []
    for layer, head in ((0, 1), (2, 3)):

        def hook(_: Any, given: Any, head: int = head) -> Any:
            z = given[0].clone()
            z[..., head * anatomy.d_head : (head + 1) * anatomy.d_head] *= -0.5
            return z, *given[1:]

        handles.append(anatomy.module("output_projection", layer).register_forward_pre_hook(hook))
    found = difference(model(**inputs).logits, answers)
    for handle in handles:
        handle.remove()
    return found


# Adapters


@pytest.mark.parametrize("kind", LLAMA)
def test_a_model_with_an_adapter_is_taken_apart_as_it_computes(tiny_directories, kind):
    folder = tiny_directories["llama"]
    wrapped = with_adapter(folder, kind)
    model = load_model(wrapped, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert model is transformers_model(wrapped) is wrapped.get_base_model()
    check(model)
    assert relative_error(logits_of(model, model.tokenizer), logits_of(network_of(folder), model.tokenizer)) > 1e-2


def test_an_adapter_of_transposed_weights_too(tiny_directories):
    folder = tiny_directories["gpt2"]
    wrapped = with_adapter(folder, "", {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True})
    check(load_model(wrapped, tokenizer=AutoTokenizer.from_pretrained(folder)))


@pytest.mark.parametrize("kind", LLAMA)
def test_an_adapters_folder_loads_its_model_with_it_and_is_merged_where_weights_are_written(
    tiny_directories, tmp_path, kind
):
    folder = tiny_directories["llama"]
    wrapped = with_adapter(folder, kind)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_model(str(tmp_path / "adapter"), device="cpu")
    expected = logits_of(wrapped, model.tokenizer)
    assert relative_error(logits_of(model, model.tokenizer), expected) < 1e-6
    if kind == "bias":
        with pytest.raises(UserError, match="cannot be merged into the weights"):
            load_checkpoint(str(tmp_path / "adapter"))
        return
    merged, tokenizer = load_checkpoint(str(tmp_path / "adapter"))
    assert relative_error(logits_of(merged, tokenizer), expected) < 1e-5
    assert not any("lora" in name for name, _ in merged.named_modules())
    with applied(model, EDIT):
        expected = logits_of(model, model.tokenizer)
    fold(merged, [EDIT])
    assert relative_error(logits_of(merged, tokenizer), expected) < 1e-5


def test_edits_are_not_written_into_half_of_a_model_with_an_adapter(tiny_directories):
    model = transformers_model(with_adapter(tiny_directories["llama"], "lora"))
    for write in (lambda: fold(model, [EDIT]), lambda: adapter_of(model, EDIT.folded())):
        with pytest.raises(UserError, match=r"layer 0 are .* adapter beside them .* with its adapters merged"):
            write()


def test_an_edit_for_a_model_is_not_for_the_model_with_an_adapter(tiny_directories):
    folder = tiny_directories["llama"]
    plain, wrapped = network_of(folder), with_adapter(folder, "lora")
    ModelIdentity.of(wrapped, "tiny").check(wrapped)
    for one, other in ((plain, wrapped), (wrapped, plain)):
        with pytest.raises(UserError, match="sampled weights differ"):
            ModelIdentity.of(one, "tiny").check(other)


def test_the_fingerprint_sees_how_much_an_adapter_adds(tiny_directories):
    wrapped = with_adapter(tiny_directories["llama"], "lora")
    first = fingerprint(wrapped)
    wrapped.get_base_model().model.layers[1].self_attn.o_proj.scaling["default"] = 1.0
    assert fingerprint(wrapped) != first
    with wrapped.disable_adapter():
        assert fingerprint(wrapped) != first


@pytest.mark.parametrize("config", [peft.OFTConfig, peft.VeraConfig, peft.LoraConfig])
def test_the_fingerprint_sees_which_adapter_acts(tiny_directories, config):
    size: dict[str, Any] = {"oft_block_size": 4, "r": 0} if config is peft.OFTConfig else {"r": 4}
    own = config(task_type="CAUSAL_LM", target_modules=["o_proj"], **size)
    wrapped: Any = peft.get_peft_model(network_of(tiny_directories["llama"]), own)
    wrapped.add_adapter("other", own)
    first = fingerprint(wrapped)
    wrapped.set_adapter("other")
    second = fingerprint(wrapped)
    with wrapped.disable_adapter():
        assert len({first, second, fingerprint(wrapped)}) == 3


def test_an_adapter_of_the_embedding_counts_for_the_models_identity(tiny_directories):
    folder = tiny_directories["llama"]
    wrapped = with_adapter(folder, "", {"target_modules": ["embed_tokens"], "r": 4})
    ModelIdentity.of(wrapped, "tiny").check(wrapped)
    with pytest.raises(UserError, match="sampled weights differ"):
        ModelIdentity.of(network_of(folder), "tiny").check(wrapped)


def saved_adapter(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    with_adapter(folder, "lora").save_pretrained(out)
    tensors = load_file(out / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(out)


def test_an_adapters_weights_that_are_missing_or_too_many_are_one_sentence(tiny_directories, tmp_path):
    key = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"
    lacking = saved_adapter(tiny_directories["llama"], tmp_path / "lacking", lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=r"did not load: it lacks base_model.*layers\.1\.self_attn\.o_proj\.lora_B"):
        load_model(lacking, device="cpu")
    other = key.replace("layers.1", "layers.7")
    many = saved_adapter(tiny_directories["llama"], tmp_path / "many", lambda ts: ts.update({other: ts[key].clone()}))
    with pytest.raises(UserError, match=r"no place for: base_model.*layers\.7"):
        load_model(many, device="cpu")


def test_an_adapter_that_names_no_model_or_none_that_is_there_is_one_sentence(tiny_directories, tmp_path):
    with_adapter(tiny_directories["llama"], "lora").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    cases = (
        (None, "does not name the model"),
        (str(tmp_path), "does not name the model"),
        ("/gone/model", "There is no model directory /gone"),
    )
    for base, message in cases:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=message):
            load_model(str(tmp_path), device="cpu")


def test_an_adapter_of_another_model_is_one_sentence(tiny_directories, tmp_path):
    with_adapter(tiny_directories["llama"], "lora").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    others = {"qwen3": "another shape: it has base_model", "gpt2": "does not fit its model"}
    for other, message in others.items():
        base = {"base_model_name_or_path": str(tiny_directories[other])}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | base))
        with pytest.raises(UserError, match=message):
            load_model(str(tmp_path), device="cpu")


def test_tokens_before_each_prompt_are_refused(tiny_directories, tmp_path):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped: Any = peft.get_peft_model(network_of(tiny_directories["llama"]), config)
    with pytest.raises(UserError, match="tokens of its own before each prompt"):
        load_model(wrapped, tokenizer=AutoTokenizer.from_pretrained(tiny_directories["llama"]))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokens of its own before each prompt"):
        load_model(str(tmp_path), device="cpu")


# Quantised


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["8bit", "4bit"])
def test_a_model_that_bitsandbytes_quantised_works_through_its_own_modules(tiny_directories, tmp_path, options):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "plain"
    # Weights are quantised by 64.
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, vocab_size=1096
    )
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_directories["llama"]).save_pretrained(folder)
    quantised = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32, device_map={"": "cpu"}
    )
    quantised.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    model: Any = load_model(str(tmp_path), device="cpu")
    assert not Anatomy(model).has_plain_output(0)
    # Eight bits are those of activations too, where rounding takes one of two neighbours.
    rounding = 0.1 if "load_in_8bit" in options else 1e-4
    check(model, rounding)
    assert relative_error(logits_of(model, model.tokenizer), logits_of(quantised, model.tokenizer)) < 1e-6
    assert fingerprint(model) == fingerprint(quantised) != fingerprint(network_of(folder))
    planned = weight_bytes(Shapes.of(quantised.config), 4)
    assert planned == pytest.approx(quantised.get_memory_footprint(), rel=0.02)
    with pytest.raises(UserError, match=r"quantised, offloaded .*; load the model unquantised"):
        fold(model, [EDIT])
    if any(getattr(module, "support_avx512bf16_for_cpu", False) for module in quantised.modules()):
        # Where the processor has AVX-512 for bfloat16, four bits are packed for a kernel without a gradient.
        with pytest.raises(UserError, match="No gradient passes the quantised maps"):
            edge_attribution(model, CONFLICTS, name="tiny")
    else:
        scores = edge_attribution(model, CONFLICTS, name="tiny", steps=1).heads.values
        plain: Any = load_model(quantised.dequantize(dtype=torch.float32), tokenizer=model.tokenizer)
        expected = edge_attribution(plain, CONFLICTS, name="tiny", steps=1).heads.values
        assert relative_error(scores, expected) < rounding
    assert checked(model, BLUEPRINTS["LlamaForCausalLM"]).n_heads
    # A file that was made of the plain model goes with the quantised one.
    ModelIdentity.of(network_of(folder), "tiny").check(model)


# Elsewhere


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_an_offloaded_model_gives_the_same(tiny_directories, tmp_path, offload):
    folder = tiny_directories["gemma3"]
    plain, elsewhere = (load_model(str(folder), device="cpu") for _ in range(2))
    options = {} if offload is cpu_offload else {"offload_dir": str(tmp_path)}
    offload(elsewhere, execution_device=torch.device("cpu"), **options)
    anatomy = Anatomy(elsewhere)
    assert anatomy.module("output_projection", 0).weight.is_meta
    check(elsewhere)
    expected = [last_token_states(model, [CONFLICTS.examples[0].prompt]).final for model in (plain, elsewhere)]
    assert relative_error(*expected) < 1e-6
    first = fingerprint(elsewhere)
    assert first == fingerprint(plain)
    if offload is cpu_offload:
        offloaded_weights(elsewhere)["model.layers.1.mlp.down_proj.weight"].mul_(3)
        assert fingerprint(elsewhere) != first
        return
    ModelIdentity.of(plain, "tiny").check(elsewhere)


def test_a_device_map_spreads_a_model(tiny_directories, tmp_path):
    folder = str(tiny_directories["llama"])
    places: dict[str, Any] = {"model.layers.1": "disk", "model.layers.2": "disk"}
    rest = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = load_model(folder, device_map=rest | places)
    assert Anatomy(model).module("output_projection", 1).weight.is_meta
    check(model)
    with pytest.raises(UserError, match="give device or device_map, not both"):
        load_model(folder, device="cpu", device_map="auto")


# Inside others


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava(text: Any) -> Any:
    vision = {"model_type": "clip_vision_model", **VISION}
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)


def gemma(text: Any) -> Any:
    return Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=3)


@pytest.mark.parametrize(("architecture", "whole"), [("llama", llava), ("mistral", llava), ("gemma3", gemma)])
def test_the_text_model_of_a_vision_language_checkpoint_is_taken(tiny_directories, tmp_path, architecture, whole):
    folder = tiny_directories[architecture]
    text = network_of(folder).config
    torch.manual_seed(2)
    seeing: Any = AutoModelForImageTextToText.from_config(whole(text)).eval()
    seeing.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    assert type(model) is type(network_of(folder))
    assert relative_error(logits_of(model, tokenizer), logits_of(seeing, tokenizer)) < 1e-6
    check(model)


def test_a_vision_language_model_without_a_text_model_of_its_own_is_one_sentence(tmp_path):
    Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Qwen2VLForConditionalGeneration is a vision-language model whose text model"):
        load_model(str(tmp_path), device="cpu")


def test_a_gguf_file_loads(tiny_directories, tmp_path):
    write_gguf(tmp_path / "my model.gguf", tiny_directories["llama"])
    model = load_model(str(tmp_path / "my model.gguf"), device="cpu")
    plain = network_of(tiny_directories["llama"])
    assert relative_error(logits_of(model, model.tokenizer), logits_of(plain, model.tokenizer)) < 1e-6
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UserError, match=r"weights\.bin is a file; give the directory"):
        load_model(str(tmp_path / "weights.bin"))


def test_paths_are_written_as_people_write_them(tiny_directories, tmp_path, monkeypatch):
    shutil.copytree(tiny_directories["llama"], tmp_path / "my model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_model("~/my model", device="cpu").config.num_hidden_layers == 3
    assert load_model(str(tmp_path), subfolder="my model", device="cpu").config.num_hidden_layers == 3
    for path in ("C:\\models\\llama", "D:/models/llama", "..\\llama", "~/nothing"):
        with pytest.raises(UserError, match="There is no model directory"):
            load_model(path)


def test_a_loaded_model_is_taken_with_its_tokenizer(tiny_directories):
    network, tokenizer = load_checkpoint(str(tiny_directories["llama"]))
    with pytest.raises(UserError, match="carries no tokenizer"):
        load_model(network)
    model = load_model(network, tokenizer=tokenizer, batch_tokens=10)
    assert model is network
    assert model.tokenizer is tokenizer
    assert not any(parameter.requires_grad for parameter in model.parameters())
    options: list[dict[str, Any]] = [
        {"device": "cpu"},
        {"dtype": "bfloat16"},
        {"attention": "eager"},
        {"revision": "a"},
    ]
    for option in options:
        with pytest.raises(UserError, match="loaded already stays as it is"):
            load_model(network, tokenizer=tokenizer, **option)
    with pytest.raises(UserError, match="has its own tokenizer"):
        load_model(tiny_directories["llama"], tokenizer=tokenizer)
    with pytest.raises(UserError, match="has no revisions"):
        load_model(tiny_directories["llama"], revision="main")
    nothing: Any = None
    with pytest.raises(UserError, match="A NoneType is no model"):
        load_model(nothing)
    with pytest.raises(UserError, match="Of 0 tokens no batch"):
        load_model(network, tokenizer=tokenizer, batch_tokens=0)
