"""Get from a person's data to one edit: measure, search on dev, verify once on test, and say what came of it.

1. The unedited model is measured on test. Where it reaches the goal, or nothing is left to gain, that is all.
2. ``conflictscope.study.search`` finds one edit within the budget of damage, of a kind that can be served.
3. It is measured once on test, next to the unedited model and its random controls, as every study does.
4. Where the wanted rate rises by more than chance, the edit is recommended: its file is written, with what it can be
   exported to. Three sentences say what was found, what it costs and what it does not fix.
"""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from conflictscope.study.choice import Chosen
from conflictscope.study.condition import AS_IS, Condition
from conflictscope.study.lab import Lab
from conflictscope.study.measure import measure
from conflictscope.study.method import Method
from conflictscope.study.record import UNEDITED, Measured, StudyRecord
from conflictscope.study.run import Study
from conflictscope.study.search import Found, Search
from conflictscope.study.verdict import SOURCES, Goal, helps, sentences_of
from conflictscope.tables import written
from interp.answers import Direction
from interp.errors import Caution, UserError
from interp.evaluation import ANSWERS_VERSION
from interventions.config import InterventionFile
from interventions.export.forms import forms_of

Kind = Literal["lora", "bake", "vector", "decoding", "prompt", "hooks"]
"""How an edit can be served: as a LoRA adapter; folded into weights; as a control vector or biases; as a rule for the
next token, which reads each prompt with and without its context; as words of the prompt; as a file that changes
activations while transformers or this package's server runs the model."""
KINDS: tuple[Kind, ...] = get_args(Kind)

EDIT = "edit.json"
"""What the recommended edit's file is called."""

_KNOWS_NOTHING = ("nothing", "unknown")
_ON_TEST = 4
_FEW = 10


@dataclass
class Clock:
    """Time that may be spent, from the moment this is made.

    Attributes:
        seconds: How much.
        reserved: How much of it is kept for what comes last.
    """

    seconds: float
    reserved: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """The seconds that have passed."""
        return time.monotonic() - self._started

    def is_over(self) -> bool:
        """Say whether nothing is to begin any more but what comes last."""
        return self.spent >= self.seconds - self.reserved


class Tuned(NamedTuple):
    """What came of it.

    Attributes:
        sentences: What was found, what it costs, what it does not fix; or one that says why there is no edit.
        file: The recommended edit; ``None`` where there is none, or no file can hold it.
        exports: How it is served, by kind: a command, or the words of a prompt.
        record: The study; ``None`` where nothing but the unedited model was measured on test.
    """

    sentences: tuple[str, ...]
    file: Path | None = None
    exports: Mapping[str, str] = {}
    record: StudyRecord | None = None


@dataclass(frozen=True)
class Tuning:
    """How one edit is looked for.

    Attributes:
        towards: The source that is wanted.
        out: The folder for what is written.
        command: The command that does it again.
        goal: What is enough; ``None`` wants as much as there is.
        allow: The kinds in one of which the edit is to be served.
        clock: The time that may be spent.
        told: Takes a sentence about what was found, at every stage.

    Raises:
        UserError: If the goal is a rate of the other source.
    """

    towards: Direction
    out: Path
    command: str
    goal: Goal | None = None
    allow: Collection[Kind] = KINDS
    clock: Clock = field(default_factory=lambda: Clock(float("inf")))
    told: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.goal is not None and self.goal.source != self.towards:
            raise UserError(f"The goal is a rate of {self.goal.source}; give --towards {self.goal.source} with it.")

    def run(self, lab: Lab, methods: Sequence[Method]) -> Tuned:
        """Measure, search, verify and write; finished steps are kept, so that what was killed goes on.

        Raises:
            UserError: If the data is too little, or asked so that dev cannot choose.
        """
        (self.out / EDIT).unlink(missing_ok=True)
        before = self._unedited(lab)
        follow = f"unedited, {written(before)} of the answers follow {SOURCES[self.towards]}"
        self.told(f"On unseen subjects, {follow}.")
        if self.goal is not None and before["value"] >= self.goal.rate:
            return Tuned((f"No edit is needed: {follow}, so that {self.goal.met_by(before)}.",))
        if before["value"] == 1:
            return Tuned((f"No edit is needed: {follow}, so that there is nothing to gain.",))
        if (count := len(lab.dev.conflicts)) < _FEW:
            few = f"Dev has {count} conflict prompts to choose by, which is little more than chance"
            warnings.warn(Caution(f"{few}; give more rows, or --unknown-too."), stacklevel=2)
        found = self._search(lab, methods)
        self.told(found.stopped)
        reasons = {**found.not_run, **found.not_tried}
        for reason in dict.fromkeys(reasons.values()):
            names = ", ".join(name.replace("_", " ") for name in reasons if reasons[name] == reason)
            self.told(f"Not tried: {names}. {reason}")
        if found.best is None:
            return Tuned(
                (
                    f"Nothing was found that stays within the budget of damage on dev, of {found.candidates} "
                    "candidates: leave the model as it is, or give more --budget, --minutes or kinds to --allow.",
                )
            )
        return self._verified(lab, next(m for m in methods if m.name == found.best.condition.method), found)

    def _unedited(self, lab: Lab) -> dict[str, Any]:
        """The unedited model's rate on test; keeps time for measuring an edit there."""

        def seconds() -> float:
            begun = self.clock.spent
            measure(lab, Condition(UNEDITED))
            return self.clock.spent - begun

        taken = lab.records.json("unedited_seconds", lab.asked.digest, seconds, version=ANSWERS_VERSION)
        # The edit and its controls are asked as much, some of them twice.
        self.clock.reserved = min(_ON_TEST * taken, self.clock.seconds / 2)
        report = measure(lab, Condition(UNEDITED)).report
        return report.select(kind="conflict").rate(self.towards).to_record()

    def _search(self, lab: Lab, methods: Sequence[Method]) -> Found:
        """Search among methods that may find something that is allowed."""
        is_any = set(self.allow) == set(KINDS)
        # What looks into the model first changes what it computes.
        is_outside = set(self.allow) <= {"prompt", "decoding"}
        fitting = [m for m in methods if not is_outside or m.needs in _KNOWS_NOTHING]
        left_out = {m.name: "It edits activations, which is not allowed." for m in methods if m not in fitting}
        search = Search(
            lab,
            self.towards,
            allowed=lambda condition: is_any or not set(kinds_of(lab.model, condition)).isdisjoint(self.allow),
            goal=None if self.goal is None else self.goal.rate,
            is_over=self.clock.is_over,
            told=self.told,
        )
        if "context" not in search.unedited.usages and "memory" not in search.unedited.usages:
            raise UserError(
                "No answer to dev's prompts begins with that of either source, so that dev cannot choose; show "
                "examples with --shots, say what answers begin with (--answer-prefix), or try another --format."
            )
        found = search.run(fitting)
        return found._replace(not_run={**left_out, **found.not_run})

    def _verified(self, lab: Lab, method: Method, found: Found) -> Tuned:
        """Measure on test what was found, and write it."""
        best = found.best
        assert best is not None
        lab.settle(method, self.towards, Chosen(best, best, found.whole))
        record = Study("tune", self.command, self.out, directions=(self.towards,), told=self.told).run(lab, [method])
        (edit,) = record.chosen(self.towards)
        is_good, sentences = helps(edit), sentences_of(record, edit, self.goal)
        file = self._write(edit) if is_good else None
        exports = self._exports(lab, best.condition, file) if is_good else {}
        if not is_good:
            # The record keeps the edit's own file; none is to be taken for a recommended one.
            (self.out / "interventions" / f"towards_{self.towards}.json").unlink(missing_ok=True)
        about = {
            "sentences": sentences,
            "recommended": is_good,
            "goal": None if self.goal is None else self.goal._asdict(),
            "allow": list(self.allow),
            "exports": exports,
            "unedited_on_dev": found.unedited.numbers | {"rate": found.unedited.rate(self.towards)},
            **found.to_record(),
        }
        not_run = {**record.not_run, **found.not_run, **found.not_tried}
        record = replace(record, not_run=not_run, details={**record.details, "tune": about})
        record.save(self.out)
        return Tuned(sentences, file, exports, record)

    def _write(self, edit: Measured) -> Path | None:
        """Write the recommended edit's file; ``None`` if no file can hold it."""
        if edit.file is None:
            return None
        InterventionFile.load(self.out / edit.file).save(self.out / EDIT)
        return self.out / EDIT

    def _exports(self, lab: Lab, condition: Condition, file: Path | None) -> dict[str, str]:
        """How the edit is served, by kind."""
        if condition.prompting != AS_IS:
            return {"prompt": condition.prompting.described()}
        if file is None:
            return {}
        exports = {}
        for form in [] if condition.decoding else forms_of(lab.model, condition.edits):
            name = form.removeprefix("--").replace(" ", "-")
            exports[name] = f"{_typed('export', lab.name, file, self.out / name)} {form}"
        return {**exports, "decoding" if condition.decoding else "hooks": _typed("serve", file)}


def kinds_of(model: nn.Module, condition: Condition) -> list[Kind]:
    """Say how a condition can be served, by asking its edits.

    Args:
        model: The model, or a bridge around it.
        condition: The condition.
    """
    if condition.prompting != AS_IS and not condition.parts:
        return ["prompt"]
    if condition.decoding is not None and not condition.edits:
        return ["decoding"]
    is_edit = condition.prompting == AS_IS and condition.decoding is None
    forms = {form.removeprefix("--").partition(" ")[0] for form in forms_of(model, condition.edits)} if is_edit else ()
    return [kind for kind in KINDS if kind in forms or kind == "hooks"]


def _typed(*words: object) -> str:
    return shlex.join(["conflictscope", *map(str, words)])
