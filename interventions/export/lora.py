"""Write edits of attention heads as LoRA adapters, which PEFT, transformers, vLLM and others apply by themselves.

A head whose output z is scaled by s before the output projection writes (s - 1) z @ W_O[head] more than it did: a
change of the projection's weight of rank d_head, which is factorised exactly, without a decomposition:

    W' = W + alpha / r * B A
    A   (r, n_heads * d_head)   picks z of the edited heads, times s - 1
    B   (d_model, r)            W_O of these heads

The scales of a dial move on straight lines, so that every setting on one side of it has the same A and B, with another
alpha; their files are one on the disk. The layout is the one that all engines read: one rank for all layers, to which
factors are padded with zeros, no patterns of ranks or alphas, no biases, and modules by their full names. Formats that
know one alpha for a file, and an engine's slots, which are all of one size, need no more.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.errors import Caution, UserError
from interp.files import atomic_directory, write_json
from interp.models import checkpoint_source, load_checkpoint
from interventions.bake import folding_of
from interventions.config import DOCUMENT, InterventionFile
from interventions.export.card import PROMPTS, card
from interventions.export.gguf import write_gguf_adapter
from interventions.folding import Folding

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""What an adapter's folder holds besides the intervention file, the prompts and the card."""
GGUF = "adapter.gguf"
"""The same for llama.cpp."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can make room for (``--max-lora-rank``, vLLM 0.32)."""


class Factors(NamedTuple):
    """A change of a linear map's weight, ``up @ down``.

    Attributes:
        down: A, ``(r, d_in)``.
        up: B, ``(d_out, r)``.
    """

    down: Tensor
    up: Tensor


class Adapter(NamedTuple):
    """The change that an edit of heads is to the weights of a model.

    Attributes:
        factors: By module path, all of one rank.
        heads: By layer, the heads that are edited.
        transposed: Whether the maps keep their weights as ``(d_in, d_out)``, as GPT-2's do.
    """

    factors: Mapping[str, Factors]
    heads: Mapping[int, tuple[int, ...]]
    transposed: bool

    @property
    def rank(self) -> int:
        """The rank of every layer's factors."""
        return len(next(iter(self.factors.values())).down)


class Setting(NamedTuple):
    """One setting of an edit, as an adapter's alpha.

    Attributes:
        end: The setting whose factors it shares.
        share: How far it goes towards that, from 0 to 1.
    """

    end: float | None
    share: float


def adapter_of(model: nn.Module, folding: Folding) -> Adapter:
    """Factorise what scaled heads are to the output projections of a model.

    Factors are in the dtype of the weights where that holds every ``s - 1`` exactly, else in float32.

    Args:
        model: A transformers model or a ``TransformerBridge``.
        folding: What the edit does to weights.

    Raises:
        UserError: If it does not scale heads only, around zero, the model lacks one of the heads, or the weights are
            quantised.
    """
    check_low_rank(folding)
    anatomy = Anatomy(model)
    anatomy.check_writable()
    by_layer: dict[int, dict[int, float]] = defaultdict(dict)
    for layer, head in sorted(folding.heads):
        anatomy.checked_head(layer, head)
        by_layer[layer][head] = folding.heads[layer, head].scale - 1
    moved = torch.tensor([change for heads in by_layer.values() for change in heads.values()], dtype=torch.float64)
    is_exact = torch.equal(moved.to(anatomy.dtype).double(), moved)
    dtype = anatomy.dtype if is_exact else torch.float32
    rank = max(map(len, by_layer.values())) * anatomy.d_head
    factors = {
        anatomy.path("output_projection", layer): _factors(anatomy, layer, heads, rank, dtype)
        for layer, heads in by_layer.items()
    }
    heads = {layer: tuple(changes) for layer, changes in by_layer.items()}
    return Adapter(factors, heads, anatomy.transposed)


def check_low_rank(folding: Folding) -> None:
    """See that an edit is a low-rank change of the output projections.

    Raises:
        UserError: If it is not; the sentence says what can hold it.
    """
    if folding.layers:
        raise UserError(
            f"The edit scales feed-forward layers ({_listed(folding.layers)}), which is no low-rank change of weights; "
            "write a checkpoint with --bake instead."
        )
    if folding.directions:
        raise UserError(
            f"The edit adds directions (after {_listed(folding.directions)}), which is a change of biases; write it "
            "with --vector instead."
        )
    if moved := [place for place, change in folding.heads.items() if change.shift.any()]:
        layer, head = min(moved)
        raise UserError(
            f"Head {layer}.{head} is scaled around a mean, which needs a bias that adapters do not have; write a "
            "checkpoint with --bake instead, or scale the head around zero."
        )


def write_adapters(
    model: str,
    file: InterventionFile,
    out: str | Path,
    *,
    name: str,
    trusts: Sequence[float] = (),
    strength: float = 1.0,
    prompts: Sequence[str] = (),
    gguf: bool = False,
) -> list[Path]:
    """Write an edit of heads as LoRA adapters, one for each setting.

    Args:
        model: The base: a registered name, a local directory with weights and tokenizer, or a hub id.
        file: The intervention file, for this model.
        out: The folder, new or empty. With several settings it holds one folder for each, ``NAME@SETTING``.
        name: What the edit is called among several.
        trusts: Where the file's dial is to stand; none leaves it as it is. At 0 the adapter changes nothing.
        strength: How far another edit is to go; 1 is what the file says.
        prompts: What ``verify`` is to ask.
        gguf: Write each for llama.cpp too, as ``adapter.gguf`` in its folder.

    Returns:
        The adapters' folders.

    Raises:
        UserError: If the file is for another model or is no edit of heads only, the model cannot be loaded, nothing
            would change, a setting is given twice, ``out`` is not empty, or the disk is full.
    """
    if len({f"{trust:g}" for trust in trusts}) < len(trusts):
        raise UserError("A setting is given twice; give each once.")
    wanted: list[float | None] = list(trusts) or [None]
    foldings = {trust: _folding(file, trust, strength) for trust in wanted}
    settings = {trust: _setting(file, trust, folding) for trust, folding in foldings.items()}
    network, tokenizer = load_checkpoint(model)
    file.check(network, tokenizer)
    ends = {setting.end: _folding(file, setting.end, strength) for setting in settings.values()}
    adapters = {end: adapter_of(network, folding) for end, folding in ends.items()}
    _warn_of_caps(adapters.values(), network)
    base = checkpoint_source(model)
    with atomic_directory(out) as partial:
        first: dict[float | None, Path] = {}
        for trust, (end, share) in settings.items():
            folder = partial if len(wanted) == 1 else partial / f"{name}@{trust:g}"
            folder.mkdir(exist_ok=True)
            adapter = adapters[end]
            _save_tensors(adapter, folder, first.setdefault(end, folder))
            if gguf:
                write_gguf_adapter(network, adapter.factors, folder / GGUF, share=share)
            write_json(folder / CONFIG, adapter_config(adapter, base, share))
            write_json(folder / PROMPTS, list(prompts))
            # A dial's file was measured at both ends, and says so; at another strength nothing was.
            measured = file.measured if strength == 1 else {}
            setting = file.at(trust=trust, strength=strength)
            setting.save(folder / DOCUMENT)
            lines = _card(model, setting, measured, adapter, share)
            (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [Path(out)] if len(wanted) == 1 else [Path(out) / f"{name}@{trust:g}" for trust in trusts]


def adapter_config(adapter: Adapter, base: str, share: float = 1.0) -> dict[str, Any]:
    """The PEFT configuration of an adapter.

    Args:
        adapter: The adapter.
        base: What the base model is loaded from.
        share: How far the adapter goes: its alpha is as many times its rank.
    """
    alpha = share * adapter.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        # Whole where it is: llama.cpp's converter and older engines read integers.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": adapter.transposed,
        "inference_mode": True,
        "target_modules": list(adapter.factors),
    }


def vllm_rank(rank: int) -> int | None:
    """The least ``--max-lora-rank`` of vLLM that takes an adapter; ``None`` if none does."""
    return next((cap for cap in VLLM_RANKS if cap >= rank), None)


def _folding(file: InterventionFile, trust: float | None, strength: float) -> Folding:
    return folding_of(file.at(trust=trust, strength=strength).build())


def _setting(file: InterventionFile, trust: float | None, folding: Folding) -> Setting:
    """The end of a dial whose factors a setting shares; itself where its scales are no share of those."""
    if trust is None:
        if not folding:
            raise UserError(f"{file.name} changes nothing as it stands; give a trust or strength other than 0.")
        return Setting(None, 1.0)
    ends = [math.copysign(1.0, trust)] if trust else [1.0, -1.0]
    found = [(end, ends_at) for end in ends if (ends_at := _folding(file, end, 1.0))]
    if not found:
        raise UserError(f"{file.name} changes nothing on that side of its dial; give a trust on the other side.")
    end, whole = found[0]
    share = abs(trust)
    expected = {place: share * (change.scale - 1) for place, change in whole.heads.items()}
    moved = {place: change.scale - 1 for place, change in folding.heads.items()}
    is_share = all(math.isclose(moved.get(place, 0.0), change, abs_tol=1e-12) for place, change in expected.items())
    return Setting(end, share) if is_share and moved.keys() <= expected.keys() else Setting(trust, 1.0)


def _factors(anatomy: Anatomy, layer: int, heads: Mapping[int, float], rank: int, dtype: torch.dtype) -> Factors:
    width = anatomy.d_head
    matrix = anatomy.output_matrix(layer).detach()
    down = torch.zeros(rank, anatomy.n_heads * width, dtype=dtype)
    up = torch.zeros(anatomy.d_model, rank, dtype=dtype)
    for place, (head, change) in enumerate(heads.items()):
        rows = slice(place * width, (place + 1) * width)
        down[rows, head * width : (head + 1) * width] = change * torch.eye(width, dtype=torch.float64)
        up[:, rows] = matrix[head].T.to(up)
    return Factors(down, up)


def _save_tensors(adapter: Adapter, folder: Path, first: Path) -> None:
    """Write the tensors into a folder, or link them to those in the first folder that has them."""
    if folder != first:
        _link(first / TENSORS, folder / TENSORS)
        return
    tensors: dict[str, Tensor] = {}
    for module, factors in adapter.factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = factors.down.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = factors.up.contiguous()
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _link(there: Path, path: Path) -> None:
    """One file under a second name; where the file system has no such names, a copy."""
    with suppress(OSError):
        os.link(there, path)
        return
    shutil.copyfile(there, path)


def _warn_of_caps(adapters: Any, model: nn.Module) -> None:
    d_head = Anatomy(model).d_head
    most = VLLM_RANKS[-1] // d_head
    for adapter in adapters:
        if vllm_rank(adapter.rank) is None:
            too_many = {layer: heads for layer, heads in adapter.heads.items() if len(heads) > most}
            named = ", ".join(f"{layer}.{head}" for layer, heads in too_many.items() for head in heads)
            warnings.warn(
                Caution(
                    f"The adapter has rank {adapter.rank}, and vLLM takes {VLLM_RANKS[-1]} at most: {most} heads of a "
                    f"layer, but edited are {named}; PEFT and llama.cpp load it, and for vLLM learn the dial with "
                    f"--max-heads-per-layer {most}, or write a checkpoint with --bake."
                ),
                stacklevel=3,
            )
            return


def _card(
    model: str, file: InterventionFile, measured: Mapping[str, Any], adapter: Adapter, share: float
) -> Iterator[str]:
    """The lines of an adapter's card."""
    about = (
        f"A LoRA adapter for `{model}` ({file.model.architecture}), which ConflictScope made of an intervention: its "
        "heads are scaled exactly, and nothing was trained. PEFT, transformers' `load_adapter` and vLLM load it."
    )
    own = {
        "attention heads changed": sum(map(len, adapter.heads.values())),
        "most heads of a layer": max(map(len, adapter.heads.values())),
        "rank": adapter.rank,
        "alpha": f"{share * adapter.rank:g}",
        "vLLM's `--max-lora-rank`": vllm_rank(adapter.rank) or "more than it takes",
    }
    return card(file, model, about, own, measured=measured, tags=("lora",), library="peft")


def _listed(layers: Mapping[int, Any]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, sorted(layers)))}"
