"""The second job: record conflict prompts, probe what was recorded, and say how good the probes are.

Probes train on the train split; strength, site and threshold are chosen on dev; one phrasing family is left out of
both. They are scored on held-out subjects, in the families they know and in the one they do not, next to what keeps
the numbers honest:

    shuffled labels     probes fitted to labels that were permuted within relation, phrasing and split; for sources,
                        whose shares differ between these, that is a second floor
    floors              the embedding of the last token; and what is known without reading the model: phrasing and
                        relation, for conflicts also which answer the context gives
    without a relation  fitted on the other relations, scored on this one
    without a phrasing  fitted on the other phrasing families, scored on this one
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl
import torch
from plotly.graph_objects import Figure
from torch import Tensor

from conflictscope.study.records import Records
from figures.probes import activation_patterns, auroc_by_layer, projection_by_layer, reliability_curve
from figures.theme import save_figure
from interp.activation_store import ActivationStore
from interp.activations import site_kind
from interp.conflicts import ConflictSet, ContextKind
from interp.errors import UserError
from interp.evaluation import ANSWERS_VERSION
from interp.facts import (
    HELD_OUT_PHRASING,
    PHRASINGS,
    build_conflicts,
    known_facts,
    relation_named,
    usable_facts,
)
from interp.files import write_json, write_parquet
from interp.known import KNOWN_VERSION
from interp.models import fingerprint
from interp.progress import tracked
from interp.statistics import Estimate, rate
from probes.detector import CONFLICT_CLASSES, SOURCE_CLASSES, ConflictDetector, threshold_rank
from probes.linear import LinearProbe, Method, ProbeSet
from probes.patterns import patterns_by_group
from probes.quality import ProbeScore, auroc_within, pooled_auroc

Label = Literal["conflict", "source"]
LABELS: tuple[Label, ...] = get_args(Label)
EMBEDDING = "embed.hook_out"
SHUFFLES = 5

_FINISHED = "fit.json"

_CLASSES: dict[Label, tuple[str, ...]] = {"conflict": CONFLICT_CLASSES, "source": SOURCE_CLASSES}
_PHRASING_GROUPS: tuple[str, str] = ("seen phrasings", "unseen phrasing")
_FLOOR = "known beforehand"
_FLOORS: dict[Label, tuple[str, ...]] = {
    "conflict": ("template", "relation", "context_answer"),
    "source": ("template", "relation"),
}
_SHORT = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "calibration_error": "ECE",
    "true_positive_rate": "conflicts found",
    "false_positive_rate": "false alarms",
}
_MEASURES = ("auroc", "auprc", "accuracy", "calibration_error")


def conflicts_for_probes(
    model: Any, relations: Sequence[str], *, folder: Path, seed: int, kinds: Sequence[ContextKind]
) -> ConflictSet:
    """Prompts of these kinds in every phrasing family about facts that the model knows (``interp.known``).

    What it knows is kept under ``folder``, so that a call that is repeated does not ask again.

    Raises:
        UserError: If it knows too few facts for conflicts.
    """
    records = Records(folder, model=fingerprint(model))
    facts = {}
    for relation in [relation_named(relation).name for relation in relations]:
        usable = usable_facts(relation)
        known = records.json(
            f"known-{relation}",
            [[fact.subject, fact.answers] for fact in usable],
            lambda relation=relation: [f.subject for f in known_facts(model, relation, progress=f"Known: {relation}")],
            version=(KNOWN_VERSION, ANSWERS_VERSION),
        )
        facts[relation] = [fact for fact in usable if fact.subject in known]
    return build_conflicts(facts, seed=seed, kinds=kinds, phrasings=tuple(PHRASINGS))


def examples_of(store: ActivationStore, label: Label) -> pl.DataFrame:
    """The index rows that have the label, with their number in the store as ``row`` and the label as ``label``.

    Raises:
        UserError: If the recording has not finished, or has no such label.
    """
    if not store.complete:
        raise UserError(f"The recording in {store.path} has not finished; run the same `conflictscope record` again.")
    index = store.index.with_row_index("row")
    needed = {"kind", "split", "template", "relation", "subject", "context_answer"} | (
        {"usage"} if label == "source" else set()
    )
    if missing := needed - set(index.columns):
        raise UserError(
            f"The recording in {store.path} lacks {', '.join(sorted(missing))}; record conflict examples, "
            "with --answers for the source probe."
        )
    column = "kind" if label == "conflict" else "usage"
    chosen = index.filter(pl.col(column).is_in(_CLASSES[label])).with_columns(label=pl.col(column))
    return chosen if label == "conflict" else chosen.filter(kind="conflict")


def fit_probes(
    store: ActivationStore,
    out: Path,
    *,
    labels: Sequence[Label] = LABELS,
    method: Method = "logistic",
    held_out: str = HELD_OUT_PHRASING,
    false_positive_rate: float = 0.05,
    controls: bool = True,
    seed: int = 0,
    device: str = "auto",
) -> tuple[dict[Label, ProbeSet], ConflictDetector | None]:
    """Fit the probes of every site, their controls and a detector, and write them all to ``out``.

    An earlier fit in ``out`` is replaced. The detector reads last tokens, so it needs a recording of these.

    Args:
        store: A finished recording.
        out: Folder for ``conflict.safetensors``, ``source.safetensors`` (each with its JSON), ``detector/`` and
            ``controls/``.
        labels: Which probes to fit; the detector needs ``conflict``.
        method: See ``ProbeSet.fit``.
        held_out: The phrasing family that is left out.
        false_positive_rate: What the detector allows; see ``ConflictDetector.from_probes``.
        controls: Whether to fit the controls.
        seed: Seed of the shuffled labels.
        device: ``auto``, ``cpu``, ``cuda``, ...

    Raises:
        UserError: If the recording does not serve, or has too few examples.
    """
    tasks: dict[Label, _Task] = {label: _Task(store, label, held_out, method, device) for label in labels}
    dev = None
    if "conflict" in tasks and store.basis["positions"] == "last":
        dev = tasks["conflict"].known.filter(split="dev")
        # Before the minutes that the fit takes.
        aligned, conflict = (dev.filter(label=name).height for name in CONFLICT_CLASSES)
        threshold_rank(aligned, conflict, false_positive_rate)
    # What is left of an earlier fit would be scored as if it belonged to this one.
    (out / _FINISHED).unlink(missing_ok=True)
    shutil.rmtree(out / "controls", ignore_errors=True)
    shutil.rmtree(out / "detector", ignore_errors=True)
    for label in LABELS:
        (out / f"{label}.json").unlink(missing_ok=True)
    probes: dict[Label, ProbeSet] = {}
    for label, task in tasks.items():
        probes[label] = task.fit(progress=f"Probes: {label}")
        for number, control in enumerate(_controls(task, probes[label], seed) if controls else ()):
            control.save(out / "controls" / f"{label}-{number:02d}.safetensors")
        probes[label].save(out / f"{label}.safetensors")
    detector = None
    if dev is not None:
        detector = ConflictDetector.from_probes(
            probes["conflict"],
            store.rows(dev["row"].to_list()),
            dev["label"].to_list(),
            source=probes.get("source"),
            false_positive_rate=false_positive_rate,
        )
        detector.save(out / "detector")
    write_json(out / _FINISHED, {"labels": list(probes), "detector": detector is not None})
    return probes, detector


def check_finished(folder: Path) -> None:
    """See that ``fit_probes`` wrote ``folder`` and came to its end.

    Raises:
        UserError: If not.
    """
    if not (folder / _FINISHED).exists():
        raise UserError(f"There are no finished probes in {folder}; fit them with `conflictscope probe fit`.")


class _Task:
    """Fits probes for one label on what they may know: not the test split, not the held-out phrasing family."""

    def __init__(self, store: ActivationStore, label: Label, held_out: str, method: Method, device: str) -> None:
        self.store = store
        self.label: Label = label
        self.method: Method = method
        self.device = device
        examples = examples_of(store, label)
        if held_out != HELD_OUT_PHRASING and held_out not in (phrasings := sorted(examples["template"].unique())):
            raise UserError(f"There is no phrasing {held_out!r} to hold out; the recording has {', '.join(phrasings)}.")
        self.known = examples.filter(pl.col("split") != "test", pl.col("template") != held_out)
        self._settings = {
            "label": label,
            "held_out_template": held_out,
            "subjects": sorted(self.known["subject"].unique()),
            **{key: store.basis[key] for key in ("model", "data", "seed", "positions", "dtype")},
        }

    def fit(
        self,
        frame: pl.DataFrame | None = None,
        features: Mapping[str, Tensor] | None = None,
        *,
        progress: str | None = None,
        **settings: Any,
    ) -> ProbeSet:
        """Fit on ``frame``: some of the known examples, or with other labels; ``None`` means all as they are."""
        examples = self.known if frame is None else frame
        return ProbeSet.fit(
            self.store.rows(examples["row"].to_list()) if features is None else features,
            examples["label"].to_list(),
            validation=(examples["split"] == "dev").to_list(),
            method=self.method,
            classes=_CLASSES[self.label],
            settings={**self._settings, **settings},
            device=self.device,
            progress=progress,
        )

    def at(self, kind: str, frame: pl.DataFrame) -> dict[str, Tensor]:
        """Features at the sites of one kind only."""
        sites = [site for site in self.store if (where := site_kind(site)) and where[0] == kind]
        rows = self.store.rows(frame["row"].to_list())
        return {site: rows[site] for site in sites}


def _controls(task: _Task, probes: ProbeSet, seed: int) -> Iterator[ProbeSet]:
    known = task.known
    for number in tracked(range(SHUFFLES), f"Shuffled labels: {task.label}"):
        yield task.fit(_shuffled(known, f"{seed}/{number}"), control="shuffled")
    categories = _categories(known, _FLOORS[task.label])
    yield task.fit(known, {_FLOOR: _one_hot(known, categories)}, control="floor", categories=categories)
    where = site_kind(probes.best.site)
    if where is None:
        return
    parts = [(c, part) for c in ("relation", "template") for part in known[c].unique(maintain_order=True)]
    for column, part in tracked(parts, f"Left out in turn: {task.label}"):
        rest = known.filter(pl.col(column) != part)
        # A single relation has no others, and what is left may lack a class in one of the splits.
        if rest.select("split", "label").n_unique() < 2 * len(probes.classes):
            continue
        best = task.fit(rest, task.at(where[0], rest)).best
        yield ProbeSet({best.site: best}, {"control": "left out", "column": column, "part": part})


def _shuffled(frame: pl.DataFrame, seed: str) -> pl.DataFrame:
    """The examples with labels permuted within relation, phrasing and split, which leaves their shares as they are."""
    rng = random.Random(seed)
    labels = frame["label"].to_list()
    strata: dict[tuple[Any, ...], list[int]] = {}
    for i, key in enumerate(frame.select("relation", "template", "split").iter_rows()):
        strata.setdefault(key, []).append(i)
    for members in strata.values():
        for i, j in zip(members, rng.sample(members, len(members)), strict=True):
            labels[i] = frame["label"][j]
    return frame.with_columns(label=pl.Series(labels))


def _categories(frame: pl.DataFrame, columns: Sequence[str]) -> list[list[str]]:
    return [[column, part] for column in columns for part in sorted(frame[column].drop_nulls().unique())]


def _one_hot(frame: pl.DataFrame, categories: Sequence[Sequence[str]]) -> Tensor:
    """Which of the categories each example is of, ``(n, n_categories)``; an unknown phrasing is all zeros."""
    columns = [(frame[column] == part).fill_null(False).cast(pl.Float32).to_numpy() for column, part in categories]
    return torch.from_numpy(np.stack(columns, 1))


class Scores(NamedTuple):
    """What ``score_probes`` gives.

    Attributes:
        frame: Columns ``label``, ``probe`` (``fitted``, ``shuffled labels``, ``floor``, ``without ...``), ``group``,
            ``site``, ``chosen`` (whether dev chose the site), ``measure``, ``value``, ``low``, ``high``, ``n``.
        figures: By name, as saved.
    """

    frame: pl.DataFrame
    figures: dict[str, Figure]


def score_probes(store: ActivationStore, folder: Path, out: Path, *, seed: int = 0) -> Scores:
    """Score fitted probes and their controls on the test split, and draw the figures.

    Args:
        store: A finished recording; only test subjects on which nothing was fitted are used.
        folder: What ``fit_probes`` wrote.
        out: Folder for ``scores.parquet``, ``scores.json`` (of what) and ``figures/``.
        seed: Seed of the bootstrap.

    Raises:
        UserError: If there are no probes, or the recording lacks a site or a test split.
    """
    check_finished(folder)
    found: list[Label] = [label for label in LABELS if (folder / f"{label}.json").exists()]
    results = [_Scoring(store, folder, label, seed).result() for label in found]
    scores = Scores(pl.concat([r.frame for r in results]), {k: f for r in results for k, f in r.figures.items()})
    write_parquet(out / "scores.parquet", scores.frame)
    about = ProbeSet.load(folder / f"{found[0]}.safetensors").settings
    write_json(out / "scores.json", {key: about[key] for key in ("model", "data", "seed", "held_out_template")})
    for name, figure in scores.figures.items():
        save_figure(figure, out / "figures" / f"{name}.html")
    return scores


class _Scoring:
    """Scores the probes of one label and their controls."""

    def __init__(self, store: ActivationStore, folder: Path, label: Label, seed: int) -> None:
        self.store = store
        self.folder = folder
        self.label: Label = label
        self.seed = seed
        self.probes = ProbeSet.load(folder / f"{label}.safetensors")
        fitted = self.probes.settings["model"]
        if fitted["fingerprint"] != store.basis["model"]["fingerprint"]:
            raise UserError(
                f"The probes in {folder} were fitted on {fitted['name']}, but {store.path} holds activations of "
                f"{store.basis['model']['name']} with other weights; record and fit with the same model."
            )
        self.controls = [ProbeSet.load(path) for path in sorted((folder / "controls").glob(f"{label}-*.safetensors"))]
        self.examples = examples_of(store, label)
        if self.probes.settings["positions"] != store.basis["positions"]:
            raise UserError(
                f"The probes in {folder} read {self.probes.settings['positions']} tokens, but {store.path} holds "
                f"{store.basis['positions']} ones; score on a recording of the same positions."
            )
        # The splits of another recording may be others.
        fitted_on = pl.col("subject").is_in(self.probes.settings["subjects"])
        self.test = self.examples.filter(pl.col("split") == "test", ~fitted_on)
        if self.test["label"].n_unique() < 2:
            raise UserError(
                f"{store.path} has no two classes of the {label} label among test subjects that the probes were not "
                "fitted on; record all splits, with the seed of the recording that they were fitted on."
            )
        self._rows: list[dict[str, Any]] = []

    def result(self) -> Scores:
        chosen = self.probes.best
        by_site = {
            site: self._score("fitted", "test", probe, self.test)
            for site, probe in tracked(list(self.probes.items()), f"Scoring: {self.label}")
        }
        by_group = {name: self._score("fitted", name, chosen, frame) for name, frame in self._groups().items()}
        self._score_within_strata()
        self._score_detector()
        shuffled = self._shuffled()
        floor = self._floor(by_site)
        for control in self._of_kind("left out"):
            column, part = control.settings["column"], control.settings["part"]
            frame = self.test.filter(pl.col(column) == part)
            if frame["label"].n_unique() > 1:
                self._score(f"without {column} {part}", f"{column} {part}", control.best, frame)
        figures: dict[str, Figure] = {
            "auroc_by_layer": auroc_by_layer(
                by_site,
                shuffled=shuffled or None,
                floor=floor[1] if floor else None,
                floor_label=floor[0] if floor else "",
                chosen=chosen.site,
            ),
            "calibration": reliability_curve({name: by_group[name] for name in _PHRASING_GROUPS if name in by_group}),
        }
        residual = [site for site in self.store if (where := site_kind(site)) and where[0] == "residual"]
        if residual:
            rows = self.store.rows(self.test["row"].to_list())
            features = {site: rows[site] for site in residual}
            labels, subjects, texts = (self.test[column].to_list() for column in ("label", "subject", "text"))
            figures["projection"] = projection_by_layer(features, self.probes, labels, texts)
            figures["patterns"] = activation_patterns(patterns_by_group(features, labels, subjects))
        return Scores(self._frame(), {f"{self.label}_{name}": figure for name, figure in figures.items()})

    def _groups(self) -> dict[str, pl.DataFrame]:
        """Parts of the test examples in which both classes occur."""
        held_out = pl.col("template") == self.probes.settings["held_out_template"]
        seen, unseen = _PHRASING_GROUPS
        groups = {seen: self.test.filter(~held_out), unseen: self.test.filter(held_out)}
        for column in ("relation", "template"):
            for part in sorted(set(self.test[column]) - {self.probes.settings["held_out_template"]}):
                groups[f"{column} {part}"] = self.test.filter(pl.col(column) == part)
        for part in sorted(self.test["relation"].unique()):
            groups[f"unseen phrasing, relation {part}"] = self.test.filter(held_out, relation=part)
        return {name: frame for name, frame in groups.items() if frame["label"].n_unique() > 1}

    def _of_kind(self, kind: str) -> list[ProbeSet]:
        return [control for control in self.controls if control.settings["control"] == kind]

    def _score(
        self, probe_name: str, group: str, probe: LinearProbe, frame: pl.DataFrame, features: Tensor | None = None
    ) -> ProbeScore:
        if features is None:
            features = self.store.read(probe.site, frame["row"].to_list())
        score = probe.score(features, frame["label"].to_list(), frame["subject"].to_list(), seed=self.seed)
        for measure in _MEASURES:
            self._note(probe_name, group, probe.site, measure, getattr(score, measure))
        return score

    def _score_within_strata(self) -> None:
        """What the chosen probe knows beyond phrasing and relation, which alone would reach .5 here."""
        chosen = self.probes.best
        logits = chosen.logits(self.store.read(chosen.site, self.test["row"].to_list()))[:, 0].numpy()
        strata = self.test.select("relation", "template").rows()
        positive, subjects = (self.test["label"] == self.probes.classes[1]).to_numpy(), self.test["subject"].to_list()
        estimate = auroc_within(logits, positive, strata, subjects, seed=self.seed)
        self._note("fitted", "within phrasing and relation", chosen.site, "auroc", estimate)

    def _score_detector(self) -> None:
        """How often the detector calls conflicting and aligned test prompts conflicts."""
        if self.label != "conflict" or not (self.folder / "detector").is_dir():
            return
        detector = ConflictDetector.load(self.folder / "detector")
        probe = detector.conflict
        for name, frame in {"test": self.test, **self._groups()}.items():
            probabilities = probe.predict_proba(self.store.read(probe.site, frame["row"].to_list()))[:, 1]
            called = frame.with_columns(
                called=pl.Series((probabilities > detector.threshold).tolist()).cast(pl.Float64)
            )
            for measure, kind in (("true_positive_rate", "conflict"), ("false_positive_rate", "aligned")):
                part = called.filter(label=kind)
                found = rate(part["called"].to_numpy(), part["subject"].to_list())
                self._note("detector", name, probe.site, measure, found)

    def _floor(self, by_site: Mapping[str, ProbeScore]) -> tuple[str, ProbeScore] | None:
        """Scores the floors; the one to draw, with its name."""
        drawn = None
        for control in self._of_kind("floor"):
            for name, frame in {**self._groups(), "test": self.test}.items():
                features = _one_hot(frame, control.settings["categories"])
                drawn = f"{_FLOOR} floor", self._score("floor", name, control[_FLOOR], frame, features)
        if (embedding := by_site.get(EMBEDDING)) is not None:
            self._note("floor", "test", EMBEDDING, "auroc", embedding.auroc)
            if self.label == "conflict":
                drawn = "embedding floor", embedding
        return drawn

    def _shuffled(self) -> dict[str, Estimate]:
        controls = self._of_kind("shuffled")
        rows, positive = self.test["row"].to_list(), (self.test["label"] == self.probes.classes[1]).to_numpy()
        result: dict[str, Estimate] = {}
        for site in tracked(list(self.probes) if controls else [], f"Shuffled labels: {self.label}"):
            features = self.store.read(site, rows)
            logits = [control[site].logits(features)[:, 0].numpy() for control in controls]
            result[site] = pooled_auroc(logits, positive, self.test["subject"].to_list(), seed=self.seed)
            self._note("shuffled labels", "test", site, "auroc", result[site])
        return result

    def _note(self, probe: str, group: str, site: str, measure: str, estimate: Estimate) -> None:
        about = {"label": self.label, "probe": probe, "group": group, "site": site}
        self._rows.append(
            {**about, "chosen": site == self.probes.best.site, "measure": measure, **estimate.to_record()}
        )

    def _frame(self) -> pl.DataFrame:
        return pl.DataFrame(self._rows)


def score_table(scores: pl.DataFrame) -> pl.DataFrame:
    """The chosen sites, their controls and floors, and the detector, on the main groups: a row for each."""
    left_out = pl.col("probe").str.starts_with("without")
    main = pl.col("chosen") | pl.col("probe").is_in(["floor", "detector"])
    groups = ("test", *_PHRASING_GROUPS, "within phrasing and relation")
    shown = scores.filter(
        pl.when(left_out).then(pl.col("measure") == "auroc").otherwise(main & pl.col("group").is_in(groups))
    )
    intervals = [f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in shown.select("value", "low", "high").rows()]
    measures = pl.col("measure").replace(_SHORT)
    table = shown.select("label", "probe", pl.col("group").alias("scored on"), measures.alias("measure"), "n")
    return table.insert_column(4, pl.Series("value [95 %]", intervals))


class Prompt(NamedTuple):
    """A prompt and what its reader calls it."""

    id: str
    text: str


def read_prompts(lines: Iterable[str], batch_size: int) -> Iterator[list[Prompt]]:
    """Prompts from lines, each a text or a JSON object with ``prompt`` and maybe ``id``, a few at a time.

    Raises:
        UserError: If a line that starts like a JSON object is none with a prompt; the message names it. Or if the
            lines are no text.
    """
    batch: list[Prompt] = []
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            # Some editors begin a file with a byte order mark.
            batch.append(_prompt(line.removeprefix("\ufeff").rstrip("\n"), number))
            if len(batch) == batch_size:
                yield batch
                batch = []
    except UnicodeDecodeError as error:
        raise UserError(f"The prompts are not UTF-8 text ({error}); convert them.") from error
    if batch:
        yield batch


def _prompt(line: str, number: int) -> Prompt:
    if not line.lstrip().startswith("{"):
        return Prompt(str(number), line)
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"Line {number} is not valid JSON ({error}); mend or remove it.") from error
    if not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise UserError(f"Line {number} has no text in a field named prompt; add one.")
    return Prompt(str(row.get("id", number)), row["prompt"])
