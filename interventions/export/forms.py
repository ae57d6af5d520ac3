"""Say in which forms of weights an edit can be shipped, by asking what writes them whether it would refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interventions.bake import check_foldable, folding_of
from interventions.base import Intervention
from interventions.export.lora import adapter_of
from interventions.export.vectors import bias_paths, check_control_vector, directions_of

ExportForm = Literal["--lora", "--bake", "--vector gguf", "--vector peft"]
"""The forms, as the options of ``conflictscope export`` that write them."""


def forms_of(model: nn.Module, interventions: Sequence[Intervention]) -> list[ExportForm]:
    """Say which forms an edit of a model can be written in.

    Args:
        model: A transformers model or a ``TransformerBridge``.
        interventions: The edit.
    """
    try:
        folding = folding_of(interventions)
    except UserError:
        return []
    if not folding:
        return []
    anatomy = Anatomy(model)
    ways: dict[ExportForm, Callable[[], Any]] = {
        "--lora": lambda: adapter_of(model, folding),
        "--bake": lambda: check_foldable(model, interventions),
        "--vector gguf": lambda: check_control_vector(anatomy, directions_of(folding, "")),
        "--vector peft": lambda: bias_paths(anatomy, directions_of(folding, "")),
    }
    return [form for form, way in ways.items() if _goes(way)]


def _goes(way: Callable[[], Any]) -> bool:
    try:
        way()
    except UserError:
        return False
    return True
