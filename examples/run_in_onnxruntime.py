"""Run a checkpoint into whose weights an intervention was folded without PyTorch: in ONNX Runtime, on the CPU.

    conflictscope export smollm2-135m INTERVENTION FOLDED --bake
    python -m examples.run_in_onnxruntime FOLDED OUT --prompt "The capital of Italy is"

1. The model is exported to ``OUT/model.onnx`` with its KV cache as one more input and output; its weights and its
   tokenizer lie next to it. The edit is part of the weights: the engine need not know of it.
2. Each prompt is continued greedily with NumPy and ONNX Runtime alone: the prompt is read into an empty cache, then
   one token after the other.
3. transformers does the same with the same checkpoint. If its tokens differ, the exit code is 1.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from interp.errors import UserError
from interp.files import atomic_directory
from interp.inputs import token_ids
from interp.models import load_checkpoint

PROMPTS = ("The capital of Italy is", "The capital of Italy is Oslo. The capital of Italy is")


class Continuation(NamedTuple):
    """What an engine makes of a prompt.

    Attributes:
        tokens: The new tokens, the one that ends the text included.
        prompt_logits: ``(n_tokens, d_vocab)`` float32: the logits at every token of the prompt.
    """

    tokens: list[int]
    prompt_logits: np.ndarray


class CachedStep(nn.Module):
    """A transformers model whose KV cache is a tensor that comes in and goes out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Read tokens ``(n_rows, n_tokens)`` after those in the cache; there is no mask for padding.

        The cache holds keys and values, ``(2, n_layers, n_rows, n_kv_heads, n_cached, d_head)``. Returned are the
        logits ``(n_rows, n_tokens, d_vocab)`` and the cache with ``n_tokens`` more.
        """
        # Made without the model's config: a layer with a sliding window keeps all tokens too, and only masks them.
        layers = DynamicCache()
        for layer, (keys, values) in enumerate(zip(*cache, strict=True)):
            layers.update(keys, values, layer)
        logits = self.model(input_ids=input_ids, past_key_values=layers, use_cache=True).logits
        return logits, stacked(layers)


def stacked(cache: DynamicCache) -> Tensor:
    """The keys and values of all layers, ``(2, n_layers, n_rows, n_kv_heads, n_cached, d_head)``."""
    layers: list[Any] = cache.layers
    return torch.stack([torch.stack([x.keys for x in layers]), torch.stack([x.values for x in layers])])


def export(model: Any, folder: Path) -> None:
    """Write ``model.onnx`` and its weights into a folder; the numbers of rows, tokens and cached tokens are free."""
    # Sizes above 1: the exporter takes a size of 1 for one that never changes.
    ids = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        cache = stacked(model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            CachedStep(model).eval(),
            (ids, cache),
            input_names=["input_ids", "cache"],
            output_names=["logits", "new_cache"],
            dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {2: Dim.DYNAMIC, 4: Dim.DYNAMIC}),
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    # The weights go into a file of their own: protobuf ends at 2 GB.
    program.save(folder / "model.onnx", external_data=True)


def in_onnxruntime(session: Any, ids: Sequence[int], ends: Collection[int], max_new_tokens: int) -> Continuation:
    """Continue the tokens of a prompt greedily in a session of the exported model, until a token that ends the text."""
    _, n_layers, _, n_heads, _, d_head = session.get_inputs()[1].shape
    cache = np.zeros((2, n_layers, 1, n_heads, 0, d_head), np.float32)
    prompt_logits, cache = session.run(None, {"input_ids": np.array([ids]), "cache": cache})
    tokens = [int(prompt_logits[0, -1].argmax())]
    while len(tokens) < max_new_tokens and tokens[-1] not in ends:
        logits, cache = session.run(None, {"input_ids": np.array([tokens[-1:]]), "cache": cache})
        tokens.append(int(logits[0, -1].argmax()))
    return Continuation(tokens, prompt_logits[0])


def in_transformers(model: Any, ids: Sequence[int], max_new_tokens: int) -> Continuation:
    """Continue the tokens of a prompt greedily with the transformers model."""
    prompt = torch.tensor([ids])
    # Some checkpoints ask for a penalty on repetition, which is not part of the network.
    options: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": max_new_tokens}
    with torch.inference_mode():
        logits = model(prompt).logits[0]
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0]
    return Continuation(text[len(ids) :].tolist(), logits.numpy())


def main(
    checkpoint: Annotated[str, typer.Argument(help="What conflictscope export --bake wrote, or any other model.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, for the ONNX model and its tokenizer.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A text to continue; give it once or more.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.", min=1)] = 12,
) -> None:
    """Export a checkpoint to ONNX and compare what ONNX Runtime and transformers say."""
    transformers_logging.set_verbosity_error()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    model, tokenizer = load_checkpoint(checkpoint)
    model = model.float().eval()
    texts = list(prompt or PROMPTS)
    prompts = dict(zip(texts, token_ids(tokenizer, texts), strict=True))
    if not all(prompts.values()):
        raise UserError("A prompt has no tokens; give a text after each --prompt.")
    started = time.perf_counter()
    with console.status("Exporting, which takes minutes"), atomic_directory(out) as partial:
        export(model, partial)
        tokenizer.save_pretrained(partial)
    console.print(f"Exported to {out / 'model.onnx'} in {time.perf_counter() - started:.0f} s")
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    ends = np.atleast_1d(model.generation_config.eos_token_id).tolist()
    others = 0
    for text, ids in prompts.items():
        found = in_onnxruntime(session, ids, ends, max_new_tokens)
        expected = in_transformers(model, ids, max_new_tokens)
        others += found.tokens != expected.tokens
        console.print(f"\nPrompt        {text!r}")
        console.print(f"ONNX Runtime  {tokenizer.decode(found.tokens)!r}")
        console.print(f"transformers  {tokenizer.decode(expected.tokens)!r}")
        difference = np.abs(found.prompt_logits - expected.prompt_logits).max()
        console.print(f"Logits        differ by {difference:.1e} at most")
    raise typer.Exit(1 if others else 0)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"Error: {error}", markup=False, style="red", highlight=False)
        sys.exit(2)
