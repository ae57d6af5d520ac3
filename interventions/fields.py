"""What entries of the intervention file are made of: bounded numbers, and checks of what they say against the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from interp.errors import UserError
from interventions.identity import ModelIdentity

Factor = Annotated[float, Field(ge=-1e4, le=1e4)]
"""How far something is scaled or moved."""
Rate = Annotated[float, Field(ge=0, le=1)]
Trust = Annotated[float, Field(ge=-1, le=1)]
Head = Annotated[int, Field(ge=0, lt=2**20)]
Feature = Annotated[int, Field(ge=0, lt=2**31)]
TensorName = Annotated[str, Field(min_length=1, max_length=200)]


def named_tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of a file by its name.

    Raises:
        UserError: If the file has none of that name.
    """
    if name not in tensors:
        raise UserError(f"The intervention's tensor file lacks {name!r}; export the intervention again.")
    return tensors[name]


def check_each_once(heads: Iterable[tuple[int, int]]) -> None:
    """Refuse ``(layer, head)`` pairs of which one occurs twice."""
    if twice := next((place for place, count in Counter(heads).items() if count > 1), None):
        raise UserError(f"Head {twice[0]}.{twice[1]} is listed twice; give each head once.")


def check_head(model: ModelIdentity, layer: int, head: int) -> None:
    """Refuse a head that the model's layers do not have."""
    if head >= model.n_heads:
        raise UserError(f"head {layer}.{head} does not exist: the model has {model.n_heads} heads in each layer")


def check_width(what: str, values: Tensor, width: int) -> None:
    """Refuse a tensor that does not hold ``width`` numbers."""
    if math.prod(values.shape) != width:
        raise UserError(f"{what} has shape {tuple(values.shape)}, but the model needs {width} numbers there")
