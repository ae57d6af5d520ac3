"""A trust dial next to other edits on the same prompts, and what of it carries over to other relations and data.

All edits compete as scales of heads: pruned heads (PH3's rankings by path patching, and greedy selection), one scaled
head, gates that the same learner learned from shuffled answers, gates with hard concrete masks, and the dial's own
scales in random places. Every setting of each is tried on dev: what it gains, what it costs. For the table, each
method's setting is chosen there in two ways, as the best of those within the dial's budgets and as the best
regardless, and measured on test.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from conflictscope.dialing import Dialing, edit_record, learned_part
from conflictscope.study import candidates, condition_record, measure_edits
from interp.attribution.path_patching import path_patching
from interp.attribution.scores import DIRECTIONS, Direction, HeadScores
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import UsageReport, answer_starts
from interp.files import write_json
from interp.formats import load_dataset
from interp.generation import tracked
from interp.plots import damage_fronts, save_figure
from interp.statistics import Estimate
from interp.teacher_forcing import continued, greedily_continued
from interventions.base import applied
from interventions.gate_data import Checked, Place, check_scales, evenly
from interventions.gate_training import GateTraining
from interventions.gates import Gate, TrustDial
from interventions.greedy import greedy_heads

if TYPE_CHECKING:
    pass

Scales = Mapping[Place, float]

SETTINGS = (0.25, 0.5, 0.75, 1.0)
_RANKED_ON, _GREEDY_ON = 96, 48
_COUNTERFACT_ITEMS = 2000
_GREEDY_COUNTS = (1, 2, 4, 8)
_SHORTLIST = 6
_HARD_CONCRETE = {"learner": "hard_concrete", "steps": 60, "conflicts": 12, "guards": 6}


class Comparison:
    """Other edits, chosen and measured on a dial's prompts; results are kept in the dial's folder.

    Args:
        dialing: The dial's job; it is run first if it was not.
    """

    def __init__(self, dialing: Dialing) -> None:
        self.dialing = dialing
        self.model = dialing.model
        self.records = dialing.records

    def run(self) -> dict[str, Any]:
        """Try, choose and measure every method; writes ``comparison.json`` and, of dev, ``comparison.html``.

        Returns:
            What ``comparison.json`` holds: for each direction every setting of every method on dev, and the table.
        """
        dialing = self.dialing
        result: dict[str, Any] = {
            "model": dialing.name,
            "data": dialing.conflicts.digest,
            "budgets": dialing.settings.budgets,
            "unedited": {"test": dialing.verified([None], "Unedited model")},
        }
        for towards in DIRECTIONS:
            tried = self._tried(towards)
            result[f"towards_{towards}"] = {
                "dev": [
                    {"method": method, "setting": label, "edit": edit_record(_dial(scales)), **asdict(checked)}
                    for method, label, scales, checked in tried
                ],
                "test": self._table(towards, tried),
            }
        figure = damage_fronts({towards: result[f"towards_{towards}"]["dev"] for towards in DIRECTIONS})
        save_figure(figure, dialing.out / "comparison.html")
        write_json(dialing.out / "comparison.json", result)
        return result

    def edits(self, towards: Direction) -> dict[str, dict[str, Scales]]:
        """Every setting of every method: its scales, by method and by what sets it apart."""
        found: dict[str, dict[str, Scales]] = {}
        for method in ("pruning", "value_scaling"):
            edits = candidates(self._head_scores, towards, method)
            found[method] = {
                ", ".join(f"{layer}.{head} x{scale:g}" for layer, head, scale in edit.heads): {
                    (layer, head): scale for layer, head, scale in edit.heads
                }
                for edit in edits
            }
        greedy = self._greedy(towards)
        found["greedy_pruning"] = {
            f"{count} heads": dict.fromkeys(greedy[:count], 0.0) for count in _GREEDY_COUNTS if count <= len(greedy)
        }
        dial = self.dialing.dial.at(1.0 if towards == "context" else -1.0)
        found["learned_gates"] = _along(_scales(dial))
        found["hard_concrete"] = _along(self._learned(towards, replace(self.dialing.settings, **_HARD_CONCRETE)))
        found["shuffled_answers"] = _along(self._learned(towards, replace(self.dialing.settings, shuffled=True)))
        found["random_gates"] = _along(_scales(self.dialing.elsewhere(dial, f"{towards}/0")))
        return found

    @cached_property
    def _head_scores(self) -> dict[str, HeadScores]:
        """Path patching on some of train, drawn evenly from relations and phrasings."""
        train = learned_part(self.dialing.conflicts, "train").select(kind="conflict")
        some = ConflictSet(train.name, tuple(evenly(train.examples, _RANKED_ON, self.dialing.seed)))
        return self.records.head_scores(
            "head_scores",
            [some.digest, self.dialing.seed],
            lambda: dict(
                path_patching(
                    self.model,
                    some,
                    name=self.dialing.name,
                    metrics=("logit_diff", "memory_probability", "context_probability"),
                    seed=self.dialing.seed,
                    progress="Path patching, all heads",
                )
            ),
        )

    def _greedy(self, towards: Direction) -> list[Place]:
        train = self.dialing.fit.data["train"]
        wanted = train.wanted(towards)[:_GREEDY_ON]
        settings = [max(_GREEDY_COUNTS), _SHORTLIST]
        chosen = self.records.json(
            f"greedy-{towards}",
            [[vars(item) for item in wanted], settings],
            lambda: [
                [step.layer, step.head, step.gain]
                for step in greedy_heads(
                    self.model,
                    wanted,
                    count=settings[0],
                    shortlist=settings[1],
                    progress=f"Greedy selection towards {towards}",
                )
            ],
        )
        return [(layer, head) for layer, head, _ in chosen]

    def _learned(self, towards: Direction, settings: GateTraining) -> Scales:
        gates = self.dialing.fit.learned(towards, settings)["gates"]
        return {(layer, head): scale for layer, head, scale in gates}

    def _tried(self, towards: Direction) -> list[tuple[str, str, Scales, Checked]]:
        """Every setting on dev."""
        settings = [
            (method, label, scales)
            for method, edits in self.edits(towards).items()
            for label, scales in edits.items()
            if scales
        ]
        dev = self.dialing.fit.data["dev"]
        wanted = dev.wanted(towards)
        found = []
        for method, label, scales in tracked(settings, f"On dev, towards {towards}"):
            places = list(scales)

            def check(scales: Scales = scales, places: Sequence[Place] = places) -> dict[str, Any]:
                values = torch.tensor([scales[place] for place in places])
                return asdict(check_scales(self.model, dev, wanted, places, values))

            depends_on = [[[*place, scale] for place, scale in scales.items()], self.dialing.conflicts.digest]
            found.append((method, label, scales, Checked(**self.records.json(f"dev-{towards}", depends_on, check))))
        return found

    def _table(
        self, towards: Direction, tried: Sequence[tuple[str, str, Scales, Checked]]
    ) -> dict[str, dict[str, Any]]:
        """For each method its two choices on test."""
        table: dict[str, dict[str, Any]] = {}
        for method in dict.fromkeys(name for name, *_ in tried):
            own = [entry for entry in tried if entry[0] == method]
            within = [entry for entry in own if entry[3].spent(self.dialing.settings.budgets) <= 1]
            table[method] = {}
            for choice, among in (("within_budget", within), ("regardless", own)):
                if not among:
                    continue
                _, label, scales, _ = max(among, key=lambda entry: entry[3].rate)
                test = self.dialing.verified([_dial(scales)], f"{method} towards {towards}")
                table[method][choice] = {"setting": label, **edit_record(_dial(scales)), "test": test}
        return table


def _dial(scales: Scales) -> TrustDial:
    """Scales as a dial that stands at its end."""
    return TrustDial(tuple(Gate(*place, scale, scale) for place, scale in scales.items()), 1.0)


def _scales(dial: TrustDial) -> Scales:
    """The scales of a dial where it stands, of what moves there."""
    scales = {(gate.layer, gate.head): gate.scale(dial.trust) for gate in dial.gates}
    return {place: scale for place, scale in scales.items() if scale != 1}


def _along(scales: Scales) -> dict[str, Scales]:
    """Scales on their way from 1."""
    return {f"{t:g}": {place: 1 + t * (scale - 1) for place, scale in scales.items()} for t in SETTINGS}


def comparison_table(result: Mapping[str, Any]) -> pl.DataFrame:
    """The table of a comparison: a row for each direction, choice and method.

    Rates and losses are shares with 95 % intervals; a loss is that of accuracy, in points.
    """
    unedited = result["unedited"]["test"]
    rows = []
    for towards in DIRECTIONS:
        for method, choices in result[f"towards_{towards}"]["test"].items():
            for choice, found in choices.items():
                test = found["test"]
                rows.append(
                    {
                        "towards": towards,
                        "method": method.replace("_", " "),
                        "chosen": choice.replace("_", " "),
                        "gates": len(found["heads"]) + len(found["feed_forward"]),
                        "rate": str(Estimate(**test[f"{towards}_rate"])),
                        "closed-book loss": _points(unedited, test, "closed_book_accuracy"),
                        "aligned loss": _points(unedited, test, "aligned_accuracy"),
                        "neutral KL": str(Estimate(**test["neutral_kl"])),
                    }
                )
    return pl.DataFrame(rows)


def _points(unedited: Mapping[str, Any], test: Mapping[str, Any], measure: str) -> str:
    return f"{100 * (unedited[measure]['value'] - test[measure]['value']):.1f}"


def leave_one_out(dialing: Dialing) -> dict[str, Any]:
    """For each relation, a dial learned from the others alone, measured on that relation's test prompts.

    The dials are kept in ``OUT/without-RELATION``.
    """
    if len(dialing.relations) < 2:
        raise UserError("To leave one relation out there must be two at least; give more of --relation.")
    whole = dialing.tested
    result = {}
    for left_out in dialing.relations:
        others = Dialing(
            dialing.model,
            dialing.name,
            relations=[relation for relation in dialing.relations if relation != left_out],
            out=dialing.out / f"without-{left_out}",
            settings=dialing.settings,
            subjects=dialing.subjects,
        )
        asked = ConflictSet(left_out, tuple(e for e in whole if e.relation == left_out))
        result[left_out] = _ends(others, asked, dialing)
    write_json(dialing.out / "leave-one-out.json", result)
    return result


def _ends(learned: Dialing, asked: ConflictSet, home: Dialing) -> dict[str, Any]:
    """No dial, both ends of a dial, and both ends of the dial that learned from these prompts' relation too."""
    conditions: dict[str, TrustDial | None] = {"unedited": None}
    for name, job in (("transferred", learned), ("own", home)):
        for towards in DIRECTIONS:
            conditions[f"{name}_{towards}"] = job.dial.at(1.0 if towards == "context" else -1.0)
    found = {}
    for name, dial in conditions.items():
        key = [None if dial is None else edit_record(dial)]
        edits = [] if dial is None else [dial]
        found[name] = condition_record(
            *measure_edits(home.model, home.records, asked, edits, key=key, label=f"{asked.name}: {name}")
        )
    return found


def transfer_table(result: Mapping[str, Any]) -> pl.DataFrame:
    """What a dial does on a relation that it was not learned from: a row for each relation and direction."""
    rows = []
    for relation, found in result.items():
        for towards in DIRECTIONS:
            rate = f"{towards}_rate"
            transferred = found[f"transferred_{towards}"]
            rows.append(
                {
                    "left out": relation,
                    "towards": towards,
                    "unedited": str(Estimate(**found["unedited"][rate])),
                    "without it": str(Estimate(**transferred[rate])),
                    "with it": str(Estimate(**found[f"own_{towards}"][rate])),
                    "closed-book loss": _points(found["unedited"], transferred, "closed_book_accuracy"),
                }
            )
    return pl.DataFrame(rows)


def counterfact_table(result: Mapping[str, Any]) -> pl.DataFrame:
    """Rates of memory and context on CounterFact: a row for the unedited model and each end of the dial."""
    return pl.DataFrame(
        [
            {
                "CounterFact": f"{condition.replace('_', ' ')} ({result['known']} of {result['items']} known)",
                **{usage: str(Estimate(**result[condition][f"{usage}_rate"])) for usage in ("memory", "context")},
            }
            for condition in ("unedited", *(f"towards_{towards}" for towards in DIRECTIONS))
        ]
    )


def counterfact(dialing: Dialing, file: Path) -> dict[str, Any]:
    """Both ends of a dial on the CounterFact items of ``file`` that the model knows.

    At most 2,000 items, drawn at random, are looked at. An item is known if the model continues the bare prompt with
    the true answer, token by token. Whether the answer after the context starts like the true or the new one is
    compared, as in Ortu et al. 2024 (arXiv 2402.11655).

    Args:
        dialing: The dial's job.
        file: ``full_data_sampled_gpt2_with_subjects.json`` of Competition of Mechanisms.

    Raises:
        UserError: If the file cannot be read, or the model knows none of the items.
    """
    loaded = load_dataset(file, "counterfact-competition", seed=dialing.seed).conflicts
    model = dialing.model
    bare = [example for example in loaded if example.kind == "none"]
    bare = random.Random(dialing.seed).sample(bare, min(_COUNTERFACT_ITEMS, len(bare)))
    items = [continued(model, example.prompt, example.memory_answers[0]) for example in bare]
    is_known = dialing.records.json(
        "counterfact-known",
        [vars(item) for item in items],
        lambda: greedily_continued(model, items, progress="CounterFact, bare"),
    )
    known = {example.id.removesuffix("-none") for example, right in zip(bare, is_known, strict=True) if right}
    asked = [e for e in loaded if e.kind == "conflict" and e.id.removesuffix("-conflict") in known]
    if not asked:
        raise UserError(f"{dialing.name} knows none of the {len(bare)} items of {file}.")
    conflicts = ConflictSet("counterfact", tuple(asked))
    result: dict[str, Any] = {"items": len(bare), "known": len(asked), "relations": dialing.relations}
    for name, trust in (("unedited", 0.0), ("towards_context", 1.0), ("towards_memory", -1.0)):
        dial = dialing.dial.at(trust)
        with applied(model, dial):
            report: UsageReport = dialing.records.usage(
                "counterfact",
                [conflicts.digest, edit_record(dial)],
                lambda: answer_starts(model, conflicts, progress="CounterFact"),
            )
        result[name] = {f"{usage}_rate": report.rate(usage).to_record() for usage in ("memory", "context")}
    write_json(dialing.out / "counterfact.json", result)
    return result
