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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import nn

from conflictscope import __version__
from conflictscope.study.choice import DEV_VERSION
from conflictscope.study.condition import Condition
from conflictscope.study.lab import BUDGETS, Lab
from conflictscope.study.measure import COST_VERSION, measure
from conflictscope.study.method import Method, method_named, registered
from conflictscope.study.run import Study
from conflictscope.study.setting import DataSetting, ModelSetting, StudySetting
from conflictscope.study.units import Done, Schedule, Step, Unit, timed
from interp.errors import UserError
from interp.evaluation import ANSWERS_VERSION
from interp.facts import relation_named
from interp.files import write_json
from interp.formats.loading import format_named
from interp.reading import READING_VERSION
from interventions.base import EDITS_VERSION
from interventions.identity import Strict

Controls = Literal["each", "kinds", "winners"]

_VERSIONS = (__version__, DEV_VERSION, ANSWERS_VERSION, EDITS_VERSION, READING_VERSION, COST_VERSION)
_HASHED = 2**20
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
        quick, budget, context_budget, sae: See ``conflictscope.study.setting.StudySetting``.
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

    @field_validator("models", mode="before")
    @classmethod
    def _named(cls, models: Any) -> Any:
        return (
            [{"name": one} if isinstance(one, str) else one for one in models] if isinstance(models, list) else models
        )

    @field_validator("data", mode="before")
    @classmethod
    def _called(cls, data: Any) -> Any:
        """The data sets with their names: those of the relations, or that of the file."""

        def name(one: dict[str, Any]) -> str:
            relations = one.get("relations")
            return "+".join(map(str, relations)) if isinstance(relations, list) else Path(str(one.get("data"))).stem

        if not isinstance(data, list):
            return data
        return [{"name": name(one), **one} if isinstance(one, dict) else one for one in data]

    @model_validator(mode="after")
    def _distinct(self) -> Comparison:
        for what, names in (("models", self.models), ("data", self.data), ("seeds", self.seeds)):
            called = [one if isinstance(one, int) else one.name for one in names]
            if twice := next((one for one in called if called.count(one) > 1), None):
                raise ValueError(f"{what} has {twice} twice; give each a name of its own")
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
        def moved(one: DataSetting) -> DataSetting:
            files = {name: str(folder / file) for name in ("data", "test_data") if (file := getattr(one, name))}
            for file in files.values():
                if not Path(file).exists():
                    raise UserError(f"{file}, the data of {one.name}, is not there; check the path.")
            return one.model_copy(update=files)

        return self.model_copy(update={"data": tuple(moved(one) for one in self.data)})

    @property
    def studies(self) -> list[StudySetting]:
        """One study for each model, data set and seed."""
        shared = {name: getattr(self, name) for name in ("quick", "budget", "context_budget", "sae")}
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
    """

    plan: Comparison
    out: Path
    command: str

    @cached_property
    def settings(self) -> dict[str, StudySetting]:
        """The studies by their digest, which other data, methods and versions of the code change."""
        return {self._digest(one): one for one in self.plan.studies}

    def folder(self, setting: StudySetting) -> Path:
        """Where a study's record is written."""
        return self.out / "studies" / _slug(setting.model.name) / _slug(setting.data.name) / f"seed-{setting.seed}"

    def records(self, setting: StudySetting) -> Path:
        """Where results of a model are kept, for all its studies."""
        return self.out / "records" / _slug(setting.model.name)

    def study(self, setting: StudySetting, told: Callable[[str], None]) -> Study:
        """The study, which tells what it finds."""
        return Study("compare", self.command, self.folder(setting), controls=self.plan.controls, told=told)

    def units(self) -> Iterator[Unit]:
        """The units that are known before anything is measured."""
        methods = self.plan.chosen_methods
        names = {method.name for method in methods}
        for digest, setting in self.settings.items():
            model = hashlib.sha256(setting.model.model_dump_json().encode()).hexdigest()[:12]

            unit = partial(_unit, digest, model)
            first = unit("prompts")
            shared = {
                name: unit("share", name, [first.id], _SHARED_FIRST)
                for name in dict.fromkeys(one for method in methods for one in method.starts_from)
            }
            yield from (first, *shared.values())
            choices = []
            for method in methods:
                before = [unit_id(digest, "choose", other) for other in method.follows if other in names]
                needs = [first.id, *(shared[name].id for name in method.starts_from), *before]
                cost = _LEARNING if method.needs in ("learning", "search", "unknown") else _CHOOSING
                choices.append(unit("choose", method.name, needs, cost))
            yield from choices
            yield unit("tests", needs=[one.id for one in choices])

    def _digest(self, setting: StudySetting) -> str:
        files = [_hash_of(Path(file)) for file in (setting.data.data, setting.data.test_data) if file]
        methods = [method.name for method in self.plan.chosen_methods]
        said = repr((setting.digest, files, methods, self.plan.controls, _VERSIONS))
        return hashlib.sha256(said.encode()).hexdigest()[:12]


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
        setting, lab = self.comparing.settings[unit.study], self._lab(unit)
        study, methods = self.comparing.study(setting, told), self.comparing.plan.chosen_methods
        match unit.step:
            case "prompts":
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
                study.run(lab, methods)
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


def _hash_of(path: Path) -> str:
    """A hash of what a file holds; of a folder, of the files in it."""
    digest = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while block := stream.read(_HASHED):
                digest.update(block)
    return digest.hexdigest()


def _slug(name: str) -> str:
    """A name as that of a folder."""
    plain = "".join(c if c.isalnum() or c in "-_.+" else "-" for c in name).strip(".-") or "data"
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
