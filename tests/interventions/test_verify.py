"""What is exported is compared with hooks; what was tampered with is found."""

import json
import shutil
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from interp.errors import UserError
from interp.models import load_model
from interventions.bake import write_folded
from interventions.config import InterventionFile
from interventions.export.llama_cpp import LlamaCpp
from interventions.export.lora import write_adapters
from interventions.export.server import Server
from interventions.export.vectors import write_vectors
from interventions.export.verify import by_llama_cpp, edits_in, left_out, prompts_in, traps, verified
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.interventions.test_lora import DIAL, PRUNED
from tests.tiny import tiny_conflicts

PROMPTS = [example.prompt for example in tiny_conflicts()][:4]


@pytest.fixture
def folder(tiny_directories) -> str:
    return str(tiny_directories["llama"])


@pytest.fixture
def model(folder) -> Any:
    return load_model(folder, device="cpu", attention=None)


@pytest.fixture
def exported(folder, model, tmp_path):
    """Two edits as adapters and one as a checkpoint, in one folder."""
    identity = ModelIdentity.of(model, folder, AutoTokenizer.from_pretrained(folder))
    dial = InterventionFile.of([DIAL], name="dial", model=identity)
    write_adapters(folder, dial, tmp_path / "out", name="dial", trusts=[1.0, -0.5], prompts=PROMPTS)
    pruned = InterventionFile.of([PRUNED], name="pruned", model=identity)
    write_folded(folder, pruned, tmp_path / "out" / "baked", prompts=PROMPTS)
    return tmp_path / "out"


def found(model, out) -> dict[tuple[str, str], Any]:
    findings = verified(model, edits_in(out), PROMPTS, max_new_tokens=6)
    return {(finding.engine, finding.edit): finding for finding in findings}


def test_every_form_is_compared_with_hooks(model, exported):
    assert prompts_in(edits_in(exported)) == PROMPTS
    before = {name: values.clone() for name, values in model.state_dict().items()}
    findings = found(model, exported)
    assert sorted(findings) == [
        ("PEFT", "dial@-0.5"),
        ("PEFT", "dial@1"),
        ("PEFT, mixed batch", "dial@-0.5"),
        ("PEFT, mixed batch", "dial@1"),
        ("PEFT, mixed batch", "none"),
        ("checkpoint", "baked"),
        ("weights of the adapter", "dial@-0.5"),
        ("weights of the adapter", "dial@1"),
    ]
    assert all(finding.holds and finding.equal == len(PROMPTS) for finding in findings.values())
    # The model is as it was.
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_directions_are_compared_with_hooks(folder, model, tmp_path):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    identity = ModelIdentity.of(model, folder, AutoTokenizer.from_pretrained(folder))
    edit = Steering(1, vector, 2.0, "all")
    file = InterventionFile.of([edit, Steering(2, vector, -1.0, "all")], name="edit", model=identity)
    for form in ("gguf", "peft"):
        write_vectors(folder, file, tmp_path / "out" / form, form=form, prompts=PROMPTS)
    findings = found(model, tmp_path / "out")
    assert sorted(findings) == [
        ("PEFT", "peft"),
        ("PEFT, mixed batch", "none"),
        ("PEFT, mixed batch", "peft"),
        ("numbers of the control vector", "gguf"),
        ("weights of the adapter", "peft"),
    ]
    assert all(finding.holds for finding in findings.values())
    assert ["lora_bias" in said for said in traps(tmp_path / "out" / "peft")] == [True]
    # Each direction counts.
    less = InterventionFile.of([edit], name="edit", model=identity)
    for form in ("gguf", "peft"):
        less.save(tmp_path / "out" / form / "intervention.json")
    wrong = {engine for (engine, _), finding in found(model, tmp_path / "out").items() if not finding.holds}
    assert {"PEFT", "numbers of the control vector", "weights of the adapter"} <= wrong


def test_a_wrong_number_is_found_and_the_others_hold(model, exported):
    path = exported / "dial@1" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if ".lora_A." in name)
    path.unlink()
    save_file({**tensors, name: -3 * tensors[name]}, path)
    findings = found(model, exported)
    wrong = findings["weights of the adapter", "dial@1"]
    assert not wrong.holds
    assert wrong.logits > 1e-2
    assert all(prompt in PROMPTS and ours != theirs for prompt, ours, theirs in wrong.differing)
    assert findings["PEFT", "dial@1"].logits == pytest.approx(wrong.logits, rel=1e-3)
    assert findings["checkpoint", "baked"].holds
    assert findings["PEFT", "dial@-0.5"].holds


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_what_llama_cpp_reads_is_compared_by_its_numbers(tiny_directories, tmp_path, architecture):
    folder = str(tiny_directories[architecture])
    model: Any = load_model(folder, device="cpu", attention=None)
    file = InterventionFile.of([DIAL], name="dial", model=ModelIdentity.of(model, folder, model.tokenizer))
    write_adapters(folder, file, tmp_path / "out", name="dial", trusts=[1.0, -0.5], prompts=PROMPTS, gguf=True)
    findings = found(model, tmp_path / "out")
    assert findings["weights of adapter.gguf", "dial@1"].holds
    assert findings["weights of adapter.gguf", "dial@-0.5"].holds
    shutil.copy(tmp_path / "out" / "dial@1" / "adapter.gguf", tmp_path / "out" / "dial@-0.5" / "adapter.gguf")
    findings = found(model, tmp_path / "out")
    assert not findings["weights of adapter.gguf", "dial@-0.5"].holds
    assert findings["weights of the adapter", "dial@-0.5"].holds


@pytest.mark.parametrize(
    ("python", "base", "sentence"),
    [
        ("no python", True, "Could not run no python"),
        (sys.executable, True, "has no llama_cpp; pip install llama-cpp-python"),
        (sys.executable, False, "is not a file; give the base model in GGUF"),
    ],
)
def test_a_llama_cpp_that_is_not_there_is_one_sentence(model, exported, tmp_path, python, base, sentence):
    (exported / "dial@1" / "adapter.gguf").touch()
    path = tmp_path / "base.gguf"
    if base:
        path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=sentence):
        list(by_llama_cpp(model, LlamaCpp(Path(python), path), edits_in(exported), PROMPTS, 1))


def test_edits_without_a_file_for_llama_cpp_are_told(model, exported, tmp_path):
    with pytest.raises(UserError, match="No edit here has a file for llama"):
        list(by_llama_cpp(model, LlamaCpp(Path(sys.executable), tmp_path), edits_in(exported), PROMPTS, 1))


def test_an_adapter_of_another_base_is_refused(exported, tiny_directories):
    other = load_model(str(tiny_directories["mistral"]), device="cpu", attention=None)
    with pytest.raises(UserError, match="is for"):
        found(other, exported)
    same_shape = load_model(str(tiny_directories["llama"]), device="cpu", attention=None)
    with torch.no_grad():
        same_shape.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
    with pytest.raises(UserError, match="is for"):
        found(same_shape, exported)


def changed(exported, tmp_path, **changes):
    folder = tmp_path / "changed"
    shutil.copytree(exported / "dial@1", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank_pattern": {"model.layers.0.self_attn.o_proj": 8}}, "rank_pattern: llama.cpp"),
        ({"alpha_pattern": {"model.layers.0.self_attn.o_proj": 8}}, "alpha_pattern: llama.cpp"),
        ({"r": 4}, "have rank 16, but r is 4"),
        ({"use_rslora": True}, "use_rslora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "vLLM refuses"),
        ({"r": 1024}, "more than vLLM takes, 512"),
        ({"lora_alpha": 0}, "alpha is 0"),
        ({"target_modules": ["o_proj"]}, "full names"),
    ],
)
def test_traps_are_told(exported, tmp_path, changes, sentence):
    assert list(traps(exported / "dial@1")) == []
    assert any(sentence in told for told in traps(changed(exported, tmp_path, **changes)))


def test_folders_without_an_edit_or_with_a_damaged_one_are_one_sentence(exported, tmp_path, model):
    with pytest.raises(UserError, match=r"holds no intervention.json"):
        edits_in(tmp_path / "nothing")
    folder = changed(exported, tmp_path, peft_type="IA3")
    with pytest.raises(UserError, match="no LoRA adapter"):
        list(traps(folder))
    folder = exported / "dial@1"
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="Could not read"):
        found(model, folder)


def test_an_adapter_without_alpha_or_half_a_pair_is_one_sentence(model, exported, tmp_path):
    with pytest.raises(UserError, match="no numbers for lora_alpha and r"):
        found(model, changed(exported, tmp_path, lora_alpha=None))
    path = exported / "dial@1" / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(UserError, match="one of two factors"):
        found(model, exported / "dial@1")


def test_what_is_not_compared_is_told(exported, monkeypatch):
    monkeypatch.setattr("interventions.export.verify._has_peft", lambda: False)
    assert "PEFT is not installed" in next(left_out(edits_in(exported)))
    config = exported / "baked" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {}}))
    with pytest.raises(UserError, match="without --drop"):
        list(left_out(edits_in(exported)))


def test_a_server_that_is_none_of_openai_s_is_one_sentence():
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="lists no models"):
            Server(f"http://127.0.0.1:{http.server_port}")
        http.shutdown()
    for url in ("http://127.0.0.1:1", "http://127.0.0.1:port"):
        with pytest.raises(UserError, match="does not answer"):
            Server(url)


def test_an_adapter_of_modules_that_the_model_lacks_is_refused(model, exported):
    path = exported / "dial@1" / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file({name.replace("layers.0.", "layers.7."): values for name, values in tensors.items()}, path)
    with pytest.raises(UserError, match=r"model.layers.7.self_attn.o_proj, which this model does not have"):
        found(model, exported / "dial@1")


def test_a_head_in_a_file_is_bound_to_its_model(folder, model, tmp_path):
    identity = ModelIdentity.of(model, folder)
    file = InterventionFile.of([HeadScaling.of([(0, 0)], 0.5)], name="one", model=identity)
    assert [str(path) for path in write_adapters(folder, file, tmp_path / "one", name="one")] == [str(tmp_path / "one")]
    assert edits_in(tmp_path / "one")[0].is_adapter
