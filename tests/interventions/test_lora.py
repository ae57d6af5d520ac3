"""Adapters against PEFT, which applies them by itself."""

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp.errors import Caution, UserError
from interp.inputs import encode
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.export.lora import adapter_of, vllm_rank, write_adapters
from interventions.feedforward import FeedForwardScaling
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.tiny import CONFIGS, tiny_conflicts

DIAL = TrustDial(
    (
        DialScale(0, 1, memory=0.5, context=2.0),
        DialScale(2, 3, memory=3.0, context=-1.0),
        DialScale(2, 0, memory=1.0, context=0.3),
    )
)
PRUNED = HeadScaling.of([(0, 0), (1, 2), (1, 3)], 0.0)


def plain(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def file_of(folder, *edits):
    model, tokenizer = plain(folder), AutoTokenizer.from_pretrained(folder)
    return InterventionFile.of(edits, name="edit", model=ModelIdentity.of(model, str(folder), tokenizer))


@pytest.fixture
def inputs(tiny_llama):
    return encode(tiny_llama, [example.prompt for example in tiny_conflicts()])


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def hooked(folder, inputs, *edits):
    model = plain(folder)
    with applied(model, *edits):
        return logits(model, inputs)


@pytest.mark.parametrize("architecture", [*CONFIGS])
@pytest.mark.parametrize("edit", [PRUNED, DIAL.at(0.4)], ids=["pruned", "dial"])
def test_peft_does_what_the_hooks_do(tiny_directories, inputs, tmp_path, architecture, edit):
    folder = tiny_directories[architecture]
    (out,) = write_adapters(str(folder), file_of(folder, edit), tmp_path / "out", name="edit")
    model = PeftModel.from_pretrained(plain(folder), out)
    expected = hooked(folder, inputs, edit)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(plain(folder), inputs), atol=1e-2)
    # Merged it is what folding makes.
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_transformers_loads_it_by_itself(tiny_directories, inputs, tmp_path, architecture):
    folder = tiny_directories[architecture]
    write_adapters(str(folder), file_of(folder, PRUNED), tmp_path / "out", name="edit")
    model = plain(folder)
    model.load_adapter(str(tmp_path / "out"), adapter_name="pruned")
    torch.testing.assert_close(logits(model, inputs), hooked(folder, inputs, PRUNED), rtol=1e-4, atol=1e-4)
    model.disable_adapters()
    torch.testing.assert_close(logits(model, inputs), hooked(folder, inputs), rtol=1e-4, atol=1e-4)


def test_several_edits_are_one_adapter(tiny_directories, inputs, tmp_path):
    folder = tiny_directories["llama"]
    model, tokenizer = plain(folder), AutoTokenizer.from_pretrained(folder)
    edits = [PRUNED, DIAL.at(1.0), HeadScaling.of([(2, 3), (1, 1)], 3.0)]
    file = InterventionFile.of(edits, name="three", model=ModelIdentity.of(model, "llama", tokenizer))
    write_adapters(str(folder), file, tmp_path / "out", name="three")
    found = logits(PeftModel.from_pretrained(plain(folder), tmp_path / "out"), inputs)
    torch.testing.assert_close(found, hooked(folder, inputs, *edits), rtol=1e-4, atol=1e-4)


def test_settings_of_a_dial_share_their_tensors(tiny_directories, inputs, tmp_path):
    folder = tiny_directories["mistral"]
    trusts = [-1.0, 1.0, 0.5, 0.0]
    folders = write_adapters(
        str(folder), file_of(folder, DIAL), tmp_path / "out", name="dial", trusts=trusts, prompts=["What?"]
    )
    assert [path.name for path in folders] == ["dial@-1", "dial@1", "dial@0.5", "dial@0"]
    model = PeftModel.from_pretrained(plain(folder), folders[0], adapter_name="setting 0")
    for number, path in enumerate(folders[1:], 1):
        model.load_adapter(str(path), adapter_name=f"setting {number}")
    for number, trust in enumerate(trusts):
        model.set_adapter(f"setting {number}")
        expected = hooked(folder, inputs, DIAL.at(trust))
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    kept = [(path / "adapter_model.safetensors").stat().st_ino for path in folders]
    assert kept[1] == kept[2] == kept[3] != kept[0]
    assert json.loads((folders[2] / "prompts.json").read_text()) == ["What?"]
    assert InterventionFile.load(folders[2]).dial.trust == 0.5


def test_the_layout_is_the_one_that_all_engines_read(tiny_directories, tmp_path):
    folder = tiny_directories["llama"]
    write_adapters(str(folder), file_of(folder, DIAL.at(0.5)), tmp_path / "out", name="dial")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    adapter = adapter_of(plain(folder), DIAL.at(0.5).folded())
    assert config["r"] == adapter.rank == 2 * 8
    assert config["lora_alpha"] == config["r"]
    assert config["bias"] == "none"
    assert not config.keys() & {"rank_pattern", "alpha_pattern", "lora_bias"}
    assert config["target_modules"] == ["model.layers.0.self_attn.o_proj", "model.layers.2.self_attn.o_proj"]
    # The layer with one head is padded to the rank of the layer with two.
    assert {factors.down.shape for factors in adapter.factors.values()} == {(16, 32)}
    assert {factors.up.shape for factors in adapter.factors.values()} == {(32, 16)}
    assert not adapter.factors["model.layers.0.self_attn.o_proj"].down[8:].any()
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("| trust, from -1 (memory) to 1 (context) | +0.5 |", "| rank | 16 |", "`--max-lora-rank` | 16 |"):
        assert line in card


def test_factors_keep_the_dtype_that_holds_them_exactly(tiny_directories):
    model = plain(tiny_directories["llama"]).bfloat16()
    exact = adapter_of(model, HeadScaling.of([(0, 0)], 0.25).folded())
    rounded = adapter_of(model, HeadScaling.of([(0, 0)], 0.3).folded())
    path = "model.layers.0.self_attn.o_proj"
    assert exact.factors[path].down.dtype == exact.factors[path].up.dtype == torch.bfloat16
    assert rounded.factors[path].down.dtype == torch.float32
    assert rounded.factors[path].down[0, 0] == torch.tensor(0.3 - 1)
    assert torch.equal(rounded.factors[path].up, model.model.layers[0].self_attn.o_proj.weight[:, :8].float())


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (FeedForwardScaling(((1, 0.5),)), "feed-forward layers .layer 1.*--bake"),
        (Steering(1, torch.ones(32), tokens="all"), "after layer 1.*--vector"),
        (Steering(1, torch.ones(32)), "cannot be folded"),
        (HeadScaling((ScaledHead(1, 2, 0.0, (1.0,) * 8),)), "Head 1.2 is scaled around a mean"),
        (HeadScaling.of([(1, 2)], 1.0), "changes nothing"),
        (DIAL, "changes nothing"),
    ],
)
def test_what_no_adapter_holds_is_refused_with_what_works(tiny_directories, tmp_path, edit, sentence):
    folder = tiny_directories["llama"]
    with pytest.raises(UserError, match=sentence):
        write_adapters(str(folder), file_of(folder, edit), tmp_path / "out", name="edit")
    assert not (tmp_path / "out").exists()


def test_other_models_and_settings_are_refused(tiny_directories, tmp_path):
    llama, mistral = tiny_directories["llama"], tiny_directories["mistral"]
    file = file_of(llama, DIAL)
    with pytest.raises(UserError, match="is for"):
        write_adapters(str(mistral), file, tmp_path / "out", name="dial", trusts=[1.0])
    with pytest.raises(UserError, match="given twice"):
        write_adapters(str(llama), file, tmp_path / "out", name="dial", trusts=[1.0, 1.0])
    with pytest.raises(UserError, match="between -1"):
        write_adapters(str(llama), file, tmp_path / "out", name="dial", trusts=[2.0])
    one_sided = file_of(llama, TrustDial((DialScale(0, 1, context=0.0),)))
    with pytest.raises(UserError, match="that side"):
        write_adapters(str(llama), one_sided, tmp_path / "out", name="dial", trusts=[-0.5])
    assert not (tmp_path / "out").exists()


def test_ranks_above_an_engines_cap_are_told_with_their_heads(tiny_directories, tmp_path, monkeypatch):
    folder = tiny_directories["llama"]
    monkeypatch.setattr("interventions.export.lora.VLLM_RANKS", (1, 8))
    with pytest.warns(Caution, match=r"rank 16.*1 heads of a layer.*2.0, 2.3.*--max-heads-per-layer 1"):
        write_adapters(str(folder), file_of(folder, DIAL.at(1.0)), tmp_path / "out", name="dial")


def test_ranks_are_those_that_vllm_has():
    assert [vllm_rank(rank) for rank in (1, 8, 24, 320, 512, 513)] == [1, 8, 32, 320, 512, None]


def test_quantised_weights_are_refused(tiny_directories):
    model = plain(tiny_directories["llama"])
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(
        torch.zeros(32, 48, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UserError, match="unquantised"):
        adapter_of(model, PRUNED.folded())
    with pytest.raises(UserError, match="Layer 9 does not exist"):
        adapter_of(plain(tiny_directories["llama"]), HeadScaling.of([(9, 0)], 0.0).folded())
