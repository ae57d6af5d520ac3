"""Compare what was exported with hooks on the same prompts: next logits and greedy answers, alone and in mixed batches.

What hooks do to the base model is the truth. An adapter is read in three ways: by its layout, which engines other than
PEFT take at their word; as what it adds to the weights; and by PEFT, where that is installed, with the edits of all
rows mixed in one batch. A checkpoint is loaded like any model. A running server is asked for each edit, one prompt
after the other and then all at once.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError
from interp.files import read_json
from interp.generation import gathered_logits, generated, next_logits
from interp.inputs import padded, token_ids, tokenizer_of
from interp.models import load_model
from interventions.base import applied
from interventions.config import DOCUMENT, UNEDITED, InterventionFile
from interventions.export.card import PROMPTS
from interventions.export.gguf import architecture_name, read_gguf, read_gguf_adapter
from interventions.export.llama_cpp import LlamaCpp, Run
from interventions.export.lora import CONFIG, GGUF, TENSORS, VLLM_RANKS, vllm_rank
from interventions.export.server import Server
from interventions.export.vectors import ARCHITECTURE, CONTROL_VECTOR, DIRECTION
from interventions.steering import Steering

_CLOSE = 1e-3
_BIAS = ".lora_B.bias"
_AT_ONCE = 32
_BATCH_SIZE = 16
# What changes how factors are scaled or where they act, beside ranks and alphas by pattern.
_OTHER_FORMS = (
    "use_rslora",
    "use_dora",
    "lora_bias",
    "layers_to_transform",
    "modules_to_save",
    "trainable_token_indices",
)


class Edit(NamedTuple):
    """An exported edit.

    Attributes:
        name: What it is called: the name of its folder.
        folder: Where it lies.
        file: The intervention that it was made of, at its setting.
    """

    name: str
    folder: Path
    file: InterventionFile

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA adapter; else it is a checkpoint."""
        return (self.folder / CONFIG).is_file()


class Answers(NamedTuple):
    """What prompts are answered.

    Attributes:
        texts: The greedy answers.
        logits: Next logits at the prompts' ends, ``(n, d_vocab)`` float32; ``None`` where they are not to be had.
    """

    texts: Sequence[str]
    logits: Tensor | None = None


@dataclass(frozen=True)
class Finding:
    """How an engine's answers compare with those of hooks.

    Attributes:
        engine: What answered, and how it was asked.
        edit: The edit's name.
        logits: The largest difference of next logits; ``None`` where they were not to be had.
        equal: How many answers are the same.
        differing: ``(prompt, hooks' answer, the engine's)`` of the others.
    """

    engine: str
    edit: str
    logits: float | None
    equal: int
    differing: tuple[tuple[str, str, str], ...]

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return not self.differing and (self.logits is None or self.logits < _CLOSE)


def edits_in(out: str | Path) -> list[Edit]:
    """The edits that an exported folder holds: itself, or one in each of its folders.

    Raises:
        UserError: If there are none.
    """
    folder = Path(out)
    places = [folder] if (folder / DOCUMENT).is_file() else sorted(path.parent for path in folder.glob(f"*/{DOCUMENT}"))
    found = [Edit(place.resolve().name, place, InterventionFile.load(place / DOCUMENT)) for place in places]
    if not found:
        raise UserError(
            f"{out} holds no {DOCUMENT}, which says what was exported; give a folder that `conflictscope export` wrote."
        )
    return found


def prompts_in(edits: Sequence[Edit]) -> list[str]:
    """The prompts that were recorded when edits were exported, each once."""
    kept = [read_json(edit.folder / PROMPTS) for edit in edits if (edit.folder / PROMPTS).is_file()]
    return list(dict.fromkeys(prompt for prompts in kept for prompt in prompts))


def traps(folder: Path) -> Iterator[str]:
    """Say, a sentence each, what engines would read otherwise than PEFT does, or not at all.

    Args:
        folder: Of an adapter.

    Raises:
        UserError: If it cannot be read.
    """
    config, tensors = read_adapter(folder)
    rank = config.get("r")
    if patterns := [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]:
        yield (
            f"It has a {patterns[0]}: llama.cpp knows one alpha for all layers and is silently wrong; pad factors to "
            "one rank, as `conflictscope export --lora` does."
        )
    ranks = {len(values) for name, values in tensors.items() if ".lora_A." in name}
    if ranks and ranks != {rank}:
        listed = ", ".join(map(str, sorted(ranks)))
        yield f"Its factors have rank {listed}, but r is {rank}: engines scale by alpha / r; export it again."
    if other := [name for name in _OTHER_FORMS if config.get(name)]:
        yield f"It sets {', '.join(other)}, which vLLM and llama.cpp refuse or leave out; use it with PEFT only."
    if config.get("bias", "none") != "none":
        yield "It has biases, which vLLM refuses; use it with PEFT only, or write a checkpoint with --bake."
    if isinstance(rank, int) and vllm_rank(rank) is None:
        yield f"Its rank {rank} is more than vLLM takes, {VLLM_RANKS[-1]}; learn under a cap, or write a checkpoint."
    if config.get("lora_alpha") == 0:
        yield "Its alpha is 0: it changes nothing, unless it is converted for llama.cpp, which then adds all of it."
    if len(set(_modules(tensors))) * 2 != sum(not name.endswith(_BIAS) for name in tensors):
        yield "It has tensors that are no pairs of factors, which engines leave out; export it again."
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all("." in str(target) for target in targets):
        yield "It names its modules by their ends, so that factors of zeros are made for all layers; give full names."


def left_out(edits: Sequence[Edit]) -> Iterator[str]:
    """Say, a sentence each, what of some edits is not compared with hooks unless an engine is asked.

    Raises:
        UserError: If a checkpoint leaves layers out, so that it is loaded with code of its own.
    """
    for edit in edits:
        if (edit.folder / "config.json").is_file() and "auto_map" in read_json(edit.folder / "config.json"):
            raise UserError(
                f"{edit.folder} leaves out layers and is loaded with its own code, which is not run here; export it "
                "without --drop, and verify that."
            )
    if any(edit.is_adapter for edit in edits) and not _has_peft():
        yield "PEFT is not installed, so that only weights are compared: pip install 'conflictscope[adapters]'"


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of an adapter.

    Raises:
        UserError: If one of them is missing or cannot be read.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG} describes no LoRA adapter; export it again.")
    try:
        return config, load_file(folder / TENSORS)
    # safetensors has its own exceptions for its header, and others for what the header leads to.
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(f"Could not read {folder / TENSORS} ({error}); export it again.") from error


def expected(model: Any, edit: Edit, prompts: Sequence[str], max_new_tokens: int) -> Answers:
    """What hooks make a model answer.

    Raises:
        UserError: If the edit is for another model.
    """
    with applied(model, edit.file):
        return answers(model, prompts, max_new_tokens)


def answers(model: Any, prompts: Sequence[str], max_new_tokens: int) -> Answers:
    """What a model answers as it is, greedily."""
    tokenizer = tokenizer_of(model)
    texts: list[str] = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        tokens = token_ids(tokenizer, prompts[start : start + _BATCH_SIZE])
        sequences, _ = generated(model, tokens, max_new_tokens, whole=True)
        texts += tokenizer.batch_decode(sequences, skip_special_tokens=True)
    return Answers(texts, gathered_logits(next_logits(model, prompts), len(prompts)))


def compared(engine: str, edit: str, prompts: Sequence[str], truth: Answers, found: Answers) -> Finding:
    """Compare an engine's answers with those of hooks."""
    rows = list(zip(prompts, truth.texts, found.texts, strict=True))
    differing = tuple(row for row in rows if row[1] != row[2])
    largest = None
    if truth.logits is not None and found.logits is not None:
        largest = (truth.logits - found.logits).abs().max().item()
    return Finding(engine, edit, largest, len(rows) - len(differing), differing)


class Change(NamedTuple):
    """What an adapter adds to a linear map.

    Attributes:
        weight: To the weight, in the shape that the module keeps it in.
        bias: To what the map gives, ``(d_out,)``; ``None`` adds nothing.
    """

    weight: Tensor
    bias: Tensor | None = None


def adapter_changes(folder: Path) -> dict[str, Change]:
    """What the files of an adapter say that is added, by module path.

    Raises:
        UserError: If they cannot be read, or are no pairs of factors.
    """
    config, tensors = read_adapter(folder)
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{folder / CONFIG} has no numbers for lora_alpha and r; export the adapter again.")
    scale = alpha / rank
    found: dict[str, Change] = {}
    for path in sorted(set(_modules(tensors))):
        down, up = (tensors.get(f"base_model.model.{path}.lora_{factor}.weight") for factor in "AB")
        if down is None or up is None:
            raise UserError(f"The adapter has one of two factors of {path}; export it again.")
        down, up = down.float(), up.float()
        if not up.ndim == down.ndim == 2 or up.shape[1] != len(down):
            raise UserError(f"The two factors of {path} do not fit each other; export the adapter again.")
        weight = scale * (up @ down)
        bias = tensors.get(f"base_model.model.{path}{_BIAS}")
        moved = None if bias is None else scale * bias
        found[path] = Change(weight.T if config.get("fan_in_fan_out") else weight, moved)
    return found


def gguf_changes(model: nn.Module, path: Path) -> dict[str, Change]:
    """What an adapter in a GGUF file says that is added, as llama.cpp counts it, by module path.

    Raises:
        UserError: If it cannot be read, or is for another model.
    """
    network = transformers_model(model)
    factors = read_gguf_adapter(network, path, read_gguf(path, architecture_name(network)))
    changes = {name: up @ down for name, (down, up) in factors.items()}
    return {name: Change(change.T if Anatomy(network).transposed else change) for name, change in changes.items()}


@contextmanager
def added(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Add to the weights of a model, and to what its linear maps give, for the length of a ``with`` block.

    Raises:
        UserError: If a module is not there, or has another shape.
    """
    before: dict[str, Tensor] = {}
    hooks = []
    modules = dict(model.named_modules())
    with torch.no_grad():
        try:
            for path, change in changes.items():
                weight: Any = getattr(modules.get(path), "weight", None)
                if weight is None or weight.shape != change.weight.shape:
                    raise UserError(f"The adapter changes {path}, which this model does not have so; give its base.")
                before[path] = weight.detach().clone()
                weight.copy_(weight.float() + change.weight.to(weight.device))
                if change.bias is not None:
                    # The map may have no bias that could be added to.
                    hooks.append(modules[path].register_forward_hook(_adding(change.bias.to(weight))))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for path, values in before.items():
                weight = modules[path].weight
                weight.copy_(values)


def _adding(bias: Tensor) -> Any:
    return lambda _, __, output: output + bias


def by_peft(
    model: Any, edits: Sequence[Edit], prompts: Sequence[str], max_new_tokens: int
) -> Iterator[tuple[str, str, Answers]]:
    """Answer with PEFT: each adapter alone, then all of them and the base in one batch.

    Yields:
        How it was asked, the edit's name, and the answers; those of the base in the mixed batch are called ``none``.
    """
    # Names of modules, which hold no dots.
    names = {edit.name: f"edit {number}" for number, edit in enumerate(edits)}
    wrapped = _wrapped(model, {name: edit.folder for name, edit in zip(names.values(), edits, strict=True)})
    try:
        wrapped.eval()
        for edit in edits:
            wrapped.set_adapter(names[edit.name])
            yield "PEFT", edit.name, answers(model, prompts, max_new_tokens)
        rows = [(prompt, name) for prompt in prompts for name in (*names.values(), "__base__")]
        texts = _mixed(model, wrapped, rows, max_new_tokens)
        for name, own in {**names, UNEDITED: "__base__"}.items():
            yield "PEFT, mixed batch", name, Answers([texts[prompt, own] for prompt in prompts])
    finally:
        wrapped.unload()


def by_server(
    server: Server, edits: Sequence[Edit], prompts: Sequence[str], max_new_tokens: int
) -> Iterator[tuple[str, str, Answers]]:
    """Answer with a running server: prompts one after the other for each edit, then all at once.

    Yields:
        As ``by_peft``.
    """
    names = [UNEDITED, *(edit.name for edit in edits)]
    for name in names:
        yield "server", name, Answers([server.answer(name, prompt, max_new_tokens) for prompt in prompts])
    rows = [(name, prompt) for prompt in prompts for name in names]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        texts = list(threads.map(lambda row: server.answer(row[0], row[1], max_new_tokens), rows))
    found = dict(zip(rows, texts, strict=True))
    for name in names:
        yield f"server, {min(_AT_ONCE, len(rows))} at once", name, Answers([found[name, prompt] for prompt in prompts])


def by_llama_cpp(
    model: Any, llama: LlamaCpp, edits: Sequence[Edit], prompts: Sequence[str], max_new_tokens: int
) -> Iterator[tuple[str, str, Answers]]:
    """Answer with llama.cpp: without an edit, and with each that has a GGUF file.

    Yields:
        As ``by_peft``.
    """
    runs = {UNEDITED: Run(), **{edit.name: run for edit in edits if (run := _run(edit)) is not None}}
    if len(runs) == 1:
        raise UserError("No edit here has a file for llama.cpp; export it with --lora --gguf, or --vector gguf.")
    tokenizer = tokenizer_of(model)
    tokens = token_ids(tokenizer, prompts)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    logits, sequences = llama.asked(list(runs.values()), tokens, max_new_tokens, n_layers=Anatomy(model).n_layers)
    for name, first, answered in zip(runs, logits, sequences, strict=True):
        whole = [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in answered]
        yield "llama.cpp", name, Answers(tokenizer.batch_decode(whole, skip_special_tokens=True), first)


def _run(edit: Edit) -> Run | None:
    """How llama.cpp is given an edit; ``None`` if it has no file for llama.cpp."""
    if (edit.folder / GGUF).is_file():
        return Run(adapter=edit.folder / GGUF)
    if (edit.folder / CONTROL_VECTOR).is_file():
        return Run(directions={part.layer: part.vector for part in _directions(edit.folder / CONTROL_VECTOR)})
    return None


def verified(
    model: Any,
    edits: Sequence[Edit],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    server: Server | None = None,
    llama: LlamaCpp | None = None,
) -> Iterator[Finding]:
    """Compare exported edits with hooks, engine after engine.

    Args:
        model: The base model, with its tokenizer.
        edits: Adapters, control vectors, checkpoints, or some of each.
        prompts: What to ask.
        max_new_tokens: Longest answer, in tokens.
        server: A running server that serves the edits, to be asked instead of what can be loaded here.
        llama: A llama.cpp and its base, to be asked too.

    Raises:
        UserError: If an edit is for another model, cannot be read, or the server or llama.cpp does not answer.
    """
    truth = {edit.name: expected(model, edit, prompts, max_new_tokens) for edit in edits}
    truth[UNEDITED] = answers(model, prompts, max_new_tokens)
    if server is not None:
        found: Iterator[tuple[str, str, Answers]] = by_server(server, edits, prompts, max_new_tokens)
    else:
        found = _loaded(model, edits, prompts, max_new_tokens)
    asked = iter(()) if llama is None else by_llama_cpp(model, llama, edits, prompts, max_new_tokens)
    for engine, name, answered in chain(found, asked):
        yield compared(engine, name, prompts, truth[name], answered)


def _loaded(
    model: Any, edits: Sequence[Edit], prompts: Sequence[str], max_new_tokens: int
) -> Iterator[tuple[str, str, Answers]]:
    """What edits answer that are loaded here."""
    adapters = [edit for edit in edits if edit.is_adapter]
    for edit in edits:
        if edit.is_adapter:
            with added(model, adapter_changes(edit.folder)):
                yield "weights of the adapter", edit.name, answers(model, prompts, max_new_tokens)
            if (edit.folder / GGUF).is_file():
                with added(model, gguf_changes(model, edit.folder / GGUF)):
                    yield f"weights of {GGUF}", edit.name, answers(model, prompts, max_new_tokens)
        elif (edit.folder / CONTROL_VECTOR).is_file():
            with applied(model, *_directions(edit.folder / CONTROL_VECTOR)):
                yield "numbers of the control vector", edit.name, answers(model, prompts, max_new_tokens)
        else:
            loaded = load_model(str(edit.folder), device=str(model.device), dtype=model.dtype, attention=None)
            yield "checkpoint", edit.name, answers(loaded, prompts, max_new_tokens)
    if adapters and _has_peft():
        yield from by_peft(model, adapters, prompts, max_new_tokens)


def _directions(path: Path) -> Iterator[Steering]:
    """What a control vector of ours adds."""
    for name, values in read_gguf(path, ARCHITECTURE).tensors.items():
        if values is not None:
            yield Steering(int(name.removeprefix(DIRECTION)), values, 1.0, "all")


def _wrapped(model: Any, folders: Mapping[str, Path]) -> Any:
    """The model with adapters in it, which PEFT loads under their names."""
    from peft import PeftModel

    (first, folder), *others = folders.items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
        for name, folder in others:
            wrapped.load_adapter(str(folder), adapter_name=name)
    return wrapped


def _mixed(
    model: Any, wrapped: Any, rows: Sequence[tuple[str, str]], max_new_tokens: int
) -> Mapping[tuple[str, str], str]:
    """The answers to prompts, each with an adapter of its own, in batches."""
    tokenizer = tokenizer_of(model)
    found: dict[tuple[str, str], str] = {}
    for start in range(0, len(rows), _BATCH_SIZE):
        some = rows[start : start + _BATCH_SIZE]
        inputs = padded(model, token_ids(tokenizer, [prompt for prompt, _ in some]))
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            sequences = wrapped.generate(
                **given, adapter_names=[name for _, name in some], max_new_tokens=max_new_tokens, do_sample=False
            )
        new = sequences[:, given["input_ids"].shape[1] :]
        found |= dict(zip(some, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True))
    return found


def _modules(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name in tensors:
        for factor in (".lora_A.weight", ".lora_B.weight"):
            if name.endswith(factor):
                yield name.removeprefix("base_model.model.").removesuffix(factor)
