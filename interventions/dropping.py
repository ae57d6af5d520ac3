"""Leave feed-forward layers out of a checkpoint: where an edit scales one by 0, its weights are not needed.

None of the architectures known here has layers without a feed-forward part, so the checkpoint brings one of its own: a
short module next to the weights, which ``from_pretrained`` runs with ``trust_remote_code=True``. The model type is a
new one, so that whoever does not run the module, as ConflictScope itself, refuses the folder, and nobody gets random
weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.files import read_json
from interventions.folding import Folding

MODULE = "modeling_dropped"

_SOURCE = '''"""{architecture} without some layers' feed-forward parts, whose weights the checkpoint does not hold."""

import torch
from torch import nn
from transformers import {architecture}, {config}


class Nothing(nn.Module):
    """Writes zeros where a feed-forward layer would write."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


class DroppedConfig({config}):
    model_type = "{model_type}"


class DroppedForCausalLM({architecture}):
    config_class = DroppedConfig

    def __init__(self, config):
        super().__init__(config)
        for path in config.dropped:
            self.set_submodule(path, Nothing())
'''


class Nothing(nn.Module):
    """Writes zeros where a feed-forward layer would write."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(hidden_states)


def silenced(changes: Folding) -> list[int]:
    """The layers whose feed-forward part writes nothing once an edit is folded in."""
    return sorted(layer for layer, scale in changes.layers.items() if scale == 0 and layer not in changes.directions)


def drop(network: Any, layers: Sequence[int]) -> list[str]:
    """Take feed-forward parts that write nothing out of a model; gives their module paths.

    Raises:
        UserError: If these parts are no modules of their own.
    """
    anatomy = Anatomy(network)
    if layers and anatomy.blueprint.mlp_steps:
        raise UserError(
            f"The feed-forward parts of this {anatomy.architecture} are no modules of their own, so none can be left "
            "out; export without --drop."
        )
    paths = [anatomy.path("mlp", layer) for layer in layers]
    for path in paths:
        network.set_submodule(path, Nothing())
    return paths


def describe(network: Any, paths: Sequence[str], folder: Path) -> None:
    """Let the checkpoint of a model without these modules say how it is loaded.

    Args:
        network: The transformers model.
        paths: Of the modules that were taken out.
        folder: Where its weights and its ``config.json`` are.
    """
    architecture, config = type(network).__name__, type(network.config).__name__
    model_type = f"{network.config.model_type}_dropped"
    record = read_json(folder / "config.json") | {
        "model_type": model_type,
        "architectures": ["DroppedForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.DroppedConfig",
            "AutoModelForCausalLM": f"{MODULE}.DroppedForCausalLM",
        },
        "dropped": list(paths),
    }
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    source = _SOURCE.format(architecture=architecture, config=config, model_type=model_type)
    (folder / f"{MODULE}.py").write_text(source, encoding="utf-8")
