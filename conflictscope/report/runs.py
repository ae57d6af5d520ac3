"""The records of a study as the report reads them: every kind of study becomes one kind of ``Run``."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl

from conflictscope.examples import UNEDITED, condition_of, read_examples
from conflictscope.report.words import edit, edits, settings, words
from conflictscope.tables import MEASURES
from interp.answers import DIRECTIONS, Direction
from interp.attribution.scores import HeadScores
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.facts import HELD_OUT_PHRASING
from interp.facts import relations as known_relations
from interp.files import read_json
from interp.statistics import Estimate

Kind = Literal["demo", "dial", "gate", "control", "probes"]

_COMMANDS = "demo, dial fit, gate fit, steer fit, spare fit or probe score"
_MEASURES = (*MEASURES, "both_rate", "other_rate", "memorisation_ratio", "by_template")
SIGNIFICANT = 0.05
"""The largest p-value of a change that is called one."""
_STEERING = ("actadd", "caa", "probe", "task_vector")
_ABLATIONS = ("remove_only", "add_only", "constant")
_CONTROLS = ("random_direction", "random_features")


class Change(NamedTuple):
    """One measure before and after an edit.

    Attributes:
        before: The unedited model's.
        after: The edited one's.
        paired: The change prompt by prompt, with ``value`` and ``p``; ``None`` where it is not known.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    paired: Mapping[str, Any] | None = None

    @property
    def verdict(self) -> str:
        """What the paired change allows to say: ``rises``, ``falls``, or ``unclear`` where chance could explain it."""
        if self.paired is None or self.paired["p"] > SIGNIFICANT:
            return "unclear"
        return "rises" if self.paired["value"] > 0 else "falls"


@dataclass(frozen=True)
class Condition:
    """The model as it comes or as it is edited, measured on test.

    Attributes:
        name: What it is called here and in ``examples.parquet``.
        test: The measures; see ``conflictscope.demo_study.condition_record``.
        towards: The source that the edit is to strengthen.
        method: What kind of edit it is; edits of both directions share it.
        edit: What it does, in words.
        title: What its card is called.
        marked: Whether it is one of those that the study is about: the chosen ones, the best ones.
        in_figures: Whether the figures show it, or the table alone.
        is_control: Whether it was drawn at random.
    """

    name: str
    test: Mapping[str, Any]
    towards: Direction | None = None
    method: str = ""
    edit: str = ""
    title: str = ""
    marked: bool = False
    in_figures: bool = True
    is_control: bool = False

    @property
    def wanted(self) -> Direction:
        """The source whose rate tells what the edit gains."""
        return self.towards or "context"


@dataclass(frozen=True)
class Run:
    """One study.

    Attributes:
        kind: Which.
        name: What it is called where there are several.
        record: ``summary.json`` or ``results.json`` as it is, or what is known of probes.
        model: ``name``, and where it is known architecture and shape.
        data: ``digest``, and where they are known ``relations``, ``counts`` and so on.
        command: How to run it again.
        seed: Its seed.
        held_out: The phrasing family that nothing was chosen on.
        conditions: What was measured, the unedited model first; none for probes.
        not_run: Why methods that can't run were not measured, by what they are called.
        examples: See ``conflictscope.examples``; ``None`` where the study left none.
        scores: What the heads of a demo were chosen by.
        table: What probes scored.
    """

    kind: Kind
    name: str
    record: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    command: str
    seed: int | None = None
    held_out: str = HELD_OUT_PHRASING
    conditions: tuple[Condition, ...] = ()
    not_run: Mapping[str, str] = field(default_factory=dict)
    examples: pl.DataFrame | None = field(default=None, repr=False)
    scores: HeadScores | None = field(default=None, repr=False)
    table: pl.DataFrame | None = field(default=None, repr=False)

    @property
    def unedited(self) -> Condition:
        """The model as it comes."""
        return self.conditions[0]

    @property
    def cards(self) -> list[Condition]:
        """The key conditions: unedited, the marked ones, and the controls that the figures show."""
        return [c for c in self.conditions if c is self.unedited or c.marked or (c.is_control and c.in_figures)]

    @property
    def random_draws(self) -> dict[str, Any]:
        """The edits drawn at random, by what they stand next to."""
        controls = self.record["random_heads"]
        return (
            {"both directions": controls["draws"]}
            if "draws" in controls
            else {f"towards {d}": controls[f"towards_{d}"]["draws"] for d in DIRECTIONS}
        )

    def towards(self, direction: Direction) -> Condition:
        """The marked condition of a direction."""
        return next(c for c in self.conditions if c.marked and c.towards == direction)

    def change(self, condition: Condition, measure: str) -> Change:
        """A measure before and after an edit."""
        paired = condition.test.get("change", self._paired.get(condition.name, {})).get(measure)
        return Change(self.unedited.test[measure], condition.test[measure], paired)

    @cached_property
    def _paired(self) -> dict[str, dict[str, Any]]:
        """How measures changed, from the answers: for records that do not say it."""
        if self.examples is None or "memory_span_match" not in self.examples.columns:
            return {}
        reports = {str(key): UsageReport(part) for (key,), part in self.examples.group_by("condition")}
        unknown = [c.name for c in self.conditions if c.name in reports and "change" not in c.test]
        return {
            name: {measure: change.to_record() for measure, change in reports[name].changes(reports[UNEDITED]).items()}
            for name in unknown
            if name != UNEDITED and UNEDITED in reports
        }


def read_run(folder: Path) -> Run:
    """The records in a folder.

    Args:
        folder: What ``demo``, ``dial fit``, ``gate fit``, ``steer fit``, ``spare fit`` or ``probe score`` wrote.

    Raises:
        UserError: If it holds none of these, or they are damaged or unfinished.
    """
    readers: dict[str, Callable[[Path], Run | None]] = {
        "summary.json": _read_summary,
        "results.json": _read_results,
        "scores.parquet": _read_scores,
    }
    for file, read in readers.items():
        if not (folder / file).exists():
            continue
        try:
            run = read(folder)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"{folder / file} lacks something that a report shows ({error}); run the study again."
            ) from error
        if run is None:
            continue
        for condition in run.conditions:
            if missing := [measure for measure in _MEASURES if not _is_measured(condition.test, measure)]:
                raise UserError(f"{folder / file} has no {missing[0]} of {condition.name}; run the study again.")
        return run
    raise UserError(f"{folder} holds no records of a study; give a folder that {_COMMANDS} wrote and finished.")


def _is_measured(test: Mapping[str, Any], measure: str) -> bool:
    """Whether a record holds a measure: an estimate, or estimates by phrasing family."""
    found = test.get(measure)
    if not isinstance(found, dict):
        return False
    if measure == "by_template":
        return all(_is_measured(rates, f"{source}_rate") for rates in found.values() for source in DIRECTIONS)
    # The ratio of memory to both sources is undefined where neither is used.
    is_undefined = measure == "memorisation_ratio" and found.get("value") is None
    numbers = [found.get("n")] if is_undefined else found.values()
    return found.keys() == set(Estimate.__annotations__) and all(isinstance(v, (int, float)) for v in numbers)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The records of several folders; where two have the same name, they are numbered.

    Raises:
        UserError: See ``read_run``.
    """
    runs = [read_run(folder) for folder in folders]
    named = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.name} ({number})") if named[run.name] > 1 else run
        for number, run in enumerate(runs, 1)
    ]


def _read_summary(folder: Path) -> Run | None:
    summary = read_json(folder / "summary.json")
    name, examples = folder.resolve().name, read_examples(folder)
    if not isinstance(summary, dict):
        return None
    if "methods" in summary:
        return demo_run(name, summary, HeadScores.load(folder / "heads.parquet"), examples)
    if "calibration" in summary:
        return _dial_run(name, summary, examples)
    return _gate_run(name, summary, examples) if "gate" in summary else None


def _read_results(folder: Path) -> Run | None:
    results = read_json(folder / "results.json")
    if not isinstance(results, dict) or "basis" not in results:
        return None
    return _control_run(folder.resolve().name, results, read_examples(folder))


def demo_run(name: str, summary: Mapping[str, Any], scores: HeadScores, examples: pl.DataFrame | None) -> Run:
    """What ``conflictscope demo`` found.

    Args:
        name: The name of its folder.
        summary: What ``summary.json`` holds.
        scores: The head scores that the edited heads were chosen by.
        examples: What ``examples.parquet`` holds, if there is one.
    """
    conditions = [_unedited(summary["baseline"]["test"])]
    for d in DIRECTIONS:
        chosen = summary[f"towards_{d}"]
        for method, by_direction in summary["methods"].items():
            is_chosen = chosen["method"] == method
            if found := chosen if is_chosen else by_direction.get(f"towards_{d}"):
                conditions.append(
                    Condition(
                        condition_of(method, d),
                        found["test"],
                        towards=d,
                        method=words(method),
                        edit=edit(found),
                        title=f"Turned towards {d}",
                        marked=is_chosen,
                        in_figures=is_chosen,
                    )
                )
    conditions += _drawn(summary["random_heads"], "random heads")
    return _of_summary("demo", name, summary, conditions, examples, _demo_command(summary), scores)


def _dial_run(name: str, summary: Mapping[str, Any], examples: pl.DataFrame | None) -> Run:
    ends = [
        Condition(
            f"towards {d}",
            summary[f"towards_{d}"]["test"],
            towards=d,
            method="dial",
            edit=edit(summary[f"towards_{d}"]),
            title=f"Dial at {1 if d == 'context' else -1:+d}".replace("-", "\N{MINUS SIGN}") + f", towards {d}",
            marked=True,
        )
        for d in DIRECTIONS
    ]
    drawn = _drawn(summary["random_heads"], "random gates")
    conditions = [_unedited(summary["baseline"]["test"]), *ends, *drawn]
    return _of_summary("dial", name, summary, conditions, examples, _dial_command(summary))


def _gate_run(name: str, summary: Mapping[str, Any], examples: pl.DataFrame | None) -> Run:
    site = summary["gate"]["site"]
    acts = {
        "everywhere": "on every prompt, without a gate",
        "gated": f"where a probe of {site} sees a conflict",
        "random_gate": f"where a random direction of {site} is high",
    }
    conditions = [
        _unedited(summary["conditions"][UNEDITED]),
        *(
            Condition(
                words(key),
                summary["conditions"][key],
                towards=summary["towards"],
                method=words(key),
                edit=where,
                title=words(key).capitalize(),
                marked=key != "random_gate",
                is_control=key == "random_gate",
            )
            for key, where in acts.items()
        ),
    ]
    return _of_summary("gate", name, summary, conditions, examples, _gate_command(summary))


def _control_run(name: str, results: Mapping[str, Any], examples: pl.DataFrame | None) -> Run:
    conditions = [_unedited(results[UNEDITED])]
    for d in DIRECTIONS:
        own = [
            Condition(
                condition_of(method, d),
                found[f"towards_{d}"]["test"],
                towards=d,
                method=words(method),
                edit=settings(found[f"towards_{d}"]["settings"]),
                title=condition_of(method, d),
                in_figures=method not in (*_ABLATIONS, *_CONTROLS),
                is_control=method in _CONTROLS,
            )
            for method, found in results["methods"].items()
            if "not_run" not in found
        ]
        best = max((c for c in own if c.in_figures), key=lambda c: c.test[f"{d}_rate"]["value"], default=None)
        conditions += [replace(c, marked=c is best) for c in own]
    basis = results["basis"]
    return Run(
        "control",
        name,
        results,
        model=basis["model"],
        data=basis["data"],
        command=_control_commands(results),
        seed=basis["seed"],
        conditions=tuple(conditions),
        not_run=_not_run(results),
        examples=examples,
    )


def _read_scores(folder: Path) -> Run | None:
    try:
        table = pl.read_parquet(folder / "scores.parquet")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{folder / 'scores.parquet'} cannot be read ({error}); run probe score again.") from error
    if not {"label", "probe", "group", "site", "chosen", "measure", "value", "low", "high", "n"} <= set(table.columns):
        return None
    about = read_json(folder / "scores.json") if (folder / "scores.json").exists() else {}
    return Run(
        "probes",
        folder.resolve().name,
        about,
        model=about.get("model", {"name": "an unnamed model"}),
        data=about.get("data", {}),
        command="conflictscope probe fit\nconflictscope probe score",
        seed=about.get("seed"),
        held_out=about.get("held_out_template", HELD_OUT_PHRASING),
        table=table,
    )


def _unedited(test: Mapping[str, Any]) -> Condition:
    return Condition(UNEDITED, test, method=UNEDITED, title="Unedited")


def _not_run(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        words(method): found["not_run"] for method, found in record.get("methods", {}).items() if "not_run" in found
    }


def _drawn(controls: Mapping[str, Any], name: str) -> list[Condition]:
    """The random controls: one for each direction, or of an older study one for both."""
    if "test" in controls:
        both, done = f"{name}, both directions together", edits(controls["draws"])
        return [
            Condition(both, controls["test"], method=name, edit=done, title=f"{both.capitalize()}", is_control=True)
        ]
    return [
        Condition(
            condition_of(name, d),
            controls[f"towards_{d}"]["test"],
            towards=d,
            method=name,
            edit=edits(controls[f"towards_{d}"]["draws"]),
            title=f"{name.capitalize()} instead, {d}",
            is_control=True,
        )
        for d in DIRECTIONS
    ]


def _of_summary(
    kind: Kind,
    name: str,
    summary: Mapping[str, Any],
    conditions: list[Condition],
    examples: pl.DataFrame | None,
    command: list[str],
    scores: HeadScores | None = None,
) -> Run:
    return Run(
        kind,
        name,
        summary,
        model=summary["model"],
        data=summary["data"],
        command=shlex.join(
            [
                *("conflictscope", *command, "--dtype", summary["settings"]["dtype"]),
                *["--quick"] * bool(summary["settings"].get("quick")),
                *("--out", f"out/{name}"),
            ]
        ),
        seed=summary["settings"]["seed"],
        held_out=summary["data"]["phrasings"]["held_out"],
        conditions=tuple(conditions),
        not_run=_not_run(summary),
        examples=examples,
        scores=scores,
    )


def _demo_command(summary: Mapping[str, Any]) -> list[str]:
    return [
        "demo",
        "--model",
        summary["model"]["name"],
        *_relations(summary),
        "--seed",
        str(summary["settings"]["seed"]),
    ]


def _dial_command(summary: Mapping[str, Any]) -> list[str]:
    chosen = summary["settings"]
    options = [
        f"--{name.replace('_', '-')}={chosen[name]}" for name in ("budget", "context_budget", "max_scales", "steps")
    ]
    options += ["--feed-forward"] * chosen["feed_forward"]
    subjects = ["--subjects", str(chosen["subjects"]["train"]), "--seed", str(chosen["seed"])]
    return ["dial", "fit", summary["model"]["name"], *_relations(summary), *options, *subjects]


def _gate_command(summary: Mapping[str, Any]) -> list[str]:
    chosen = summary["settings"]
    options = ["--keep", str(chosen["keep"]), "--subjects", str(chosen["subjects"]["train"])]
    if chosen.get("trust") is not None:
        options += ["--trust", str(chosen["trust"])]
    model = ["--model", summary["model"]["name"]]
    return ["gate", "fit", "INTERVENTION.json", *model, *_relations(summary), *options, "--seed", str(chosen["seed"])]


def _relations(summary: Mapping[str, Any]) -> list[str]:
    return [part for relation in summary["data"]["relations"] for part in ("--relation", relation)]


def _control_commands(results: Mapping[str, Any]) -> str:
    basis = results["basis"]
    relations = basis["data"]["name"].split("+")
    if all(relation in known_relations() for relation in relations):
        data = [part for relation in relations for part in ("--relation", relation)]
    else:
        data = ["--data", f"{basis['data']['name']}.jsonl"]
    shared = ["--model", basis["model"]["name"], *data, "--tokens", basis["tokens"]]
    shared += ["--test-subjects", str(basis["data"]["test_subjects"]), "--seed", str(basis["seed"])]
    steering = [part for m in results["methods"] if m in _STEERING for part in ("--method", m)]
    commands = [["steer", "fit", *steering]] if steering else []
    commands += [["spare", "fit"]] if "spare" in results["methods"] else []
    return "\n".join(shlex.join(["conflictscope", *command, *shared]) for command in commands)
