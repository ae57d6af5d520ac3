"""The fifth job: put an intervention behind a gate, and verify that it then acts only where there is a conflict.

1. Build prompts of every kind about what the model knows: conflicting, agreeing and irrelevant contexts, and none.
2. Record what residual stream, attention and MLP hold at the prompts' ends, in the layers below the lowest edited one,
   and fit a probe at every site that tells conflicts from all other kinds.
3. On dev, set each probe's threshold so that the wanted share of conflicts passes; of all sites take the one that lets
   fewest of the others through.
4. Measure on test, held-out subjects and an unseen phrasing among others: the model unedited, edited everywhere, edited
   behind the gate, and behind a gate that reads a random direction; how often the gates open for each kind of prompt;
   and which share of the edit's gain the gate keeps, and of its damage.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from conflictscope.demo_study import TEST_PHRASINGS, condition_record, measure_edits, model_record, run_record
from conflictscope.dialing import known_conflicts, learned_part, subjects_by_split
from conflictscope.examples import example_frame, write_examples
from conflictscope.study.records import Records
from conflictscope.tables import MEASURES, written
from interp.activations import Activations, record, sites_of
from interp.anatomy import Anatomy, located
from interp.conflicts import CONTEXT_KINDS, ConflictSet, Split
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.facts import HELD_OUT_PHRASING, LEARNED_PHRASINGS, STUDY_PHRASINGS, relation_named
from interp.files import write_json
from interp.models import fingerprint
from interp.statistics import Estimate, bootstrap_means, rate
from interventions.base import Intervention
from interventions.config import InterventionFile
from interventions.dial import TrustDial
from interventions.gate import ConflictGate
from interventions.identity import ModelIdentity
from probes.linear import LinearProbe, ProbeSet

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Condition = Literal["unedited", "everywhere", "gated", "random_gate"]
_CLASSES = ("other", "conflict")
# Of each kind. Subjects matter more than phrasings of the same one.
_EXAMPLES: dict[Split, int] = {"train": 180, "dev": 120}
# What is most like a conflict, a context about something else, is asked in the same phrasings.
_PHRASINGS = {**TEST_PHRASINGS, "irrelevant": STUDY_PHRASINGS}
_OTHERS = tuple(kind for kind in CONTEXT_KINDS if kind != "conflict")


class Chosen(NamedTuple):
    """A probe with its threshold, chosen on dev.

    Attributes:
        probe: The probe.
        threshold: Log odds above which the gate is open.
        opened: The share of dev's prompts of each kind for which it is.
    """

    probe: LinearProbe
    threshold: float
    opened: dict[str, float]


def passing_threshold(scores: Tensor, keep: float) -> float:
    """The threshold that a new score exceeds with probability ``keep`` at least, if it is exchangeable with these.

    It is the ``floor((n + 1) * (1 - keep))``-th smallest of the ``n`` scores (Vovk et al. 2005, "Algorithmic Learning
    in a Random World").

    Args:
        scores: Of prompts that should pass, ``(n,)``.
        keep: The share that should, between 0 and 1.

    Raises:
        UserError: If there are too few scores for it.
    """
    rank = math.floor((len(scores) + 1) * (1 - keep))
    if rank < 1:
        raise UserError(
            f"There are {len(scores)} conflict prompts to set the gate's threshold on, too few to let {keep:g} of them "
            "pass; choose more relations or subjects, or a smaller share."
        )
    return float(scores.sort().values[rank - 1])


class Gating:
    """One intervention file, put behind a gate; finished steps are kept in ``out/records``.

    Args:
        model: The bridge.
        file: The intervention, without a gate; for this model.
        relations: Relations to fit and test the gate on.
        out: The folder.
        keep: The share of conflicts that the gate is to let pass.
        subjects: How many subjects of each relation are asked about at most, to learn from and to test on.
        seed: Decides splits, conflicts and the random control.

    Raises:
        UserError: If ``keep`` is no share, or the file is for another model, is gated already, or edits the lowest
            layer.
    """

    def __init__(
        self,
        model: TransformerBridge,
        file: InterventionFile,
        *,
        relations: Sequence[str],
        out: Path,
        keep: float = 0.95,
        subjects: int = 40,
        seed: int = 0,
    ) -> None:
        if not 0 < keep < 1:
            raise UserError(f"The share of conflicts that pass the gate lies between 0 and 1, not at {keep:g}.")
        file.model.check(model)
        self.model = model
        self.file = file
        self.edits = _ungated(file)
        self.relations = list(dict.fromkeys(relation_named(relation).name for relation in relations))
        self.out = out
        self.keep = keep
        self.seed = seed
        self.subjects = subjects_by_split(subjects)
        self.records = Records(out / "records", model=fingerprint(model))
        self.lowest = min((layer for edit in self.edits for layer in edit.edited_layers), default=0)
        if self.lowest == 0:
            raise UserError(
                f"{file.name} edits layer 0 or nothing, so that no gate can lie below it; take an edit of higher "
                "layers, or set its dial."
            )

    def run(self) -> dict[str, Any]:
        """Fit and verify the gate, and write ``gated.json`` and ``summary.json``.

        Returns:
            The summary.

        Raises:
            UserError: If the model knows too little.
        """
        chosen, gate, control = self.chosen, self.gate(self.chosen), self.gate(self.blind)
        measured: dict[Condition, tuple[UsageReport, np.ndarray]] = {
            "unedited": self._measured([], "Unedited"),
            "everywhere": self._measured(self.edits, "Edited everywhere"),
            "gated": self._measured([gate], "Gated"),
            "random_gate": self._measured([control], "Gated at random"),
        }
        reports: dict[Condition, UsageReport] = {name: report for name, (report, _) in measured.items()}
        opened = self._opened()
        summary = {
            "model": model_record(self.model, self.file.model.name),
            "intervention": self.file.name,
            "towards": self.file.towards,
            "data": {
                "relations": self.relations,
                "counts": self.conflicts.counts(),
                "phrasings": {
                    "learned_from": LEARNED_PHRASINGS,
                    "tested": STUDY_PHRASINGS,
                    "held_out": HELD_OUT_PHRASING,
                },
                "digest": self.conflicts.digest,
            },
            "settings": {
                "keep": self.keep,
                "trust": next((edit.trust for edit in self.edits if isinstance(edit, TrustDial)), None),
                "subjects": self.subjects,
                "seed": self.seed,
                **run_record(self.model),
            },
            "gate": {
                "site": chosen.probe.site,
                "threshold": chosen.threshold,
                "dev": {"auroc": chosen.probe.validation_auroc, "opened": chosen.opened},
                "test": {"opened": opened["gated"]},
            },
            "random_gate": {"dev": {"opened": self.blind.opened}, "test": {"opened": opened["random_gate"]}},
            "conditions": {
                name: condition_record(*found, None if name == "unedited" else reports["unedited"])
                for name, found in measured.items()
            },
            "kept": {name: self._kept(reports, name) for name in ("gated", "random_gate")},
        }
        self._write(gate, summary, reports)
        return summary

    @cached_property
    def conflicts(self) -> ConflictSet:
        """Prompts of every kind and phrasing about what the model knows."""
        name = self.file.model.name
        return known_conflicts(
            self.model, name, self.relations, subjects=self.subjects, seed=self.seed, records=self.records
        )

    @cached_property
    def tested(self) -> ConflictSet:
        """What is asked on test."""
        test = self.conflicts.select(split="test")
        return ConflictSet(test.name, tuple(e for e in test if e.template in _PHRASINGS[e.kind]))

    @cached_property
    def chosen(self) -> Chosen:
        """The probe that lets fewest others through while it lets the wanted share of conflicts pass, on dev."""
        parts = {split: self._learned_from(split) for split in _EXAMPLES}
        sites = sites_of(self.model, layers=range(self.lowest))
        recorded = {
            split: record(self.model, part, sites, progress=f"Recording: {split}") for split, part in parts.items()
        }
        examples = [example for part in parts.values() for example in part]
        probes = ProbeSet.fit(
            {site: torch.cat([values[site] for values in recorded.values()]) for site in sites},
            ["conflict" if example.kind == "conflict" else "other" for example in examples],
            validation=[example.split == "dev" for example in examples],
            classes=_CLASSES,
            device=str(Anatomy(self.model).device),
            progress="Probes",
        )
        candidates = [self._set(probe, recorded["dev"], parts["dev"]) for probe in probes.values()]
        return min(candidates, key=lambda chosen: sum(chosen.opened[kind] for kind in _OTHERS))

    @cached_property
    def blind(self) -> Chosen:
        """The control: a random direction at the chosen site, set to let as many conflicts pass."""
        probe = self.chosen.probe
        generator = torch.Generator().manual_seed(self.seed)
        weight = (
            torch.randn(probe.weight.shape, generator=generator) * probe.weight.norm() / probe.weight.numel() ** 0.5
        )
        direction = LinearProbe(probe.site, _CLASSES, weight, torch.zeros(1), probe.strength, 0.5)
        dev = self._learned_from("dev")
        return self._set(direction, record(self.model, dev, [probe.site], progress="Recording: random gate"), dev)

    def _learned_from(self, split: Split) -> ConflictSet:
        """As many prompts of each kind, at random."""
        part = learned_part(self.conflicts, split)
        rng = random.Random(f"{self.seed}/{split}")
        kinds = [part.select(kind=kind).examples for kind in CONTEXT_KINDS]
        return ConflictSet(
            part.name, tuple(e for some in kinds for e in rng.sample(some, min(_EXAMPLES[split], len(some))))
        )

    def gate(self, chosen: Chosen) -> ConflictGate:
        """The edits behind a probe."""
        part, layer = located(chosen.probe.site)
        weight, bias = chosen.probe.weight[0].cpu(), float(chosen.probe.bias[0])
        return ConflictGate(part, layer, weight, bias, chosen.threshold, self.edits)

    def _set(self, probe: LinearProbe, recorded: Activations, part: ConflictSet) -> Chosen:
        scores = probe.logits(recorded[probe.site])[:, 0].cpu()
        kinds = np.array([example.kind for example in part])
        threshold = passing_threshold(scores[torch.from_numpy(kinds == "conflict")], self.keep)
        is_open = (scores > threshold).numpy()
        return Chosen(probe, threshold, {kind: float(is_open[kinds == kind].mean()) for kind in CONTEXT_KINDS})

    def _measured(self, edits: Sequence[Intervention], label: str) -> tuple[UsageReport, np.ndarray]:
        return measure_edits(self.model, self.records, self.tested, edits, label=f"Test: {label}")

    def _opened(self) -> dict[str, dict[str, Any]]:
        """For both gates the share of test's prompts of each kind for which they open, and in the unseen phrasing."""
        asked = self.tested
        values = record(self.model, asked, [self.chosen.probe.site], progress="Recording: test")
        columns = {name: [getattr(e, name) for e in asked] for name in ("kind", "subject", "template")}
        shares: dict[str, dict[str, Any]] = {}
        for name, (probe, threshold, _) in {"gated": self.chosen, "random_gate": self.blind}.items():
            is_open = (probe.logits(values[probe.site])[:, 0].cpu() > threshold).double().numpy()
            opened = pl.DataFrame({**columns, "open": is_open})
            unseen = opened.filter(template=HELD_OUT_PHRASING)
            shares[name] = {**_shares(opened), "held_out_phrasing": _shares(unseen)}
        return shares

    def _kept(self, reports: Mapping[Condition, UsageReport], gated: Condition) -> dict[str, Any]:
        """What a gate keeps of gain and damage, over all phrasings and in the one it has not seen."""
        unseen: dict[Condition, UsageReport] = {
            name: report.select(template=HELD_OUT_PHRASING) for name, report in reports.items()
        }
        return {
            **kept_shares(reports, gated, self.file.towards),
            "held_out_phrasing": kept_shares(unseen, gated, self.file.towards),
        }

    def _write(self, gate: ConflictGate, summary: dict[str, Any], reports: Mapping[Condition, UsageReport]) -> None:
        # The summary is taken away first and comes last: where there is one, it belongs to the file beside it.
        (self.out / "summary.json").unlink(missing_ok=True)
        InterventionFile.of(
            [gate],
            name=f"{self.file.name}, gated",
            towards=self.file.towards,
            model=ModelIdentity.of(self.model, self.file.model.name),
            provenance={
                "method": "conflict_gate",
                "chosen_on": "dev",
                "data": summary["data"]["digest"],
                "relations": self.relations,
                **summary["settings"],
                "edit": self.file.provenance.model_dump(mode="json"),
            },
            measured={"unedited": summary["conditions"]["unedited"], "test": summary["conditions"]["gated"]},
        ).save(self.out / "gated.json")
        named = {name.replace("_", " "): report for name, report in reports.items()}
        write_examples(self.out, example_frame(self.tested, named))
        write_json(self.out / "summary.json", summary)


def _shares(opened: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """Share of ones in the column ``open`` by kind, with intervals by subject."""
    return {
        kind: rate(part["open"].to_numpy(), part["subject"].to_list()).to_record()
        for kind in CONTEXT_KINDS
        if not (part := opened.filter(kind=kind)).is_empty()
    }


def kept_shares(
    reports: Mapping[Condition, UsageReport], gated: Condition, towards: str | None
) -> dict[str, dict[str, Any]]:
    """Which share of the ungated edit's gain and damage is left behind a gate, with intervals by subject.

    Args:
        reports: Answers to the same prompts under each condition.
        gated: The condition behind the gate.
        towards: The source whose rate is the gain; ``None`` has damage only.

    Returns:
        ``gain``, and the losses of accuracy ``none``, ``aligned``, ``irrelevant``, as far as there are such prompts.
        Of what the ungated edit does not change the share is undefined.
    """
    shares: dict[str, dict[str, Any]] = {}
    for kind in CONTEXT_KINDS:
        if kind == "conflict" and towards is None:
            continue
        names: tuple[Condition, ...] = ("unedited", "everywhere", gated)
        frames = [reports[name].select(kind=kind).frame for name in names]
        right = np.stack(
            [
                ((f["usage"] == towards) if kind == "conflict" else f["memory_span_match"]).cast(pl.Float64).to_numpy()
                for f in frames
            ],
            axis=1,
        )
        if len(right):
            name = "gain" if kind == "conflict" else kind
            shares[name] = _kept_share(right, frames[0]["subject"].to_list()).to_record()
    return shares


def _kept_share(right: np.ndarray, subjects: Sequence[str]) -> Estimate:
    """Which share of a change is kept; ``right`` is ``(n, 3)``: unedited, edited everywhere, gated."""
    changed, kept = right[:, 1] - right[:, 0], right[:, 2] - right[:, 0]
    if not changed.sum():
        return Estimate.undefined(len(right))
    moved = np.flatnonzero(changed).tolist()
    one_way, kept_of_moved = abs(changed.sum()) == len(moved), kept[moved] / changed[moved]
    if one_way and np.count_nonzero(kept) == kept_of_moved.sum() and np.isin(kept_of_moved, (0, 1)).all():
        # Nothing else changed, and of what did each prompt keeps its change or loses it: a rate.
        return rate(kept_of_moved, [subjects[i] for i in moved])
    means = np.vstack([right.mean(0), bootstrap_means(right, subjects)])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (means[:, 2] - means[:, 0]) / (means[:, 1] - means[:, 0])
    # Where a resample has no change at all there is no share; what it would be is bounded by nothing.
    low, high = np.quantile(share[1:][np.isfinite(share[1:])], [0.025, 0.975])
    return Estimate(float(share[0]), float(low), float(high), len(right))


def gating_table(summary: Mapping[str, Any]) -> pl.DataFrame:
    """What the gate does, a row for each condition."""
    return pl.DataFrame(
        [
            {
                "condition": name.replace("_", " "),
                **{m.replace("_", " "): written(found[m]) for m in MEASURES},
            }
            for name, found in summary["conditions"].items()
        ]
    )


def gating_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """What the gate lets through and keeps, in a few lines."""

    def listed(shares: Mapping[str, Any]) -> str:
        return ", ".join(f"{kind} {written(share)}" for kind, share in shares.items() if kind != "held_out_phrasing")

    opened, kept = summary["gate"]["test"]["opened"], summary["kept"]["gated"]
    yield f"The gate reads {summary['gate']['site']}; it opens for {listed(opened)}"
    yield f"in the unseen phrasing for {listed(opened['held_out_phrasing'])}"
    yield f"It keeps of the gain, and of each loss of accuracy: {listed(kept)}"
    yield f"in the unseen phrasing: {listed(kept['held_out_phrasing'])}"


def _ungated(file: InterventionFile) -> tuple[Intervention, ...]:
    edits: list[Intervention] = []
    for edit in file.build():
        if isinstance(edit, ConflictGate):
            raise UserError(f"{file.name} has a gate already; give the file that it was made from.")
        edits.append(edit)
    if any(isinstance(edit, TrustDial) and not edit.trust for edit in edits):
        raise UserError(f"The dial of {file.name} is at 0, which changes nothing; give --trust.")
    return tuple(edits)
