"""Fit probes of every site of a recording, their controls, and a detector.

Probes train on the train split; strength, site and threshold are chosen on dev; one phrasing family is left out of
both. ``probes.scoring`` scores them on test, next to controls that keep the numbers honest:

    shuffled labels     probes fitted to labels that were permuted within relation, phrasing and split; for sources,
                        whose shares differ between these, that is a second floor
    floors              the embedding of the last token; and what is known without reading the model: phrasing and
                        relation, for conflicts also which answer the context gives
    without a relation  fitted on the other relations, scored on this one
    without a phrasing  fitted on the other phrasing families, scored on this one
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from interp.activation_store import ActivationStore
from interp.activations import site_kind
from interp.conflicts import ConflictSet, ContextKind
from interp.errors import UserError
from interp.facts import HELD_OUT_PHRASING, relation_named, usable_facts
from interp.files import write_json
from interp.fingerprints import fingerprint
from interp.known import conflicts_about_known
from interp.progress import tracked
from interp.records import Records
from probes.detector import CONFLICT_CLASSES, SOURCE_CLASSES, ConflictDetector, threshold_rank
from probes.linear import Method, ProbeSet

Label = Literal["conflict", "source"]
LABELS: tuple[Label, ...] = get_args(Label)
EMBEDDING = "embed.hook_out"
"""The site whose probe knows the last token alone."""
KNOWN_BEFOREHAND = "known beforehand"
"""What stands for a site of the floor that does not read the model."""
SHUFFLES = 5

_FINISHED = "fit.json"
_CLASSES: dict[Label, tuple[str, ...]] = {"conflict": CONFLICT_CLASSES, "source": SOURCE_CLASSES}
_FLOORS: dict[Label, tuple[str, ...]] = {
    "conflict": ("template", "relation", "context_answer"),
    "source": ("template", "relation"),
}


def conflicts_for_probes(
    model: nn.Module, relations: Sequence[str], *, folder: Path, seed: int, kinds: Sequence[ContextKind]
) -> ConflictSet:
    """Build prompts, in every phrasing family, about the facts of some relations that the model knows.

    What it knows is kept under ``folder``, so that a call that is repeated does not ask again.

    Raises:
        UserError: If a relation is not known, or the model knows too few facts for conflicts.
    """
    facts = {relation_named(name).name: usable_facts(name) for name in relations}
    return conflicts_about_known(model, facts, Records(folder, model=fingerprint(model)), seed=seed, kinds=kinds)


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
    _clear(out)
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


def _clear(folder: Path) -> None:
    """Remove what is left of an earlier fit, which would be scored as if it belonged to the next one."""
    (folder / _FINISHED).unlink(missing_ok=True)
    shutil.rmtree(folder / "controls", ignore_errors=True)
    shutil.rmtree(folder / "detector", ignore_errors=True)
    for label in LABELS:
        (folder / f"{label}.json").unlink(missing_ok=True)


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
    yield task.fit(known, {KNOWN_BEFOREHAND: one_hot(known, categories)}, control="floor", categories=categories)
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


def one_hot(frame: pl.DataFrame, categories: Sequence[Sequence[str]]) -> Tensor:
    """Which of the categories each example is of, ``(n, n_categories)``; an unknown phrasing is all zeros."""
    columns = [(frame[column] == part).fill_null(False).cast(pl.Float32).to_numpy() for column, part in categories]
    return torch.from_numpy(np.stack(columns, 1))
