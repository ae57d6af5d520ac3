"""Control vectors against the gguf package's reader and repeng's conventions, biases against PEFT."""

import json
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel

from interp.errors import UserError
from interp.inputs import encode
from interp.models import load_checkpoint
from interventions.base import applied
from interventions.config import DOCUMENT, InterventionFile
from interventions.export.gguf import architecture_name
from interventions.export.vectors import CONTROL_VECTOR, write_vectors
from interventions.feedforward import FeedForwardScaling
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.interventions import test_lora
from tests.interventions.test_lora import file_of, hooked, logits, plain
from tests.tiny import CONFIGS

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))
EDITS = (
    Steering(1, VECTOR, 2.0, "all"),
    Steering(2, VECTOR.flip(0), -1.5, "all"),
    Steering(1, VECTOR.roll(3), 0.5, "all"),
)
POST_NORM = ["gemma2", "gemma3"]


inputs = test_lora.inputs


# PEFT


@pytest.mark.parametrize("architecture", sorted(CONFIGS.keys() - set(POST_NORM)))
def test_peft_does_what_the_hooks_do(tiny_directories, inputs, tmp_path, architecture):
    folder = tiny_directories[architecture]
    edits = (*EDITS, Steering(0, VECTOR, 1.0, "all"))
    write_vectors(str(folder), file_of(folder, *edits), tmp_path / "out", form="peft")
    model = PeftModel.from_pretrained(plain(folder), tmp_path / "out")
    expected = hooked(folder, inputs, *edits)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(plain(folder), inputs), atol=1e-2)


def test_peft_does_what_the_hooks_do_on_the_real_model(smollm2, tmp_path):
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    file = InterventionFile.of(
        [Steering(12, vector, 0.5, "all"), Steering(29, vector, 0.5, "all")],
        name="edit",
        model=ModelIdentity.of(smollm2, "smollm2-135m"),
    )
    write_vectors("smollm2-135m", file, tmp_path / "out", form="peft")
    network, _ = load_checkpoint("smollm2-135m")
    tokens = encode(smollm2, ["The capital of Japan is Lima. The capital of Japan is", "Paris is"])
    before = logits(network, tokens)
    with applied(network, file):
        expected = logits(network, tokens)
    found = logits(PeftModel.from_pretrained(network, tmp_path / "out"), tokens)
    assert (found - expected).abs().max() < 1e-4
    assert (before - expected).abs().max() > 1


@pytest.mark.parametrize("architecture", POST_NORM)
def test_a_bias_before_a_norm_is_refused(tiny_directories, tmp_path, architecture):
    folder = tiny_directories[architecture]
    with pytest.raises(UserError, match=r"a norm follows the MLP; write it for llama.cpp with --vector gguf"):
        write_vectors(str(folder), file_of(folder, *EDITS), tmp_path / "out", form="peft")
    assert list(tmp_path.iterdir()) == []


# GGUF


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_a_control_vector_says_what_llama_cpp_and_repeng_ask_of_it(tiny_directories, tmp_path, architecture):
    folder = tiny_directories[architecture]
    write_vectors(str(folder), file_of(folder, *EDITS), tmp_path / "out", form="gguf")
    reader: Any = gguf.GGUFReader(tmp_path / "out" / CONTROL_VECTOR)
    said = {name: reader.get_field(name).contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert said["general.architecture"] == "controlvector"
    assert said["controlvector.layer_count"] == 2
    assert said["controlvector.model_hint"] in gguf.MODEL_ARCH_NAMES.values()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == {"direction.1", "direction.2"}
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    np.testing.assert_allclose(tensors["direction.1"].data, 2 * VECTOR + 0.5 * VECTOR.roll(3), rtol=1e-6)
    np.testing.assert_allclose(tensors["direction.2"].data, -1.5 * VECTOR.flip(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "expected"), [("mistral", "llama"), ("gpt-neox", "gptneox"), ("gemma3", "gemma3")]
)
def test_architectures_have_the_names_that_llama_cpp_gives_them(tiny_directories, architecture, expected):
    assert architecture_name(plain(tiny_directories[architecture])) == expected


@pytest.mark.parametrize(
    ("architecture", "instead"), [("llama", "write it for PEFT with --vector peft, or fit it"), ("gemma2", "; fit it")]
)
def test_a_direction_after_layer_0_is_refused(tiny_directories, tmp_path, architecture, instead):
    folder = tiny_directories[architecture]
    file = file_of(folder, Steering(0, VECTOR, 1.0, "all"), *EDITS)
    with pytest.raises(UserError, match=f"llama.cpp adds no direction after layer 0.*{instead}"):
        write_vectors(str(folder), file, tmp_path / "out", form="gguf")
    assert list(tmp_path.iterdir()) == []


# Both


def test_the_folder_says_what_it_was_made_of(tiny_directories, tmp_path):
    folder = tiny_directories["qwen2"]
    file = file_of(folder, *EDITS)
    write_vectors(str(folder), file, tmp_path / "out", form="gguf", strength=-0.5, prompts=["What?"])
    assert InterventionFile.load(tmp_path / "out" / DOCUMENT).digest == file.scaled(-0.5).digest
    assert json.loads((tmp_path / "out" / "prompts.json").read_text()) == ["What?"]
    card = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert "# edit" in card
    assert "| layers after which a direction is added | 1, 2 |" in card


@pytest.mark.parametrize("form", ["gguf", "peft"])
@pytest.mark.parametrize(
    ("edit", "strength", "message"),
    [
        (HeadScaling.of([(0, 1)], 0.0), 1.0, "scales heads, .* write it with --lora, or a checkpoint with --bake"),
        (FeedForwardScaling(((1, 0.5),)), 1.0, "scales layers, .* write it with --bake"),
        (EDITS[0], 0.0, "adds no direction as it stands"),
        (Steering(1, VECTOR), 1.0, "cannot be folded into weights"),
        (Steering(1, VECTOR, 1.0, "all", "replace"), 1.0, "cannot be folded into weights"),
    ],
    ids=["heads", "layers", "nothing", "last token", "replaced"],
)
def test_what_is_no_direction_at_all_tokens_is_refused(tiny_directories, tmp_path, form, edit, strength, message):
    folder = tiny_directories["llama"]
    with pytest.raises(UserError, match=message):
        write_vectors(str(folder), file_of(folder, edit), tmp_path / "out", form=form, strength=strength)
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_another_model_is_refused(tiny_directories, tmp_path):
    file = file_of(tiny_directories["llama"], *EDITS)
    with pytest.raises(UserError, match=r"is for .*, but the model has architecture"):
        write_vectors(str(tiny_directories["mistral"]), file, tmp_path / "out", form="peft")
