"""Edit only where there is a conflict: a probe is read on the way up, and decides row by row about the layers above.

1. A forward pass over new prompts reads a linear probe at the last token of every prompt, at one site or at several.
2. Rows whose log odds exceed the threshold are open: in these the edits act, in this pass and in every later one that
   goes on with the same text. In all others they do nothing. A soft gate moves every row instead, by the probability
   that its log odds lie above the threshold.
3. A prompt that is too unlike all that the probe was fitted on stays closed, whatever the probe says.

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
from interventions.identity import Layer, ModelIdentity, Strict
from interventions.tokens import TokenTracker

if TYPE_CHECKING:
    from interp.pairs import Combined


ReadPart = Literal["block", "output_projection", "attention", "attention_post_norm", "mlp", "mlp_post_norm"]


@dataclass(frozen=True, eq=False)
class GateReading:
    """What a gate's probe reads at one more site.

    Attributes:
        part: The part of a block whose output it is, of the output projection its input, z.
        layer: The block.
        weight: Its part of the probe, ``(width,)``.
    """

    part: Part
    layer: int
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Familiar:
    """What a gate was fitted on looked like, where it reads: a normal distribution of each number by itself.

    Attributes:
        center: Means, ``(width,)``.
        scale: Standard deviations, ``(width,)``, above 0.
        limit: The strangeness, that is the mean squared distance from the mean in standard deviations, up to which a
            prompt counts as like those.
    """

    center: Tensor
    scale: Tensor
    limit: float

    def strangeness(self, values: Tensor) -> Tensor:
        """How far rows of values ``(..., width)`` are from what is familiar; about 1 for what is like it."""
        center, scale = self.center.to(values), self.scale.to(values)
        return ((values - center) / scale).square().mean(-1)


@dataclass(frozen=True, eq=False)
class ConflictGate(Intervention):
    """Applies edits to the rows of a batch for which a probe sees a conflict. Immutable.

    Attributes:
        part: What the probe reads: the part of a block whose output it is, of the output projection its input, z.
        layer: The block.
        weight: The probe, ``(width,)``.
        bias: Of the probe.
        threshold: Log odds, the sum of all readings' ``weight @ values`` plus ``bias``, above which a row is open.
        edits: What is applied then, in order.
        also: What the probe reads at other sites, of no higher layers.
        soft: Whether edits act on every row, by ``sigmoid(log odds - threshold)`` of the way.
        familiar: What prompts have to be like at ``part`` and ``layer`` to open; ``None`` takes all.

    Raises:
        UserError: If the probe is not finite, there is no edit, or one is a gate or lies not above the probe's layer,
            or chooses tokens behind a soft gate.
    """

    part: Part
    layer: int
    weight: Tensor
    bias: float
    threshold: float
    edits: tuple[Intervention, ...]
    also: tuple[GateReading, ...] = ()
    soft: bool = False
    familiar: Familiar | None = None

    in_one_pass = True

    def __post_init__(self) -> None:
        for reading in self.readings:
            if reading.weight.ndim != 1 or not reading.weight.isfinite().all():
                shape = tuple(reading.weight.shape)
                raise UserError(f"A gate's probe is a row of finite numbers, not of shape {shape}; fit it again.")
        for reading in self.also:
            if reading.layer > self.layer or (reading.part, reading.layer) == (self.part, self.layer):
                raise UserError(
                    f"A gate decides in the highest layer that it reads, {self.part} of {self.layer}, but also reads "
                    f"{reading.part} of {reading.layer}; give the highest as its part and layer, and each site once."
                )
        if self.familiar is not None:
            self._check_familiar(self.familiar)
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

    def _check_familiar(self, familiar: Familiar) -> None:
        rows = (familiar.center, familiar.scale)
        if (
            any(row.shape != self.weight.shape or not row.isfinite().all() for row in rows)
            or (familiar.scale <= 0).any()
        ):
            raise UserError(
                f"What is familiar to a gate are {len(self.weight)} finite means and as many standard deviations above "
                "0; fit it again."
            )
        if not familiar.limit > 0:
            raise UserError(f"The strangeness that a gate allows is above 0, not {familiar.limit:g}; fit it again.")

    @property
    def readings(self) -> tuple[GateReading, ...]:
        """All that the probe reads; where it decides last."""
        return (*self.also, GateReading(self.part, self.layer, self.weight))

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
        if self.soft and inside.rule is not None:
            raise UserError(
                "A rule for the next token is let through or not at all; put it behind a gate that is not soft."
            )
        rule = None if inside.rule is None else reader.rule_where_open(inside.rule)
        return Acting(reader.around(inside.patches), rule)

    def _reader(self, model: nn.Module) -> _Reader:
        anatomy = Anatomy(model)
        for one in self.readings:
            anatomy.site(one.part, one.layer)
            width = anatomy.n_heads * anatomy.d_head if one.part == "output_projection" else anatomy.d_model
            if len(one.weight) != width:
                raise UserError(
                    f"The gate's probe reads {len(one.weight)} numbers, but this model has {width} there; fit it on "
                    "this model."
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
        also = f" and {len(self.also)} sites below" if self.also else ""
        yield (
            f"behind a {'soft ' * self.soft}gate that reads the {self.part} of layer {self.layer}{also}, above "
            f"{self.threshold:.3f}"
        )
        for edit in self.edits:
            yield from edit.described()

    def entry(self, name: str, tensors: dict[str, Tensor]) -> ConflictGateEntry:
        """Its part of the intervention file; probe and edits' tensors are put into ``tensors``."""
        tensors[f"{name}.probe"] = self.weight.float()
        also = []
        for number, reading in enumerate(self.also):
            tensors[f"{name}.probe.{number}"] = reading.weight.float()
            also.append({"part": reading.part, "layer": reading.layer, "weight": f"{name}.probe.{number}"})
        familiar = None
        if self.familiar is not None:
            tensors[f"{name}.center"] = self.familiar.center.float()
            tensors[f"{name}.scale"] = self.familiar.scale.float()
            familiar = {"center": f"{name}.center", "scale": f"{name}.scale", "limit": self.familiar.limit}
        return ConflictGateEntry.model_validate(
            {
                "part": self.part,
                "layer": self.layer,
                "weight": f"{name}.probe",
                "bias": self.bias,
                "threshold": self.threshold,
                "interventions": [edit.entry(f"{name}.{i}", tensors) for i, edit in enumerate(self.edits)],
                "also": also,
                "soft": self.soft,
                "familiar": familiar,
            }
        )


class _Reader:
    """The probe at work; what it decided is kept until the next prompts, for each thread by itself."""

    def __init__(self, gate: ConflictGate) -> None:
        self._gate = gate
        self._tracker = TokenTracker("last_prompt")
        self._decided = threading.local()
        self._weights = [Placed(reading.weight) for reading in gate.readings]

    def attach(self, model: nn.Module) -> Removable:
        """Follow the passes of ``model``, a transformers model or a ``TransformerBridge``."""
        return self._tracker.attach(model)

    def around(self, patches: Sequence[Patch]) -> list[Patch]:
        """Patches that read the probe, and the given ones where it opens."""
        reading = [
            Patch(one.part, one.layer, self._read(number), self) for number, one in enumerate(self._gate.readings)
        ]
        return [*reading, *(patch._replace(change=self.where_open(patch.change)) for patch in patches)]

    def _read(self, number: int) -> Callable[[Tensor], Tensor]:
        """Take one reading, of ``(n_rows, n_tokens, width)``, and decide after all of them; the values stay."""
        weight, familiar = self._weights[number], self._gate.familiar
        is_main = number == len(self._weights) - 1

        def read(values: Tensor) -> Tensor:
            mask = self._tracker.mask(values.device)
            if mask is None:
                return values
            rows = torch.arange(len(values), device=values.device)
            last = values[rows, mask.int().argmax(-1)].float()
            found: dict[int, Tensor] = getattr(self._decided, "read", {})
            # What is there already is of a pass that broke off.
            found = {**({} if number in found else found), number: last @ weight.like(last)}
            if is_main and familiar is not None:
                self._decided.unlike = familiar.strangeness(last) > familiar.limit
            if len(found) == len(self._weights):
                log_odds = torch.stack([one.to(last.device) for one in found.values()]).sum(0) + self._gate.bias
                share, found = self._share(log_odds), {}
                self._decide(share if familiar is None else share * ~self._decided.unlike.to(share.device))
            self._decided.read = found
            return values

        return read

    def _share(self, log_odds: Tensor) -> Tensor:
        """How far each row is moved: not at all or wholly, or anything between behind a soft gate."""
        over = log_odds - self._gate.threshold
        return over.sigmoid() if self._gate.soft else over > 0

    def tell(self, real: Tensor, *, new_prompts: bool, kept: Tensor | None = None) -> None:
        """Say what the next passes are; ``kept`` is how far their rows are moved, if these were read before."""
        self._tracker.tell(real, new_prompts=new_prompts)
        if kept is not None:
            self._decide(kept)

    def keep(self) -> Tensor:
        """How far each row is moved, ``(n_rows,)``; boolean but for soft gates."""
        return self._decided.rows

    def leave(self) -> None:
        """Note that the passes that were told of are over."""
        self._tracker.leave()

    def _decide(self, rows: Tensor) -> None:
        self._decided.rows = rows
        # Looked at once here, so that later modules and steps need not ask the device.
        self._decided.any, self._decided.all = bool(rows.any()), bool((rows == 1).all())

    def where_open(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same change, of open rows only, or behind a soft gate of each row in part."""

        def change_some(values: Tensor) -> Tensor:
            if not self._decided.any:
                return values
            edited = change(values)
            if self._decided.all or edited is values:
                return edited
            rows = self._decided.rows.to(values.device)[:, None, None]
            return values.lerp(edited, rows.to(values.dtype)) if self._gate.soft else torch.where(rows, edited, values)

        return change_some

    def rule_where_open(self, rule: Combined) -> Combined:
        """The same rule, for pairs of rows of which the first one, with the context, is open."""

        def choose_some(with_context: Tensor, without: Tensor) -> Tensor:
            is_open = self._decided.rows[: len(with_context), None].to(with_context.device)
            return torch.where(is_open, rule(with_context, without), with_context)

        return choose_some


class GateReadingEntry(Strict):
    """A ``GateReading``; ``weight`` is the name of its tensor."""

    part: ReadPart
    layer: Layer
    weight: TensorName


class FamiliarEntry(Strict):
    """What is familiar to a gate; ``center`` and ``scale`` are names of tensors."""

    center: TensorName
    scale: TensorName
    limit: Annotated[float, Field(gt=0, le=1e9)]


class ConflictGateEntry(Entry):
    """A ``ConflictGate``; ``weight`` is the name of its probe's tensor."""

    kind: Literal["conflict_gate"] = "conflict_gate"
    part: ReadPart
    layer: Layer
    weight: TensorName
    bias: Annotated[float, Field(ge=-1e9, le=1e9)]
    threshold: Annotated[float, Field(ge=-1e9, le=1e9)]
    interventions: Annotated[list[EditEntry], Field(min_length=1)]
    also: Annotated[list[GateReadingEntry], Field(default_factory=list, max_length=10_000)]
    soft: bool = False
    familiar: FamiliarEntry | None = None

    def build(self, tensors: Mapping[str, Tensor]) -> ConflictGate:
        """The intervention that this entry describes."""
        edits = tuple(entry.build(tensors) for entry in self.interventions)
        weight = named_tensor(tensors, self.weight)
        also = tuple(GateReading(one.part, one.layer, named_tensor(tensors, one.weight)) for one in self.also)
        familiar = None
        if self.familiar is not None:
            center, scale = (named_tensor(tensors, name) for name in (self.familiar.center, self.familiar.scale))
            familiar = Familiar(center, scale, self.familiar.limit)
        return ConflictGate(self.part, self.layer, weight, self.bias, self.threshold, edits, also, self.soft, familiar)

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it reads and changes."""
        readings = [Place(one.part, one.layer) for one in (*self.also, self)]
        if missing := [place.part for place in readings if place.part not in blueprint.parts]:
            raise UserError(f"the gate reads the part {missing[0]!r}, which this architecture does not have")
        inner = [place for entry in self.interventions for place in entry.places(blueprint)]
        return [*readings, *inner]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that the probe is as wide as what it reads, and that the edits fit."""
        for one in (*self.also, self):
            width = model.n_heads * model.d_head if one.part == "output_projection" else model.d_model
            check_width("the gate's probe", named_tensor(tensors, one.weight), width)
        for entry in self.interventions:
            entry.check(model, tensors)
