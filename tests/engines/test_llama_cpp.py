"""Logits and tokens of a real llama.cpp against hooks: adapters of heads, a dial by its scale, and control vectors.

`make engines` runs this alone, since it needs that engine: CONFLICTSCOPE_LLAMA_PYTHON names the interpreter of an
environment with llama-cpp-python. The model is written here as a GGUF file in float32, without a tokenizer: llama.cpp
is asked for token ids.
"""

import os
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from conflictscope.cli.verify import recorded
from interp.generation import gathered_logits, generated, next_logits
from interp.inputs import token_ids
from interp.models import load_model
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.export.llama_cpp import LlamaCpp, Run
from interventions.export.lora import GGUF, write_adapters
from interventions.export.vectors import CONTROL_VECTOR, write_vectors
from interventions.export.verify import edits_in, verified
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering

PYTHON = os.environ["CONFLICTSCOPE_LLAMA_PYTHON"]
MODEL, TOKENS = "smollm2-135m", 12
LAYERS, HEADS, KEY_HEADS, WIDTH = 30, 9, 3, 576


CONTEXT, MEMORY = [(23, 0), (23, 1), (23, 2), (23, 7)], [(23, 4), (24, 4), (29, 0)]
DIAL = TrustDial(
    (
        *(DialScale(*head, memory=0.2, context=1.8) for head in CONTEXT),
        *(DialScale(*head, memory=1.8, context=0.2) for head in MEMORY),
    )
)
# Layers with different numbers of heads: factors of all are padded to one rank.
PRUNED = HeadScaling((*(ScaledHead(*head, 0.0) for head in MEMORY), ScaledHead(3, 8, -1.0)))


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(MODEL, device="cpu", attention=None)


@pytest.fixture(scope="module")
def prompts(model):
    return token_ids(model.tokenizer, recorded(None))


def write_model(model, path):
    """Write a Llama as llama.cpp's converter does: rows of queries and keys in another order."""
    config = model.config
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = weight
        if heads := HEADS if ".q_proj." in name else KEY_HEADS if ".k_proj." in name else 0:
            rows = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), rows.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_model(model, folder / "model.gguf")
    return LlamaCpp(Path(PYTHON), folder / "model.gguf")


def hooked(model, prompts, *edits):
    """Next logits and greedy tokens, up to the end of the text."""
    texts = [model.tokenizer.decode(tokens) for tokens in prompts]
    with applied(model, *edits):
        logits = gathered_logits(next_logits(model, texts), len(texts))
        sequences, _ = generated(model, prompts, TOKENS, whole=True)
    return logits, sequences.tolist()


def assert_same_tokens(model, found, expected):
    end = model.generation_config.eos_token_id
    for ours, theirs in zip(expected, found, strict=True):
        length = ours.index(end) + 1 if end in ours else len(ours)
        assert theirs[:length] == ours[:length]


def saved(model, *edits):
    return InterventionFile.of(edits, name="edit", model=ModelIdentity.of(model, MODEL))


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Adapters by name."""
    folder = tmp_path_factory.mktemp("adapters")
    dials = write_adapters(
        MODEL, saved(model, DIAL), folder / "dial", name="dial", trusts=[1.0, 0.5, -1.0, 0.0], gguf=True
    )
    (pruned,) = write_adapters(MODEL, saved(model, PRUNED), folder / "pruned", name="pruned", gguf=True)
    return {path.name: path / GGUF for path in (*dials, pruned)}


def test_adapters_do_what_hooks_do(model, prompts, adapters, llama):
    """Each alone; half a dial by its file and by the scale that a request asks for; and a dial at rest."""
    runs = {
        "none": (Run(), ()),
        "pruned": (Run(adapters["pruned"]), (PRUNED,)),
        "dial@-1": (Run(adapters["dial@-1"]), (DIAL.at(-1.0),)),
        "dial@0.5": (Run(adapters["dial@0.5"]), (DIAL.at(0.5),)),
        "dial@1, scale 0.5": (Run(adapters["dial@1"], 0.5), (DIAL.at(0.5),)),
        "dial@0": (Run(adapters["dial@0"]), ()),
    }
    logits, tokens = llama.asked([run for run, _ in runs.values()], prompts, TOKENS, n_layers=LAYERS)
    plain, _ = hooked(model, prompts)
    for number, (name, (_, edits)) in enumerate(runs.items()):
        expected, greedy = hooked(model, prompts, *edits)
        difference = (logits[number] - expected).abs().max()
        print(f"{name}: {difference:.1e}, the edit itself {(plain - expected).abs().max():.1f}")  # noqa: T201
        assert difference < 1e-3
        assert_same_tokens(model, tokens[number], greedy)
        assert not edits or (plain - expected).abs().max() > 1


def test_a_direction_acts_after_the_block_that_its_tensor_names(model, prompts, llama, tmp_path):
    """Also after the last block; next to it, it does something else."""
    vector = 2 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    runs, edits = [], []
    for layers in ((1,), (12,), (LAYERS - 1,), (3, 20)):
        edits.append([Steering(layer, vector.roll(layer), 1.0, "all") for layer in layers])
        out = tmp_path / str(layers)
        write_vectors(MODEL, saved(model, *edits[-1]), out, form="gguf")
        tensors = gguf.GGUFReader(out / CONTROL_VECTOR).tensors
        runs.append(
            Run(directions={int(one.name.removeprefix("direction.")): torch.tensor(one.data) for one in tensors})
        )
    logits, _ = llama.asked(runs, prompts[:4], 1, n_layers=LAYERS)
    for found, edit in zip(logits, edits, strict=True):
        expected, _ = hooked(model, prompts[:4], *edit)
        before, _ = hooked(model, prompts[:4], *(Steering(e.layer - 1, e.vector, 1.0, "all") for e in edit))
        print(f"{(found - expected).abs().max():.1e}, a layer earlier {(before - expected).abs().max():.1f}")  # noqa: T201
        assert (found - expected).abs().max() < 1e-3
        assert (before - expected).abs().max() > 0.1


def test_verify_asks_llama_cpp(model, llama, adapters, tmp_path):
    """By the command's own way: adapters and a control vector, alone and without an edit."""
    direction = Steering(12, torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), 1.0, "all")
    write_vectors(MODEL, saved(model, direction), tmp_path / "vector", form="gguf", prompts=recorded(None)[:4])
    edits = [*edits_in(adapters["dial@1"].parents[1]), *edits_in(tmp_path / "vector")]
    findings = verified(model, edits, recorded(None)[:4], max_new_tokens=TOKENS, llama=llama)
    found = {finding.edit: finding for finding in findings if finding.engine == "llama.cpp"}
    assert found.keys() == {"none", "vector", "dial@1", "dial@0.5", "dial@-1", "dial@0"}
    assert all(finding.holds and finding.logits is not None and finding.equal == 4 for finding in found.values())
