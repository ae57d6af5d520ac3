"""Adapters for llama.cpp, read by the gguf package and counted as llama.cpp counts them."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp.anatomy import Anatomy
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.export.lora import GGUF, write_adapters
from interventions.identity import ModelIdentity
from tests.tiny import CONFIGS

# One head in layer 0, two in layer 2: factors of one rank.
DIAL = TrustDial((DialScale(0, 1, 0.5, 2.0), DialScale(2, 3, 3.0, -1.0), DialScale(2, 0, 1.0, 0.3)))


@pytest.mark.parametrize("architecture", [*CONFIGS])
def test_an_adapter_adds_scaled_heads_as_llama_cpp_counts(tiny_directories, tmp_path, architecture):
    folder = tiny_directories[architecture]
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    identity = ModelIdentity.of(model, str(folder), AutoTokenizer.from_pretrained(folder))
    file = InterventionFile.of([DIAL], name="dial", model=identity)
    out = tmp_path / "out"
    write_adapters(str(folder), file, out, name="dial", trusts=[1.0, 0.5, -1.0, 0.0], gguf=True)
    anatomy = Anatomy(model)
    for trust in (1.0, 0.5, -1.0, 0.0):
        reader: Any = gguf.GGUFReader(out / f"dial@{trust:g}" / GGUF)
        said = {name: reader.get_field(name).contents() for name in reader.fields if not name.startswith("GGUF.")}
        assert said["general.type"] == "adapter"
        assert said["adapter.type"] == "lora"
        assert said["general.architecture"] in gguf.MODEL_ARCH_NAMES.values()
        # Where it is 0, llama.cpp adds the whole.
        assert said["adapter.lora.alpha"] > 0
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        assert tensors.keys() == {f"blk.{i}.attn_output.weight.lora_{x}" for i in (0, 2) for x in "ab"}
        for layer in (0, 2):
            down, up = (tensors[f"blk.{layer}.attn_output.weight.lora_{x}"] for x in "ab")
            added = said["adapter.lora.alpha"] / up.shape[1] * up @ down
            change = torch.zeros(4, 1, 1)
            for place in DIAL.scales:
                if place.layer == layer:
                    change[place.head] = place.at(trust) - 1
            expected = (change * anatomy.output_matrix(layer)).flatten(0, 1).T.detach().numpy()
            np.testing.assert_allclose(added, expected, atol=1e-6)
