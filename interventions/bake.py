"""Fold interventions into the weights: the edited model becomes an ordinary checkpoint.

What scales an activation by the same number at every position scales the weights that write it:

    head, z' = mean + s (z - mean)    W_O[head]' = s W_O[head],  b_O' = b_O + (1 - s) mean @ W_O[head]
    feed-forward layer                the last linear map's weight and bias times s
    the same, before a post norm      the post norm's gain times s
    direction v at every token        the bias of the MLP's last linear map plus v (over the residual multiplier)

A trust dial is folded as it stands. What depends on the token or on the activation is refused: other steering, feature
edits and gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.files import atomic_directory, write_json
from interp.models import load_checkpoint, save_checkpoint
from interventions import dropping
from interventions.base import Intervention, applied
from interventions.config import DOCUMENT, InterventionFile
from interventions.export.card import PROMPTS, card
from interventions.folding import Folding, HeadMap


def fold(model: nn.Module, interventions: Sequence[Intervention]) -> None:
    """Fold interventions into the weights of ``model``, in place. A refused call changes nothing.

    Several edits of one head or layer are folded one after the other, as they would be applied. The sums are done in
    float32 and rounded to the dtype of the weights.

    Args:
        model: A transformers model or a ``TransformerBridge``.
        interventions: Scaled heads, scaled feed-forward layers, trust dials, and steering that adds a direction at
            every token, in order.

    Raises:
        UserError: As ``check_foldable``.
    """
    changes = check_foldable(model, interventions)
    anatomy = Anatomy(model)
    with torch.no_grad():
        for (layer, head), change in changes.heads.items():
            _fold_head(anatomy, layer, head, change)
        for layer, scale in changes.layers.items():
            _scale_mlp(anatomy, layer, scale)
        # After the scales: a direction is added to what a scaled MLP writes.
        for layer, direction in changes.directions.items():
            bias = anatomy.mlp_bias(layer)
            assert bias is not None, "refused above"
            bias.copy_(bias.float() + direction.to(bias.device) / anatomy.residual_multiplier)


def check_foldable(model: nn.Module, interventions: Sequence[Intervention]) -> Folding:
    """See that interventions can be folded into the weights of a model, and say what they do to them.

    Args:
        model: A transformers model or a ``TransformerBridge``.
        interventions: The interventions, in order.

    Raises:
        UserError: If one of them cannot be folded, the model does not have what it changes, a head is scaled around a
            mean or a direction is added but the model has no bias for it, a scaled feed-forward layer has experts, or
            the weights are quantised, offloaded or have adapters.
    """
    changes = folding_of(interventions)
    # Attaching makes the checks that folding needs too: heads and layers that exist, means of the right length.
    with applied(model, *interventions):
        pass
    anatomy = Anatomy(model)
    anatomy.check_writable()
    for (layer, head), change in changes.heads.items():
        if change.shift.any() and anatomy.output_bias(layer) is None:
            raise UserError(
                f"Head {layer}.{head} is scaled around a mean, which needs a bias to be folded into, and the output "
                f"projections of this {anatomy.architecture} have none; scale the head around zero, or apply the "
                "intervention while the model runs."
            )
    for layer in changes.layers:
        # Refused where there is no one map that writes.
        anatomy.mlp_weights(layer)
    for layer in changes.directions:
        if anatomy.mlp_bias(layer) is None:
            raise UserError(
                f"A direction is added after layer {layer}, which needs a bias to be folded into, and the MLPs of this "
                f"{anatomy.architecture} have none; apply the intervention while the model runs."
            )
    return changes


def folding_of(interventions: Sequence[Intervention]) -> Folding:
    """What interventions do to weights, one after the other, less what they leave as it is.

    Raises:
        UserError: If one of them cannot be folded.
    """
    folding = Folding()
    for intervention in interventions:
        folding = folding.then(intervention.folded())
    return folding.without_idle()


def write_folded(
    model: str,
    file: InterventionFile,
    out: str | Path,
    *,
    trust: float | None = None,
    strength: float = 1.0,
    drop: bool = False,
    prompts: Sequence[str] = (),
) -> None:
    """Write a checkpoint that is ``model`` with an intervention file folded into its weights.

    The folder holds weights, in the dtype in which the model was saved, tokenizer, generation settings and a model
    card, and loads like the model itself; beside them lie the intervention file at its setting, and prompts.

    Args:
        model: A registered name, a local directory with weights and tokenizer, or a hub id.
        file: The intervention file, for this model.
        out: The folder, new or empty. It appears only once it is complete.
        trust: Where the file's dial is to stand; ``None`` leaves it as it is.
        strength: How far another edit is to go; 1 is what the file says.
        drop: Leave out the weights of feed-forward layers that are scaled by 0: the checkpoint is smaller, and is
            loaded with ``trust_remote_code=True``.
        prompts: What ``verify`` is to ask.

    Raises:
        UserError: If the file is for another model or cannot be folded, the model cannot be loaded, trust lies
            outside -1 to 1 or the file holds no dial, nothing would change, no layer is scaled by 0 that could be left
            out, ``out`` is not empty, or the disk is full.
    """
    folded = file.at(trust=trust, strength=strength)
    interventions = folded.build()
    changes = folding_of(interventions)
    if not changes:
        raise UserError(f"{file.name} changes nothing as it stands; give a trust or strength other than 0.")
    dropped = dropping.silenced(changes) if drop else []
    if drop and not dropped:
        raise UserError(
            f"{file.name} scales no feed-forward layer by 0, so none can be left out; export without --drop."
        )
    with atomic_directory(out) as partial:
        network, tokenizer = load_checkpoint(model)
        folded.check(network, tokenizer)
        fold(network, interventions)
        paths = dropping.drop(network, dropped)
        # To a model type that transformers does not know no names are translated.
        save_checkpoint(network, tokenizer, partial, own_names=not paths)
        if paths:
            dropping.describe(network, paths, partial)
        # A dial's file was measured at both ends, and says so; at another strength nothing was.
        measured = file.measured if strength == 1 else {}
        card = "\n".join(_card(model, folded, changes, measured, len(dropped)))
        folded.save(partial / DOCUMENT)
        write_json(partial / PROMPTS, list(prompts))
        (partial / "README.md").write_text(card + "\n", encoding="utf-8")


def _fold_head(anatomy: Anatomy, layer: int, head: int, change: HeadMap) -> None:
    # A view: the model's own weights are written to.
    weight = anatomy.output_matrix(layer)[head]
    values = weight.float()
    if change.shift.any():
        bias = anatomy.output_bias(layer)
        assert bias is not None, "fold() refuses a shift without a bias"
        bias.copy_(bias.float() + change.shift.to(values.device) @ values)
    weight.copy_(change.scale * values)


def _scale_mlp(anatomy: Anatomy, layer: int, scale: float) -> None:
    weights, offset = anatomy.mlp_weights(layer)
    for weight in weights:
        weight.copy_(scale * (weight.float() + offset) - offset)


def _card(
    model: str, file: InterventionFile, changes: Folding, measured: Mapping[str, Any], n_dropped: int
) -> Iterator[str]:
    """The lines of the model card."""
    loads = (
        "It loads with `trust_remote_code=True`, and holds no weights of layers that write nothing."
        if n_dropped
        else "It loads like the model itself; nothing has to be installed or attached."
    )
    what = f"`{model}` ({file.model.architecture}) with an intervention folded into its weights by ConflictScope."
    own = {"attention heads changed": len(changes.heads), "feed-forward layers changed": len(changes.layers)}
    if n_dropped:
        own["of these left out"] = n_dropped
    own["layers after which a direction is added"] = len(changes.directions)
    return card(file, model, f"{what} {loads}", own, measured=measured)
