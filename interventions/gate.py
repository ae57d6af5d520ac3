"""Edit only where there is a conflict: a probe is read on the way up, and decides row by row about the layers above.

1. A forward pass over new prompts reads a linear probe at the last token of every prompt, at the probe's site.
2. Rows whose log odds exceed the threshold are open: in these the edits act, in this pass and in every later one that
   goes on with the same text. In all others they do nothing.

One pass both decides and answers, so an edit must lie above the layer that the probe reads. A row that is open gets
what the edits alone would give it; one that is not, what the unedited model would. A rule for the next token is let
through for prompts whose row with the context is open.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from interp.anatomy import Anatomy, Blueprint, Part
from interp.errors import UserError
from interventions.base import Acting, Entry, Intervention, Patch, Place, Placed, Removable
from interventions.entries import EditEntry
from interventions.fields import TensorName, check_width, named_tensor
from interventions.identity import Layer, ModelIdentity
from interventions.tokens import TokenTracker

if TYPE_CHECKING:
    from interp.pairs import Combined


@dataclass(frozen=True, eq=False)
class ConflictGate(Intervention):
    """Applies edits to the rows of a batch for which a probe sees a conflict. Immutable.

    Attributes:
        part: What the probe reads: the part of a block whose output it is, of the output projection its input, z.
        layer: The block.
        weight: The probe, ``(width,)``.
        bias: Of the probe.
        threshold: Log odds, ``weight @ values + bias``, above which a row is open.
        edits: What is applied then, in order.

    Raises:
        UserError: If the probe is not finite, there is no edit, or one is a gate or lies not above the probe's layer.
    """

    part: Part
    layer: int
    weight: Tensor
    bias: float
    threshold: float
    edits: tuple[Intervention, ...]

    in_one_pass = True

    def __post_init__(self) -> None:
        if self.weight.ndim != 1 or not self.weight.isfinite().all():
            raise UserError(
                f"A gate's probe is a row of finite numbers, not of shape {tuple(self.weight.shape)}; fit it again."
            )
        if not (math.isfinite(self.bias) and math.isfinite(self.threshold)):
            raise UserError("A gate's bias and threshold must be finite numbers; fit it again.")
        if not self.edits:
            raise UserError("A gate needs an edit that it lets through; give it one at least.")
        if any(isinstance(edit, ConflictGate) for edit in self.edits):
            raise UserError("A gate lets edits through, not another gate; give it that gate's edits.")
        if refused := next((edit for edit in self.edits if not edit.by_row), None):
            raise UserError(
                f"{type(refused).__name__} acts on all prompts of a batch or none; apply it without a gate."
            )
        # A dial may be turned later, wherever it stands.
        turned = [edit.turned(trust) for edit in self.edits for trust in (-1.0, 1.0)]
        layers = [layer for edit in turned for layer in edit.edited_layers]
        lowest = min(layers, default=None)
        if lowest is not None and lowest <= self.layer:
            raise UserError(
                f"The gate reads layer {self.layer}, but layer {lowest} is edited, which has been passed by then; gate "
                "at a lower layer, or leave out edits of layers up to the gate's."
            )

    @property
    def edited_layers(self) -> set[int]:
        """The layers that it changes where it is open."""
        return {layer for edit in self.edits for layer in edit.edited_layers}

    @property
    def head_scales(self) -> dict[tuple[int, int], float]:
        """The scales of the heads that it moves where it is open, by ``(layer, head)``."""
        return {head: scale for edit in self.edits for head, scale in edit.head_scales.items()}

    @property
    def n_moved(self) -> int:
        """How many heads, feed-forward layers, directions or features it lets move."""
        return sum(edit.n_moved for edit in self.edits)

    @property
    def parts(self) -> tuple[Intervention, ...]:
        """The edits that it lets through."""
        return self.edits

    def patches(self, model: nn.Module) -> list[Patch]:
        """What it reads and changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model lacks what is read or changed, or is of another width.
        """
        reader = self._reader(model)
        return reader.around([patch for edit in self.edits for patch in edit.patches(model)])

    def acting(self, model: nn.Module) -> Acting:
        """The same, and the rule for the next token that it lets through, if there is one.

        The next tokens of a prompt that does not open the gate are those of the model.

        Raises:
            UserError: As ``patches``, or if there are several rules.
        """
        reader = self._reader(model)
        inside = Acting.together(edit.acting(model) for edit in self.edits)
        rule = None if inside.rule is None else reader.rule_where_open(inside.rule)
        return Acting(reader.around(inside.patches), rule)

    def _reader(self, model: nn.Module) -> _Reader:
        anatomy = Anatomy(model)
        anatomy.site(self.part, self.layer)
        width = anatomy.n_heads * anatomy.d_head if self.part == "output_projection" else anatomy.d_model
        if len(self.weight) != width:
            raise UserError(
                f"The gate's probe reads {len(self.weight)} numbers, but this model has {width} there; fit it on this "
                "model."
            )
        return _Reader(self)

    def scaled(self, strength: float) -> ConflictGate:
        """The same gate around edits that are ``strength`` times as far.

        Raises:
            UserError: If one of them has no strength.
        """
        return replace(self, edits=tuple(edit.scaled(strength) for edit in self.edits))

    def turned(self, trust: float) -> ConflictGate:
        """The same gate around dials that are turned."""
        return replace(self, edits=tuple(edit.turned(trust) for edit in self.edits))

    def settled(self) -> tuple[ConflictGate, ...]:
        """A gate around what its edits do without settings, if they do anything."""
        edits = tuple(part for edit in self.edits for part in edit.settled())
        return (replace(self, edits=edits),) if edits else ()

    def described(self) -> Iterator[str]:
        """What it reads, then what it lets through."""
        yield f"behind a gate that reads the {self.part} of layer {self.layer}, above {self.threshold:.3f}"
        for edit in self.edits:
            yield from edit.described()

    def entry(self, name: str, tensors: dict[str, Tensor]) -> ConflictGateEntry:
        """Its part of the intervention file; probe and edits' tensors are put into ``tensors``."""
        tensors[f"{name}.probe"] = self.weight.float()
        return ConflictGateEntry.model_validate(
            {
                "part": self.part,
                "layer": self.layer,
                "weight": f"{name}.probe",
                "bias": self.bias,
                "threshold": self.threshold,
                "interventions": [edit.entry(f"{name}.{i}", tensors) for i, edit in enumerate(self.edits)],
            }
        )


class _Reader:
    """The probe at work; what it decided is kept until the next prompts, for each thread by itself."""

    def __init__(self, gate: ConflictGate) -> None:
        self._gate = gate
        self._tracker = TokenTracker("last_prompt")
        self._decided = threading.local()
        self._weight = Placed(gate.weight)

    def attach(self, model: nn.Module) -> Removable:
        """Follow the passes of ``model``, a transformers model or a ``TransformerBridge``."""
        return self._tracker.attach(model)

    def around(self, patches: Sequence[Patch]) -> list[Patch]:
        """A patch that reads the probe, and the given ones where it opens."""
        reading = Patch(self._gate.part, self._gate.layer, self.read, self)
        return [reading, *(patch._replace(change=self.where_open(patch.change)) for patch in patches)]

    def read(self, values: Tensor) -> Tensor:
        """Decide about the rows of ``(n_rows, n_tokens, width)``, if these are new prompts; the values stay."""
        mask = self._tracker.mask(values.device)
        if mask is not None:
            rows = torch.arange(len(values), device=values.device)
            last = values[rows, mask.int().argmax(-1)].float()
            self._decide(last @ self._weight.like(last) + self._gate.bias > self._gate.threshold)
        return values

    def tell(self, real: Tensor, *, new_prompts: bool, kept: Tensor | None = None) -> None:
        """Say what the next passes are; ``kept`` is which of their rows are open, if these were read before."""
        self._tracker.tell(real, new_prompts=new_prompts)
        if kept is not None:
            self._decide(kept)

    def keep(self) -> Tensor:
        """Which rows are open, boolean ``(n_rows,)``."""
        return self._decided.rows

    def leave(self) -> None:
        """Note that the passes that were told of are over."""
        self._tracker.leave()

    def _decide(self, is_open: Tensor) -> None:
        self._decided.rows = is_open
        # Looked at once here, so that later modules and steps need not ask the device.
        self._decided.any, self._decided.all = bool(is_open.any()), bool(is_open.all())

    def where_open(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same change, of open rows only."""

        def change_some(values: Tensor) -> Tensor:
            if not self._decided.any:
                return values
            edited = change(values)
            if self._decided.all or edited is values:
                return edited
            return torch.where(self._decided.rows.to(values.device)[:, None, None], edited, values)

        return change_some

    def rule_where_open(self, rule: Combined) -> Combined:
        """The same rule, for pairs of rows of which the first one, with the context, is open."""

        def choose_some(with_context: Tensor, without: Tensor) -> Tensor:
            is_open = self._decided.rows[: len(with_context), None].to(with_context.device)
            return torch.where(is_open, rule(with_context, without), with_context)

        return choose_some


class ConflictGateEntry(Entry):
    """A ``ConflictGate``; ``weight`` is the name of its probe's tensor."""

    kind: Literal["conflict_gate"] = "conflict_gate"
    part: Literal["block", "output_projection", "attention", "attention_post_norm", "mlp", "mlp_post_norm"]
    layer: Layer
    weight: TensorName
    bias: Annotated[float, Field(ge=-1e9, le=1e9)]
    threshold: Annotated[float, Field(ge=-1e9, le=1e9)]
    interventions: Annotated[list[EditEntry], Field(min_length=1)]

    def build(self, tensors: Mapping[str, Tensor]) -> ConflictGate:
        """The intervention that this entry describes."""
        edits = tuple(entry.build(tensors) for entry in self.interventions)
        weight = named_tensor(tensors, self.weight)
        return ConflictGate(self.part, self.layer, weight, self.bias, self.threshold, edits)

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it reads and changes."""
        if self.part not in blueprint.parts:
            raise UserError(f"the gate reads the part {self.part!r}, which this architecture does not have")
        inner = [place for entry in self.interventions for place in entry.places(blueprint)]
        return [Place(self.part, self.layer), *inner]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that the probe is as wide as what it reads, and that the edits fit."""
        width = model.n_heads * model.d_head if self.part == "output_projection" else model.d_model
        check_width("the gate's probe", named_tensor(tensors, self.weight), width)
        for entry in self.interventions:
            entry.check(model, tensors)
