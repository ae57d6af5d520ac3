"""A checkpoint without the feed-forward layers that write nothing answers as the edited model does, and is smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp.errors import UserError
from interp.inputs import encode
from interp.models import load_checkpoint
from interventions.bake import write_folded
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.feedforward import FeedForwardScaling
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.tiny import tiny_conflicts


@pytest.fixture(autouse=True)
def modules_of_checkpoints_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("architecture", ["gpt2", "gpt-neox", "llama", "gemma2", "gemma3", "qwen3"])
def test_it_answers_as_the_edited_model_and_holds_no_weights_of_these_layers(
    tiny_llama, tiny_directories, tmp_path, architecture
):
    source = tiny_directories[architecture]
    network, tokenizer = load_checkpoint(str(source))
    edits = (FeedForwardScaling(((0, 0.0), (1, 0.5), (2, 0.0))), HeadScaling.of([(1, 1)], 0.0))
    file = InterventionFile.of(edits, name="suppressed", model=ModelIdentity.of(network, "tiny"))
    # All tiny models share a tokenizer.
    inputs = encode(tiny_llama, [e.prompt for e in tiny_conflicts()])
    real = inputs["attention_mask"].bool()
    with applied(network, *edits), torch.inference_mode():
        expected = network(**inputs).logits[real]
    write_folded(str(source), file, tmp_path / "whole")
    write_folded(str(source), file, tmp_path / "dropped", drop=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dropped", trust_remote_code=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**inputs).logits[real], expected, rtol=1e-4, atol=1e-4)
    mlps = [name for name, _ in network.named_parameters() if ".mlp." in name]
    left_out = sum(p.numel() for name, p in network.named_parameters() if name in mlps and ".1." not in name)
    assert sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in loaded.parameters()) == left_out
    assert size(tmp_path / "whole") - size(tmp_path / "dropped") >= 4 * left_out
    assert "of these left out | 2 |" in (tmp_path / "dropped" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "dropped")("Lima").input_ids == tokenizer("Lima").input_ids


def test_who_does_not_run_its_module_gets_no_model(tiny_directories, tmp_path):
    source = str(tiny_directories["llama"])
    network, _ = load_checkpoint(source)
    file = InterventionFile.of(
        [FeedForwardScaling(((0, 0.0),))], name="suppressed", model=ModelIdentity.of(network, "tiny")
    )
    write_folded(source, file, tmp_path / "dropped", drop=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dropped", trust_remote_code=False)
    with pytest.raises(UserError, match="contains custom code"):
        load_checkpoint(str(tmp_path / "dropped"))


def test_a_layer_that_still_writes_is_not_left_out(tiny_directories, tmp_path):
    source = str(tiny_directories["gpt2"])
    network, _ = load_checkpoint(source)
    width = network.config.n_embd
    added = Steering(0, torch.ones(width), 1.0, "all", "add")
    for edits in ([FeedForwardScaling(((0, 0.5),))], [FeedForwardScaling(((0, 0.0),)), added]):
        file = InterventionFile.of(edits, name="half", model=ModelIdentity.of(network, "tiny"))
        with pytest.raises(UserError, match=r"half scales no feed-forward layer by 0, .* export without --drop"):
            write_folded(source, file, tmp_path / "dropped", drop=True)
        assert not (tmp_path / "dropped").exists()
