import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from examples import run_in_onnxruntime as example
from interp.errors import UserError
from interp.models import load_checkpoint, save_checkpoint
from interventions.bake import fold
from interventions.base import applied
from interventions.heads import HeadScaling
from tests.tiny import tiny_conflicts

PRUNED = HeadScaling.of([(0, 1), (2, 3)], 0.0)
PROMPTS = [conflict.prompt for conflict in tiny_conflicts()][:2]
N_TOKENS = 8


class Run(NamedTuple):
    checkpoint: Path
    out: Path
    output: str
    exit_code: int


def run(checkpoint, out):
    app = typer.Typer()
    app.command()(example.main)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return CliRunner().invoke(app, [str(checkpoint), str(out), *prompts, "--max-new-tokens", str(N_TOKENS)])


@pytest.fixture(scope="module")
def folded(tiny_directories, tmp_path_factory) -> Run:
    """A checkpoint with two heads pruned, put through the example once: exporting takes its time."""
    root = tmp_path_factory.mktemp("onnx")
    model, tokenizer = load_checkpoint(str(tiny_directories["llama"]))
    fold(model, [PRUNED])
    save_checkpoint(model, tokenizer, root / "folded")
    result = run(root / "folded", root / "out")
    return Run(root / "folded", root / "out", result.output, result.exit_code)


@pytest.fixture
def session(folded):
    return onnxruntime.InferenceSession(folded.out / "model.onnx", providers=["CPUExecutionProvider"])


def hooked(folder, ids) -> Any:
    """From the plain model with hooks: the logits of the tokens ``ids`` and of those that follow, and the latter."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.tensor([ids])
    with torch.inference_mode(), applied(model, PRUNED):
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=N_TOKENS)
        return model(text).logits[0].numpy(), text[0, len(ids) :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_onnx_runtime_says_what_the_hooked_model_says(folded, session, tiny_directories, prompt):
    model, tokenizer = load_checkpoint(str(tiny_directories["llama"]))
    ids = tokenizer(prompt)["input_ids"]
    logits, tokens = hooked(tiny_directories["llama"], ids)
    found = example.in_onnxruntime(session, ids, [tokenizer.eos_token_id], N_TOKENS)
    assert found.tokens == tokens
    np.testing.assert_allclose(found.prompt_logits, logits[: len(ids)], rtol=0, atol=1e-4)
    with torch.inference_mode():
        unedited = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(found.prompt_logits - unedited).max() > 0.1


def test_rows_and_tokens_read_at_once_are_free(session, tiny_directories):
    ids = np.random.default_rng(0).integers(1, 200, (3, 11))
    _, n_layers, _, n_heads, _, d_head = session.get_inputs()[1].shape
    cache = np.zeros((2, n_layers, 3, n_heads, 0, d_head), np.float32)
    found = []
    for part in np.split(ids, [4, 9, 10], axis=1):
        logits, cache = session.run(None, {"input_ids": part, "cache": cache})
        found.append(logits)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_directories["llama"]).eval()
    with torch.inference_mode(), applied(model, PRUNED):
        expected = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=1e-4)


def test_a_text_ends_with_its_end_token(folded, session, tiny_directories):
    _, tokenizer = load_checkpoint(str(folded.checkpoint))
    ids = tokenizer(PROMPTS[0])["input_ids"]
    _, tokens = hooked(tiny_directories["llama"], ids)
    assert example.in_onnxruntime(session, ids, [tokens[2]], N_TOKENS).tokens == tokens[: tokens.index(tokens[2]) + 1]


def test_the_report_shows_both_texts_and_succeeds(folded, tiny_directories):
    assert folded.exit_code == 0
    _, tokenizer = load_checkpoint(str(folded.checkpoint))
    for prompt in PROMPTS:
        _, tokens = hooked(tiny_directories["llama"], tokenizer(prompt)["input_ids"])
        assert folded.output.count(repr(tokenizer.decode(tokens))) >= 2
    assert folded.output.count("differ by") == len(PROMPTS)


def test_other_tokens_make_the_exit_code_1(folded, tiny_directories, tmp_path, monkeypatch):
    def as_before(_, folder):
        shutil.copytree(folded.out, folder, dirs_exist_ok=True)

    monkeypatch.setattr(example, "export", as_before)
    assert run(tiny_directories["llama"], tmp_path / "out").exit_code == 1


def test_an_empty_prompt_is_refused_before_anything_is_written(folded, tmp_path):
    with pytest.raises(UserError, match="no tokens"):
        example.main(str(folded.checkpoint), tmp_path / "out", prompt=[""])
    assert not (tmp_path / "out").exists()
