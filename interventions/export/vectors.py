"""Write directions that are added to the residual stream at all tokens, as the files that other engines load.

    gguf   the control vector of llama.cpp and repeng: a tensor ``direction.N`` is added after block N, counted from 0
    peft   a LoRA adapter of the MLP's last map with factors of zeros, whose bias is the direction

llama.cpp takes no direction after block 0. A bias is the direction only where no norm stands between the MLP and the
residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.files import atomic_directory, write_json
from interp.models import checkpoint_source, load_checkpoint
from interventions.bake import folding_of
from interventions.config import DOCUMENT, InterventionFile
from interventions.export.card import PROMPTS, card
from interventions.export.gguf import architecture_name, finish
from interventions.export.lora import CONFIG, TENSORS, Adapter, Factors, adapter_config
from interventions.folding import Folding

VectorForm = Literal["gguf", "peft"]

CONTROL_VECTOR = "control_vector.gguf"
"""What an exported folder calls the control vector."""
ARCHITECTURE = "controlvector"
"""What a control vector has for an architecture."""
MODEL_HINT = f"{ARCHITECTURE}.model_hint"
DIRECTION = "direction."
"""What the names of a control vector's tensors begin with, before the number of the block."""


def write_vectors(
    model: str,
    file: InterventionFile,
    out: str | Path,
    *,
    form: VectorForm,
    trust: float | None = None,
    strength: float = 1.0,
    prompts: Sequence[str] = (),
) -> None:
    """Write the directions that an edit adds at all tokens as a control vector, or as biases of a LoRA adapter.

    The folder also holds the intervention file at its setting, prompts, and a card.

    Args:
        model: The base: a registered name, a local directory with weights and tokenizer, or a hub id.
        file: The intervention file, for this model.
        out: The folder, new or empty.
        form: ``gguf`` for llama.cpp and repeng, ``peft`` for PEFT.
        trust: Where the file's dial is to stand; ``None`` leaves it as it is.
        strength: How far the edit is to go; 1 is what the file says.
        prompts: What ``verify`` is to ask.

    Raises:
        UserError: If the file is for another model, does anything else than add directions at all tokens, or the form
            cannot hold one of them; the model cannot be loaded, ``out`` is not empty, or the disk is full.
    """
    setting = file.at(trust=trust, strength=strength)
    directions = directions_of(folding_of(setting.build()), file.name)
    network, tokenizer = load_checkpoint(model)
    setting.check(network, tokenizer)
    with atomic_directory(out) as partial:
        if form == "gguf":
            write_control_vector(network, directions, partial / CONTROL_VECTOR)
        else:
            write_biases(network, directions, partial, checkpoint_source(model))
        write_json(partial / PROMPTS, list(prompts))
        setting.save(partial / DOCUMENT)
        # At another strength nothing was measured.
        lines = _card(model, setting, form, directions, file.measured if strength == 1 else {})
        (partial / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def directions_of(folding: Folding, name: str) -> Mapping[int, Tensor]:
    """The directions of an edit that adds nothing but directions, by layer, ``(d_model,)`` float32.

    Args:
        folding: What the edit does to weights.
        name: What it is called.

    Raises:
        UserError: If it scales heads or feed-forward layers, or adds nothing.
    """
    if folding.heads or folding.layers:
        what, instead = ("heads", "--lora, or a checkpoint with --bake") if folding.heads else ("layers", "--bake")
        raise UserError(f"{name} scales {what}, which is no direction that is added; write it with {instead} instead.")
    if not folding.directions:
        raise UserError(f"{name} adds no direction as it stands; give a strength, or a dial's trust, other than 0.")
    return dict(sorted(folding.directions.items()))


def write_control_vector(model: nn.Module, directions: Mapping[int, Tensor], path: Path) -> None:
    """Write a control vector, which llama.cpp and repeng load.

    Args:
        model: A transformers model or a ``TransformerBridge``.
        directions: By layer, ``(d_model,)``.
        path: The GGUF file.

    Raises:
        UserError: If a direction is added after layer 0, which llama.cpp does not do.
    """
    import gguf

    check_control_vector(Anatomy(model), directions)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(MODEL_HINT, architecture_name(model))
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"{DIRECTION}{layer}", direction.float().cpu().contiguous().numpy())
    finish(writer)


def write_biases(model: nn.Module, directions: Mapping[int, Tensor], folder: Path, base: str) -> None:
    """Write a LoRA adapter of rank 1 that adds nothing but biases, which PEFT loads.

    Args:
        model: A transformers model or a ``TransformerBridge``.
        directions: By layer, ``(d_model,)``.
        folder: Where its two files go.
        base: What the base model is loaded from.

    Raises:
        UserError: As ``bias_paths``.
    """
    anatomy = Anatomy(model)
    paths = bias_paths(anatomy, directions)
    nothing = Factors(torch.zeros(1, anatomy.d_mlp), torch.zeros(anatomy.d_model, 1))
    tensors: dict[str, Tensor] = {}
    for path, direction in zip(paths, directions.values(), strict=True):
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (factor.clone() for factor in nothing)
        # All that the block adds may be multiplied on its way.
        tensors[f"{name}.lora_B.bias"] = (direction.float() / anatomy.residual_multiplier).cpu().contiguous()
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    adapter = Adapter(dict.fromkeys(paths, nothing), {}, anatomy.transposed)
    write_json(folder / CONFIG, adapter_config(adapter, base) | {"lora_bias": True})


def check_control_vector(anatomy: Anatomy, directions: Mapping[int, Tensor]) -> None:
    """See that llama.cpp adds a direction wherever an edit does.

    Raises:
        UserError: If it adds none there.
    """
    if 0 in directions:
        others = "" if anatomy.blueprint.mlp_post_norm is not None else "write it for PEFT with --vector peft, or "
        raise UserError(
            f"llama.cpp adds no direction after layer 0, as this edit does; {others}fit it after a later layer."
        )


def bias_paths(anatomy: Anatomy, layers: Iterable[int]) -> list[str]:
    """The paths of the maps whose biases are directions that are added after layers.

    Raises:
        UserError: If the architecture has a norm between its MLPs and the residual stream, or a layer has experts.
    """
    check_no_post_norm(anatomy)
    paths: list[str] = []
    for layer in layers:
        path = anatomy.mlp_output_path(layer)
        if path is None:
            raise UserError(
                f"A direction is no bias in layer {layer}, which has experts; write it for llama.cpp (--vector gguf), "
                "or apply the intervention while the model runs."
            )
        paths.append(path)
    return paths


def check_no_post_norm(anatomy: Anatomy) -> None:
    """See that a bias of the MLP's last map is a direction that is added to the residual stream.

    Raises:
        UserError: If a norm stands between them.
    """
    if anatomy.blueprint.mlp_post_norm is not None:
        raise UserError(
            f"A direction is no bias in {anatomy.architecture}, where a norm follows the MLP; write it for llama.cpp "
            "with --vector gguf, or apply the intervention while the model runs."
        )


def _card(
    model: str, file: InterventionFile, form: VectorForm, directions: Mapping[int, Tensor], measured: Mapping[str, Any]
) -> Iterator[str]:
    """The lines of the card."""
    loads = (
        f"llama.cpp loads it (`--control-vector {CONTROL_VECTOR}`), and repeng (`ControlVector.import_gguf`)."
        if form == "gguf"
        else "PEFT loads it; vLLM and llama.cpp do not, because it has biases."
    )
    what = "A control vector" if form == "gguf" else "A LoRA adapter of biases alone"
    about = f"{what} for `{model}` ({file.model.architecture}), which ConflictScope made of an intervention. {loads}"
    own = {"layers after which a direction is added": ", ".join(map(str, directions))}
    tags, library = (("lora",), "peft") if form == "peft" else (("control-vector",), "gguf")
    return card(file, model, about, own, measured=measured, tags=tags, library=library)
