"""Tell Inspect of the model provider, without what that needs: Inspect imports this whenever it starts."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi  # pyright: ignore[reportMissingImports]


@modelapi(name="conflictscope")
def conflictscope() -> type[ModelAPI]:
    """The class behind ``--model conflictscope/NAME``."""
    from conflictscope.elsewhere.inspect_ai import EditedModel

    return EditedModel
