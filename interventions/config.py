"""The intervention file, version 1: a JSON document that says what to change in which model, and what it did.

{"format": "conflictscope-intervention", "version": 1, "name": ..., "towards": "context" | "memory" | null,
 "model": {"name", "architecture", "n_layers", "n_heads", "d_head", "d_model"},
 "interventions": [
   {"kind": "head_scaling", "heads": [{"layer", "head", "scale", "mean"}]},
   {"kind": "feed_forward_scaling", "layers": [{"layer", "scale"}]},
   {"kind": "trust_dial", "trust", "gates": [{"layer", "head", "memory", "context"}],
    "calibration": [{"trust", "memory_rate", "context_rate"}]},
   {"kind": "steering", "layer", "vector", "strength", "tokens", "mode"},
   {"kind": "feature_edit", "alpha", "alpha_form", "tokens", "layers": [{"layer", "architecture", ..., "weights"}]}],
 "tensors": {"file", "sha256"} | null,
 "provenance": {...}, "measured": {...}}

Vectors and weights lie in a safetensors file next to the document, which names them and holds the file's hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    ValidationError,
)
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.files import atomic_path, write_json
from interp.sae import Architecture, Normalization, SparseAutoencoder
from interventions.base import Handle
from interventions.features import AlphaForm, EditedFeatures, FeatureEdit
from interventions.feedforward import FeedForwardScaling
from interventions.gates import DialPoint, Gate, TrustDial
from interventions.heads import HeadScaling, ScaledHead
from interventions.steering import Steering, SteeringMode
from interventions.tokens import Tokens

FORMAT = "conflictscope-intervention"
VERSION = 1

AnyIntervention = HeadScaling | FeedForwardScaling | TrustDial | Steering | FeatureEdit


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

    def build(self, _: Mapping[str, Tensor]) -> HeadScaling:
        """The intervention that this entry describes."""
        return HeadScaling(
            tuple(ScaledHead(h.layer, h.head, h.scale, None if h.mean is None else tuple(h.mean)) for h in self.heads)
        )


class ScaledLayerEntry(_Strict):
    """One scaled feed-forward layer."""

    layer: NonNegativeInt
    scale: FiniteFloat


class FeedForwardScalingEntry(_Strict):
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


class GateEntry(_Strict):
    """A ``Gate``."""

    layer: NonNegativeInt
    head: NonNegativeInt | None
    memory: FiniteFloat
    context: FiniteFloat


class DialPointEntry(_Strict):
    """A ``DialPoint``."""

    trust: FiniteFloat
    memory_rate: FiniteFloat
    context_rate: FiniteFloat


class TrustDialEntry(_Strict):
    """A ``TrustDial``."""

    kind: Literal["trust_dial"] = "trust_dial"
    trust: FiniteFloat
    gates: Annotated[list[GateEntry], Field(min_length=1)]
    calibration: list[DialPointEntry] = []

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


class SteeringEntry(_Strict):
    """A ``Steering``; ``vector`` is the name of its tensor."""

    kind: Literal["steering"] = "steering"
    layer: NonNegativeInt
    vector: str
    strength: FiniteFloat
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


class EditedFeaturesEntry(_Strict):
    """An ``EditedFeatures``; ``weights`` maps the names of its weights to those of their tensors.

    The tensor ``targets`` holds the targets of the removed features first, then those of the added ones.
    """

    layer: NonNegativeInt
    architecture: Architecture
    normalization: Normalization
    subtracts_b_dec: bool
    k: PositiveInt | None
    residual_threshold: FiniteFloat
    max_iterations: PositiveInt | None
    stop_on_duplicate_support: bool
    removed: list[NonNegativeInt]
    added: list[NonNegativeInt]
    targets: str
    weights: dict[str, str]

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
            layer=sae.layer,
            architecture=sae.architecture,
            normalization=sae.normalization,
            subtracts_b_dec=sae.subtracts_b_dec,
            k=sae.k,
            residual_threshold=sae.residual_threshold,
            max_iterations=sae.max_iterations,
            stop_on_duplicate_support=sae.stop_on_duplicate_support,
            removed=[features[i] for i in order[:removed]],
            added=[features[i] for i in order[removed:]],
            targets=f"{name}.targets",
            weights=weights,
        )

    def build(self, tensors: Mapping[str, Tensor]) -> EditedFeatures:
        """The edit that this entry describes."""
        features = (*self.removed, *self.added)
        sae = SparseAutoencoder(
            architecture=self.architecture,
            weights={key: _tensor(tensors, name) for key, name in self.weights.items()},
            layer=self.layer,
            k=self.k,
            normalization=self.normalization,
            subtracts_b_dec=self.subtracts_b_dec,
            residual_threshold=self.residual_threshold,
            max_iterations=self.max_iterations,
            stop_on_duplicate_support=self.stop_on_duplicate_support,
            kept=features,
            name=f"of layer {self.layer}",
        )
        added = torch.arange(len(features)) >= len(self.removed)
        return EditedFeatures(sae, _tensor(tensors, self.targets), added)


class FeatureEditEntry(_Strict):
    """A ``FeatureEdit``."""

    kind: Literal["feature_edit"] = "feature_edit"
    alpha: FiniteFloat
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


Entry = Annotated[
    HeadScalingEntry | FeedForwardScalingEntry | TrustDialEntry | SteeringEntry | FeatureEditEntry,
    Field(discriminator="kind"),
]


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"The intervention's tensor file lacks {name!r}; export the intervention again.")
    return tensors[name]


class TensorFile(_Strict):
    """Where the tensors lie.

    Attributes:
        file: A file name; the file lies next to the document.
        sha256: Its hash.
    """

    file: Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")]
    sha256: str


class InterventionFile(_Strict):
    """A whole file. It is itself an intervention: ``attach`` checks the model, then applies every entry in order.

    Attributes:
        name: A name for people.
        towards: Which source it strengthens, if that is its purpose.
        model: The model it is for.
        interventions: What to change, in order.
        tensors: The file with the entries' tensors, once saved, if they have any.
        provenance: Where it comes from: data, method, seed, versions.
        measured: What it was measured to gain and to damage.
    """

    format: Literal["conflictscope-intervention"] = FORMAT
    version: Literal[1] = VERSION
    name: str
    towards: Literal["context", "memory"] | None = None
    model: ModelShape
    interventions: Annotated[list[Entry], Field(min_length=1)]
    tensors: TensorFile | None = None
    provenance: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    _values: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, interventions: Sequence[AnyIntervention], **about: Any) -> InterventionFile:
        """The file for some interventions, in order; ``about`` are its other fields."""
        values: dict[str, Tensor] = {}
        entries: list[Entry] = []
        for number, intervention in enumerate(interventions):
            if isinstance(intervention, HeadScaling):
                entries.append(HeadScalingEntry.of(intervention))
            elif isinstance(intervention, FeedForwardScaling):
                entries.append(FeedForwardScalingEntry.of(intervention))
            elif isinstance(intervention, TrustDial):
                entries.append(TrustDialEntry.of(intervention))
            elif isinstance(intervention, Steering):
                entries.append(SteeringEntry.of(intervention, str(number), values))
            else:
                entries.append(FeatureEditEntry.of(intervention, str(number), values))
        file = cls(interventions=entries, **about)
        file._values.update(values)
        return file

    def build(self) -> list[AnyIntervention]:
        """The interventions that the file describes, in order."""
        return [entry.build(self._values) for entry in self.interventions]

    def scaled(self, factor: float) -> InterventionFile:
        """The same with every strength and alpha multiplied; what was measured no longer holds and is left out.

        Raises:
            UserError: If the factor is not finite, or the file scales heads or layers, which have no common strength.
        """
        if factor == 1:
            return self
        if not math.isfinite(factor):
            raise UserError(f"A strength is multiplied by a finite number, not by {factor}.")
        scaled: list[Steering | FeatureEdit] = []
        for intervention in self.build():
            if isinstance(intervention, TrustDial):
                raise UserError(f"{self.name} is a dial; it is set with --trust, or with `dialed`.")
            if isinstance(intervention, Steering):
                scaled.append(replace(intervention, strength=intervention.strength * factor))
            elif isinstance(intervention, FeatureEdit):
                scaled.append(replace(intervention, alpha=intervention.alpha * factor))
            else:
                raise UserError(
                    f"{self.name} scales heads or layers, which have no strength to multiply; apply it as it is."
                )
        provenance = {**self.provenance, "scaled_by": factor * self.provenance.get("scaled_by", 1.0)}
        about = {"name": self.name, "towards": self.towards, "model": self.model, "provenance": provenance}
        return InterventionFile.of(scaled, **about)

    @property
    def dial(self) -> TrustDial:
        """The dial that the file holds.

        Raises:
            UserError: If it holds none, or several.
        """
        dials = [intervention for intervention in self.build() if isinstance(intervention, TrustDial)]
        if len(dials) != 1:
            raise UserError(
                f"{self.name} holds {len(dials) or 'no'} trust dials; give a file with one, as written by "
                "`conflictscope dial fit`."
            )
        return dials[0]

    def dialed(self, trust: float) -> InterventionFile:
        """The same with its dial at ``trust``; what was measured no longer holds and is left out.

        Raises:
            UserError: If the file holds no dial, or trust lies outside -1 to 1.
        """
        dial = self.dial
        towards: Literal["context", "memory"] | None = "context" if trust > 0 else "memory" if trust < 0 else None
        parts = [dial.at(trust) if isinstance(part, TrustDial) else part for part in self.build()]
        return InterventionFile.of(parts, name=self.name, towards=towards, model=self.model, provenance=self.provenance)

    def attach(self, model: nn.Module) -> Handle:
        """Apply every entry to ``model`` until the handle is removed.

        Raises:
            UserError: If the file is for another model; nothing stays attached then.
        """
        self.model.check(model)
        with ExitStack() as stack:
            handles = [stack.enter_context(intervention.attach(model)) for intervention in self.build()]
            stack.pop_all()
        return Handle([hook for handle in handles for hook in handle.hooks])

    def save(self, path: str | Path) -> None:
        """Write the file as JSON, and its tensors next to it under the same name, each atomically.

        A document whose tensors were replaced in between is refused when it is loaded: their hash would be another.
        """
        record = self.model_dump(mode="json") | {"tensors": None}
        if self._values:
            # One copy of each: a view would keep all it is a view of.
            content = save({name: values.detach().cpu().contiguous().clone() for name, values in self._values.items()})
            place = Path(path).with_suffix(".tensors.safetensors")
            with atomic_path(place) as temporary:
                temporary.write_bytes(content)
            record["tensors"] = {"file": place.name, "sha256": hashlib.sha256(content).hexdigest()}
        write_json(path, record)

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
            if loaded.tensors is not None:
                loaded._values.update(_read_tensors(Path(path).parent / loaded.tensors.file, loaded.tensors.sha256))
            loaded.build()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{path} is not a valid intervention file: {where}: {first['msg']}; export it again."
            ) from error
        return loaded


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"Could not read the intervention's tensors {path}: {error.strerror or error}; the file belongs next to "
            "the JSON document."
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} is not the file that the intervention was saved with; export the intervention again.")
    try:
        return load(content)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}); export the intervention again.") from error
