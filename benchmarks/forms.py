"""The same model in the forms that people have it: which heads path patching finds in each, against the plain one.

Run ``python -m benchmarks.forms --json``. What quantises is taken if it is installed (``pip install bitsandbytes
torchao optimum-quanto``); what is not is named. ``--gguf FILE`` adds a GGUF file of the model. The adapter is random
and small, on all linear maps: what it changes stands beside as KL divergence on neutral text.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer

from benchmarks import show
from benchmarks.path_patching import capital_prompts
from interp.anatomy import Anatomy
from interp.answers import Direction
from interp.attribution.path_patching import path_patching
from interp.attribution.scores import HeadScores, top_heads
from interp.conflicts import ConflictSet
from interp.evaluation import divergence, neutral_texts
from interp.inputs import encode
from interp.models import DEFAULT_MODEL, checkpoint_source, load_model

_FOUND = 5


def quantised(source: str, config: Any) -> Any:
    """The model of a checkpoint, quantised while it loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"quantization_config": config, "dtype": torch.float32, "device_map": {"": "cpu"}}
    network = AutoModelForCausalLM.from_pretrained(source, **options)
    return load_model(network, tokenizer=AutoTokenizer.from_pretrained(source))


def with_random_adapter(model: str) -> Any:
    """The model with a LoRA adapter of rank 8 on all of its linear maps."""
    from peft import LoraConfig, get_peft_model

    network: Any = load_model(model, device="cpu")
    wrapped: Any = get_peft_model(network, LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return load_model(wrapped)


def forms(model: str, gguf: str | None) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Name, package that it needs, and a way to load each form."""
    from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    source = checkpoint_source(model)
    eight, four = BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True)
    yield "bitsandbytes 8 bit", "bitsandbytes", lambda: quantised(source, eight)
    yield "bitsandbytes 4 bit", "bitsandbytes", lambda: quantised(source, four)

    def torchao() -> Any:
        eight = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
        return quantised(source, TorchAoConfig(eight))

    yield "torchao 8 bit", "torchao", torchao
    yield "quanto 8 bit", "optimum.quanto", lambda: quantised(source, QuantoConfig(weights="int8"))
    yield "LoRA beside it", "peft", lambda: with_random_adapter(model)
    if gguf is not None:
        yield "GGUF", "gguf", lambda: load_model(gguf, device="cpu")


def heads_of(model: Any, conflicts: ConflictSet) -> tuple[HeadScores, float]:
    """Path patching's scores, and how long they took."""
    start = time.perf_counter()
    return path_patching(model, conflicts, name="form")["logit_diff"], time.perf_counter() - start


def logits_of(model: Any) -> torch.Tensor:
    """Logits of ten neutral texts at their last tokens, ``(10, d_vocab)``."""
    with torch.inference_mode():
        return Anatomy(model).model(**encode(model, neutral_texts()[:10]), logits_to_keep=1).logits[:, -1]


def main(
    model: Annotated[str, typer.Option(help="Model to measure on.")] = DEFAULT_MODEL,
    prompts: Annotated[int, typer.Option(help="Number of conflict prompts.")] = 64,
    gguf: Annotated[str | None, typer.Option(help="A GGUF file of the model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line only.")] = False,
) -> None:
    """Find heads in every form, and compare."""
    warnings.simplefilter("ignore")
    conflicts = capital_prompts(prompts)
    plain = load_model(model, device="cpu")
    expected, seconds = heads_of(plain, conflicts)
    clean = logits_of(plain)
    ends: tuple[Direction, ...] = ("context", "memory")
    tops: dict[Direction, list[tuple[int, int]]] = {end: top_heads(expected.ranked(end), _FOUND) for end in ends}
    result: dict[str, Any] = {"model": model, "prompts": len(expected.values), "plain: seconds": round(seconds, 1)}
    result |= {f"plain: {end} heads": _shown(heads) for end, heads in tops.items()}
    for name, package, load in forms(model, gguf):
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            result[f"{name}: not measured"] = f"{package} is not installed"
            continue
        other = load()
        scores, seconds = heads_of(other, conflicts)
        result |= {
            f"{name}: rank correlation": round(scores.rank_correlation(expected), 4),
            f"{name}: correlation": round(_correlation(scores, expected), 4),
            f"{name}: neutral KL, nats": round(divergence(clean, logits_of(other)).mean().item(), 6),
            f"{name}: seconds": round(seconds, 1),
        }
        for end, heads in tops.items():
            found = top_heads(scores.ranked(end), _FOUND)
            result[f"{name}: {end} heads shared of {_FOUND}"] = len({*found} & {*heads})
    show(result, as_json=as_json)


def _correlation(one: HeadScores, other: HeadScores) -> float:
    return torch.corrcoef(torch.stack([one.mean().flatten(), other.mean().flatten()]))[0, 1].item()


def _shown(heads: list[tuple[int, int]]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


if __name__ == "__main__":
    typer.run(main)
