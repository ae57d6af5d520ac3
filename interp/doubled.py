"""Know of models that an edit makes read every prompt twice, so that nobody takes one reading's activations for all."""

from __future__ import annotations

import weakref

from torch import nn

from interp.anatomy import transformers_model
from interp.errors import UserError

_DOUBLED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_doubled(model: nn.Module) -> bool:
    """Whether an edit makes the model, or the one that a bridge is around, read every prompt twice."""
    return transformers_model(model) in _DOUBLED


def set_doubled(model: nn.Module, *, doubled: bool) -> None:
    """Note that an edit makes the model read every prompt twice, or no longer does."""
    (_DOUBLED.add if doubled else _DOUBLED.discard)(transformers_model(model))


def check_single(model: nn.Module) -> None:
    """Refuse to look into a model that reads every prompt twice."""
    if is_doubled(model):
        raise UserError(
            "The model reads every prompt twice for an edit, so that its activations are those of two readings; take "
            "the edit off to look into it."
        )
