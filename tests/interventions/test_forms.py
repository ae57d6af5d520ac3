"""The forms that an edit is said to have are those in which it can be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.errors import UserError
from interp.models import load_model
from interventions.bake import write_folded
from interventions.base import Intervention
from interventions.config import InterventionFile
from interventions.dola import DoLa
from interventions.export.forms import forms_of
from interventions.export.lora import write_adapters
from interventions.export.vectors import write_vectors
from interventions.feedforward import FeedForwardScaling
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering

VECTOR = torch.linspace(-1, 1, 32)
EDITS: dict[str, Sequence[Intervention]] = {
    "heads": [HeadScaling.of([(1, 1), (2, 0)], 0.0)],
    "heads around a mean": [HeadScaling((ScaledHead(1, 1, 0.0, (0.5,) * 8),))],
    "feed-forward layers": [FeedForwardScaling(((1, 0.5),))],
    "a direction everywhere": [Steering(1, VECTOR, 1.0, "all")],
    "a direction after layer 0": [Steering(0, VECTOR, 1.0, "all")],
    "a direction at the end": [Steering(1, VECTOR, 1.0, "last_prompt")],
    "heads and a direction": [HeadScaling.of([(1, 1)], 0.0), Steering(1, VECTOR, 1.0, "all")],
    "a contrast of layers": [DoLa((0, 1))],
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_has_the_forms_that_it_can_be_written_in(
    tiny_directories: dict[str, Path], tmp_path: Path, architecture: str, name: str
) -> None:
    folder = str(tiny_directories[architecture])
    model = load_model(folder, device="cpu")
    file = InterventionFile.of(EDITS[name], name=name, model=ModelIdentity.of(model, folder))
    ways: dict[str, Callable[[Path], Any]] = {
        "--lora": lambda out: write_adapters(folder, file, out, name="edit"),
        "--bake": lambda out: write_folded(folder, file, out),
        "--vector gguf": lambda out: write_vectors(folder, file, out, form="gguf"),
        "--vector peft": lambda out: write_vectors(folder, file, out, form="peft"),
    }

    def is_written(form: str) -> bool:
        try:
            ways[form](tmp_path / form.replace(" ", ""))
        except UserError:
            return False
        return True

    assert forms_of(model, file.build()) == [form for form in ways if is_written(form)]


def test_what_does_nothing_has_no_form(tiny_llama: Any) -> None:
    assert forms_of(tiny_llama, [HeadScaling.of([(1, 1)], 1.0)]) == []
