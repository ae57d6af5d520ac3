"""The intervention file, version 1: a JSON document that says what to change in which model, and what it did.

{"format": "conflictscope-intervention", "version": 1, "name": ..., "towards": "context" | "memory" | null,
 "model": {"name", "architecture", "n_layers", "n_heads", "d_head", "d_model"},
 "interventions": [{"kind": "head_scaling", "heads": [{"layer", "head", "scale", "mean"}]}],
 "provenance": {...}, "measured": {...}}
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError
from torch import nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.files import write_json
from interventions.base import Handle
from interventions.heads import HeadScaling, ScaledHead

FORMAT = "conflictscope-intervention"
VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelShape(_Strict):
    """Which model an intervention is for.

    Attributes:
        name: What the model was loaded by; for people, not checked.
        architecture: Class name of the transformers model.
    """

    name: str
    architecture: str
    n_layers: PositiveInt
    n_heads: PositiveInt
    d_head: PositiveInt
    d_model: PositiveInt

    @classmethod
    def of(cls, model: nn.Module, name: str) -> ModelShape:
        """The shape of a loaded model."""
        anatomy = Anatomy(model)
        return cls(name=name, **{field: getattr(anatomy, field) for field in cls._checked()})

    def check(self, model: nn.Module) -> None:
        """Refuse a model of another architecture or shape.

        Raises:
            UserError: If ``model`` differs; the message says in what.
        """
        anatomy = Anatomy(model)
        for field in self._checked():
            if (wanted := getattr(self, field)) != (found := getattr(anatomy, field)):
                raise UserError(
                    f"This intervention is for {self.name} ({field} {wanted}), but the model has {field} {found}; "
                    "load the model it was made for."
                )

    @classmethod
    def _checked(cls) -> list[str]:
        return [field for field in cls.model_fields if field != "name"]


class HeadEntry(_Strict):
    """One scaled head, as ``ScaledHead``; JSON's lists stand for tuples."""

    layer: NonNegativeInt
    head: NonNegativeInt
    scale: FiniteFloat
    mean: list[FiniteFloat] | None = None


class HeadScalingEntry(_Strict):
    """A ``HeadScaling``."""

    kind: Literal["head_scaling"] = "head_scaling"
    heads: Annotated[list[HeadEntry], Field(min_length=1)]

    @classmethod
    def of(cls, scaling: HeadScaling) -> HeadScalingEntry:
        """The entry for ``scaling``."""
        return cls(
            heads=[
                HeadEntry(layer=h.layer, head=h.head, scale=h.scale, mean=None if h.mean is None else list(h.mean))
                for h in scaling.heads
            ]
        )

    def build(self) -> HeadScaling:
        """The intervention that this entry describes."""
        return HeadScaling(
            tuple(ScaledHead(h.layer, h.head, h.scale, None if h.mean is None else tuple(h.mean)) for h in self.heads)
        )


class InterventionFile(_Strict):
    """A whole file. It is itself an intervention: ``attach`` checks the model, then applies every entry in order.

    Attributes:
        name: A name for people.
        towards: Which source it strengthens, if that is its purpose.
        model: The model it is for.
        interventions: What to change, in order.
        provenance: Where it comes from: data, method, seed, versions.
        measured: What it was measured to gain and to damage.
    """

    format: Literal["conflictscope-intervention"] = FORMAT
    version: Literal[1] = VERSION
    name: str
    towards: Literal["context", "memory"] | None = None
    model: ModelShape
    interventions: Annotated[list[HeadScalingEntry], Field(min_length=1)]
    provenance: dict[str, Any] = {}
    measured: dict[str, Any] = {}

    def attach(self, model: nn.Module) -> Handle:
        """Apply every entry to ``model`` until the handle is removed.

        Raises:
            UserError: If the file is for another model; nothing stays attached then.
        """
        self.model.check(model)
        with ExitStack() as stack:
            handles = [stack.enter_context(entry.build().attach(model)) for entry in self.interventions]
            stack.pop_all()
        return Handle([hook for handle in handles for hook in handle.hooks])

    def save(self, path: str | Path) -> None:
        """Write the file as JSON, atomically."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: str | Path) -> InterventionFile:
        """Read and validate a file.

        Raises:
            UserError: If it is missing, is not JSON, is of a later version, or says anything that is not allowed.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Could not read the intervention file {path}: {error}; check the path.") from error
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); export the intervention again.") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise UserError(f'{path} is not an intervention file: its "format" must be "{FORMAT}".')
        if record.get("version") != VERSION:
            raise UserError(
                f"{path} has version {record.get('version')!r}, this conflictscope reads version {VERSION}; "
                "upgrade with: pip install --upgrade conflictscope"
            )
        try:
            loaded = cls.model_validate(record)
            for entry in loaded.interventions:
                entry.build()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{path} is not a valid intervention file: {where}: {first['msg']}; export it again."
            ) from error
        return loaded
