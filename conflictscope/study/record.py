"""Keep what a study measured: one shape for every study, in ``study.json``, with the answers in ``examples.parquet``.

{"format": "conflictscope-study", "version": 1, "kind": "demo" | "compare" | ..., "command": ...,
 "model": {"name", "architecture", "n_layers", "n_heads", "d_head", "d_model", "fingerprint"},
 "data": {"name", "relations", "counts", "phrasings": {"learned", "tested", "held_out"}, "digest", ...},
 "settings": {"seed", "quick", "budgets", "device", "dtype", "versions"},
 "conditions": [unedited first, then every chosen condition, then random controls: see ``Measured``],
 "tried": [{"method", "towards", "settings", "does", "moved", "rate", "kept", "damage", "spent"}],
 "lines": {name: [a measurement at each dose]}, "not_run": {method: reason},
 "details": {method, "dial" or "agreement": what is said besides},
 "to_come": [the methods that an unfinished study has not measured yet]}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from interp.answers import USAGES, Direction
from interp.errors import UserError
from interp.files import read_json, write_json, write_parquet

FORMAT, VERSION = "conflictscope-study", 1
RECORD, EXAMPLES, HEADS = "study.json", "examples.parquet", "heads.parquet"
UNEDITED = "unedited"
WITHIN = ", within budget"
"""What the name of a condition ends with that is the best within the budget, and not the best of all."""

Choice = Literal["best", "within_budget"]
"""How a condition was chosen on dev: at its method's best, or as the best within the damage budget."""

_ANSWER_COLUMNS = {
    *("condition", "id", "subject", "relation", "template", "kind", "split", "prompt", "answer", "usage"),
    *("logit_difference", "memory_answers", "context_answers"),
}


@dataclass(frozen=True)
class Measured:
    """One condition, measured on test.

    Attributes:
        name: What it is called, here and in ``examples.parquet``.
        method: What found it.
        towards: The source that it is to strengthen; ``None`` for the unedited model.
        choices: How it was chosen on dev; both where one condition is both, none for the unedited model and controls.
        settings: What tells it from its method's other candidates.
        does: What it does, in words.
        moved: How many heads, feed-forward layers, directions or features it moves.
        heads: ``(layer, head, scale)`` of the heads it scales.
        test: By measure its estimate with interval; ``None`` where a measure does not apply to it. See
            ``conflictscope.study.measure.measures_of``.
        cost: ``speed``, tokens per second relative to the unedited model on the same prompts; ``None`` unmeasured.
        dev: What it was chosen by: see ``conflictscope.study.choice.Tried.to_record``.
        control_of: The name of the condition that it is a random control of.
        draws: How many random draws are measured together.
        file: Its intervention file, relative to the record.
    """

    name: str
    method: str
    test: Mapping[str, Any]
    towards: Direction | None = None
    choices: tuple[Choice, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    does: str = ""
    moved: int = 0
    heads: tuple[tuple[int, int, float], ...] = ()
    cost: Mapping[str, Any] | None = None
    dev: Mapping[str, Any] | None = None
    control_of: str | None = None
    draws: int = 1
    file: str | None = None

    @property
    def is_control(self) -> bool:
        """Whether it was drawn at random."""
        return self.control_of is not None


@dataclass(frozen=True)
class StudyRecord:
    """A whole study; the module says what each part holds."""

    kind: str
    command: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    conditions: tuple[Measured, ...]
    tried: tuple[Mapping[str, Any], ...] = ()
    lines: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    to_come: tuple[str, ...] = ()

    @property
    def unedited(self) -> Measured:
        """The model as it comes."""
        return self.conditions[0]

    @property
    def methods(self) -> list[str]:
        """The methods that were measured, in their order."""
        return list(dict.fromkeys(c.method for c in self.conditions if c.choices))

    def chosen(self, towards: Direction, choice: Choice = "best") -> list[Measured]:
        """What was chosen towards a source, one condition for each method."""
        return [c for c in self.conditions if c.towards == towards and choice in c.choices]

    def winner(self, towards: Direction) -> Measured | None:
        """Of what was chosen at its best the one that dev preferred over all methods; ``None`` where there is none."""
        return next((c for c in self.chosen(towards) if c.name == self.settings["winners"].get(towards)), None)

    @property
    def weighed(self) -> list[Mapping[str, Any]]:
        """The candidates that were asked guards; none where those are no more than were chosen."""
        found = [candidate for candidate in self.tried if candidate["damage"] is not None]
        return found if len(found) > sum(bool(c.choices) for c in self.conditions) else []

    def controls_of(self, condition: Measured) -> list[Measured]:
        """The random controls of a condition."""
        return [c for c in self.conditions if c.control_of == condition.name]

    def save(self, folder: Path) -> None:
        """Write ``study.json``, atomically."""
        record = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        write_json(folder / RECORD, record)

    @classmethod
    def load(cls, folder: Path) -> StudyRecord:
        """Read what ``save`` wrote.

        Raises:
            UserError: If there is no record, it was made by an older or newer version, or something is missing.
        """
        path = folder / RECORD
        if not path.exists():
            old = next((name for name in ("summary.json", "results.json") if (folder / name).exists()), None)
            if old:
                raise UserError(f"{folder / old} is of an older conflictscope; run the command that made it again.")
            raise UserError(f"{folder} holds no study; give a folder that demo, compare, dial, gate or steer wrote.")
        record = read_json(path)
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise UserError(f'{path} is no record of a study: its "format" must be "{FORMAT}".')
        if (version := record.pop("version", None)) != VERSION:
            raise UserError(f"{path} has version {version}, this conflictscope reads {VERSION}; run the study again.")
        try:
            conditions = tuple(
                Measured(
                    **{
                        **c,
                        "choices": tuple(c["choices"]),
                        "heads": tuple((layer, head, scale) for layer, head, scale in c["heads"]),
                    }
                )
                for c in record.pop("conditions")
            )
            parts = {name: tuple(record.get(name, ())) for name in ("tried", "to_come")}
            loaded = cls(**{**record, **parts, "conditions": conditions})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{path} lacks something or says too much ({error}); run the study again.") from error
        if not conditions or conditions[0].method != UNEDITED:
            raise UserError(f"{path} lacks the unedited model; run the study again.")
        return loaded


def write_examples(folder: Path, frame: pl.DataFrame) -> None:
    """Write the answers behind a study's numbers, prompt by prompt, to ``examples.parquet``."""
    write_parquet(folder / EXAMPLES, frame)


def read_examples(folder: Path) -> pl.DataFrame | None:
    """Read what ``write_examples`` wrote; ``None`` where there is none.

    Raises:
        UserError: If the file is damaged or another one.
    """
    path = folder / EXAMPLES
    if not path.exists():
        return None
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run the study again.") from error
    if missing := _ANSWER_COLUMNS - set(frame.columns):
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; remove it and run the study again.")
    text = frame.schema["logit_difference"] not in (pl.Float64, pl.Null)
    if text or not frame["usage"].is_in(USAGES).all():
        raise UserError(f"{path} holds usages or logit differences that are none; remove it and run the study again.")
    return frame
