"""Compare methods on several models, data sets and seeds: read the plan, cut it into units, do one of them.

A plan is a YAML file::

    models: [smollm2-135m]
    data:
      - relations: [capital, language]
      - {name: NQ-Swap, data: nq-swap.parquet, data_format: nq-swap, unknown_too: true, subjects: 20}
    methods: [pruning, caa, adacad]
    seeds: [0, 1]

Every model is a study with every data set and every seed. What is not said is as in ``conflictscope compare``; files
are looked for from where the plan lies.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import nn

from conflictscope.study.condition import Condition
from conflictscope.study.lab import BUDGETS, Lab
from conflictscope.study.measure import measure
from conflictscope.study.method import Method, method_named, registered
from conflictscope.study.record import StudyRecord
from conflictscope.study.run import Study
from conflictscope.study.setting import DataSetting, ModelSetting, StudySetting
from conflictscope.study.units import Done, Schedule, Step, Unit, timed
from interp.errors import UserError
from interp.facts import relation_named
from interp.files import write_json
from interp.formats.loading import format_named
from interventions.identity import Strict

Controls = Literal["each", "kinds", "winners"]

DEV_TEXTS = "dev texts"
"""What all methods share: ordinary text that candidates are to leave as it is."""
# Expected costs, in units of measuring one condition on test: what others wait for, what learns, and other methods.
_SHARED_FIRST, _LEARNING, _CHOOSING = 30.0, 20.0, 2.0


class Comparison(Strict):
    """What is compared on what.

    Attributes:
        models: The models, each by its name or with how it is loaded.
        data: The data sets.
        methods: The methods; all by default.
        without: Methods that are left out.
        seeds: Each decides splits, subjects and conflicts anew.
        controls: Which random controls are measured, see ``conflictscope.study.run.Study``.
        quick, budget, context_budget, sae, abilities: See ``conflictscope.study.setting.StudySetting``.
    """

    models: tuple[ModelSetting, ...] = Field(strict=False, min_length=1)
    data: tuple[DataSetting, ...] = Field(strict=False, min_length=1)
    methods: tuple[str, ...] = Field((), strict=False)
    without: tuple[str, ...] = Field((), strict=False)
    seeds: tuple[int, ...] = Field((0,), strict=False, min_length=1)
    controls: Controls = "kinds"
    quick: bool = False
    budget: float = Field(BUDGETS["none"], gt=0)
    context_budget: float = Field(BUDGETS["aligned"], gt=0)
    sae: str | None = None
    abilities: bool = False

    @field_validator("models", mode="before")
    @classmethod
    def _named(cls, models: Any) -> Any:
        return (
            [{"name": one} if isinstance(one, str) else one for one in models] if isinstance(models, list) else models
        )

    @model_validator(mode="after")
    def _distinct(self) -> Comparison:
        for what, names in (("models", self.models), ("data", self.data), ("seeds", self.seeds)):
            called = [one if isinstance(one, int) else one.name for one in names]
            if twice := [one for one in called if called.count(one) > 1]:
                raise ValueError(f"{what} has {twice[0]} twice; give each a name of its own, or take one of them out")
        return self

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """Read a plan.

        Raises:
            UserError: If it cannot be read, is not YAML, or says what cannot be done.
        """
        try:
            said = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); check it."
            ) from error
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}); mend it.") from error
        if not isinstance(said, dict):
            raise UserError(f"{path} is no plan: it needs models and data, each a list; see docs/comparison.md.")
        try:
            plan = cls.model_validate(said)
        except ValidationError as error:
            (first, *_) = error.errors()
            place = ".".join(map(str, first["loc"])) or "the plan"
            raise UserError(f"{path}, {place}: {first['msg'].removeprefix('Value error, ')}; mend the plan.") from error
        # Before hours are spent.
        for name in (*plan.methods, *plan.without):
            method_named(name)
        for relation in (relation for one in plan.data for relation in one.relations):
            relation_named(relation)
        for name in (name for one in plan.data for name in (one.data_format, one.test_format) if name):
            format_named(name)
        return plan._with_files_from(path.parent)

    def _with_files_from(self, folder: Path) -> Comparison:
        """The same with whole paths, which mean the same on every machine."""

        def whole(said: str | None) -> str | None:
            path = Path(said or "").expanduser()
            there = path if path.is_absolute() else folder / path
            return str(there.resolve()) if said and there.exists() else said

        for path in (one.name for one in self.models if one.name.startswith((".", "~", "/"))):
            if whole(path) == path and not Path(path).exists():
                raise UserError(f"{path} in the plan's models is not there; check the path.")
        for one in self.data:
            for file in filter(None, (one.data, one.test_data)):
                if not Path(str(whole(file))).exists():
                    raise UserError(f"{folder / file}, the data of {one.name}, is not there; check the path.")
        models = tuple(
            one.model_copy(update={"name": whole(one.name), "blueprint": whole(one.blueprint)}) for one in self.models
        )
        data = tuple(
            one.model_copy(update={"data": whole(one.data), "test_data": whole(one.test_data)}) for one in self.data
        )
        return self.model_copy(update={"models": models, "data": data, "sae": whole(self.sae)})

    @property
    def studies(self) -> list[StudySetting]:
        """One study for each model, data set and seed."""
        shared = {name: getattr(self, name) for name in ("quick", "budget", "context_budget", "sae", "abilities")}
        return [
            StudySetting(model=model, data=data, seed=seed, **shared)
            for model in self.models
            for data in self.data
            for seed in self.seeds
        ]

    @property
    def chosen_methods(self) -> list[Method]:
        """The methods, in their order.

        Raises:
            UserError: If none is left.
        """
        left_out = {method_named(name).name for name in self.without}
        found = [method_named(name) for name in dict.fromkeys(self.methods or registered()) if name not in left_out]
        if not found:
            raise UserError("No method is left to measure; leave out fewer.")
        return found


@dataclass(frozen=True)
class Comparing:
    """A comparison in a folder: what it is made of, and where everything lies.

    Attributes:
        plan: What is compared.
        out: The folder; where several machines work, all of them see it under this path.
        command: The command that makes it again.
        settings: The studies by a hash of all that decides them.
    """

    plan: Comparison
    out: Path
    command: str
    settings: Mapping[str, StudySetting]

    @classmethod
    def of(cls, plan: Comparison, out: Path, command: str) -> Comparing:
        """A comparison in a folder; files are looked at here, once for all machines."""
        decides = (*(method.name for method in plan.chosen_methods), plan.controls)

        def digest(setting: StudySetting) -> str:
            return hashlib.sha256(repr((setting.digest, decides)).encode()).hexdigest()[:12]

        return cls(plan, out, command, {digest(setting): setting for setting in plan.studies})

    def folder(self, setting: StudySetting) -> Path:
        """Where a study's record is written."""
        return self.out / "studies" / _slug(setting.model.name) / _slug(setting.data.name) / f"seed-{setting.seed}"

    def records(self, setting: StudySetting) -> Path:
        """Where results of a model are kept, for all its studies."""
        return self.out / "records" / _slug(setting.model.name)

    def study(self, digest: str, told: Callable[[str], None]) -> Study:
        """The study of this hash, which tells what it finds."""
        folder = self.folder(self.settings[digest])
        return Study("compare", self.command, folder, controls=self.plan.controls, digest=digest, told=told)

    def has_record(self, digest: str) -> bool:
        """Whether the record of the study of this hash is there, and not one that another plan wrote in its place."""
        try:
            return StudyRecord.load(self.folder(self.settings[digest])).settings.get("digest") == digest
        except (KeyError, OSError, ValueError, UserError):
            return False

    def units(self) -> Iterator[Unit]:
        """The units that are known before anything is measured."""
        methods = self.plan.chosen_methods
        names = {method.name for method in methods}
        texts: dict[tuple[str, int, str], Unit] = {}
        for digest, setting in self.settings.items():
            model = hashlib.sha256(setting.model.model_dump_json().encode()).hexdigest()[:12]

            unit = partial(_unit, digest, model)
            first = unit("prompts")
            shared = {
                name: unit("share", name, [first.id], _SHARED_FIRST)
                for name in dict.fromkeys((DEV_TEXTS, *(one for method in methods for one in method.starts_from)))
            }
            for name in shared.keys() & {DEV_TEXTS, "texts"}:
                # They are the same for all data: the first study makes them.
                shared[name] = texts.setdefault((model, setting.seed, name), shared[name])
            yield from (first, *(one for one in shared.values() if one.study == digest))
            choices = []
            for method in methods:
                before = [unit_id(digest, "choose", other) for other in method.follows if other in names]
                needs = [first.id, *(shared[name].id for name in (DEV_TEXTS, *method.starts_from)), *before]
                cost = _LEARNING if method.needs in ("learning", "search", "unknown") else _CHOOSING
                choices.append(unit("choose", method.name, needs, cost))
            yield from choices
            yield unit("tests", needs=[one.id for one in choices])


def _unit(study: str, model: str, step: Step, what: str = "", needs: Iterable[str] = (), cost: float = 1.0) -> Unit:
    return Unit(unit_id(study, step, what), model, study, step, what, tuple(needs), cost)


def unit_id(study: str, step: str, what: str = "") -> str:
    """What a unit is called."""
    return f"{study}/{step}/{what}" if what else f"{study}/{step}"


@dataclass
class StudyWorker:
    """Do the units of a comparison, with one model held and the labs of the last studies.

    Attributes:
        comparing: The comparison.
    """

    comparing: Comparing
    _model: tuple[str, nn.Module] | None = field(default=None, init=False)
    _labs: dict[str, Lab] = field(default_factory=dict, init=False)

    def run(self, unit: Unit) -> Done:
        """Do one unit; what keeps it from being done is told in its result."""
        return timed(unit, self._run)

    def _run(self, unit: Unit, told: Callable[[str], None]) -> tuple[Unit, ...]:
        lab, methods = self._lab(unit), self.comparing.plan.chosen_methods
        study = self.comparing.study(unit.study, told)
        match unit.step:
            case "prompts":
                pass
            case "share" if unit.what == DEV_TEXTS:
                lab.texts("dev")
            case "share":
                # What cannot be made is said by the methods that start from it.
                with contextlib.suppress(UserError):
                    lab.share(unit.what)  # pyright: ignore[reportArgumentType]
            case "choose":
                study.choose(lab, method_named(unit.what))
            case "tests":
                return self._tests(unit, lab, study.conditions(lab, methods))
            case "test":
                measure(lab, Condition.load(self._conditions(unit) / unit.what))
            case "record":
                study.finish(lab, methods)
        return ()

    def _lab(self, unit: Unit) -> Lab:
        if unit.study not in self._labs:
            setting = self.comparing.settings[unit.study]
            if self._model is None or self._model[0] != unit.model:
                # Before the next one is loaded, so that two are never held.
                self._model, self._labs = None, {}
                self._model = (unit.model, setting.model.load())
            while len(self._labs) > 1:
                del self._labs[next(iter(self._labs))]
            self._labs[unit.study] = setting.lab(self.comparing.records(setting), self._model[1])
        return self._labs[unit.study]

    def _tests(self, unit: Unit, lab: Lab, conditions: Sequence[Condition]) -> tuple[Unit, ...]:
        """Write what is measured on test, and make a unit of each, and of the record."""
        tests = []
        for condition in conditions:
            name = condition.digest or "unedited"
            condition.save(self._conditions(unit) / name, lab.identity)
            tests.append(Unit(unit_id(unit.study, "test", name), unit.model, unit.study, "test", name))
        needs = tuple(one.id for one in tests)
        return (*tests, Unit(unit_id(unit.study, "record"), unit.model, unit.study, "record", "", needs))

    def _conditions(self, unit: Unit) -> Path:
        return self.comparing.out / "conditions" / unit.study


def finished(comparing: Comparing, schedule: Schedule) -> list[Path]:
    """The folders of the studies whose records were written; records of earlier plans may lie beside them."""
    done = {one.study for one in schedule.units.values() if one.step == "record" and schedule.is_done(one.id)}
    return [comparing.folder(setting) for digest, setting in comparing.settings.items() if digest in done]


def save_plan(comparing: Comparing) -> None:
    """Write what is compared, with all that it did not say, as ``plan.json``."""
    write_json(comparing.out / "plan.json", comparing.plan.model_dump(mode="json"))


def _slug(name: str) -> str:
    """A name as that of a folder."""
    plain = "".join(c if c.isalnum() or c in "-_.+" else "-" for c in name).strip(".-") or "data"
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
