"""Score fitted probes and their controls on the test split.

Only test subjects on which nothing was fitted count. Probes are scored in the phrasing families that they know and in
the one that they do not, in each relation, and next to the controls that ``probes.fitting`` describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from torch import Tensor

from interp.activation_store import ActivationStore
from interp.activations import site_kind
from interp.errors import UserError
from interp.files import write_json, write_parquet
from interp.progress import tracked
from interp.statistics import Estimate, rate
from probes.detector import ConflictDetector
from probes.fitting import EMBEDDING, KNOWN_BEFOREHAND, LABELS, Label, check_finished, examples_of, one_hot
from probes.linear import LinearProbe, ProbeSet
from probes.patterns import patterns_by_group
from probes.quality import ProbeScore, auroc_within, pooled_auroc

PHRASING_GROUPS: tuple[str, str] = ("seen phrasings", "unseen phrasing")
"""The test examples phrased as those that probes were fitted on, and those in the family that was left out."""

_SHORT = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "calibration_error": "ECE",
    "true_positive_rate": "conflicts found",
    "false_positive_rate": "false alarms",
}
_MEASURES = ("auroc", "auprc", "accuracy", "calibration_error")


@dataclass(frozen=True, eq=False)
class LabelScores:
    """How good the probes of one label are, with what figures of them need.

    Attributes:
        label: The label.
        frame: The label's rows of ``Scores.frame``.
        probes: The probes.
        by_group: The score of the chosen one in each part of the test examples.
        test: These examples: rows of the recording's index.
        features: Their activations by recorded site, read from disk when one is asked for.
        patterns: What ``patterns_by_group`` says of the residual stream, by label; ``None`` where it was not recorded.
    """

    label: Label
    frame: pl.DataFrame
    probes: ProbeSet
    by_group: Mapping[str, ProbeScore]
    test: pl.DataFrame
    features: Mapping[str, Tensor]
    patterns: pl.DataFrame | None


class Scores(NamedTuple):
    """What ``score_probes`` gives.

    Attributes:
        frame: Columns ``label``, ``probe`` (``fitted``, ``shuffled labels``, ``floor``, ``without ...``), ``group``,
            ``site``, ``chosen`` (whether dev chose the site), ``measure``, ``value``, ``low``, ``high``, ``n``.
        labels: The scores of each label's probes.
    """

    frame: pl.DataFrame
    labels: list[LabelScores]


def score_probes(store: ActivationStore, folder: Path, out: Path, *, seed: int = 0) -> Scores:
    """Score fitted probes and their controls on the test split.

    Args:
        store: A finished recording; only test subjects on which nothing was fitted are used.
        folder: What ``fit_probes`` wrote.
        out: Folder for ``scores.parquet`` and ``scores.json`` (of what).
        seed: Seed of the bootstrap.

    Raises:
        UserError: If there are no probes, or the recording lacks a site or a test split.
    """
    check_finished(folder)
    found: list[Label] = [label for label in LABELS if (folder / f"{label}.json").exists()]
    labels = [_Scoring(store, folder, label, seed).result() for label in found]
    scores = Scores(pl.concat([label.frame for label in labels]), labels)
    write_parquet(out / "scores.parquet", scores.frame)
    about = labels[0].probes.settings
    write_json(out / "scores.json", {key: about[key] for key in ("model", "data", "seed", "held_out_template")})
    return scores


def score_table(scores: pl.DataFrame) -> pl.DataFrame:
    """The chosen sites, their controls and floors, and the detector, on the main groups: a row for each."""
    left_out = pl.col("probe").str.starts_with("without")
    main = pl.col("chosen") | pl.col("probe").is_in(["floor", "detector"])
    groups = ("test", *PHRASING_GROUPS, "within phrasing and relation")
    shown = scores.filter(
        pl.when(left_out).then(pl.col("measure") == "auroc").otherwise(main & pl.col("group").is_in(groups))
    )
    estimates = shown.select("value", "low", "high", "n").iter_rows(named=True)
    measures = pl.col("measure").replace(_SHORT)
    table = shown.select("label", "probe", pl.col("group").alias("scored on"), measures.alias("measure"), "n")
    return table.insert_column(4, pl.Series("value [95 %]", [str(Estimate.from_record(one)) for one in estimates]))


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
        examples = examples_of(store, label)
        if self.probes.settings["positions"] != store.basis["positions"]:
            raise UserError(
                f"The probes in {folder} read {self.probes.settings['positions']} tokens, but {store.path} holds "
                f"{store.basis['positions']} ones; score on a recording of the same positions."
            )
        # The splits of another recording may be others.
        fitted_on = pl.col("subject").is_in(self.probes.settings["subjects"])
        self.test = examples.filter(pl.col("split") == "test", ~fitted_on)
        if self.test["label"].n_unique() < 2:
            raise UserError(
                f"{store.path} has no two classes of the {label} label among test subjects that the probes were not "
                "fitted on; record all splits, with the seed of the recording that they were fitted on."
            )
        self._rows: list[dict[str, Any]] = []

    def result(self) -> LabelScores:
        by_site = {
            site: self._score("fitted", "test", probe, self.test)
            for site, probe in tracked(list(self.probes.items()), f"Scoring: {self.label}")
        }
        chosen = self.probes.best
        by_group = {name: self._score("fitted", name, chosen, frame) for name, frame in self._groups().items()}
        self._score_within_strata()
        self._score_detector()
        self._score_shuffled()
        self._score_floors(by_site.get(EMBEDDING))
        self._score_left_out()
        features = self.store.rows(self.test["row"].to_list())
        residual = [site for site in self.store if (where := site_kind(site)) and where[0] == "residual"]
        patterns = None
        if residual:
            labels, subjects = self.test["label"].to_list(), self.test["subject"].to_list()
            patterns = patterns_by_group({site: features[site] for site in residual}, labels, subjects)
        frame = pl.DataFrame(self._rows)
        return LabelScores(self.label, frame, self.probes, by_group, self.test, features, patterns)

    def _groups(self) -> dict[str, pl.DataFrame]:
        """Parts of the test examples in which both classes occur."""
        held_out = pl.col("template") == self.probes.settings["held_out_template"]
        seen, unseen = PHRASING_GROUPS
        groups = {seen: self.test.filter(~held_out), unseen: self.test.filter(held_out)}
        for column in ("relation", "template"):
            for part in sorted(set(self.test[column]) - {self.probes.settings["held_out_template"]}):
                groups[f"{column} {part}"] = self.test.filter(pl.col(column) == part)
        for part in sorted(self.test["relation"].unique()):
            groups[f"unseen phrasing, relation {part}"] = self.test.filter(held_out, relation=part)
        return {name: frame for name, frame in groups.items() if frame["label"].n_unique() > 1}

    def _score_left_out(self) -> None:
        """How well probes do on the relation or phrasing that they were fitted without."""
        for control in self._of_kind("left out"):
            column, part = control.settings["column"], control.settings["part"]
            frame = self.test.filter(pl.col(column) == part)
            if frame["label"].n_unique() > 1:
                self._score(f"without {column} {part}", f"{column} {part}", control.best, frame)

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

    def _score_shuffled(self) -> None:
        controls = self._of_kind("shuffled")
        rows, positive = self.test["row"].to_list(), (self.test["label"] == self.probes.classes[1]).to_numpy()
        for site in tracked(list(self.probes) if controls else [], f"Shuffled labels: {self.label}"):
            features = self.store.read(site, rows)
            logits = [control[site].logits(features)[:, 0].numpy() for control in controls]
            estimate = pooled_auroc(logits, positive, self.test["subject"].to_list(), seed=self.seed)
            self._note("shuffled labels", "test", site, "auroc", estimate)

    def _score_floors(self, embedding: ProbeScore | None) -> None:
        for control in self._of_kind("floor"):
            for name, frame in {**self._groups(), "test": self.test}.items():
                features = one_hot(frame, control.settings["categories"])
                self._score("floor", name, control[KNOWN_BEFOREHAND], frame, features)
        if embedding is not None:
            self._note("floor", "test", EMBEDDING, "auroc", embedding.auroc)

    def _note(self, probe: str, group: str, site: str, measure: str, estimate: Estimate) -> None:
        about = {"label": self.label, "probe": probe, "group": group, "site": site}
        self._rows.append(
            {**about, "chosen": site == self.probes.best.site, "measure": measure, **estimate.to_record()}
        )
