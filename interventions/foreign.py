"""Read edits that other programs wrote, or that were exported, as intervention files of a model that is here.

    a control vector (GGUF; llama.cpp, repeng)     directions that are added after blocks, at all tokens
    a LoRA adapter (PEFT), biases at MLPs' ends    the same
    a LoRA adapter (PEFT or GGUF) of heads only    scaled heads: they are told by the model's own weights
    what ConflictScope exported                    the intervention file in the folder

A change of an output projection is a scaling of heads if, for each head, it is a number times the head's own output
matrix: the number is then the scale less 1. Any other adapter is refused; PEFT can merge it into a checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interventions.base import Intervention
from interventions.config import DOCUMENT, InterventionFile
from interventions.export.gguf import Gguf, architecture_name, read_gguf, read_gguf_adapter
from interventions.export.lora import CONFIG, TENSORS
from interventions.export.vectors import ARCHITECTURE, DIRECTION, MODEL_HINT, check_no_post_norm
from interventions.export.verify import read_adapter
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering

# Rounding weights to bfloat16 moves a matrix by less than this share of its length.
_ROUNDED = 2.0**-8
# What makes PEFT compute with the same tensors otherwise, beside what is read here.
_OTHER_FORMS = ("alpha_pattern", "alora_invocation_tokens", "arrow_config", "layer_replication", "use_qalora")
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.(weight|bias)")


class Found(NamedTuple):
    """What a file does, however it is written.

    Attributes:
        form: What the file is.
        path: The file that holds the numbers.
        scales: Of heads, by ``(layer, head)``.
        directions: By the layer after which they are added, ``(d_model,)``.
    """

    form: str
    path: Path
    scales: Mapping[tuple[int, int], float]
    directions: Mapping[int, Tensor]


def imported(
    path: str | Path,
    network: nn.Module,
    tokenizer: Any,
    *,
    model: str,
    strength: float = 1.0,
    layers: Collection[int] | None = None,
) -> InterventionFile:
    """Read an edit that another program wrote, or that was exported, for a model.

    Args:
        path: A control vector, an adapter or its folder, or a folder that ``conflictscope export`` wrote.
        network: The transformers model that it is for.
        tokenizer: Its tokenizer.
        model: What the model was loaded by.
        strength: How far the edit is to go: directions are multiplied, and scales' distances from 1.
        layers: The layers whose changes are taken; ``None`` takes all.

    Raises:
        UserError: If the file cannot be read, is for another model, or is no such edit.
    """
    place = Path(path)
    if place.name == DOCUMENT or (place / DOCUMENT).is_file():
        file = InterventionFile.load(place)
        if layers is not None:
            raise UserError(f"{path} is an intervention file, which is taken whole; give no --layers.")
        file.check(network, tokenizer)
        return file.at(strength=strength)
    found = _found(place, Anatomy(network))
    name = found.path.parent.resolve().name if found.path.name == TENSORS else found.path.stem
    with found.path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return InterventionFile.of(
        _interventions(found, strength, layers),
        name=name,
        model=ModelIdentity.of(network, model, tokenizer),
        provenance={"method": "imported", "file": found.path.name, "sha256": sha256, "format": found.form},
    )


def _found(path: Path, anatomy: Anatomy) -> Found:
    """What the file at a path does, or the one file in a folder."""
    if path.is_dir():
        vectors = sorted(path.glob("*.gguf"))
        if (path / CONFIG).is_file():
            return _in_adapter(path, anatomy)
        if len(vectors) == 1:
            return _in_gguf(vectors[0], anatomy)
        raise UserError(
            f"The folder {path} holds no {DOCUMENT}, no {CONFIG} and not one GGUF file; give the path of the edit."
        )
    if path.name in (CONFIG, TENSORS):
        return _in_adapter(path.parent, anatomy)
    return _in_gguf(path, anatomy)


def _interventions(found: Found, strength: float, layers: Collection[int] | None) -> list[Intervention]:
    """What a file does, in some layers, at a strength."""
    there = sorted({layer for layer, _ in found.scales} | found.directions.keys())
    wanted = set(there if layers is None or not there else layers)
    if missing := sorted(wanted - set(there)):
        raise UserError(
            f"{found.path} changes nothing in layer {missing[0]}; it does in {', '.join(map(str, there))}: give those."
        )
    heads = tuple(ScaledHead(*head, scale) for head, scale in sorted(found.scales.items()) if head[0] in wanted)
    parts: list[Intervention] = [HeadScaling(heads).scaled(strength)] if heads else []
    for layer, direction in sorted(found.directions.items()):
        if layer in wanted:
            parts.append(Steering(layer, direction, strength, "all"))
    if not parts:
        raise UserError(f"{found.path} changes nothing; give a file that does.")
    return parts


def _in_gguf(path: Path, anatomy: Anatomy) -> Found:
    config: Any = anatomy.model.config
    known = {architecture_name(anatomy.model), config.model_type}
    file = read_gguf(path, ARCHITECTURE, *sorted(known))
    if file.metadata["general.architecture"] == ARCHITECTURE:
        return _in_control_vector(path, file, known, anatomy)
    projections = {anatomy.path("output_projection", layer): layer for layer in range(anatomy.n_layers)}
    scales: dict[tuple[int, int], float] = {}
    for module, (down, up) in read_gguf_adapter(anatomy.model, path, file).items():
        if not (down.isfinite().all() and up.isfinite().all()):
            raise UserError(f"The factors of {module} in {path} have numbers that are not finite; export it again.")
        if module not in projections:
            raise UserError(f"What the adapter {path} adds to {module} is no edit of heads; {_MERGE}")
        scales |= _head_scales(path, module, projections[module], (down.double(), up.double()), anatomy)
    return Found("GGUF LoRA adapter", path, scales, {})


def _in_control_vector(path: Path, file: Gguf, known: Collection[str], anatomy: Anatomy) -> Found:
    if (hint := file.metadata.get(MODEL_HINT)) is not None and hint not in known:
        raise UserError(
            f"{path} was made for a model of type {str(hint)[:100]!r}, but this is of type {min(known)!r}; give the "
            "model that it was made for."
        )
    directions: dict[int, Tensor] = {}
    for name, values in file.tensors.items():
        if re.fullmatch(rf"{re.escape(DIRECTION)}\d{{1,6}}", name, re.ASCII) is None:
            raise UserError(f"{path} has a tensor {name[:100]!r}, not direction.N; give a control vector.")
        layer = int(name.removeprefix(DIRECTION))
        if layer in directions:
            raise UserError(f"{path} has two directions for layer {layer}; give a file with one for each layer.")
        directions[layer] = _direction(path, layer, values, anatomy)
    return Found("GGUF control vector", path, {}, directions)


def _direction(path: Path, layer: int, values: Tensor | None, anatomy: Anatomy) -> Tensor:
    """A direction that fits the model."""
    if layer >= anatomy.n_layers:
        raise UserError(
            f"{path} adds a direction after layer {layer}, but this model has layers 0 to {anatomy.n_layers - 1}; give "
            "the model that it was made for."
        )
    if values is None or values.shape != (anatomy.d_model,):
        what = "not float32" if values is None else f"of shape {tuple(values.shape)}"
        raise UserError(
            f"The direction after layer {layer} in {path} is {what}, but this model's residual stream takes "
            f"{anatomy.d_model} float32 numbers; give the model that it was made for."
        )
    if not values.isfinite().all():
        raise UserError(f"The direction after layer {layer} in {path} has numbers that are not finite; fit it again.")
    return values.float()


def _in_adapter(folder: Path, anatomy: Anatomy) -> Found:
    config, tensors = read_adapter(folder)
    if other := next((name for name in _OTHER_FORMS if config.get(name)), None):
        raise UserError(f"The adapter {folder} has a {other}, which makes it another edit than one of heads; {_MERGE}")
    by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, values in tensors.items():
        if (match := _FACTOR.fullmatch(name)) is None:
            raise UserError(f"The adapter {folder} holds {name[:200]!r}, so that it is no edit of heads only; {_MERGE}")
        if not values.isfinite().all():
            raise UserError(f"{name[:200]!r} in {folder} has numbers that are not finite; export the adapter again.")
        by_module[match[1]][f"{match[2]}.{match[3]}"] = values
    layers = range(anatomy.n_layers)
    projections = {anatomy.path("output_projection", layer): layer for layer in layers}
    mlps = {path: layer for layer in layers if (path := anatomy.mlp_output_path(layer)) is not None}
    scales: dict[tuple[int, int], float] = {}
    directions: dict[int, Tensor] = {}
    for module, parts in by_module.items():
        down, up, bias = _scaled_parts(folder, module, config, parts)
        if module in projections and not bias.any():
            scales |= _head_scales(folder, module, projections[module], (down, up), anatomy)
        elif module in mlps and not (up @ down).any():
            if bias.any():
                check_no_post_norm(anatomy)
                directions[mlps[module]] = _direction(folder, mlps[module], anatomy.residual_multiplier * bias, anatomy)
        else:
            raise UserError(f"What the adapter {folder} adds to {module} is no edit of heads; {_MERGE}")
    form = "PEFT LoRA adapter" + " of biases" * (not scales)
    return Found(form, folder / TENSORS, scales, directions)


_MERGE = "merge it into a checkpoint with PEFT's merge_and_unload, and give that as the model instead."


def _scaled_parts(
    folder: Path, module: str, config: Mapping[str, Any], parts: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """A, B times the adapter's factor, and B's bias times it, in float64."""
    down, up = parts.get("A.weight"), parts.get("B.weight")
    alpha = config.get("lora_alpha")
    if down is None or up is None or down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or not len(down):
        raise UserError(f"The factors of {module} in {folder} are no pair of matrices; export the adapter again.")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{folder / CONFIG} has no number for lora_alpha; export the adapter again.")
    factor = alpha / (math.sqrt(len(down)) if config.get("use_rslora") else len(down))
    bias = parts.get("B.bias", torch.zeros(len(up)))
    return down.double(), factor * up.double(), factor * bias.double()


def _head_scales(
    source: Path, module: str, layer: int, factors: tuple[Tensor, Tensor], anatomy: Anatomy
) -> dict[tuple[int, int], float]:
    """The scales, other than 1, of a layer's heads, to which a change of their output projection comes down."""
    heads = anatomy.output_matrix(layer).detach().double()
    down, up = factors
    if (len(up), down.shape[1]) != (anatomy.d_model, anatomy.n_heads * anatomy.d_head):
        raise UserError(
            f"The adapter {source} changes {module} by a matrix of shape {(len(up), down.shape[1])}, but this model's "
            f"has {(anatomy.d_model, anatomy.n_heads * anatomy.d_head)}; give the model that it was made for."
        )
    change = (up @ down).T.reshape(heads.shape)
    moved = torch.nan_to_num((change * heads).sum((1, 2)) / heads.square().sum((1, 2)))
    left = (change - moved[:, None, None] * heads).norm(dim=(1, 2))
    if (left > _ROUNDED * change.norm(dim=(1, 2))).any():
        raise UserError(f"What the adapter {source} adds to {module} is no scaling of this model's heads; {_MERGE}")
    # Sums of products leave some noise.
    scales = [round(1 + change, 12) for change in moved.tolist()]
    return {(layer, head): scale for head, scale in enumerate(scales) if scale != 1}
