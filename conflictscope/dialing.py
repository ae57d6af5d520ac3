"""The fourth job: learn a trust dial, calibrate it, and verify it on held-out subjects.

1. Sample facts, and keep those that the model continues right in most phrasings, asked in one pass.
2. Learn the gates of both directions on train, within the budget of damage on dev.
3. Calibrate: the rates of memory and context on dev at settings from one end to the other.
4. Measure both ends on test: held-out subjects, phrasings of which one is unseen; next to the unedited model, to gates
   of the same scales in random places, and to the setting that the curve gives for a rate halfway.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conflictscope.demo_study import (
    RANDOM_DRAWS,
    TEST_PHRASINGS,
    measure_edits,
    model_record,
    pooled_record,
    run_record,
)
from conflictscope.examples import UNEDITED, example_frame, write_examples
from conflictscope.gate_fit import GateFit, LearnedFrom
from conflictscope.study.records import Records
from figures.dial import dial_curve
from figures.theme import save_figure
from interp.answers import DIRECTIONS, Direction
from interp.conflicts import CONTEXT_KINDS, SPLITS, ConflictSet, Split, split_of
from interp.errors import UserError
from interp.evaluation import ANSWERS_VERSION, UsageReport, answer_starts
from interp.facts import (
    HELD_OUT_PHRASING,
    LEARNED_PHRASINGS,
    PHRASINGS,
    SEEN_PHRASINGS,
    STUDY_PHRASINGS,
    Fact,
    build_conflicts,
    closed_book_prompt,
    relation_named,
    usable_facts,
)
from interp.files import write_json
from interp.generation import tracked
from interp.models import fingerprint
from interp.teacher_forcing import FORCING_VERSION, continued, greedily_continued
from interventions.base import EDITS_VERSION, applied
from interventions.config import InterventionFile, effect_digest
from interventions.dial import DialPoint, DialScale, TrustDial
from interventions.fitting.scale_data import scale_places
from interventions.fitting.scale_learning import ScaleTraining
from interventions.identity import ModelIdentity

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RELATIONS = ("capital", "language", "continent", "manufacturer")
SETTINGS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)

_CALIBRATED_ON = 160


class Dialing:
    """One dial for one model; finished steps are kept in ``out/records``.

    Args:
        model: The bridge.
        name: What the model was loaded by.
        relations: Relations to learn from, all together.
        out: The folder.
        settings: What decides the learning; its seed decides the splits too.
        subjects: How many subjects of each relation are asked about at most, to learn from and to test on; three fifths
            as many to choose on.
    """

    def __init__(
        self,
        model: TransformerBridge,
        name: str,
        *,
        relations: Sequence[str] = RELATIONS,
        out: Path,
        settings: ScaleTraining | None = None,
        subjects: int = 40,
    ) -> None:
        self.model = model
        self.name = name
        self.relations = list(dict.fromkeys(relation_named(relation).name for relation in relations))
        self.out = out
        self.settings = settings or ScaleTraining()
        self.seed = self.settings.seed
        self.subjects = subjects
        self._subjects = subjects_by_split(subjects)
        self.records = Records(out / "records", model=fingerprint(model))

    def run(self) -> dict[str, Any]:
        """Learn, calibrate and verify the dial, and write its files.

        Returns:
            The summary, as it is written to ``summary.json``.

        Raises:
            UserError: If the model knows too little to learn from.
        """
        dial = self.dial
        baseline = self.verified([None], "Unedited model")
        ends = {towards: dial.at(1.0 if towards == "context" else -1.0) for towards in DIRECTIONS}
        measured = {towards: self.verified([end], f"Dial towards {towards}") for towards, end in ends.items()}
        draws = {
            towards: [self.elsewhere(end, f"{towards}/{draw}") for draw in range(RANDOM_DRAWS)]
            for towards, end in ends.items()
        }
        summary = {
            "model": model_record(self.model, self.name),
            "data": {
                "relations": self.relations,
                "counts": self.conflicts.counts(),
                "splits": self.conflicts.counts()["subjects_by_split"],
                "phrasings": {
                    "learned_from": LEARNED_PHRASINGS,
                    "tested": STUDY_PHRASINGS,
                    "held_out": HELD_OUT_PHRASING,
                },
                "digest": self.conflicts.digest,
            },
            "settings": {
                **vars(self.settings),
                "subjects": self._subjects,
                **run_record(self.model),
            },
            "baseline": {"test": baseline},
            **{
                f"towards_{towards}": {
                    "method": "learned_gates",
                    **edit_record(ends[towards]),
                    "chosen_on": "dev",
                    "dev": self._learned[towards]["dev"],
                    "test": measured[towards],
                }
                for towards in DIRECTIONS
            },
            "random_heads": {
                f"towards_{towards}": {
                    "draws": [edit_record(draw) for draw in drawn],
                    "chosen_on": "random",
                    "test": self.verified(drawn, f"Random gates, towards {towards}"),
                }
                for towards, drawn in draws.items()
            },
            "calibration": [vars(point) for point in dial.calibration],
            "asked": {f"towards_{towards}": self._asked(towards) for towards in DIRECTIONS},
        }
        self._write(dial, summary)
        return summary

    @cached_property
    def conflicts(self) -> ConflictSet:
        """Prompts of every kind and phrasing about what the model knows."""
        return known_conflicts(
            self.model, self.name, self.relations, subjects=self._subjects, seed=self.seed, records=self.records
        )

    @cached_property
    def dial(self) -> TrustDial:
        """The dial, calibrated, at trust 0."""
        scales: dict[tuple[int, int | None], dict[str, float]] = {}
        for towards in DIRECTIONS:
            if not self._learned[towards]["gates"]:
                raise UserError(
                    f"No gate could be moved towards {towards} within the budgets of {self.settings.budget:g} and "
                    f"{self.settings.context_budget:g} nats; give a larger --budget or --context-budget."
                )
            for layer, head, scale in self._learned[towards]["gates"]:
                scales.setdefault((layer, head), {})[towards] = scale
        order = sorted(scales, key=lambda place: (place[0], -1 if place[1] is None else place[1]))
        dial = TrustDial(tuple(DialScale(*place, **scales[place]) for place in order))
        dev = learned_part(self.conflicts, "dev").select(kind="conflict")
        count = min(_CALIBRATED_ON, len(dev))
        chosen = ConflictSet(dev.name, tuple(random.Random(self.seed).sample(dev.examples, count)))
        points = []
        for trust in tracked(SETTINGS, "Calibrating"):
            report = self._starts(dial.at(trust), chosen)
            points.append(DialPoint(trust, report.rate("memory").value, report.rate("context").value))
        return TrustDial(dial.scales, calibration=tuple(points))

    def _starts(self, dial: TrustDial, conflicts: ConflictSet) -> UsageReport:
        """Which source answers to conflict prompts start with."""

        def ask() -> UsageReport:
            with applied(self.model, dial):
                return answer_starts(self.model, conflicts)

        key = [conflicts.digest, effect_digest([dial])]
        return self.records.usage("starts", key, ask, version=(ANSWERS_VERSION, EDITS_VERSION))

    @cached_property
    def _learned(self) -> dict[Direction, dict[str, Any]]:
        """For each direction its gates ``[layer, head, scale]``, and what they do on dev."""
        return {towards: self.gate_fit.learned(towards, self.settings) for towards in DIRECTIONS}

    @cached_property
    def gate_fit(self) -> GateFit:
        """What gates are learned from."""
        parts: dict[LearnedFrom, ConflictSet] = {
            "train": learned_part(self.conflicts, "train"),
            "dev": learned_part(self.conflicts, "dev"),
        }
        return GateFit(self.model, parts, self.records, seed=self.seed)

    @cached_property
    def tested(self) -> ConflictSet:
        """What is asked on test."""
        return tested_part(self.conflicts)

    def verified(self, dials: Sequence[TrustDial | None], label: str) -> dict[str, Any]:
        """What some dials, or no dial, do on test, all together."""
        unedited = None if dials == [None] else self.measured(None, "Unedited model")[0]
        return pooled_record([self.measured(dial, label) for dial in dials], unedited)

    def measured(self, dial: TrustDial | None, label: str) -> tuple[UsageReport, np.ndarray]:
        """What a dial, or no dial, does on test, and the KL divergence on every neutral text; both are kept."""
        edits = [] if dial is None else [dial]
        return measure_edits(self.model, self.records, self.tested, edits, label=f"Test: {label}")

    def _asked(self, towards: Direction) -> dict[str, Any]:
        """The rate on test when the dial is asked for the one halfway between no trust and its end.

        As in the calibration, the first token of an answer counts, and phrasings are those that were learned from; the
        held-out one stands next to them.
        """
        rates = {p.trust: p.context_rate if towards == "context" else p.memory_rate for p in self.dial.calibration}
        wanted = (rates[0.0] + rates[1.0 if towards == "context" else -1.0]) / 2
        trust = self.dial.trust_for(towards, wanted)
        test = self.conflicts.select(split="test", kind="conflict")
        parts = {
            "learned_phrasings": test.select(templates=LEARNED_PHRASINGS),
            "held_out_phrasing": test.select(templates=[HELD_OUT_PHRASING]),
        }
        rates_on_test = {
            name: self._starts(self.dial.at(trust), part).rate(towards).to_record() for name, part in parts.items()
        }
        return {"rate": wanted, "trust": trust, "test": rates_on_test}

    def elsewhere(self, end: TrustDial, draw: str) -> TrustDial:
        """The scales of one end of the dial in random places."""
        rng = random.Random(f"{self.seed}/{draw}")
        gates: list[DialScale] = []
        every = scale_places(self.model, feed_forward=True)
        for heads in (True, False):
            moved = [gate for gate in end.scales if gate.at(end.trust) != 1 and (gate.head is not None) == heads]
            taken = {(gate.layer, gate.head) for gate in moved}
            places = [place for place in every if (place[1] is not None) == heads]
            free = [place for place in places if place not in taken]
            # Where too many move, some of the others' places are their own.
            drawn = rng.sample(free if len(free) >= len(moved) else places, len(moved))
            scales = [gate.at(end.trust) for gate in moved]
            gates += [DialScale(*place, scale, scale) for place, scale in zip(drawn, scales, strict=True)]
        return TrustDial(tuple(gates), 1.0)

    def _write(self, dial: TrustDial, summary: dict[str, Any]) -> None:
        # The summary is taken away first and comes last: where there is one, it belongs to the files beside it.
        (self.out / "summary.json").unlink(missing_ok=True)
        InterventionFile.of(
            [dial],
            name=f"{self.name}: trust dial",
            model=ModelIdentity.of(self.model, self.name),
            provenance={
                "method": "learned_gates",
                "chosen_on": "dev",
                "data": summary["data"]["digest"],
                "relations": self.relations,
                **summary["settings"],
            },
            measured={
                "unedited": summary["baseline"]["test"],
                **{f"trust {end:+d}": summary[f"towards_{d}"]["test"] for d, end in (("memory", -1), ("context", 1))},
            },
        ).save(self.out / "dial.json")
        self.conflicts.save(self.out / "conflicts.jsonl")
        ends = {"towards context": dial.at(1.0), "towards memory": dial.at(-1.0)}
        shown = {UNEDITED: None, **ends}
        reports = {name: self.measured(end, name)[0] for name, end in shown.items()}
        write_examples(self.out, example_frame(self.tested, reports))
        save_figure(dial_curve(summary["calibration"]), self.out / "dial.html")
        write_json(self.out / "summary.json", summary)


def known_conflicts(
    model: TransformerBridge,
    name: str,
    relations: Sequence[str],
    *,
    subjects: Mapping[Split, int],
    seed: int,
    records: Records,
) -> ConflictSet:
    """Prompts of every kind and phrasing about facts that the model continues right in most seen phrasings.

    Args:
        model: The bridge.
        name: What it was loaded by.
        relations: Relations of the fact tables.
        subjects: How many subjects of each relation are asked about at most, by split.
        seed: Decides splits, subjects and conflicts.
        records: Where what is known is kept.

    Raises:
        UserError: If a split is left without prompts of one of the kinds.
    """
    facts: dict[str, list[Fact]] = {}
    for relation in relations:
        usable = usable_facts(relation)
        facts[relation] = []
        for split in SPLITS:
            members = [fact for fact in usable if split_of(fact.subject, seed) == split]
            rng = random.Random(f"{seed}/{relation}/{split}")
            facts[relation] += rng.sample(members, min(subjects[split], len(members)))
    asked = [(relation, fact, p) for relation in facts for fact in facts[relation] for p in SEEN_PHRASINGS]
    items = [
        continued(model, closed_book_prompt(relation_named(relation), fact.subject, phrasing), fact.answers[0])
        for relation, fact, phrasing in asked
    ]
    known = records.json(
        "known",
        [vars(item) for item in items],
        lambda: greedily_continued(model, items, progress="Closed-book"),
        version=FORCING_VERSION,
    )
    # As in a study, a fact is known if most seen phrasings get it right; it is then asked about in all.
    hits = Counter(
        (relation, fact.subject) for (relation, fact, _), is_right in zip(asked, known, strict=True) if is_right
    )
    usable = {
        relation: [fact for fact in some if 2 * hits[relation, fact.subject] > len(SEEN_PHRASINGS)]
        for relation, some in facts.items()
    }
    conflicts = build_conflicts(usable, seed=seed, kinds=CONTEXT_KINDS, phrasings=list(PHRASINGS))
    parts = {
        "train": learned_part(conflicts, "train"),
        "dev": learned_part(conflicts, "dev"),
        "test": tested_part(conflicts),
    }
    for split, part in parts.items():
        if missing := [kind for kind in CONTEXT_KINDS if not len(part.select(kind=kind))]:
            raise UserError(
                f"{name} knows too few facts of {', '.join(relations)}: the {split} split has no prompts of the kind "
                f"{missing[0]!r}; choose more relations or --subjects, or a model that knows more."
            )
    return conflicts


def subjects_by_split(subjects: int) -> dict[Split, int]:
    """How many subjects of each relation are asked about: to learn from and to test on, and fewer to choose on."""
    return {"train": subjects, "dev": max(1, subjects * 3 // 5), "test": subjects}


def learned_part(conflicts: ConflictSet, split: Split) -> ConflictSet:
    """Prompts of train or dev, none of them in the held-out phrasing."""
    return conflicts.select(split=split, templates=LEARNED_PHRASINGS)


def tested_part(conflicts: ConflictSet) -> ConflictSet:
    """What is asked on test: conflicts in every tested phrasing, what could be damaged in fewer."""
    test = conflicts.select(split="test")
    return ConflictSet(test.name, tuple(e for e in test if e.template in TEST_PHRASINGS[e.kind]))


def edit_record(dial: TrustDial) -> dict[str, Any]:
    """The heads and feed-forward layers that a dial moves at its setting, as a study's summary says them."""
    moved = [(gate, gate.at(dial.trust)) for gate in dial.scales if gate.at(dial.trust) != 1]
    return {
        "heads": [[gate.layer, gate.head, scale] for gate, scale in moved if gate.head is not None],
        "feed_forward": [[gate.layer, scale] for gate, scale in moved if gate.head is None],
        "around": "zero",
    }
