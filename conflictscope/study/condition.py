"""Say what is done while a model is asked: to its forward pass, to the prompt, or to the choice of the next token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from interp.answers import Direction
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.files import read_json, write_json
from interventions.base import Intervention
from interventions.config import InterventionFile, effect_digest
from interventions.decoding import DecodingRule
from interventions.identity import ModelIdentity

if TYPE_CHECKING:
    from interp.pairs import Combined

_T = TypeVar("_T")


@dataclass(frozen=True)
class Prompting:
    """Ask examples as they are; subclasses ask them in another way."""

    def prompt(self, example: ConflictExample) -> str:
        """The text that the model continues."""
        return example.prompt

    def described(self) -> str:
        """How, in words."""
        return _said(_record(self))

    def asked(self, examples: Sequence[ConflictExample]) -> list[ConflictExample]:
        """The examples with the prompts that are really asked."""
        return [replace(example, prompt=self.prompt(example)) for example in examples]


AS_IS = Prompting()


@dataclass(frozen=True, eq=False)
class Condition:
    """What is done while the model is asked. Conditions that do the same are measured once, whatever they are called.

    Attributes:
        method: What found it.
        towards: The source that it is to strengthen.
        settings: What tells it from the method's other candidates, as JSON.
        edits: Changes of the forward pass, in order.
        prompting: How examples are asked.
        decoding: The rule for the next token, from the prompts with and without their contexts; ``None`` takes the most
            probable one.
        control_of: The method that it is a random control of.
    """

    method: str
    towards: Direction | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    edits: tuple[Intervention, ...] = ()
    prompting: Prompting = AS_IS
    decoding: DecodingRule | None = None
    control_of: str | None = None

    @property
    def name(self) -> str:
        """What people call it, for example ``value scaling, towards memory``."""
        words = self.method.replace("_", " ")
        return words if self.towards is None else f"{words}, towards {self.towards}"

    @property
    def digest(self) -> str | None:
        """A hash of what it does, whatever it is called; ``None`` if that is nothing."""
        around = [_record(part) for part in self._around]
        edited = effect_digest(self.edits)
        return _hash([edited, *around]) if around else edited

    @property
    def changes_text(self) -> bool:
        """Whether it says what happens to a text that is no example: prompting and decoding do not."""
        return not self._around

    @property
    def combined(self) -> Combined | None:
        """How the next token is chosen from both prompts' logits; ``None`` reads one prompt alone."""
        return None if self.decoding is None else self.decoding.scores

    @property
    def parts(self) -> tuple[Intervention, ...]:
        """What an intervention file says of it: the edits, and the rule for the next token."""
        return self.edits if self.decoding is None else (*self.edits, self.decoding)

    @property
    def moved(self) -> int:
        """How many heads, feed-forward layers, directions or features it moves."""
        return sum(edit.n_moved for edit in self.edits)

    @property
    def heads(self) -> tuple[tuple[int, int, float], ...]:
        """``(layer, head, scale)`` of the heads that it scales."""
        return tuple((*head, scale) for edit in self.edits for head, scale in edit.head_scales.items())

    @property
    def does(self) -> str:
        """What it does, in words."""
        said = [line for part in self.parts for line in part.described()]
        return "; ".join(said if self.prompting == AS_IS else [*said, self.prompting.described()])

    def scaled(self, strength: float) -> Condition:
        """The same edits and rule for the next token, ``strength`` times as far.

        Raises:
            UserError: If one of them has no strength, or examples are asked in another way, which has none.
        """
        if self.prompting != AS_IS:
            raise UserError(f"{self.name} asks in other words, which have no strength; leave it as it is.")
        settings = {**self.settings, "strength of it": round(strength, 4)}
        edits = tuple(edit.scaled(strength) for edit in self.edits)
        decoding = None if self.decoding is None else self.decoding.scaled(strength)
        return replace(self, settings=settings, edits=edits, decoding=decoding)

    def asked(self, examples: ConflictSet) -> ConflictSet:
        """The examples with the prompts that are really asked."""
        if self.prompting == AS_IS:
            return examples
        return ConflictSet(examples.name, tuple(self.prompting.asked(examples.examples)))

    def save(self, folder: Path, model: ModelIdentity) -> None:
        """Write ``condition.json`` and, with edits, the intervention file ``edits.json`` to a folder."""
        if self.edits:
            InterventionFile.of(self.edits, name=self.name, towards=self.towards, model=model).save(
                folder / "edits.json"
            )
        about = {name: getattr(self, name) for name in ("method", "towards", "control_of")}
        about |= {"settings": dict(self.settings), "edits": "edits.json" if self.edits else None}
        around = {
            "prompting": _record(self.prompting),
            "decoding": None if self.decoding is None else _record(self.decoding),
        }
        write_json(folder / "condition.json", {**about, **around})

    @classmethod
    def load(cls, folder: Path) -> Condition:
        """Read what ``save`` wrote.

        Raises:
            UserError: If it cannot be read.
        """
        record = read_json(folder / "condition.json")
        edits, decoding = record["edits"], record["decoding"]
        return cls(
            **{name: record[name] for name in ("method", "towards", "control_of", "settings")},
            edits=() if edits is None else tuple(InterventionFile.load(folder / edits).build()),
            prompting=_read(Prompting, record["prompting"]),
            decoding=None if decoding is None else _read(DecodingRule, decoding),
        )

    @property
    def _around(self) -> list[Prompting | DecodingRule]:
        """What it does besides edits."""
        around: list[Prompting | DecodingRule] = [] if self.prompting == AS_IS else [self.prompting]
        return around if self.decoding is None else [*around, self.decoding]


def _record(part: Prompting | DecodingRule) -> dict[str, Any]:
    """The name of its class, and its settings, for JSON."""
    return {"kind": type(part).__name__, **asdict(part)}  # pyright: ignore[reportArgumentType]


def _read(base: type[_T], record: Mapping[str, Any]) -> _T:
    """What ``_record`` gave, of a class that is ``base`` or was derived from it wherever."""
    settings = dict(record)
    kinds, found = {}, [base]
    while found:
        kind = found.pop()
        kinds[kind.__name__] = kind
        found += kind.__subclasses__()
    if (name := settings.pop("kind", None)) not in kinds:
        raise UserError(f"There is no {base.__name__} {name!r}; known are {', '.join(kinds)}.")
    return kinds[name](**settings)


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _said(record: Mapping[str, Any]) -> str:
    kind, *settings = record.items()
    return ", ".join([str(kind[1]), *(f"{name} {value}" for name, value in settings)])
