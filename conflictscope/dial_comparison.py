"""A trust dial next to other edits on the same prompts, and what of it carries over to other relations and data.

All edits compete as scales of heads: pruned heads (PH3's rankings by path patching, and greedy selection), one scaled
head, gates with hard concrete masks, gates that the same learner learned from other prompts' answers, and the dial's
own scales in random places. On dev each is tried as it is and moved back towards 1 as far as the dial's budgets demand;
learned gates are tried further on their line too. Of each method two choices are measured on test: the best within the
budgets, and the best regardless.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from conflictscope.demo_study import (
    RANDOM_DRAWS,
    RANKED_METHODS,
    RankedMethod,
    candidates,
    condition_record,
    measure_edits,
)
from conflictscope.dialing import Dialing, edit_record, learned_part
from conflictscope.tables import written
from figures.gain import damage_fronts
from figures.theme import save_figure
from interp.answers import DIRECTIONS, Direction
from interp.attribution.examples import with_partners
from interp.attribution.path_patching import PATH_PATCHING_VERSION, path_patching
from interp.attribution.scores import HeadScores
from interp.conflicts import CONTEXT_KINDS, ConflictSet
from interp.corpus import TEXTS_VERSION
from interp.errors import UserError
from interp.evaluation import ANSWERS_VERSION, UsageReport, answer_starts
from interp.files import write_json
from interp.formats import load_dataset
from interp.generation import tracked
from interp.statistics import paired_difference, rate
from interp.teacher_forcing import FORCING_VERSION, continued, greedily_continued
from interventions.base import EDITS_VERSION, applied
from interventions.config import effect_digest
from interventions.dial import DialScale, TrustDial
from interventions.fitting.greedy import GREEDY_VERSION, greedy_heads
from interventions.fitting.scale_data import SCALE_DATA_VERSION, Checked, Place, check_scales, evenly, to_budget
from interventions.fitting.scale_learning import ScaleTraining

Scales = Mapping[Place, float]

_RANKED: tuple[RankedMethod, ...] = tuple(method for method in RANKED_METHODS if method != "mean_ablation")
_RANKED_ON, _GREEDY_ON = 96, 48
_COUNTERFACT_ITEMS = 2000
_GREEDY_COUNTS = (1, 2, 4, 8)
_SHORTLIST = 6
_NOISY: dict[str, Any] = {"learner": "hard_concrete", "steps": 60, "conflicts": 12, "guards": 6}
_FURTHER = (0.5, 1.5, 2.0)


class Tried(NamedTuple):
    """An edit on dev.

    Attributes:
        method: What made it.
        setting: Which of the method's edits it is, and how far on its line from 1.
        scales: Its scales.
        checked: What it does.
    """

    method: str
    setting: str
    scales: Scales
    checked: Checked


class Comparison:
    """Other edits, chosen and measured on a dial's prompts; results are kept in the dial's folder.

    Args:
        dialing: The dial's job.
    """

    def __init__(self, dialing: Dialing) -> None:
        self.dialing = dialing
        self.model = dialing.model
        self.records = dialing.records

    def run(self) -> dict[str, Any]:
        """Try, choose and measure every method; writes ``comparison.json`` and, of dev, ``comparison.html``.

        Returns:
            What ``comparison.json`` holds: for each direction all that was tried on dev, and the choices on test.
        """
        dialing = self.dialing
        result: dict[str, Any] = {
            "model": dialing.name,
            "data": dialing.conflicts.digest,
            "budgets": dialing.settings.budgets,
            "unedited": {"test": dialing.verified([None], "Unedited model")},
        }
        for towards in DIRECTIONS:
            edits = self.edits(towards)
            tried = self._tried(towards, {method: some for method, some in edits.items() if not isinstance(some, str)})
            not_run = {method: {"not_run": why} for method, why in edits.items() if isinstance(why, str)}
            result[f"towards_{towards}"] = {
                "dev": [
                    {"method": t.method, "setting": t.setting, **edit_record(_dial(t.scales)), **asdict(t.checked)}
                    for t in tried
                ],
                "test": {**self._chosen(towards, tried), **not_run},
            }
        figure = damage_fronts(
            [
                {**t, "towards": d, "does": t["setting"], "damage": t["divergence"], "kept": t["right"]["none"]}
                for d in DIRECTIONS
                for t in result[f"towards_{d}"]["dev"]
            ]
        )
        save_figure(figure, dialing.out / "comparison.html")
        write_json(dialing.out / "comparison.json", result)
        return result

    def edits(self, towards: Direction) -> dict[str, dict[str, Scales] | str]:
        """Every edit of every method, by method and by what sets it apart; of a method that can't run, why."""
        settings = self.dialing.settings
        end = _end(self.dialing.dial, towards)
        learners = {
            **{method: partial(self._ranked, towards, method) for method in _RANKED},
            "greedy_pruning": partial(self._pruned_greedily, towards),
            "learned_gates": lambda: {"the dial": _scales(end)},
            "hard_concrete": partial(self._learned, towards, replace(settings, **_NOISY)),
            "other_answers": partial(self._learned, towards, replace(settings, shuffled=True)),
            "random_gates": lambda: {
                f"draw {draw}": _scales(self.dialing.elsewhere(end, f"{towards}/{draw}"))
                for draw in range(RANDOM_DRAWS)
            },
        }
        found: dict[str, dict[str, Scales] | str] = {}
        for method, learn in learners.items():
            try:
                found[method] = learn()
            except UserError as error:
                found[method] = str(error)
        return found

    def _ranked(self, towards: Direction, method: RankedMethod) -> dict[str, Scales]:
        return {
            ", ".join(f"{layer}.{head} x{scale:g}" for layer, head, scale in edit.heads): {
                (layer, head): scale for layer, head, scale in edit.heads
            }
            for edit in candidates(self._head_scores, towards, method)
        }

    def _pruned_greedily(self, towards: Direction) -> dict[str, Scales]:
        greedy = self._greedy(towards)
        counts = sorted({min(count, len(greedy)) for count in _GREEDY_COUNTS})
        return {f"{count} heads": dict.fromkeys(greedy[:count], 0.0) for count in counts}

    @cached_property
    def _head_scores(self) -> dict[str, HeadScores]:
        """Path patching on some of train, drawn evenly from relations and phrasings."""
        train = learned_part(self.dialing.conflicts, "train").select(kind="conflict")
        drawn = evenly(train.examples, _RANKED_ON, self.dialing.seed)
        some = ConflictSet(train.name, tuple(with_partners(drawn)))
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
            version=PATH_PATCHING_VERSION,
        )

    def _greedy(self, towards: Direction) -> list[Place]:
        train = self.dialing.gate_fit.data["train"]
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
            version=(GREEDY_VERSION, SCALE_DATA_VERSION, FORCING_VERSION),
        )
        return [(layer, head) for layer, head, _ in chosen]

    def _learned(self, towards: Direction, settings: ScaleTraining) -> dict[str, Scales]:
        gates = self.dialing.gate_fit.learned(towards, settings)["gates"]
        return {"its gates": {(layer, head): scale for layer, head, scale in gates}}

    def _tried(self, towards: Direction, edits: Mapping[str, Mapping[str, Scales]]) -> list[Tried]:
        """Every edit on dev, as it is and within the budgets."""
        dialing = self.dialing
        dev = dialing.gate_fit.data["dev"]
        wanted = dev.wanted(towards)
        budgets = dialing.settings.budgets
        checked_by = (SCALE_DATA_VERSION, FORCING_VERSION, TEXTS_VERSION)

        def check(scales: Scales, *, back: bool = False) -> dict[str, Any]:
            places, values = list(scales), torch.tensor([*scales.values()])
            if back:
                values, checked = to_budget(self.model, dev, wanted, places, values, budgets)
            else:
                checked = check_scales(self.model, dev, wanted, places, values)
            if not all(np.isfinite([*checked.divergence.values()])):
                raise UserError(
                    "An edit leaves the range of the model's dtype; load the model with --dtype float32 or bfloat16."
                )
            return {"scales": values.tolist(), "checked": asdict(checked)}

        def kept(scales: Scales, *, back: bool = False) -> tuple[Scales, Checked]:
            depends_on = [dialing.gate_fit.basis, [[*place, scale] for place, scale in scales.items()]]
            depends_on += [budgets] if back else []
            found = self.records.json(
                f"dev-{towards}", depends_on, lambda: check(scales, back=back), version=checked_by
            )
            moved = dict(zip(scales, found["scales"], strict=True))
            return {place: scale for place, scale in moved.items() if scale != 1}, Checked(**found["checked"])

        every = [(method, name, scales) for method, some in edits.items() for name, scales in some.items()]
        tried = []
        for method, name, scales in tracked(every, f"On dev, towards {towards}"):
            tried.append(Tried(method, name, *kept(scales)))
            if (spent := tried[-1].checked.spent(budgets)) > 1:
                # Divergence grows about with the square of the way.
                tried.append(Tried(method, f"{name}, moved back", *kept(_along(scales, spent**-0.5), back=True)))
            if method in ("learned_gates", "hard_concrete", "other_answers"):
                tried += [Tried(method, f"{name} at {t:g}", *kept(_along(scales, t))) for t in _FURTHER]
        return tried

    def _chosen(self, towards: Direction, tried: Sequence[Tried]) -> dict[str, dict[str, Any]]:
        """For each method its two choices on test; random gates are measured together, as they are."""
        chosen: dict[str, dict[str, Any]] = {}
        for method in dict.fromkeys(entry.method for entry in tried):
            own = [entry for entry in tried if entry.method == method]
            within = [entry for entry in own if entry.checked.spent(self.dialing.settings.budgets) <= 1]
            choices = {
                "within_budget": [max(within, key=lambda entry: entry.checked.rate)],
                "regardless": [max(own, key=lambda entry: entry.checked.rate)],
            }
            if method == "random_gates":
                choices = {"regardless": [entry for entry in own if entry.setting.startswith("draw")]}
            chosen[method] = {choice: self._measured(towards, some) for choice, some in choices.items()}
        return chosen

    def _measured(self, towards: Direction, edits: Sequence[Tried]) -> dict[str, Any]:
        before, _ = self.dialing.measured(None, "Unedited model")
        dials = [_dial(edit.scales) for edit in edits]
        label = f"{edits[0].method} towards {towards}"
        after = [self.dialing.measured(dial, label)[0] for dial in dials]
        return {
            "setting": "; ".join(edit.setting for edit in edits),
            **edit_record(dials[0]),
            "test": self.dialing.verified(dials, label),
            "loss": losses(before, after),
        }


def losses(before: UsageReport, after: Sequence[UsageReport]) -> dict[str, dict[str, float]]:
    """By how much accuracy fell, prompt by prompt, on each kind but conflicts; with intervals by subject."""
    found = {}
    for kind in (kind for kind in CONTEXT_KINDS if kind != "conflict"):
        clean = before.select(kind=kind).frame
        kept = np.concatenate([report.select(kind=kind).frame["memory_span_match"].to_numpy() for report in after])
        right, subjects = np.tile(clean["memory_span_match"].to_numpy(), len(after)), clean["subject"].to_list()
        # What is lost is what would be won on the way back.
        found[kind] = paired_difference(kept, right, subjects * len(after)).to_record()
    return found


def _end(dial: TrustDial, towards: Direction) -> TrustDial:
    return dial.at(1.0 if towards == "context" else -1.0)


def _dial(scales: Scales) -> TrustDial:
    """Scales as a dial that stands at its end."""
    return TrustDial(tuple(DialScale(*place, scale, scale) for place, scale in scales.items()), 1.0)


def _scales(dial: TrustDial) -> Scales:
    """The scales of a dial where it stands, of what moves there."""
    scales = {(gate.layer, gate.head): gate.at(dial.trust) for gate in dial.scales}
    return {place: scale for place, scale in scales.items() if scale != 1}


def _along(scales: Scales, way: float) -> Scales:
    """Scales on their line from 1; at 1 they are themselves."""
    return {place: 1 + way * (scale - 1) for place, scale in scales.items()}


_LOSSES = {"none": "closed-book loss", "aligned": "aligned loss", "irrelevant": "irrelevant loss"}


def comparison_table(result: Mapping[str, Any]) -> pl.DataFrame:
    """The choices of a comparison on test: a row for each direction, choice and method, after the unedited model.

    Rates are shares, losses fallen shares of right answers, both with 95 % intervals by subject.
    """
    rows = []
    for towards in DIRECTIONS:
        rate = f"{towards}_rate"
        unedited = result["unedited"]["test"]
        rows.append(
            {
                "towards": towards,
                "method": "unedited",
                "chosen": "",
                "gates": "0",
                "rate": written(unedited[rate]),
                **dict.fromkeys(_LOSSES.values(), ""),
                "neutral KL": written(unedited["neutral_kl"], 3),
            }
        )
        for choice in ("within_budget", "regardless"):
            for method, choices in result[f"towards_{towards}"]["test"].items():
                # Random gates are taken as they are drawn: none is chosen within the budgets.
                if choice not in choices:
                    continue
                found = choices[choice]
                rows.append(
                    {
                        "towards": towards,
                        "method": method.replace("_", " "),
                        "chosen": choice.replace("_", " "),
                        "gates": str(len(found["heads"]) + len(found["feed_forward"])),
                        "rate": written(found["test"][rate]),
                        **{label: written(found["loss"][kind]) for kind, label in _LOSSES.items()},
                        "neutral KL": written(found["test"]["neutral_kl"], 3),
                    }
                )
        rows += [
            {
                "towards": towards,
                "method": method.replace("_", " "),
                "chosen": f"not run: {choices['not_run']}",
                "gates": "",
                **dict.fromkeys(("rate", *_LOSSES.values(), "neutral KL"), ""),
            }
            for method, choices in result[f"towards_{towards}"]["test"].items()
            if "not_run" in choices
        ]
    return pl.DataFrame(rows)


def leave_one_out(dialing: Dialing) -> dict[str, Any]:
    """For each relation, a dial learned from the others alone, measured on that relation's test prompts.

    Next to it the dial that learned from all. What was learned is kept in ``OUT/without-RELATION``, the result is
    written to ``leave-one-out.json``. Contexts about something else may be about any relation.

    Raises:
        UserError: If the model knows nothing of a relation on test.
    """
    asked = {
        relation: ConflictSet(relation, tuple(e for e in dialing.tested if e.relation == relation))
        for relation in dialing.relations
    }
    if empty := [relation for relation, part in asked.items() if not len(part)]:
        raise UserError(
            f"{dialing.name} knows no test subject of {empty[0]}, so that it cannot be left out and tested; leave that "
            "relation away or give more --subjects."
        )
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
        result[left_out] = _ends(dialing, asked[left_out], {"without_it": others.dial, "with_it": dialing.dial})
    write_json(dialing.out / "leave-one-out.json", result)
    return result


def _ends(home: Dialing, asked: ConflictSet, dials: Mapping[str, TrustDial]) -> dict[str, Any]:
    """What the unedited model and both ends of some dials do on some prompts."""

    def measured(dial: TrustDial | None, label: str) -> tuple[UsageReport, np.ndarray]:
        edits = [] if dial is None else [dial]
        return measure_edits(home.model, home.records, asked, edits, label=f"{asked.name}: {label}")

    before = measured(None, "unedited")
    found: dict[str, Any] = {"unedited": {"test": condition_record(*before)}}
    for name, dial in dials.items():
        for towards in DIRECTIONS:
            after = measured(_end(dial, towards), f"{name}, towards {towards}")
            found[f"{name}_{towards}"] = {
                "test": condition_record(*after, before[0]),
                "loss": losses(before[0], [after[0]]),
            }
    return found


def transfer_table(result: Mapping[str, Any]) -> pl.DataFrame:
    """What a dial does on a relation that it was not learned from: a row for each relation and direction."""
    rows = []
    for relation, found in result.items():
        for towards in DIRECTIONS:
            rate = f"{towards}_rate"
            transferred = found[f"without_it_{towards}"]
            rows.append(
                {
                    "left out": relation,
                    "towards": towards,
                    "unedited": written(found["unedited"]["test"][rate]),
                    "learned without it": written(transferred["test"][rate]),
                    "learned with it": written(found[f"with_it_{towards}"]["test"][rate]),
                    **{label: written(transferred["loss"][kind]) for kind, label in _LOSSES.items()},
                }
            )
    return pl.DataFrame(rows)


def counterfact(dialing: Dialing, file: Path) -> dict[str, Any]:
    """Both ends of a dial on the CounterFact items of ``file`` that the model knows.

    At most 2,000 items are looked at, drawn at random from those whose subject falls into the test split, so that the
    dial has not seen it. An item is known if the model continues the bare prompt with the true answer, token by token.
    After the context, whether the answer starts like the true or the new one is compared, as in Ortu et al. 2024
    (arXiv 2402.11655). Next to it stand the same scales in random places, and what is still known without the context.

    Args:
        dialing: The dial's job.
        file: ``full_data_sampled_gpt2_with_subjects.json`` of Competition of Mechanisms.

    Returns:
        What ``counterfact.json`` holds.

    Raises:
        UserError: If the file cannot be read, or the model knows none of the items.
    """
    model, seed = dialing.model, dialing.seed
    loaded = load_dataset(file, "counterfact-competition", seed=seed).conflicts.select(split="test")
    bare = [example for example in loaded if example.kind == "none"]
    bare = random.Random(seed).sample(bare, min(_COUNTERFACT_ITEMS, len(bare)))

    def still_known(some: Sequence[Any], dial: TrustDial, label: str) -> list[bool]:
        items = [continued(model, example.prompt, example.memory_answers[0]) for example in some]

        def ask() -> list[bool]:
            with applied(model, dial):
                return greedily_continued(model, items, progress=label)

        key = [[vars(item) for item in items], effect_digest([dial])]
        return dialing.records.json("counterfact-known", key, ask, version=(FORCING_VERSION, EDITS_VERSION))

    right = still_known(bare, dialing.dial.at(0), "CounterFact, bare")
    known = [example for example, is_known in zip(bare, right, strict=True) if is_known]
    names = {example.id.removesuffix("-none") for example in known}
    conflicts = ConflictSet(
        "counterfact", tuple(e for e in loaded if e.kind == "conflict" and e.id.removesuffix("-conflict") in names)
    )
    if not len(conflicts):
        raise UserError(f"{dialing.name} knows none of the {len(bare)} items that were drawn from {file}.")
    dials = {"unedited": dialing.dial.at(0)}
    for towards in DIRECTIONS:
        dials[f"towards_{towards}"] = end = _end(dialing.dial, towards)
        dials[f"random_{towards}"] = dialing.elsewhere(end, f"{towards}/0")
    result: dict[str, Any] = {"items": len(bare), "known": len(known), "relations": dialing.relations}
    for name, dial in dials.items():

        def ask(dial: TrustDial = dial) -> UsageReport:
            with applied(model, dial):
                return answer_starts(model, conflicts, progress="CounterFact, conflicts")

        key = [conflicts.digest, effect_digest([dial])]
        report = dialing.records.usage("counterfact", key, ask, version=(ANSWERS_VERSION, EDITS_VERSION))
        kept = still_known(known, dial, "CounterFact, known")
        result[name] = {
            **{f"{usage}_rate": report.rate(usage).to_record() for usage in ("memory", "context")},
            "closed_book_accuracy": rate(kept, [example.subject for example in known]).to_record(),
        }
    write_json(dialing.out / "counterfact.json", result)
    return result


def counterfact_table(result: Mapping[str, Any]) -> pl.DataFrame:
    """Rates on CounterFact: a row for the unedited model, each end of the dial, and random gates."""
    return pl.DataFrame(
        [
            {
                f"CounterFact, {result['known']} of {result['items']} known": condition.replace("_", " "),
                **{
                    measure.replace("_", " "): written(found[measure])
                    for measure in ("memory_rate", "context_rate", "closed_book_accuracy")
                },
            }
            for condition, found in result.items()
            if isinstance(found, Mapping)
        ]
    )
