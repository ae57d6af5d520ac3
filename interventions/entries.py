"""The kinds of interventions in a file: for each what the JSON document says, and what it stands for.

Vectors and weights lie in the file's tensors; an entry holds their names. An entry knows the parts of blocks that it
reads or changes, and checks that what it describes fits the model that the file is for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from interp.anatomy import Blueprint, Part
from interp.errors import UserError
from interp.sae import SEPARATE, WEIGHT_NAMES, Architecture, Normalization, SparseAutoencoder
from interventions.features import AlphaForm, EditedFeatures, FeatureEdit
from interventions.feedforward import FeedForwardScaling
from interventions.gates import DialPoint, Gate, TrustDial
from interventions.gating import ConflictGate, Gateable
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import Count, Layer, ModelIdentity, Strict
from interventions.steering import Steering, SteeringMode
from interventions.tokens import Tokens

AnyIntervention = Gateable | ConflictGate

EDITS_VERSION = 1
"""Version of what interventions do: raise it when one of them would change a model in another way."""

Factor = Annotated[float, Field(ge=-1e4, le=1e4)]
"""How far something is scaled or moved."""

Rate = Annotated[float, Field(ge=0, le=1)]
Trust = Annotated[float, Field(ge=-1, le=1)]
Head = Annotated[int, Field(ge=0, lt=2**20)]
Feature = Annotated[int, Field(ge=0, lt=2**31)]
TensorName = Annotated[str, Field(min_length=1, max_length=200)]


_SAE_SETTINGS = (
    "layer",
    "architecture",
    "normalization",
    "subtracts_b_dec",
    "k",
    "residual_threshold",
    "max_iterations",
    "stop_on_duplicate_support",
)


class Place(NamedTuple):
    """A part of a block; of the output projection its input is meant, of every other part its output."""

    part: Part
    layer: int


class HeadEntry(Strict):
    """One scaled head, as ``ScaledHead``; JSON's lists stand for tuples."""

    layer: Layer
    head: Head
    scale: Factor
    mean: list[Factor] | None = None


class HeadScalingEntry(Strict):
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

    def build(self, _: Mapping[str, Tensor]) -> HeadScaling:
        """The intervention that this entry describes."""
        return HeadScaling(
            tuple(ScaledHead(h.layer, h.head, h.scale, None if h.mean is None else tuple(h.mean)) for h in self.heads)
        )

    def places(self, _: Blueprint) -> list[Place]:
        """What it changes."""
        return [Place("output_projection", head.layer) for head in self.heads]

    def check(self, model: ModelIdentity, _: Mapping[str, Tensor]) -> None:
        """See that it fits the model's shapes, other than the number of layers."""
        for head in self.heads:
            _check_head(model, head.layer, head.head)
            if head.mean is not None and len(head.mean) != model.d_head:
                raise UserError(
                    f"the mean of head {head.layer}.{head.head} has {len(head.mean)} numbers, but heads have "
                    f"{model.d_head}"
                )


class ScaledLayerEntry(Strict):
    """One scaled feed-forward layer."""

    layer: Layer
    scale: Factor


class FeedForwardScalingEntry(Strict):
    """A ``FeedForwardScaling``."""

    kind: Literal["feed_forward_scaling"] = "feed_forward_scaling"
    layers: Annotated[list[ScaledLayerEntry], Field(min_length=1)]

    @classmethod
    def of(cls, scaling: FeedForwardScaling) -> FeedForwardScalingEntry:
        """The entry for ``scaling``."""
        return cls(layers=[ScaledLayerEntry(layer=layer, scale=scale) for layer, scale in scaling.scales])

    def build(self, _: Mapping[str, Tensor]) -> FeedForwardScaling:
        """The intervention that this entry describes."""
        return FeedForwardScaling(tuple((entry.layer, entry.scale) for entry in self.layers))

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it changes."""
        return [Place(blueprint.writing_part("mlp"), entry.layer) for entry in self.layers]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """Every layer of every model fits it."""


class GateEntry(Strict):
    """A ``Gate``."""

    layer: Layer
    head: Head | None
    memory: Factor
    context: Factor


class DialPointEntry(Strict):
    """A ``DialPoint``."""

    trust: Trust
    memory_rate: Rate
    context_rate: Rate


class TrustDialEntry(Strict):
    """A ``TrustDial``."""

    kind: Literal["trust_dial"] = "trust_dial"
    trust: Trust
    gates: Annotated[list[GateEntry], Field(min_length=1)]
    calibration: list[DialPointEntry] = Field(default_factory=list)

    @classmethod
    def of(cls, dial: TrustDial) -> TrustDialEntry:
        """The entry for ``dial``."""
        return cls(
            trust=dial.trust,
            gates=[GateEntry(**vars(gate)) for gate in dial.gates],
            calibration=[DialPointEntry(**vars(point)) for point in dial.calibration],
        )

    def build(self, _: Mapping[str, Tensor]) -> TrustDial:
        """The intervention that this entry describes."""
        return TrustDial(
            tuple(Gate(**dict(gate)) for gate in self.gates),
            self.trust,
            tuple(DialPoint(**dict(point)) for point in self.calibration),
        )

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it changes when it is turned."""
        mlp = blueprint.writing_part("mlp")
        return [Place(mlp if gate.head is None else "output_projection", gate.layer) for gate in self.gates]

    def check(self, model: ModelIdentity, _: Mapping[str, Tensor]) -> None:
        """See that it fits the model's shapes, other than the number of layers."""
        for gate in self.gates:
            _check_head(model, gate.layer, gate.head or 0)


class SteeringEntry(Strict):
    """A ``Steering``; ``vector`` is the name of its tensor."""

    kind: Literal["steering"] = "steering"
    layer: Layer
    vector: TensorName
    strength: Factor
    tokens: Tokens
    mode: SteeringMode

    @classmethod
    def of(cls, steering: Steering, name: str, tensors: dict[str, Tensor]) -> SteeringEntry:
        """The entry for ``steering``, whose vector is put into ``tensors`` under a name that begins with ``name``."""
        tensors[f"{name}.vector"] = steering.vector.float()
        return cls(
            layer=steering.layer,
            vector=f"{name}.vector",
            strength=steering.strength,
            tokens=steering.tokens,
            mode=steering.mode,
        )

    def build(self, tensors: Mapping[str, Tensor]) -> Steering:
        """The intervention that this entry describes."""
        return Steering(self.layer, _tensor(tensors, self.vector), self.strength, self.tokens, self.mode)

    def places(self, _: Blueprint) -> list[Place]:
        """What it changes."""
        return [Place("block", self.layer)]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that it fits the model's shapes, other than the number of layers."""
        _check_width("the steering vector", _tensor(tensors, self.vector), model.d_model)


class EditedFeaturesEntry(Strict):
    """An ``EditedFeatures``; ``weights`` maps the names of its weights to those of their tensors.

    The tensor ``targets`` holds the targets of the removed features first, then those of the added ones.
    """

    layer: Layer
    architecture: Architecture
    normalization: Normalization
    subtracts_b_dec: bool
    k: Count | None
    residual_threshold: Annotated[float, Field(ge=-1e9, le=1e9)]
    max_iterations: Annotated[int, Field(ge=1, le=10_000)] | None
    stop_on_duplicate_support: bool
    removed: list[Feature]
    added: list[Feature]
    targets: TensorName
    weights: Annotated[dict[str, TensorName], Field(max_length=20)]

    @classmethod
    def of(cls, edit: EditedFeatures, name: str, tensors: dict[str, Tensor]) -> EditedFeaturesEntry:
        """The entry for ``edit``, whose tensors are put into ``tensors`` under names that begin with ``name``."""
        sae = edit.sae
        features = list(sae.kept or range(sae.d_sae))
        order = [*(~edit.added).nonzero().flatten().tolist(), *edit.added.nonzero().flatten().tolist()]
        sorted_sae = sae.restricted(order)
        tensors[f"{name}.targets"] = edit.targets[order].float()
        weights = {key: f"{name}.{key}" for key in sorted_sae.weights}
        tensors |= {weights[key]: values for key, values in sorted_sae.weights.items()}
        removed = len(order) - int(edit.added.sum())
        return cls(
            **{name: getattr(sae, name) for name in _SAE_SETTINGS},
            removed=[features[i] for i in order[:removed]],
            added=[features[i] for i in order[removed:]],
            targets=f"{name}.targets",
            weights=weights,
        )

    def build(self, tensors: Mapping[str, Tensor]) -> EditedFeatures:
        """The edit that this entry describes."""
        features = (*self.removed, *self.added)
        sae = SparseAutoencoder(
            **{name: getattr(self, name) for name in _SAE_SETTINGS},
            weights={key: _tensor(tensors, name) for key, name in self.weights.items()},
            kept=features,
            name=f"of layer {self.layer}",
        )
        if len(set(features)) < len(features):
            raise UserError(f"Layer {self.layer} has a feature twice among those to remove and to add; give each once.")
        # Where each feature is computed by itself the others are not there: then numbers of features are but names.
        d_sae = sae.weights["W_enc"].shape[-1]
        if self.architecture not in SEPARATE and (outside := [i for i in features if i >= d_sae]):
            raise UserError(f"The SAE {sae.name} has no feature {outside[0]}; its features are 0 to {d_sae - 1}.")
        added = torch.arange(len(features)) >= len(self.removed)
        return EditedFeatures(sae, _tensor(tensors, self.targets), added)

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that its weights are those of such an autoencoder, and as wide as the model."""
        weights = {key: _tensor(tensors, name) for key, name in self.weights.items()}
        if unknown := sorted(weights.keys() - {"W_dec", "b_dec", *WEIGHT_NAMES[self.architecture]}):
            raise UserError(f"a {self.architecture} autoencoder has no weights {unknown[0][:40]!r}")
        if len(dtypes := {str(values.dtype) for values in weights.values()}) > 1:
            raise UserError(f"the weights of one autoencoder are of the dtypes {' and '.join(sorted(dtypes))}")
        if "b_dec" in weights:
            _check_width("the autoencoder", weights["b_dec"], model.d_model)


class FeatureEditEntry(Strict):
    """A ``FeatureEdit``."""

    kind: Literal["feature_edit"] = "feature_edit"
    alpha: Factor
    alpha_form: AlphaForm
    tokens: Tokens
    layers: Annotated[list[EditedFeaturesEntry], Field(min_length=1)]

    @classmethod
    def of(cls, edit: FeatureEdit, name: str, tensors: dict[str, Tensor]) -> FeatureEditEntry:
        """The entry for ``edit``, whose tensors are put into ``tensors`` under names that begin with ``name``."""
        layers = [EditedFeaturesEntry.of(part, f"{name}.{part.sae.layer}", tensors) for part in edit.layers]
        return cls(alpha=edit.alpha, alpha_form=edit.alpha_form, tokens=edit.tokens, layers=layers)

    def build(self, tensors: Mapping[str, Tensor]) -> FeatureEdit:
        """The intervention that this entry describes."""
        layers = tuple(layer.build(tensors) for layer in self.layers)
        return FeatureEdit(layers, self.alpha, self.alpha_form, self.tokens)

    def places(self, _: Blueprint) -> list[Place]:
        """What it changes."""
        return [Place("block", layer.layer) for layer in self.layers]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that it fits the model's shapes, other than the number of layers."""
        for layer in self.layers:
            layer.check(model, tensors)


UngatedEntry = Annotated[
    HeadScalingEntry | FeedForwardScalingEntry | TrustDialEntry | SteeringEntry | FeatureEditEntry,
    Field(discriminator="kind"),
]


class ConflictGateEntry(Strict):
    """A ``ConflictGate``; ``weight`` is the name of its probe's tensor."""

    kind: Literal["conflict_gate"] = "conflict_gate"
    part: Literal["block", "output_projection", "attention", "attention_post_norm", "mlp", "mlp_post_norm"]
    layer: Layer
    weight: TensorName
    bias: Annotated[float, Field(ge=-1e9, le=1e9)]
    threshold: Annotated[float, Field(ge=-1e9, le=1e9)]
    interventions: Annotated[list[UngatedEntry], Field(min_length=1)]

    @classmethod
    def of(cls, gate: ConflictGate, name: str, tensors: dict[str, Tensor]) -> ConflictGateEntry:
        """The entry for ``gate``, whose tensors are put into ``tensors`` under names that begin with ``name``."""
        tensors[f"{name}.probe"] = gate.weight.float()
        return cls.model_validate(
            {
                "part": gate.part,
                "layer": gate.layer,
                "weight": f"{name}.probe",
                "bias": gate.bias,
                "threshold": gate.threshold,
                "interventions": [ungated_entry(edit, f"{name}.{i}", tensors) for i, edit in enumerate(gate.edits)],
            }
        )

    def build(self, tensors: Mapping[str, Tensor]) -> ConflictGate:
        """The intervention that this entry describes."""
        edits = tuple(entry.build(tensors) for entry in self.interventions)
        weight = _tensor(tensors, self.weight)
        return ConflictGate(self.part, self.layer, weight, self.bias, self.threshold, edits)

    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it reads and changes."""
        if self.part not in blueprint.parts:
            raise UserError(f"the gate reads the part {self.part!r}, which this architecture does not have")
        inner = [place for entry in self.interventions for place in entry.places(blueprint)]
        return [Place(self.part, self.layer), *inner]

    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that it fits the model's shapes, other than the number of layers."""
        width = model.n_heads * model.d_head if self.part == "output_projection" else model.d_model
        _check_width("the gate's probe", _tensor(tensors, self.weight), width)
        for entry in self.interventions:
            entry.check(model, tensors)


Entry = Annotated[
    HeadScalingEntry | FeedForwardScalingEntry | TrustDialEntry | SteeringEntry | FeatureEditEntry | ConflictGateEntry,
    Field(discriminator="kind"),
]


def ungated_entry(edit: Gateable, name: str, tensors: dict[str, Tensor]) -> UngatedEntry:
    """The entry for an edit, whose tensors, if any, are put into ``tensors`` under names that begin with ``name``."""
    if isinstance(edit, HeadScaling):
        return HeadScalingEntry.of(edit)
    if isinstance(edit, FeedForwardScaling):
        return FeedForwardScalingEntry.of(edit)
    if isinstance(edit, TrustDial):
        return TrustDialEntry.of(edit)
    if isinstance(edit, Steering):
        return SteeringEntry.of(edit, name, tensors)
    return FeatureEditEntry.of(edit, name, tensors)


def entries_of(interventions: Sequence[AnyIntervention], tensors: dict[str, Tensor]) -> list[Entry]:
    """The entries for some interventions, in order, whose tensors are put into ``tensors``."""
    return [
        ConflictGateEntry.of(intervention, str(number), tensors)
        if isinstance(intervention, ConflictGate)
        else ungated_entry(intervention, str(number), tensors)
        for number, intervention in enumerate(interventions)
    ]


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"The intervention's tensor file lacks {name!r}; export the intervention again.")
    return tensors[name]


def _check_head(model: ModelIdentity, layer: int, head: int) -> None:
    if head >= model.n_heads:
        raise UserError(f"head {layer}.{head} does not exist: the model has {model.n_heads} heads in each layer")


def _check_width(what: str, values: Tensor, width: int) -> None:
    if math.prod(values.shape) != width:
        raise UserError(f"{what} has shape {tuple(values.shape)}, but the model needs {width} numbers there")
