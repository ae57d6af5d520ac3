"""The intervention file, version 3: a JSON document that says what to change in which model, and what it did.

{"format": "conflictscope-intervention", "version": 3, "name": ..., "towards": "context" | "memory" | null,
 "model": {"name", "architecture", "n_layers", ..., "weights", "tokenizer"},
 "sites": [{"site": "blocks.3.attn.o.hook_in", "module": "model.layers.3.self_attn.o_proj", "values": "input"}],
 "interventions": [
   {"kind": "head_scaling", "heads": [{"layer", "head", "scale", "mean"}]},
   {"kind": "feed_forward_scaling", "layers": [{"layer", "scale"}]},
   {"kind": "trust_dial", "trust", "scales": [{"layer", "head", "memory", "context"}],
    "calibration": [{"trust", "memory_rate", "context_rate"}]},
   {"kind": "steering", "layer", "vector", "strength", "tokens", "mode"},
   {"kind": "feature_edit", "alpha", "alpha_form", "tokens", "layers": [{"layer", "architecture", ..., "weights"}]},
   {"kind": "cad", "alpha"}, {"kind": "adacad", "threshold", "strength"}, {"kind": "coiecd", "alpha", "strength"},
   {"kind": "ck_plug", "alpha" | null, "gate": "paper" | "released"},
   {"kind": "juice", "heads": [{"layer", "head", "factor"}]},
   {"kind": "decore", "heads": [{"layer", "head"}], "strength"}, {"kind": "dola", "layers"},
   {"kind": "conflict_gate", "part", "layer", "weight", "bias", "threshold", "interventions": [any of the above]}],
 "tensors": {"file", "sha256"} | null,
 "provenance": {"method", "data", "chosen_on", "seed", "versions", "details"}, "measured": {...}}

``sites`` says for other programs where the file reads and writes. Vectors and weights lie in a safetensors file next to
the document, which names them and holds the file's hash. ``schema.json`` in this folder is the JSON Schema. A file is
trusted with nothing: whatever is unknown, out of range, of another model or not where it should be is refused. Files of
versions 1, which had no ``sites``, weights or tokenizer, and 2, whose dials had ``gates`` for scales, are read as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, JsonValue, PrivateAttr, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from interp.anatomy import site
from interp.answers import OPPOSITE, Direction
from interp.errors import UserError
from interp.files import atomic_path, write_json
from interventions.base import Entry, Handle, Intervention, attach_patches
from interventions.dial import TrustDial
from interventions.entries import EditEntry
from interventions.gate import ConflictGateEntry
from interventions.identity import Digest, Line, ModelIdentity, Strict

FORMAT = "conflictscope-intervention"
VERSION = 3
DOCUMENT = "intervention.json"
"""What a file is called that is alone in its folder."""
UNEDITED = "none"
"""What is chosen among files by name to get the model as it is."""

_LARGEST_DOCUMENT, _LARGEST_TENSORS = 2**25, 2**32
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Text = Annotated[str, Field(max_length=1000)]
Record = Annotated[dict[str, JsonValue], Field(max_length=1000)]
AnyEntry = Annotated[EditEntry | ConflictGateEntry, Field(discriminator="kind")]


class Site(Strict):
    """Where the file reads or writes.

    Attributes:
        site: The name in transformer_lens.
        module: The module path in transformers.
        values: Whether they are the module's input or its output.
    """

    site: Text
    module: Text
    values: Literal["input", "output"]


class TensorFile(Strict):
    """Where the tensors lie.

    Attributes:
        file: A file name; the file lies next to the document.
        sha256: Its hash.
    """

    file: Annotated[str, Field(pattern=r"^[^/\\:\x00-\x1f]+\.safetensors$", max_length=255)]
    sha256: Digest


class Provenance(Strict):
    """Where a file comes from.

    Attributes:
        method: What found the edit.
        data: Hash of the data that it was found with.
        chosen_on: The split that it was chosen on.
        seed: Of splits and random choices.
        versions: Of the packages that decide the numbers.
        details: Other settings.
    """

    method: Text | None = None
    data: Text | None = None
    chosen_on: Text | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    versions: Annotated[dict[Text, Text], Field(max_length=100)] = Field(default_factory=dict)
    details: Record = Field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Provenance:
        """What ``record`` says, with all that has no field of its own, or does not fit it, among the details."""
        kinds = {"method": str, "data": str, "chosen_on": str, "seed": int, "versions": dict}
        known = {key: record[key] for key, kind in kinds.items() if isinstance(record.get(key), kind)}
        return cls(**known, details={key: value for key, value in record.items() if key not in known})


class InterventionFile(Strict):
    """What to change in which model, as a file.

    It is itself an intervention: ``attach`` checks the model, then applies every entry in order.

    Attributes:
        name: A name for people.
        towards: Which source it strengthens, if that is its purpose.
        model: The model it is for.
        sites: Where it reads and writes: the same for all who read the file.
        interventions: What to change, in order.
        tensors: The file with the entries' tensors, once saved, if they have any.
        provenance: Where it comes from.
        measured: What it was measured to gain and to damage, by condition.
    """

    format: Literal["conflictscope-intervention"] = FORMAT
    version: Literal[3] = VERSION
    name: Annotated[Line, Field(min_length=1)]
    towards: Direction | None = None
    model: ModelIdentity
    sites: list[Site]
    interventions: Annotated[list[AnyEntry], Field(min_length=1, max_length=1000)]
    tensors: TensorFile | None = None
    provenance: Provenance = Field(default_factory=Provenance)
    measured: Record = Field(default_factory=dict)
    _values: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(
        cls,
        interventions: Sequence[Intervention],
        *,
        name: str,
        model: ModelIdentity,
        towards: Direction | None = None,
        provenance: Provenance | Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
        sites: Sequence[Site] | None = None,
    ) -> InterventionFile:
        """The file for some interventions, in order.

        Args:
            interventions: What to change.
            name: A name for people.
            model: The model it is for.
            towards: Which source it strengthens, if that is its purpose.
            provenance: Where it comes from.
            measured: What it was measured to do.
            sites: Where it reads and writes; ``None`` works it out, for which the architecture has to be known.

        Raises:
            UserError: If they cannot be written down: a number is out of range, or they do not fit ``model``.
        """
        values: dict[str, Tensor] = {}
        try:
            entries = _entries(interventions, values)
            file = cls.model_validate(
                {
                    "name": name,
                    "towards": towards,
                    "model": model,
                    "sites": _sites(model, entries) if sites is None else [*sites],
                    "interventions": entries,
                    "provenance": provenance if isinstance(provenance, Provenance) else Provenance.of(provenance or {}),
                    "measured": dict(measured or {}),
                }
            )
        except ValidationError as error:
            raise UserError(f"{name} cannot be written as an intervention file: {_first(error)}.") from error
        file._values.update(values)
        return file

    @property
    def digest(self) -> str:
        """A hash of what the file does: of its interventions and their tensors."""
        return _digest(self.interventions, self._values)

    def build(self) -> list[Intervention]:
        """The interventions that the file describes, in order."""
        return [entry.build(self._values) for entry in self.interventions]

    def scaled(self, factor: float) -> InterventionFile:
        """The same, ``factor`` times as far: 0 changes nothing, 1 is the file as it is, -1 goes the other way.

        Strengths and alphas are multiplied, and scales' distances from 1. What was measured no longer holds and is
        left out.

        Raises:
            UserError: If the factor is not finite, or below 0 for features, which cannot fire less than not at all; or
                the file holds a dial, which has a setting of its own.
        """
        if factor == 1:
            return self
        parts = [part.scaled(factor) for part in self.build()]
        provenance = self.provenance.details
        before = provenance.get("scaled_by", 1.0)
        details = {**provenance, "scaled_by": factor * before if isinstance(before, float | int) else factor}
        opposite = None if self.towards is None else OPPOSITE[self.towards]
        return self._changed(parts, self.towards if factor > 0 else opposite if factor < 0 else None, details)

    @property
    def dials(self) -> list[TrustDial]:
        """The dials that the file holds, also behind gates."""
        return [edit for part in self.build() for edit in part.parts if isinstance(edit, TrustDial)]

    @property
    def dial(self) -> TrustDial:
        """The dial that the file holds, maybe behind a gate.

        Raises:
            UserError: If it holds none, or several.
        """
        dials = self.dials
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
        # Refuses a file without one, or with several.
        _ = self.dial
        towards: Direction | None = "context" if trust > 0 else "memory" if trust < 0 else None
        return self._changed([part.turned(trust) for part in self.build()], towards, self.provenance.details)

    def at(self, *, trust: float | None = None, strength: float = 1.0) -> InterventionFile:
        """The same at a setting: ``dialed``, if there is a trust for it, and ``scaled``."""
        return (self if trust is None else self.dialed(trust)).scaled(strength)

    def check(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Refuse another model; and another tokenizer, if one is given.

        Raises:
            UserError: If something differs, or sites are not where the file reads and writes in such a model: loading
                the file sees that only where the architecture is known.
        """
        self.model.check(model, tokenizer)
        _check_places(self)

    def attach(self, model: nn.Module) -> Handle:
        """Apply every entry to ``model`` until the handle is removed.

        Raises:
            UserError: As ``check``; nothing stays attached then.
        """
        self.check(model)
        return attach_patches(model, [patch for intervention in self.build() for patch in intervention.patches(model)])

    def save(self, path: str | Path) -> None:
        """Write the file as JSON, and its tensors next to it under the same name, each atomically.

        A document whose tensors were replaced in between is refused when it is loaded: their hash would be another.

        Raises:
            UserError: If it would not be accepted when it is loaded, or the file system refuses.
        """
        _check(self)
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

        Args:
            path: The document, or a folder in which ``intervention.json`` or nothing else is a JSON file.

        Raises:
            UserError: If it is missing, is not JSON, is of a later version, or says anything that is not allowed.
        """
        document = _document(Path(path))
        try:
            loaded = cls.model_validate(_upgraded(_read_record(document), document))
            if loaded.tensors is not None:
                loaded._values.update(_read_tensors(document.parent / loaded.tensors.file, loaded.tensors.sha256))
            _check(loaded)
        except ValidationError as error:
            raise _invalid(document, _first(error)) from error
        except (RecursionError, OverflowError) as error:
            raise _invalid(document, "it is nested too deeply or holds too large numbers") from error
        return loaded

    def _changed(self, parts: Sequence[Intervention], towards: Direction | None, details: Record) -> InterventionFile:
        provenance = self.provenance.model_copy(update={"details": details})
        # No setting moves what is read and changed.
        of_file = {"name": self.name, "model": self.model, "sites": self.sites}
        return InterventionFile.of(parts, **of_file, towards=towards, provenance=provenance)


def named(paths: Iterable[Path]) -> dict[str, InterventionFile]:
    """Intervention files by the names that requests choose them by: those of the files, or of their folders.

    Raises:
        UserError: If a file cannot be read, or two have the same name.
    """
    files: dict[str, InterventionFile] = {}
    for path in paths:
        name = path.resolve().name if path.is_dir() else path.stem
        if name in files:
            raise UserError(f"Two interventions are called {name}; rename one of the files.")
        files[name] = InterventionFile.load(path)
    return files


def check_choice(files: Mapping[str, InterventionFile], model: Any, tokenizer: Any) -> None:
    """See that all of some named files, or none of them, can be chosen for a model.

    Raises:
        UserError: If a file is for another model or tokenizer, or takes the name of the unedited model.
    """
    if UNEDITED in files:
        raise UserError(f"An intervention cannot be called {UNEDITED}: that is the unedited model; rename the file.")
    for file in files.values():
        file.check(model, tokenizer)


def chosen_file(files: Mapping[str, InterventionFile], name: str) -> InterventionFile:
    """The file of that name.

    Raises:
        UserError: If there is none; the message lists those there are.
    """
    if name not in files:
        raise UserError(f"There is no intervention {name!r}; there are {', '.join([UNEDITED, *files])}.")
    return files[name]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file, as ``schema.json`` holds it."""
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ConflictScope intervention file"}
    schema: dict[str, Any] = about | InterventionFile.model_json_schema() | {"title": about["title"]}
    for record in (schema, *schema["$defs"].values()):
        # Python need not say what can only be one thing: a file must.
        if constant := [name for name, about in record.get("properties", {}).items() if "const" in about]:
            record["required"] = [*constant, *record.get("required", [])]
    return schema


def effect_digest(interventions: Sequence[Intervention]) -> str | None:
    """Hash what interventions do to a model, in order; ``None`` stands for nothing.

    Names do not count, nor how an edit is written down: a dial is what it scales at its setting.

    Raises:
        UserError: If they cannot be written down.
    """
    values: dict[str, Tensor] = {}
    try:
        entries = _entries([part for intervention in interventions for part in intervention.settled()], values)
    except ValidationError as error:
        raise UserError(f"The edit cannot be written as an intervention file: {_first(error)}.") from error
    return _digest(entries, values) if entries else None


def _entries(interventions: Sequence[Intervention], tensors: dict[str, Tensor]) -> list[Entry]:
    """The entries for some interventions, in order, whose tensors are put into ``tensors``."""
    return [intervention.entry(str(number), tensors) for number, intervention in enumerate(interventions)]


def _digest(entries: Sequence[Entry], values: Mapping[str, Tensor]) -> str:
    written = [entry.model_dump(mode="json") for entry in entries]
    digest = hashlib.sha256(json.dumps(written, sort_keys=True).encode())
    digest.update(save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(values.items())}))
    return digest.hexdigest()


def _sites(model: ModelIdentity, entries: Sequence[Entry]) -> list[Site]:
    blueprint = model.blueprint
    places = dict.fromkeys(place for entry in entries for place in entry.places(blueprint))
    return [
        Site(
            site=site(part, layer),
            module=blueprint.path(part, layer),
            values="input" if part == "output_projection" else "output",
        )
        for part, layer in sorted(places, key=lambda place: (place.layer, blueprint.parts.index(place.part)))
    ]


def _check(file: InterventionFile) -> None:
    """See that the parts of a file fit each other."""
    if file.model.weights is not None:
        file.model.expected_weights()
    try:
        json.dumps([file.provenance.model_dump(), file.measured], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{file.name} holds text that is not UTF-8 ({error.reason}); take it out.") from error
    if odd := [(name, values.dtype) for name, values in file._values.items() if values.dtype not in _DTYPES]:
        name, dtype = odd[0]
        raise UserError(
            f"The tensor {_short(name)!r} of {file.name} is {dtype}, not one of {', '.join(map(str, _DTYPES))}; "
            "convert it and export the intervention again."
        )
    used = _Used(file._values)
    for number, entry in enumerate(file.interventions):
        with _in_entry(file, number):
            entry.check(file.model, used)
        entry.build(used)
    if unused := sorted(set(file._values) - used.names):
        raise UserError(
            f"{file.name} has the tensor {_short(unused[0])!r}, which nothing needs; export the intervention again."
        )
    if file.model.is_known:
        _check_places(file)


def _check_places(file: InterventionFile) -> None:
    """See that a file reads and writes where the model has something, and says so; the architecture has to be known."""
    blueprint = file.model.blueprint
    for number, entry in enumerate(file.interventions):
        with _in_entry(file, number):
            for place in entry.places(blueprint):
                if place.layer >= file.model.n_layers:
                    raise UserError(f"layer {place.layer} does not exist: the model has {file.model.n_layers} layers")
    if file.sites != _sites(file.model, file.interventions):
        raise UserError(
            f"The sites that {file.name} names are not those that its interventions read and change in a "
            f"{file.model.architecture}; export the intervention again."
        )


@contextmanager
def _in_entry(file: InterventionFile, number: int) -> Iterator[None]:
    """Say of an error which of a file's interventions it is about."""
    try:
        yield
    except UserError as error:
        kind = file.interventions[number].kind
        raise UserError(f"{file.name}, intervention {number} ({kind}): {error}".rstrip(".") + ".") from error


class _Used(dict[str, Tensor]):
    """Tensors, and the names of those that were asked for."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)


def _document(path: Path) -> Path:
    """The document that ``path`` is, or that lies in it."""
    try:
        if not path.is_dir():
            return path
        if (path / DOCUMENT).is_file():
            return path / DOCUMENT
        documents = sorted(path.glob("*.json"))
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror}; check the path.") from error
    if len(documents) != 1:
        raise UserError(f"The folder {path} holds {len(documents)} JSON files; give the path of the intervention file.")
    return documents[0]


def _read(path: Path, largest: int, what: str) -> bytes:
    """The content of a file that is one, and is not too large."""
    try:
        with open(path, "rb", opener=_without_waiting) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is not a file; give {what}.")
            if status.st_size > largest:
                raise UserError(
                    f"{path} has {status.st_size} bytes, more than the {largest} that {what} may have; export the "
                    "intervention again."
                )
            return stream.read(status.st_size)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Could not read {what} {path}: {reason}; check the path.") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe in its place, to which nobody writes, would be waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read_record(path: Path) -> dict[str, Any]:
    content = _read(path, _LARGEST_DOCUMENT, "the intervention file")
    try:
        record = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_repetition,
            parse_constant=_refused_number,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({_short(error)}); export the intervention again.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f'{path} is not an intervention file: its "format" must be "{FORMAT}".')
    return record


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{_short(name)!r} is said twice")
    return record


def _refused_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _upgraded(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """A record of the present version."""
    version = record.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UserError(
            f"{path} has version {_short(version)}, this conflictscope reads versions 1 to {VERSION}; "
            "upgrade with: pip install --upgrade conflictscope"
        )
    if version < 3:
        record = {**record, "version": VERSION, "interventions": _with_scales(record.get("interventions"), path)}
    return _with_sites(record, path) if version == 1 else record


def _with_scales(interventions: Any, path: Path) -> Any:
    """Entries of version 1 or 2 with their dials' ``gates`` called scales; what is not valid is left to be refused."""
    if not isinstance(interventions, list):
        return interventions
    upgraded = []
    for entry in interventions:
        if isinstance(entry, dict) and entry.get("kind") == "trust_dial":
            if "scales" in entry or "gates" not in entry:
                raise _invalid(path, "a trust_dial of versions 1 and 2 has gates, not scales")
            entry = {"scales" if name == "gates" else name: value for name, value in entry.items()}
        elif isinstance(entry, dict) and entry.get("kind") == "conflict_gate":
            entry = {**entry, "interventions": _with_scales(entry.get("interventions"), path)}
        upgraded.append(entry)
    return upgraded


def _with_sites(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """A record of version 1 with sites, and with fields in its provenance."""
    if "sites" in record:
        raise _invalid(path, "sites: files of version 1 have none")
    try:
        provenance = Provenance.of(record.get("provenance", {})).model_dump()
        draft = InterventionFile.model_validate({**record, "sites": [], "provenance": provenance})
        sites = [place.model_dump() for place in _sites(draft.model, draft.interventions)]
    except ValidationError as error:
        raise _invalid(path, _first(error)) from error
    except (AttributeError, TypeError) as error:
        raise _invalid(path, "provenance: it should be a record") from error
    return {**record, "sites": sites, "provenance": provenance}


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    # Unlike Path.resolve this raises nothing where links lead round in circles; reading does.
    if Path(os.path.realpath(path)).parent != Path(os.path.realpath(path.parent)):
        raise UserError(f"{path} is a link that leaves its folder; put the tensors themselves next to the document.")
    content = _read(path, _LARGEST_TENSORS, "the intervention's tensors")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} is not the file that the intervention was saved with; export the intervention again.")
    try:
        tensors = load(content)
    # safetensors has its own exceptions for its header, and others for what the header leads to.
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
        raise UserError(
            f"{path} is not a safetensors file ({_short(error)}); export the intervention again."
        ) from error
    return tensors


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{_short('.'.join(map(str, first['loc'])))}: {_short(first['msg'])}"


def _short(said: object) -> str:
    """What a file says, or was said of it, as a part of one sentence: a file may say anything, of any length."""
    text = "".join(sign if sign.isprintable() else "?" for sign in str(said)[:300])
    return text if len(text) <= 200 else f"{text[:200]}..."


def _invalid(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a valid intervention file: {reason}; export it again.")
