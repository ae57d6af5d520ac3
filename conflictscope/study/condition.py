"""Say what is done while a model is asked: to its forward pass, to the prompt, or to the choice of the next token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from interp.answers import Direction
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.files import read_json, write_json
from interventions.base import Intervention
from interventions.config import InterventionFile, effect_digest
from interventions.identity import ModelIdentity


class _Recorded:
    """A frozen dataclass that can be written down by the name of its class, and read again."""

    _kinds: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _Recorded in cls.__bases__:
            cls._kinds = {}
        cls._kinds[cls.__name__] = cls

    def to_record(self) -> dict[str, Any]:
        """Its kind and its settings, for JSON."""
        return {"kind": type(self).__name__, **asdict(self)}  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Any:
        """What ``to_record`` gave.

        Raises:
            UserError: If there is no such kind.
        """
        settings = dict(record)
        if (kind := settings.pop("kind", None)) not in cls._kinds:
            raise UserError(f"There is no {cls.__name__} {kind!r}; known are {', '.join(cls._kinds)}.")
        return cls._kinds[kind](**settings)


@dataclass(frozen=True)
class Prompting(_Recorded):
    """Ask an example as it is; subclasses ask it in another way."""

    def prompt(self, example: ConflictExample) -> str:
        """The text that the model continues."""
        return example.prompt


@dataclass(frozen=True)
class Decoding(_Recorded):
    """Take the most probable next token; subclasses weigh it against what the model says without the context.

    Both prompts of an example, with and without its context, are then read side by side, and go on with the same token.
    """

    needs_bare: ClassVar[bool] = False

    def combined(self, with_context: Tensor, without: Tensor) -> Tensor:
        """Scores of the next token from both prompts' logits, each ``(n, d_vocab)``; the highest is taken."""
        del without
        return with_context

    def scaled(self, strength: float) -> Decoding:
        """The same rule, ``strength`` times as far from taking the most probable token.

        Raises:
            UserError: If it has no strength.
        """
        del strength
        raise UserError(f"{type(self).__name__} has no strength to be scaled; leave it as it is.")


AS_IS, GREEDY = Prompting(), Decoding()


@dataclass(frozen=True, eq=False)
class Condition:
    """What is done while the model is asked. Conditions that do the same are measured once, whatever they are called.

    Attributes:
        method: What found it.
        towards: The source that it is to strengthen.
        settings: What tells it from the method's other candidates, as JSON.
        edits: Changes of the forward pass, in order.
        prompting: How examples are asked.
        decoding: How the next token is chosen.
        control_of: The method that it is a random control of.
    """

    method: str
    towards: Direction | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    edits: tuple[Intervention, ...] = ()
    prompting: Prompting = AS_IS
    decoding: Decoding = GREEDY
    control_of: str | None = None

    @property
    def name(self) -> str:
        """What people call it, for example ``value scaling, towards memory``."""
        words = self.method.replace("_", " ")
        return words if self.towards is None else f"{words}, towards {self.towards}"

    @property
    def digest(self) -> str | None:
        """A hash of what it does, whatever it is called; ``None`` if that is nothing."""
        around = [part.to_record() for part in (self.prompting, self.decoding) if part not in (AS_IS, GREEDY)]
        edited = effect_digest(self.edits)
        return _hash([edited, *around]) if around else edited

    @property
    def changes_text(self) -> bool:
        """Whether it says what happens to a text that is no example: prompting and decoding do not."""
        return self.prompting == AS_IS and not self.decoding.needs_bare

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
        around = [part.to_record() for part in (self.prompting, self.decoding) if part not in (AS_IS, GREEDY)]
        said = [line for edit in self.edits for line in edit.described()]
        return "; ".join([*said, *(_said(record) for record in around)])

    def scaled(self, strength: float) -> Condition:
        """The same edits and rule for the next token, ``strength`` times as far.

        Raises:
            UserError: If one of them has no strength, or examples are asked in another way, which has none.
        """
        if self.prompting != AS_IS:
            raise UserError(f"{self.name} asks in other words, which have no strength; leave it as it is.")
        settings = {**self.settings, "strength of it": round(strength, 4)}
        edits = tuple(edit.scaled(strength) for edit in self.edits)
        decoding = self.decoding if self.decoding == GREEDY else self.decoding.scaled(strength)
        return replace(self, settings=settings, edits=edits, decoding=decoding)

    def asked(self, examples: ConflictSet) -> ConflictSet:
        """The examples with the prompts that are really asked."""
        if self.prompting == AS_IS:
            return examples
        prompts = (replace(example, prompt=self.prompting.prompt(example)) for example in examples)
        return ConflictSet(examples.name, tuple(prompts))

    def save(self, folder: Path, model: ModelIdentity) -> None:
        """Write ``condition.json`` and, with edits, the intervention file ``edits.json`` to a folder."""
        if self.edits:
            InterventionFile.of(self.edits, name=self.name, towards=self.towards, model=model).save(
                folder / "edits.json"
            )
        about = {name: getattr(self, name) for name in ("method", "towards", "control_of")}
        about |= {"settings": dict(self.settings), "edits": "edits.json" if self.edits else None}
        around = {"prompting": self.prompting.to_record(), "decoding": self.decoding.to_record()}
        write_json(folder / "condition.json", {**about, **around})

    @classmethod
    def load(cls, folder: Path) -> Condition:
        """Read what ``save`` wrote.

        Raises:
            UserError: If it cannot be read.
        """
        record = read_json(folder / "condition.json")
        edits = record["edits"]
        return cls(
            **{name: record[name] for name in ("method", "towards", "control_of", "settings")},
            edits=() if edits is None else tuple(InterventionFile.load(folder / edits).build()),
            prompting=Prompting.from_record(record["prompting"]),
            decoding=Decoding.from_record(record["decoding"]),
        )


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _said(record: Mapping[str, Any]) -> str:
    kind, *settings = record.items()
    return ", ".join([str(kind[1]), *(f"{name} {value}" for name, value in settings)])
