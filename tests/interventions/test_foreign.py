"""Files of other programs, written here as those write them: read as what they do, or refused in a sentence."""

import json
import math
import re
import struct
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.inputs import encode
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.export.gguf import finish
from interventions.export.lora import write_adapters
from interventions.export.vectors import write_vectors
from interventions.foreign import imported
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.interventions.test_config_fuzz import assert_one_sentence
from tests.tiny import CONFIGS, tiny_conflicts

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))
DIRECTIONS = (Steering(1, VECTOR, 1.0, "all"), Steering(2, VECTOR.flip(0), 1.0, "all"))
DIAL = TrustDial((DialScale(0, 1, 0.5, 2.0), DialScale(2, 3, 3.0, -1.0), DialScale(2, 0, 1.0, 0.3)))
FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def plain(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def file_of(folder, *edits):
    model, tokenizer = plain(folder), AutoTokenizer.from_pretrained(folder)
    return InterventionFile.of(edits, name="edit", model=ModelIdentity.of(model, str(folder), tokenizer))


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.fixture
def inputs(tiny_llama):
    return encode(tiny_llama, [example.prompt for example in tiny_conflicts()])


@pytest.fixture
def take(tiny_plain):
    """Imports a file for the tiny model of an architecture."""

    def taken(path, architecture="llama", **options):
        network = tiny_plain(architecture)
        return imported(path, network, network.tokenizer, model=architecture, **options)

    return taken


def control_vector(path, directions, *, hint="llama", architecture="controlvector"):
    """Write what repeng 0.4 writes, in its order."""
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for name, values in directions.items():
        writer.add_tensor(f"direction.{name}" if isinstance(name, int) else name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rows(*layers, width=32, dtype: Any = np.float32):
    generator = np.random.default_rng(0)
    return {layer: generator.standard_normal(width).astype(dtype) for layer in layers}


def digest(*parts):
    """Of a file that holds these interventions for any model."""
    any_model = ModelIdentity(name="any", architecture="LlamaForCausalLM", n_layers=3, n_heads=4, d_head=8, d_model=32)
    return InterventionFile.of(parts, name="any", model=any_model).digest


# Round trips


@pytest.mark.parametrize(("form", "file"), [("gguf", "control_vector.gguf"), ("peft", "adapter_model.safetensors")])
def test_exported_directions_are_the_same_when_they_are_imported(tiny_directories, tmp_path, take, form, file):
    folder = tiny_directories["llama"]
    write_vectors(str(folder), file_of(folder, *DIRECTIONS), tmp_path / "out", form=form)
    found = take(tmp_path / "out" / file)
    assert found.digest == file_of(folder, *DIRECTIONS).digest
    assert found.model.name == "llama"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter.gguf"])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_exported_heads_are_found_by_the_weights(tiny_directories, tmp_path, take, architecture, file):
    folder = tiny_directories[architecture]
    edits = (HeadScaling.of([(0, 0), (1, 2)], 0.0), DIAL.at(0.4))
    write_adapters(str(folder), file_of(folder, *edits), tmp_path / "out", name="edit", gguf=True)
    (found,) = take(tmp_path / "out" / file, architecture).build()
    assert found.head_scales == pytest.approx(
        {(0, 0): 0.0, (0, 1): 1.4, (1, 2): 0.0, (2, 0): 0.72, (2, 3): 0.2}, abs=1e-6
    )
    assert found.head_scales[1, 2] == 0


@pytest.mark.parametrize("alpha", [2.0, 0.5, 0.0])
def test_the_alpha_of_an_adapter_for_llama_cpp_counts_as_there(tiny_plain, tmp_path, take, alpha):
    """Over the rank; where it is 0, the whole product is added. Written as llama.cpp's converter does."""
    heads = Anatomy(tiny_plain("llama")).output_matrix(1).detach().numpy()
    writer = gguf_adapter(tmp_path / "adapter.gguf", alpha)
    # Rank 8: what head 2 reads, and its output matrix.
    writer.add_tensor("blk.1.attn_output.weight.lora_a", np.eye(32, dtype=np.float32)[16:24])
    writer.add_tensor("blk.1.attn_output.weight.lora_b", np.ascontiguousarray(heads[2].T))
    finish(writer)
    (found,) = take(tmp_path / "adapter.gguf").build()
    assert found.head_scales == pytest.approx({(1, 2): 1 + (alpha / 8 if alpha else 1)}, abs=1e-6)


def gguf_adapter(path, alpha=8.0, *, kind="adapter"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    return writer


@pytest.mark.parametrize(
    ("kind", "alpha", "tensors", "sentence"),
    [
        ("model", 8.0, {}, "no LoRA adapter"),
        ("adapter", math.nan, {}, "says no alpha"),
        ("adapter", 8.0, {"blk.9.attn_output.weight.lora_a": (8, 32)}, "which this model does not have"),
        ("adapter", 8.0, {"blk.1.attn_output.weight.lora_a": (8, 32)}, "no two float32 factors"),
        (
            "adapter",
            8.0,
            {"blk.1.ffn_down.weight.lora_a": (8, 64), "blk.1.ffn_down.weight.lora_b": (32, 8)},
            "no edit of heads",
        ),
        (
            "adapter",
            8.0,
            {"blk.1.attn_output.weight.lora_a": (8, 32), "blk.1.attn_output.weight.lora_b": (32, 8)},
            "no scaling of this model's heads",
        ),
        ("adapter", 8.0, {}, "changes nothing"),
    ],
)
def test_an_adapter_for_llama_cpp_that_is_none_of_heads_is_refused(tmp_path, take, kind, alpha, tensors, sentence):
    writer = gguf_adapter(tmp_path / "adapter.gguf", alpha, kind=kind)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    finish(writer)
    with pytest.raises(UserError, match=sentence):
        take(tmp_path / "adapter.gguf")


def test_an_adapter_in_half_precision_is_found_by_the_weights(tiny_directories, tmp_path, take):
    folder = tiny_directories["llama"]
    write_adapters(str(folder), file_of(folder, HeadScaling.of([(1, 2)], 0.5)), tmp_path / "out", name="edit")
    path = tmp_path / "out" / "adapter_model.safetensors"
    save_file({name: values.bfloat16() for name, values in load_file(path).items()}, path)
    (found,) = take(path).build()
    assert found.head_scales == pytest.approx({(1, 2): 0.5}, abs=2**-8)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_heads_are_found_in_factors_of_any_form(tiny_plain, tiny_directories, tmp_path, inputs, take, rank_stabilised):
    """An adapter that PEFT itself writes, whose factors are turned by a random matrix."""
    model = plain(tiny_directories["llama"])
    config = LoraConfig(
        r=11, lora_alpha=3, use_rslora=rank_stabilised, target_modules=["o_proj"], layers_to_transform=[1]
    )
    wrapped: Any = get_peft_model(model, config)
    projection = wrapped.base_model.model.model.layers[1].self_attn.o_proj
    turn = torch.randn(11, 8, generator=torch.Generator().manual_seed(1))
    down, weight = projection.lora_A["default"].weight, projection.base_layer.weight
    with torch.no_grad():
        down.zero_()
        down[:, 16:24] = turn
        projection.lora_B["default"].weight.copy_(weight[:, 16:24] @ torch.linalg.pinv(turn) * -0.7)
    scale = 1 - 0.7 * 3 / (math.sqrt(11) if rank_stabilised else 11)
    wrapped.save_pretrained(tmp_path / "out")
    (found,) = take(tmp_path / "out").build()
    assert found.head_scales == pytest.approx({(1, 2): scale}, abs=1e-5)
    with applied(tiny_plain("llama"), found):
        torch.testing.assert_close(
            logits(tiny_plain("llama"), inputs), logits(wrapped.eval(), inputs), rtol=1e-4, atol=1e-4
        )


def test_an_exported_folder_is_its_intervention_file(tiny_directories, tmp_path, take):
    folder = tiny_directories["llama"]
    file = file_of(folder, DIAL)
    write_adapters(str(folder), file, tmp_path / "out", name="dial", trusts=[0.5])
    found = take(tmp_path / "out")
    assert found.digest == file.dialed(0.5).digest
    assert found.dial.trust == 0.5
    with pytest.raises(UserError, match="is taken whole; give no --layers"):
        take(tmp_path / "out", layers=[2])
    with pytest.raises(UserError, match="the model has architecture MistralForCausalLM"):
        take(tmp_path / "out", "mistral")


# What the files of others mean


def test_a_vector_of_repeng_acts_after_the_blocks_that_it_names(tmp_path, take):
    directions = rows(2, 0, 1)
    found = take(control_vector(tmp_path / "happy.gguf", directions))
    assert found.name == "happy"
    expected = [Steering(layer, torch.tensor(directions[layer]), 1.0, "all") for layer in range(3)]
    assert found.digest == digest(*expected)


def test_provenance_says_where_it_came_from(tmp_path, take):
    path = control_vector(tmp_path / "happy.gguf", rows(1))
    provenance = take(path).provenance
    assert provenance.method == "imported"
    assert provenance.details["file"] == "happy.gguf"
    assert provenance.details["format"] == "GGUF control vector"
    assert re.fullmatch("[0-9a-f]{64}", str(provenance.details["sha256"]))


def test_strength_and_layers_choose_how_much_of_a_file_is_taken(tmp_path, take):
    directions = rows(0, 1, 2)
    path = control_vector(tmp_path / "happy.gguf", directions)
    found = take(path, strength=-2.5, layers=[1])
    assert found.digest == digest(Steering(1, torch.tensor(directions[1]), -2.5, "all"))
    with pytest.raises(UserError, match="changes nothing in layer 7; it does in 0, 1, 2: give those"):
        take(path, layers=[1, 7])


def test_the_strength_of_scaled_heads_is_how_far_they_go(tiny_directories, tmp_path, take):
    folder = tiny_directories["llama"]
    edit = HeadScaling((ScaledHead(0, 1, 0.5), ScaledHead(2, 3, 2.0)))
    write_adapters(str(folder), file_of(folder, edit), tmp_path / "out", name="edit")
    path = tmp_path / "out" / "adapter_model.safetensors"
    (found,) = take(path, strength=2.0, layers=[2]).build()
    assert found.head_scales == pytest.approx({(2, 3): 3.0})


@pytest.mark.parametrize("hint", ["mistral", "llama", None])
def test_the_names_that_repeng_and_llama_cpp_give_an_architecture_are_known(tmp_path, take, hint):
    path = control_vector(tmp_path / "happy.gguf", rows(1), hint=hint)
    assert take(path, "mistral").model.architecture == "MistralForCausalLM"


# What is refused


@pytest.mark.parametrize(
    ("directions", "options", "message"),
    [
        (rows(1, width=31), {}, r"after layer 1 .* of shape \(31,\), but .* takes 32 float32 numbers"),
        ({1: np.ones((2, 16), np.float32)}, {}, r"of shape \(2, 16\)"),
        (rows(1, dtype=np.float16), {}, "is not float32"),
        ({1: np.array([math.nan] * 32, np.float32)}, {}, "has numbers that are not finite"),
        ({1: np.array([math.inf] * 32, np.float32)}, {}, "has numbers that are not finite"),
        (rows(3), {}, "after layer 3, but this model has layers 0 to 2"),
        ({1: np.zeros(32, np.float32)}, {"strength": math.nan}, "finite"),
        ({}, {}, "changes nothing"),
        (rows("direction.x"), {}, "has a tensor 'direction.x', not direction.N"),
        (rows("direction.-1"), {}, "has a tensor 'direction.-1', not direction.N"),
        (rows("direction.1", "direction.01"), {}, "two directions for layer 1"),
        (rows("blk.0.ffn_up.weight"), {}, "not direction.N"),
        (rows(1), {"hint": "qwen2"}, "made for a model of type 'qwen2', but this is of type 'llama'"),
        (rows(1), {"architecture": "llama"}, "no LoRA adapter; give one, or a control vector"),
        (rows(1), {"architecture": "qwen2"}, "GGUF file of 'qwen2', not of 'controlvector' or 'llama'"),
    ],
)
def test_a_control_vector_that_does_not_fit_is_refused(tmp_path, take, directions, options, message):
    strength = options.pop("strength", 1.0)
    path = control_vector(tmp_path / "bad.gguf", directions, **options)
    with pytest.raises(UserError, match=message) as refused:
        take(path, strength=strength)
    assert_one_sentence(str(refused.value))


@pytest.mark.parametrize("name", ["absent.gguf", "empty.gguf", "text.gguf", "folder", "notes.bin", "a\x00b"])
def test_what_is_no_file_of_an_edit_is_refused(tmp_path, take, name):
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("a direction")
    (tmp_path / "notes.bin").write_bytes(b"\x80\x04")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"give|fetch"):
        take(tmp_path / name)


def adapter(folder, tensors, **config):
    folder.mkdir()
    record = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["x"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(record))
    save_file(
        {f"base_model.model.{name}": values for name, values in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def factors(module, d_in=32, d_out=32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return {
        f"{module}.lora_A.weight": scale * torch.randn(2, d_in, generator=generator),
        f"{module}.lora_B.weight": torch.randn(d_out, 2, generator=generator),
    }


O_PROJ, DOWN = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"
BIAS = {f"{DOWN}.lora_B.bias": torch.ones(32)}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (factors(O_PROJ), {}, "is no scaling of this model's heads; merge it into a checkpoint"),
        (factors("model.layers.1.self_attn.q_proj"), {}, r"q_proj is no edit of heads; merge"),
        (factors(DOWN, d_in=48), {}, "down_proj is no edit of heads"),
        (factors("model.layers.9.self_attn.o_proj"), {}, "layers.9.self_attn.o_proj is no edit of heads"),
        (factors(O_PROJ, d_in=31), {}, r"by a matrix of shape \(32, 31\), but this model's has \(32, 32\)"),
        (factors(O_PROJ) | {f"{O_PROJ}.lora_magnitude_vector": torch.ones(32)}, {}, "so that it is no edit of heads"),
        (factors(O_PROJ), {"alpha_pattern": {"o_proj": 3}}, "has a alpha_pattern"),
        (factors(O_PROJ), {"lora_alpha": "two"}, "has no number for lora_alpha"),
        (factors(O_PROJ), {"lora_alpha": None}, "has no number for lora_alpha"),
        (factors(O_PROJ), {"lora_alpha": 0}, "changes nothing"),
        (factors(O_PROJ, scale=math.nan), {}, "has numbers that are not finite"),
        (factors(DOWN, 48, 32, 0.0) | {f"{DOWN}.lora_B.bias": torch.ones(31)}, {}, r"of shape \(31,\)"),
        (BIAS, {}, "are no pair of matrices"),
        (factors(O_PROJ, scale=0.0) | {f"{O_PROJ}.lora_B.bias": torch.ones(32)}, {}, "o_proj is no edit of heads"),
    ],
)
def test_an_adapter_that_is_no_such_edit_is_refused(tmp_path, take, tensors, config, message):
    with pytest.raises(UserError, match=message) as refused:
        take(adapter(tmp_path / "adapter", tensors, **config))
    assert_one_sentence(str(refused.value))


def test_a_bias_before_a_norm_is_refused(tmp_path, take):
    with pytest.raises(UserError, match="no bias in Gemma2ForCausalLM"):
        take(adapter(tmp_path / "adapter", factors(DOWN, 48, 32, 0.0) | BIAS), "gemma2")


def test_an_adapter_for_other_weights_is_refused(tiny_directories, tmp_path, take):
    """Of the same shape: by its own weights an adapter scales no head of another model."""
    folder = tiny_directories["mistral"]
    write_adapters(str(folder), file_of(folder, HeadScaling.of([(1, 2)], 0.5)), tmp_path / "out", name="edit")
    network = plain(tiny_directories["llama"])
    with torch.no_grad():
        network.model.layers[1].self_attn.o_proj.weight.normal_()
    with pytest.raises(UserError, match="is no scaling of this model's heads"):
        imported(tmp_path / "out" / "adapter_config.json", network, None, model="llama")


# Damaged files


def judged(take, path):
    """See that a file is refused in a sentence or is valid."""
    try:
        found = take(path)
    except UserError as error:
        assert_one_sentence(str(error))
        return "refused"
    assert all(values.isfinite().all() for values in found._values.values())
    return "accepted"


@FUZZ
@given(data=st.data())
def test_damaged_control_vectors_are_refused_or_valid(tmp_path, take, data):
    content = bytearray(control_vector(tmp_path / "whole.gguf", rows(1, 2)).read_bytes())
    # The header takes the first 200 bytes or so; the rest is numbers.
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 260))
        wild = st.sampled_from([0, 1, 8, 9, 255, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])
        size = data.draw(st.sampled_from("BIQ"))
        value = data.draw(wild) % 2 ** (8 * struct.calcsize(size))
        content[place : place + struct.calcsize(size)] = struct.pack(f"<{size}", value)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(bytes(content[: data.draw(st.sampled_from([None, 0, 3, 23, 150, 250, 400]))]))
    judged(take, path)


def test_a_control_vector_cut_anywhere_is_refused(tmp_path, take):
    content = control_vector(tmp_path / "whole.gguf", rows(1, 2)).read_bytes()
    path = tmp_path / "damaged.gguf"
    seen = set()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        seen.add(judged(take, path))
    assert seen == {"refused"}


@FUZZ
@given(data=st.data())
def test_damaged_adapters_are_refused_or_valid(tmp_path, take, data):
    folder = tmp_path / "adapter"
    if not folder.exists():
        adapter(folder, factors(DOWN, 48, 32, 0.0) | BIAS, lora_bias=True)
        (tmp_path / "whole.json").write_bytes((folder / "adapter_config.json").read_bytes())
        (tmp_path / "whole").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    for name, whole in (("adapter_config.json", "whole.json"), ("adapter_model.safetensors", "whole")):
        content = bytearray((tmp_path / whole).read_bytes())
        for _ in range(data.draw(st.integers(0, 2))):
            content[data.draw(st.integers(0, min(len(content), 500) - 1))] = data.draw(
                st.sampled_from(b'\x00\xff{}[]",:019ae')
            )
        (folder / name).write_bytes(bytes(content[: data.draw(st.sampled_from([None, None, None, 0, 7, 60]))]))
    judged(take, folder)


def test_biases_that_peft_itself_writes_are_directions(tiny_directories, tmp_path, inputs, take, tiny_plain):
    config = LoraConfig(r=1, lora_alpha=3, lora_bias=True, target_modules=["dense_4h_to_h"], layers_to_transform=[0, 2])
    wrapped: Any = get_peft_model(plain(tiny_directories["gpt-neox"]), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.copy_(VECTOR)
    wrapped.save_pretrained(tmp_path / "out")
    found = take(tmp_path / "out", "gpt-neox")
    assert found.digest == digest(Steering(0, 3 * VECTOR, 1.0, "all"), Steering(2, 3 * VECTOR, 1.0, "all"))
    model = PeftModel.from_pretrained(plain(tiny_directories["gpt-neox"]), tmp_path / "out")
    with applied(tiny_plain("gpt-neox"), found):
        torch.testing.assert_close(logits(tiny_plain("gpt-neox"), inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)
