"""Whether every path is right on an accelerator, and how long each takes on the shapes of an 8B model.

Run ``python -m benchmarks.gpu --json``. Weights are random, so nothing is downloaded but a tokenizer; what the numbers
take does not depend on them. Without an accelerator all runs on the CPU, on a small shape.

- Right: a small model of the same architecture computes every path on the CPU in float32, then on the device in float32
  and in bfloat16. An error is the norm of the difference over the norm of the CPU's result.
- Fast: the large model in bfloat16. Each time is the median of its repetitions, after one that warms up. Sides that are
  compared take turns.

A path that fails is named with its error, and the others go on.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import show
from benchmarks.mutual_information import Population
from benchmarks.runtime import random_heads
from interp.activations import record, sites_of
from interp.anatomy import Anatomy
from interp.attribution.direct_logits import direct_logit_attribution
from interp.attribution.path_patching import path_patching
from interp.conflicts import ConflictSet
from interp.evaluation import neutral_texts
from interp.facts import build_conflicts, usable_facts
from interp.generation import gathered_logits, next_logits
from interp.inputs import padded, prompt_batches
from interp.models import DEFAULT_MODEL, decode_plainly, fetch, resolve_device
from interventions.bake import fold
from interventions.base import applied
from interventions.decoding import CAD
from interventions.fitting.gauss_newton import GaussNewton
from interventions.fitting.scale_data import ScaleData
from interventions.fitting.scale_training import ScaleTraining
from interventions.two_streams import generate
from probes.information import mutual_information
from probes.linear import STRENGTHS
from probes.training import balanced_weights, fit_logistic

REPEATS, ENOUGH = 3, 15.0


@dataclass(frozen=True)
class Shape:
    """How large things are: the model, and what it is asked.

    Attributes:
        model: Of a Llama: width, feed-forward width, layers, heads, key-value heads, vocabulary.
        prompts: Conflict prompts that are attributed and recorded.
        examples: Examples that probes learn from, at every layer.
        features: Features whose information about the source is estimated, from as many prompts.
        rows: Prompts that are continued together.
        tokens: Tokens that each is continued by.
        compiled_layers: Layers of the model that is compiled, which takes its time.
    """

    model: tuple[int, int, int, int, int, int]
    prompts: int
    examples: int
    features: int
    rows: int
    tokens: int
    compiled_layers: int


LARGE = Shape((4096, 14336, 32, 32, 8, 128_256), 256, 2_000, 131_072, 16, 32, 4)
SMALL = Shape((128, 256, 4, 8, 2, 49_152), 24, 64, 512, 4, 4, 2)


def random_model(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, tokenizer: Any) -> Any:
    """A Llama with random weights, the same at every call, with transformers' default attention."""
    width, feed_forward, layers, heads, kv_heads, vocabulary = shape
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=max(vocabulary, len(tokenizer)),
        initializer_range=width**-0.5,
        dtype=dtype,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.tokenizer = tokenizer
    decode_plainly(model)
    return model.eval().requires_grad_(False)


def capitals(count: int, *kinds: Any) -> ConflictSet:
    """The first ``count`` prompts about capitals of every one of these kinds."""
    everything = build_conflicts({"capital": usable_facts("capital")})
    chosen = [e for kind in kinds for e in everything.select(kind=kind).examples[:count]]
    return ConflictSet("capitals", tuple(chosen))


def tokens_of(model: Any, texts: list[str]) -> dict[str, Tensor]:
    """Texts as one batch, padded on the left."""
    inputs = padded(model, [ids for batch in prompt_batches(model, texts, len(texts)) for ids in batch.tokens])
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def two_prompts(model: Any, rows: int, rule: CAD, tokens: int) -> Tensor:
    """What a model writes that reads each prompt with its context and without."""
    examples = capitals(rows, "conflict").examples
    with_context = tokens_of(model, [e.prompt for e in examples])
    without = tokens_of(model, [e.bare_prompt for e in examples])
    return generate(model, rule, **with_context, without=without, max_new_tokens=tokens, min_new_tokens=tokens)


def dial(model: Any, texts: int, count: int) -> tuple[GaussNewton, Callable[[], None]]:
    """A learner of scales, and its next step."""
    settings = ScaleTraining()
    data = ScaleData(
        model, capitals(count, "conflict", "none", "aligned", "irrelevant").examples, neutral_texts()[:texts]
    )
    wanted, learner = data.wanted("context"), GaussNewton(model, settings)
    return learner, lambda: learner.descend(wanted, data)


def every_path(model: Any) -> dict[str, Callable[[], Tensor]]:
    """What each path computes on a small model, by name."""
    device = model.device
    prompts = capitals(16, "conflict")
    texts = [e.prompt for e in prompts]
    heads = random_heads(Anatomy(model), 12)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    separable = torch.randn(2, 200, 16, generator=generator) + labels[:, None]
    features = Population.draw(64, generator).sample(labels, generator)

    def forward(network: Any) -> Tensor:
        return gathered_logits(next_logits(network, texts), len(texts))

    def hooked() -> Tensor:
        with applied(model, heads):
            return forward(model)

    def folded() -> Tensor:
        baked = copy.deepcopy(model)
        fold(baked, [heads])
        return forward(baked)

    def probes() -> Tensor:
        weights, strengths = balanced_weights(labels, 2), torch.tensor(STRENGTHS)
        given = (value.to(device) for value in (separable, labels, weights, strengths))
        return fit_logistic(*given, n_classes=2).logits(separable.to(device))

    def dialed() -> Tensor:
        learner, step = dial(model, 8, 8)
        step()
        return learner.scales()

    return {
        "forward": lambda: forward(model),
        "path_patching": lambda: path_patching(model, prompts, name="random")["logit_diff"].values,
        "direct_logits": lambda: direct_logit_attribution(model, prompts, name="random").heads.values,
        "recording": lambda: torch.stack(list(record(model, texts, sites_of(model, ["residual"])).values())),
        "hooked": hooked,
        "folded": folded,
        "probes": probes,
        "mutual_information": lambda: mutual_information(features.to(device), labels),
        "dial_step": dialed,
        "two_streams": lambda: two_prompts(model, 8, CAD(1.0), 8),
    }


def errors(device: torch.device, tokenizer: Any) -> dict[str, dict[str, float | str]]:
    """For each dtype and path: how far the device is from the CPU in float32, or why it could not be computed.

    Of ``two_streams`` it is the share of tokens that differ.
    """
    expected_of = {name: path() for name, path in every_path(_small(torch.device("cpu"), tokenizer)).items()}
    found: dict[str, dict[str, float | str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = _small(device, tokenizer).to(dtype)
        row = found[str(dtype).removeprefix("torch.")] = {}
        for name, path in every_path(model).items():
            with named(row, name):
                expected, value = expected_of[name].double(), path().cpu().double()
                differ = (value != expected).double().mean()
                error = differ if name == "two_streams" else (value - expected).norm() / expected.norm()
                row[name] = float(f"{error:.2e}")
    return found


def _small(device: torch.device, tokenizer: Any) -> Any:
    """The small model, with the attention that ``interp.models.load_model`` chooses."""
    model = random_model(SMALL.model, torch.device("cpu"), torch.float32, tokenizer)
    model.set_attn_implementation("eager")
    return model.to(device)


def seconds_each(sides: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each side; they take turns, the first warms up, and after ``ENOUGH`` seconds none follows."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    begun = time.perf_counter()
    for turn in range(REPEATS + 1):
        if turn > 1 and time.perf_counter() - begun > ENOUGH:
            break
        for name, side in sides.items():
            _wait(device)
            begin = time.perf_counter()
            side()
            _wait(device)
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def named(row: dict[str, Any], name: str) -> Iterator[None]:
    """Put the error of what is done here into the row, under this name."""
    try:
        yield
    except Exception as error:
        row[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def speeds(shape: Shape, device: torch.device, dtype: torch.dtype, tokenizer: Any) -> dict[str, Any]:
    """What each path takes on a model of a shape."""
    model = random_model(shape.model, device, dtype, tokenizer)
    anatomy = Anatomy(model)
    prompts = capitals(shape.prompts, "conflict")
    texts = [e.prompt for e in prompts]
    batches = [padded(model, batch.tokens) for batch in prompt_batches(model, texts, 32)]
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    weights = sum(p.numel() for p in model.model.parameters()) - model.get_input_embeddings().weight.numel()
    row: dict[str, Any] = {"heads": anatomy.n_layers * anatomy.n_heads, "prompts": len(texts), "tokens": n_tokens}

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            model.model(**batch, use_cache=False)

    def timed(**sides: Callable[[], object]) -> None:
        with named(row, next(iter(sides))):
            row.update({f"{name}_seconds": round(value, 4) for name, value in seconds_each(sides, device).items()})
        print(json.dumps(row), file=sys.stderr)

    timed(forward=forward, recording=lambda: record(model, texts, sites_of(model, ["residual"])))
    if "forward_seconds" in row:
        row["forward_teraflops"] = round(2 * weights * n_tokens / row["forward_seconds"] / 1e12, 1)
    timed(path_patching=lambda: path_patching(model, prompts, name="random"))
    # Every head's stream goes through the feed-forward layers from its own on.
    mlps = 3 * anatomy.d_model * anatomy.d_mlp * anatomy.n_heads * anatomy.n_layers * (anatomy.n_layers + 1) / 2
    if "path_patching_seconds" in row:
        row["path_patching_teraflops"] = round(2 * mlps * len(texts) / row["path_patching_seconds"] / 1e12, 1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(shape.examples) % 2
    with named(row, "probes"):
        timed(probes=_probe_fits(anatomy, labels.to(device), generator))
    with named(row, "mutual_information"):
        timed(mutual_information=_feature_information(shape, labels, generator, device))
    with named(row, "dial_step"):
        _, step = dial(model, 48, 64)
        timed(dial_step=step)
    edit, rule = random_heads(anatomy, 40), CAD(1.0)
    inputs = tokens_of(model, texts[: shape.rows])
    timed(
        plain=lambda: _write(model, inputs, shape.tokens),
        hooked=lambda: _with(model, edit, inputs, shape.tokens),
        two_streams=lambda: two_prompts(model, shape.rows, rule, shape.tokens),
    )
    return row


def _feature_information(
    shape: Shape, labels: Tensor, generator: torch.Generator, device: torch.device
) -> Callable[[], object]:
    features = Population.draw(shape.features, generator).sample(labels, generator).to(device)
    return lambda: mutual_information(features, labels)


def _probe_fits(anatomy: Anatomy, labels: Tensor, generator: torch.Generator) -> Callable[[], object]:
    direction = torch.randn(anatomy.n_layers, 1, anatomy.d_model, generator=generator).to(labels.device)
    noise = torch.randn(anatomy.n_layers, len(labels), anatomy.d_model, generator=generator).to(labels.device)
    examples = noise + direction * labels[None, :, None] * 0.1
    weights, strengths = balanced_weights(labels, 2), torch.tensor(STRENGTHS, device=labels.device)
    return lambda: fit_logistic(examples, labels, weights, strengths, n_classes=2)


def _write(model: Any, inputs: dict[str, Tensor], tokens: int, **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)


def _with(model: Any, edit: Any, inputs: dict[str, Tensor], tokens: int, **options: Any) -> Tensor:
    with applied(model, edit):
        return _write(model, inputs, tokens, **options)


def compiled(shape: Shape, device: torch.device, dtype: torch.dtype, tokenizer: Any) -> dict[str, Any]:
    """Decoding with a static cache, which transformers compiles into CUDA graphs, against decoding without."""
    width, feed_forward, _, *others = shape.model
    model = random_model((width, feed_forward, shape.compiled_layers, *others), device, dtype, tokenizer)
    inputs = tokens_of(model, [e.prompt for e in capitals(shape.rows, "conflict")])
    edit = random_heads(Anatomy(model), 12)
    tokens = shape.tokens
    row: dict[str, Any] = {}
    for name, edits in (("plain", ()), ("hooked", (edit,))):
        with applied(model, *edits):
            expected = _write(model, inputs, tokens)
            begin = time.perf_counter()
            found = _write(model, inputs, tokens, cache_implementation="static")
            row[f"compiling_{name}_seconds"] = round(time.perf_counter() - begin, 1)
            row[f"compiled_{name}_tokens_that_differ"] = int((found != expected).sum())
            times = seconds_each(
                {
                    f"{name}_few_layers": lambda: _write(model, inputs, tokens),
                    f"compiled_{name}_few_layers": lambda: _write(model, inputs, tokens, cache_implementation="static"),
                },
                device,
            )
            row.update({f"{key}_seconds": round(value, 4) for key, value in times.items()})
    return row


def main(
    tokenizer: Annotated[str, typer.Option(help="Folder of a tokenizer; the default model's is fetched.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    small: Annotated[bool, typer.Option(help="The small shape on an accelerator, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line last.")] = False,
) -> None:
    """Compare every path with the CPU, then time each on a large model with random weights."""
    where = resolve_device(device)
    words: Any = AutoTokenizer.from_pretrained(tokenizer or fetch(DEFAULT_MODEL))
    words.pad_token = words.pad_token or words.eos_token
    is_small = small or where.type == "cpu"
    shape, dtype = (SMALL, torch.float32) if is_small else (LARGE, torch.bfloat16)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else str(where),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "errors": errors(where, words),
    }
    print(json.dumps(result), file=sys.stderr)
    result["shape"] = dict(
        zip(("d_model", "d_mlp", "layers", "heads", "kv_heads", "vocabulary"), shape.model, strict=True)
    )
    result.update(speeds(shape, where, dtype, words))
    with named(result, "compiled"):
        result.update(compiled(shape, where, dtype, words))
    if where.type == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated(where) / 2**30, 1)
    show(result, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
