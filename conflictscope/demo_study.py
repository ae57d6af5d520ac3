"""The main job, from a model to verified interventions: measure, locate, intervene, verify.

1. Ask the model closed-book and keep the facts it knows; build conflict prompts from them, split by subject.
2. Measure on test what it uses, unedited.
3. Score every head by path patching on the train split's conflict prompts, and learn the scales of all heads together.
4. For both directions and every method, let candidates compete on dev. Of those that are as good as the best within
   one standard error (Breiman et al. 1984) take the one that keeps most facts closed-book.
5. Measure the winners, and random heads edited alike, on test: held-out subjects, all phrasing families, one of
   which no earlier step has seen; and what they damage.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from rich.console import Console
from torch import Tensor

from conflictscope import __version__
from conflictscope.examples import UNEDITED, condition_of, example_frame, write_examples
from conflictscope.gate_fit import GateFit, LearnedFrom
from conflictscope.report.words import words
from conflictscope.study.records import Records
from interp.anatomy import Anatomy
from interp.answers import DIRECTIONS, OPPOSITE, USAGES, Direction
from interp.attribution.path_patching import PATH_PATCHING_VERSION, path_patching
from interp.attribution.scores import HeadScores, RankedHead, top_heads
from interp.attribution.states import STATES_VERSION, last_token_states
from interp.conflicts import CONTEXT_KINDS, ConflictSet, Split
from interp.errors import UserError
from interp.evaluation import (
    ANSWERS_VERSION,
    NEUTRAL_KL_VERSION,
    Damage,
    UsageReport,
    answer_starts,
    measure_usage,
    neutral_kl,
    neutral_texts,
)
from interp.facts import (
    HELD_OUT_PHRASING,
    SEEN_PHRASINGS,
    STUDY_PHRASINGS,
    Fact,
    build_conflicts,
    closed_book_prompt,
    known_facts,
    relation_named,
    usable_facts,
)
from interp.files import write_json
from interp.known import KNOWN_VERSION
from interp.models import fingerprint, load_model
from interp.statistics import Estimate, bootstrap_means
from interventions.base import EDITS_VERSION, Intervention, applied
from interventions.config import InterventionFile, effect_digest
from interventions.fitting.scale_learning import ScaleTraining
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RankedMethod = Literal["value_scaling", "mean_ablation", "pruning"]
Method = Literal["value_scaling", "mean_ablation", "pruning", "learned_gates"]
RANKED_METHODS: tuple[RankedMethod, ...] = get_args(RankedMethod)
METHODS: tuple[Method, ...] = get_args(Method)

# Where an edit could do damage is asked in fewer words than where it should do good: answers cost most of the time.
TEST_PHRASINGS: Mapping[str, Sequence[str]] = {
    "conflict": STUDY_PHRASINGS,
    "aligned": (HELD_OUT_PHRASING,),
    "irrelevant": (HELD_OUT_PHRASING,),
    "none": ("question", HELD_OUT_PHRASING),
}
RANDOM_DRAWS = 2


_SCALES = ((0.0, 2.0), (-1.0, 4.0))
_PRUNED_HEADS = (1, 2, 4, 8)
_ABLATED_HEADS = (4, 8)
_STRENGTHENED = 1.5
_QUICK_FACTS = 40
_GATES = ScaleTraining()


@dataclass(frozen=True)
class Candidate:
    """An edit that competes on dev.

    Attributes:
        heads: The ``(layer, head, scale)`` that make it up.
        around_mean: Whether heads are scaled around their mean output instead of zero. The mean is that of the last
            position of closed-book prompts; it is applied at every position.
    """

    heads: tuple[tuple[int, int, float], ...]
    around_mean: bool = False

    def scaling(self, means: Tensor) -> HeadScaling:
        """The intervention; ``means`` are the heads' mean outputs, ``(n_layers, n_heads, d_head)``."""
        return HeadScaling(
            tuple(
                ScaledHead(layer, head, scale, tuple(means[layer, head].tolist()) if self.around_mean else None)
                for layer, head, scale in self.heads
            )
        )

    def to_record(self) -> dict[str, Any]:
        """What the summary says about it."""
        return {"heads": [list(head) for head in self.heads], "around": "mean" if self.around_mean else "zero"}


def candidates(scores: Mapping[str, HeadScores], towards: Direction, method: RankedMethod) -> list[Candidate]:
    """The candidates of one method that ranks heads.

    ``pruning`` removes the k heads that push hardest to the other source (PH3). They are ranked in two ways: by the
    logit difference, and by how much the wanted answer's probability gains without them. ``mean_ablation`` holds
    the latter at their mean output instead, alone or with the strongest supporter strengthened by half.
    ``value_scaling`` scales one head (Yu et al. 2023): the strongest opponent down and below zero, or the strongest
    supporter up.
    """
    opposite = OPPOSITE[towards]
    opponents = scores["logit_diff"].ranked(opposite)
    obstacles = scores[f"{towards}_probability"].ranked(opposite)

    def removed(ranking: list[RankedHead], k: int) -> tuple[tuple[int, int, float], ...]:
        return tuple((*head, 0.0) for head in sorted(top_heads(ranking, k)))

    opponent, supporter = top_heads(opponents, 1)[0], top_heads(scores["logit_diff"].ranked(towards), 1)[0]
    if method == "value_scaling":
        edits = [((*head, scale),) for down, up in _SCALES for head, scale in ((opponent, down), (supporter, up))]
    elif method == "mean_ablation":
        alone = [removed(obstacles, k) for k in _ABLATED_HEADS]
        stronger = (*supporter, _STRENGTHENED)
        edits = [*alone, *((*edit, stronger) for edit in alone if supporter not in {head[:2] for head in edit})]
    else:
        edits = [removed(ranking, k) for k in _PRUNED_HEADS for ranking in (opponents, obstacles)]
    return [Candidate(edit, around_mean=method == "mean_ablation") for edit in dict.fromkeys(edits)]


def as_good_as_the_best(reports: Sequence[UsageReport], towards: Direction) -> list[int]:
    """Indices of the reports whose rate of ``towards`` is within one standard error of the best one's.

    All reports are about the same prompts; the standard error is that of the paired difference, by subject.
    """
    hits = np.array([(report.frame["usage"] == towards).to_numpy() for report in reports], dtype=float)
    behind_best = (hits[hits.mean(1).argmax()] - hits).T
    standard_error = bootstrap_means(behind_best, reports[0].frame["subject"].to_list()).std(0)
    return np.flatnonzero(behind_best.mean(0) <= standard_error).tolist()


class Study:
    """One study of one model: every step is computed once and kept in ``out/records``.

    Args:
        model: The bridge.
        name: What the model was loaded by.
        relations: Relations to build conflicts from.
        out: The run's folder.
        seed: Decides splits, conflicts, corrupted prompts and the random control.
        quick: Use few facts: a check that everything runs, not a measurement.
        console: Where progress is told.
    """

    def __init__(
        self,
        model: TransformerBridge,
        name: str,
        *,
        relations: Sequence[str],
        out: Path,
        seed: int = 0,
        quick: bool = False,
        console: Console | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.relations = [relation_named(relation).name for relation in relations]
        self.out = out
        self.seed = seed
        self.quick = quick
        self.console = console or Console(stderr=True)
        self.fingerprint = fingerprint(model)
        self.records = Records(out / "records", model=self.fingerprint)
        self.conflicts = self._build_conflicts()

    def run(self) -> dict[str, Any]:
        """Do the whole study and write its files.

        Returns:
            The summary, as it is written to ``summary.json``.
        """
        scores = self.head_scores()
        unedited, _ = before = self._measured("Unedited model", None)
        baseline = condition_record(*before)
        competing, not_run = self._competing()
        chosen: dict[Direction, dict[Method, Candidate]] = {
            d: {method: self._chosen(scores, d, method) for method in competing} for d in DIRECTIONS
        }
        winners: dict[Direction, Method] = {
            towards: competing[self._best(list(by_method.values()), towards)] for towards, by_method in chosen.items()
        }
        methods = {
            method: {
                f"towards_{towards}": self._verified(f"{method} towards {towards}", chosen[towards][method], unedited)
                for towards in DIRECTIONS
            }
            for method in competing
        }
        summary = {
            "model": model_record(self.model, self.name),
            "data": {
                "relations": self.relations,
                "counts": self.conflicts.counts(),
                "splits": self.conflicts.counts()["subjects_by_split"],
                "phrasings": {"seen": list(SEEN_PHRASINGS), "held_out": HELD_OUT_PHRASING},
                "digest": self.conflicts.digest,
            },
            "settings": {
                "seed": self.seed,
                "quick": self.quick,
                **run_record(self.model),
            },
            "baseline": {"test": baseline},
            **{
                f"towards_{towards}": {"method": winners[towards], **methods[winners[towards]][f"towards_{towards}"]}
                for towards in DIRECTIONS
            },
            "random_heads": self._random_control({d: chosen[d][winners[d]] for d in DIRECTIONS}, unedited),
            "methods": {**methods, **{method: {"not_run": reason} for method, reason in not_run.items()}},
        }
        shown: dict[str, Candidate | None] = {
            UNEDITED: None,
            **{condition_of(method, d): chosen[d][method] for d in DIRECTIONS for method in competing},
        }
        examples = example_frame(self._tested, {name: self._measured(name, edit)[0] for name, edit in shown.items()})
        self._write(summary, scores["logit_diff"], chosen, examples)
        return summary

    def head_scores(self) -> dict[str, HeadScores]:
        """Path patching on the train split's conflict prompts in the seen phrasings, by metric."""
        train = self._selected("train", ["conflict"], SEEN_PHRASINGS)
        return self.records.head_scores(
            "head_scores",
            [train.digest, self.seed],
            lambda: dict(
                path_patching(
                    self.model,
                    train,
                    name=self.name,
                    metrics=("logit_diff", "memory_probability", "context_probability"),
                    seed=self.seed,
                    progress="Path patching, all heads",
                )
            ),
            version=PATH_PATCHING_VERSION,
        )

    def _build_conflicts(self) -> ConflictSet:
        facts: dict[str, list[Fact]] = {}
        for relation in self.relations:
            asked = usable_facts(relation)
            if self.quick:
                asked = random.Random(self.seed).sample(asked, min(_QUICK_FACTS, len(asked)))
            prompts = [
                closed_book_prompt(relation_named(relation), f.subject, p) for f in asked for p in SEEN_PHRASINGS
            ]
            known = self.records.json(
                f"known-{relation}",
                [prompts, [fact.answers for fact in asked]],
                lambda relation=relation, asked=asked: [
                    fact.subject
                    for fact in known_facts(self.model, relation, among=asked, progress=f"Closed-book: {relation}")
                ],
                version=(KNOWN_VERSION, ANSWERS_VERSION),
            )
            facts[relation] = [fact for fact in asked if fact.subject in known]
            self.console.print(f"{self.name} knows {len(known)} of {len(asked)} facts of {relation} closed-book.")
        conflicts = build_conflicts(facts, seed=self.seed)
        for split in ("train", "dev", "test"):
            if not len(conflicts.select(split=split)):
                raise UserError(
                    f"{self.name} knows too few facts of {', '.join(self.relations)} for a {split} split; "
                    "choose another relation, another seed or a model that knows more."
                )
        return conflicts

    def _selected(self, split: Split, kinds: Sequence[str], templates: Sequence[str]) -> ConflictSet:
        part = self.conflicts.select(split=split, templates=templates)
        return ConflictSet(self.conflicts.name, tuple(e for e in part if e.kind in kinds))

    @cached_property
    def mean_outputs(self) -> Tensor:
        """Each head's mean z at the end of the train split's closed-book prompts, ``(n_layers, n_heads, d_head)``."""
        prompts = [example.prompt for example in self._selected("train", ["none"], SEEN_PHRASINGS)]

        def compute() -> list[Any]:
            return last_token_states(self.model, prompts).z.mean(0).float().cpu().tolist()

        # Kept, since what they decide is kept under their digits, which may differ from run to run.
        return torch.tensor(self.records.json("mean_outputs", prompts, compute, version=STATES_VERSION))

    def _chosen(self, scores: Mapping[str, HeadScores], towards: Direction, method: Method) -> Candidate:
        """The method's winner on dev."""
        if method == "learned_gates":
            return self._learned_gates(towards)
        competitors = candidates(scores, towards, method)
        return competitors[self._best(competitors, towards)]

    def _competing(self) -> tuple[list[Method], dict[Method, str]]:
        """The methods that this model allows, and why not the others: gates need gradients, and text to guard them."""
        try:
            for towards in DIRECTIONS:
                self._learned_gates(towards)
        except UserError as error:
            return [method for method in METHODS if method != "learned_gates"], {"learned_gates": str(error)}
        return list(METHODS), {}

    def _learned_gates(self, towards: Direction) -> Candidate:
        """The scales of all heads, learned together."""
        settings = replace(_GATES, seed=self.seed)
        if self.quick:
            settings = replace(settings, steps=3, conflicts=8, guards=4)
        gates = self._gate_fit.learned(towards, settings)["gates"]
        return Candidate(tuple((layer, head, scale) for layer, head, scale in gates))

    @cached_property
    def _gate_fit(self) -> GateFit:
        def part(split: LearnedFrom) -> ConflictSet:
            return self._selected(split, CONTEXT_KINDS, SEEN_PHRASINGS)

        return GateFit(self.model, {"train": part("train"), "dev": part("dev")}, self.records, seed=self.seed)

    def _best(self, competitors: Sequence[Candidate], towards: Direction) -> int:
        """Index of the winner on dev."""
        conflict = self._selected("dev", ["conflict"], SEEN_PHRASINGS)
        closed_book = self._selected("dev", ["none"], SEEN_PHRASINGS[1:2])
        label = f"Candidates towards {towards}"
        reports = [self._edited_report("dev", label, conflict, c, answer_starts) for c in competitors]
        finalists = as_good_as_the_best(reports, towards)

        def kept(index: int) -> float:
            report = self._edited_report("dev_guard", label, closed_book, competitors[index], measure_usage)
            return report.accuracy().value

        return max(finalists, key=kept)

    def _edits(self, candidate: Candidate | None) -> list[HeadScaling]:
        return [] if candidate is None else [candidate.scaling(self.mean_outputs)]

    def _edited_report(
        self, step: str, label: str, conflicts: ConflictSet, candidate: Candidate | None, measure: Any
    ) -> UsageReport:
        edits = self._edits(candidate)

        def compute() -> UsageReport:
            with applied(self.model, *edits):
                return measure(self.model, conflicts, progress=label)

        key = [conflicts.digest, effect_digest(edits)]
        return self.records.usage(step, key, compute, version=(ANSWERS_VERSION, EDITS_VERSION))

    @cached_property
    def _tested(self) -> ConflictSet:
        """What is asked on test."""
        return ConflictSet(
            self.conflicts.name,
            (
                *self._selected("test", ["conflict"], TEST_PHRASINGS["conflict"]),
                *self._selected("test", ["aligned", "irrelevant"], TEST_PHRASINGS["aligned"]),
                *self._selected("test", ["none"], TEST_PHRASINGS["none"]),
            ),
        )

    def _measured(self, label: str, candidate: Candidate | None) -> tuple[UsageReport, np.ndarray]:
        """Answers on test, and the KL of every neutral text."""
        return measure_edits(self.model, self.records, self._tested, self._edits(candidate), label=label)

    def _verified(self, label: str, candidate: Candidate, unedited: UsageReport) -> dict[str, Any]:
        return {
            **candidate.to_record(),
            "chosen_on": "dev",
            "test": condition_record(*self._measured(label, candidate), unedited),
        }

    def _random_control(self, winners: Mapping[Direction, Candidate], unedited: UsageReport) -> dict[str, Any]:
        """For each winner as many random heads, edited alike and drawn several times; none of a winner's, if possible.

        Returns:
            For each direction its draws, measured together.
        """
        anatomy = Anatomy(self.model)
        taken = {head[:2] for winner in winners.values() for head in winner.heads}
        places = [(layer, head) for layer in range(anatomy.n_layers) for head in range(anatomy.n_heads)]
        free = [place for place in places if place not in taken]
        controls = {}
        for towards, winner in winners.items():
            rng = random.Random(f"{self.seed}/{towards}")
            draws = []
            for _ in range(RANDOM_DRAWS):
                # Where too many heads are edited, some of the others are among them.
                enough = len(winner.heads) <= len(free)
                drawn = zip(rng.sample(free if enough else places, len(winner.heads)), winner.heads, strict=True)
                draws.append(Candidate(tuple((*place, scale) for place, (*_, scale) in drawn), winner.around_mean))
            label = f"Random heads, towards {towards}, draw"
            measured = [self._measured(f"{label} {i}", draw) for i, draw in enumerate(draws, 1)]
            controls[f"towards_{towards}"] = {
                "draws": [draw.to_record() for draw in draws],
                "chosen_on": "random",
                "test": pooled_record(measured, unedited),
            }
        return controls

    def _write(
        self,
        summary: dict[str, Any],
        scores: HeadScores,
        chosen: Mapping[Direction, Mapping[Method, Candidate]],
        examples: pl.DataFrame,
    ) -> None:
        # The summary is taken away first and comes last: where there is one, it belongs to the files beside it.
        (self.out / "summary.json").unlink(missing_ok=True)
        for towards, by_method in chosen.items():
            for method, candidate in by_method.items():
                test = summary["methods"][method][f"towards_{towards}"]["test"]
                file = InterventionFile.of(
                    [candidate.scaling(self.mean_outputs)],
                    name=f"{self.name}: {method.replace('_', ' ')} towards {towards}",
                    towards=towards,
                    model=ModelIdentity.of(self.model, self.name),
                    provenance={
                        "method": method,
                        "chosen_on": "dev",
                        "data": summary["data"]["digest"],
                        "relations": self.relations,
                        **summary["settings"],
                    },
                    measured={"test": test, "unedited": summary["baseline"]["test"]},
                )
                file.save(self.out / "interventions" / f"{method}-towards_{towards}.json")
                if method == summary[f"towards_{towards}"]["method"]:
                    file.save(self.out / "interventions" / f"towards_{towards}.json")
        scores.save(self.out / "heads.parquet")
        self.conflicts.save(self.out / "conflicts.jsonl")
        write_examples(self.out, examples)
        write_json(self.out / "summary.json", summary)


def measure_edits(
    model: TransformerBridge,
    records: Records,
    asked: ConflictSet,
    edits: Sequence[Intervention],
    *,
    label: str,
    neutral_position: Literal["all", "last"] = "all",
) -> tuple[UsageReport, np.ndarray]:
    """What an edited model answers, and the KL of every neutral text; both are kept, for whatever does the same.

    Args:
        model: The bridge, unedited.
        records: Where they are kept.
        asked: What is asked.
        edits: What is applied; nothing measures the unedited model.
        label: What progress bars say.
        neutral_position: The positions of neutral text that count; see ``neutral_kl``.
    """

    def answers() -> UsageReport:
        with applied(model, *edits):
            return measure_usage(model, asked, progress=label)

    def divergences() -> list[float]:
        progress = f"{label}: neutral text"
        return neutral_kl(model, lambda: applied(model, *edits), position=neutral_position, progress=progress).tolist()

    effect = effect_digest(edits)
    kl = records.json(
        "neutral_kl",
        [effect, neutral_texts(), neutral_position],
        divergences,
        version=(NEUTRAL_KL_VERSION, EDITS_VERSION),
    )
    report = records.usage("test", [effect, asked.digest], answers, version=(ANSWERS_VERSION, EDITS_VERSION))
    return report, np.array(kl)


def model_record(model: TransformerBridge, name: str) -> dict[str, Any]:
    """What a summary says about the model."""
    anatomy = Anatomy(model)
    shape = {key: getattr(anatomy, key) for key in ("architecture", "n_layers", "n_heads", "d_head", "d_model")}
    return {"name": name, **shape, "fingerprint": fingerprint(model)}


def run_record(model: TransformerBridge) -> dict[str, Any]:
    """What a summary says about where and with what it was made."""
    anatomy = Anatomy(model)
    dtype = str(anatomy.dtype).removeprefix("torch.")
    return {"device": str(anatomy.device), "dtype": dtype, "versions": versions()}


def condition_record(
    report: UsageReport, divergences: np.ndarray, unedited: UsageReport | None = None
) -> dict[str, Any]:
    """What the summary says about one measured condition.

    Args:
        report: Answers to the test prompts, maybe of several draws one after the other.
        divergences: Of the neutral texts.
        unedited: The unedited model's answers, to compare with prompt by prompt: ``change`` holds for each rate and
            accuracy how it changed. ``None`` for the unedited model itself.
    """
    conflict = report.select(kind="conflict")

    def rates(part: UsageReport) -> dict[str, dict[str, Any]]:
        return {f"{usage}_rate": part.rate(usage).to_record() for usage in USAGES}

    record = {
        **rates(conflict),
        "memorisation_ratio": conflict.memorisation_ratio().to_record(),
        **Damage.of(report, divergences).to_record(),
        "by_template": {
            template: rates(conflict.select(template=template))
            for template in conflict.frame["template"].unique(maintain_order=True)
        },
    }
    if unedited is None:
        return record
    return {**record, "change": {name: change.to_record() for name, change in report.changes(unedited).items()}}


def pooled_record(
    measured: Sequence[tuple[UsageReport, np.ndarray]], unedited: UsageReport | None = None
) -> dict[str, Any]:
    """The same for several draws together."""
    report = UsageReport(pl.concat([report.frame for report, _ in measured]))
    return condition_record(report, np.mean([kl for _, kl in measured], axis=0), unedited)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("torch", "transformers", "transformer-lens")
    return {"conflictscope": __version__, **{package: importlib.metadata.version(package) for package in packages}}


def run_study(
    model: str, *, relations: Sequence[str], out: Path, seed: int, quick: bool, device: str, dtype: str
) -> dict[str, Any]:
    """Load ``model`` and study it; see ``Study``.

    Raises:
        UserError: If an input cannot be used.
    """
    for relation in relations:
        relation_named(relation)
    bridge = load_model(model, device=device, dtype=dtype)
    return Study(bridge, model, relations=relations, out=out, seed=seed, quick=quick).run()


def headline(summary: Mapping[str, Any]) -> Iterator[str]:
    """The result in a few lines, for the terminal."""
    conditions = {"unedited": summary["baseline"]}
    for towards in (f"towards_{d}" for d in DIRECTIONS):
        conditions[words(towards)] = summary[towards]
        conditions[f"random, {words(towards)}"] = summary["random_heads"][towards]
    width = max(map(len, conditions)) + 1
    for name, condition in conditions.items():
        test = condition["test"]
        edits = [edit for edit in condition.get("draws", [condition]) if "heads" in edit]
        sizes = [len(edit["heads"]) + len(edit.get("feed_forward", ())) for edit in edits]
        gated = any(edit.get("feed_forward") for edit in edits)
        edited = f"{'+'.join(map(str, sizes))} {'gates' if gated else 'heads'}" if sizes else ""
        measures = ("memory_rate", "context_rate", "closed_book_accuracy", "aligned_accuracy", "neutral_kl")
        values = "  ".join(f"{measure} {Estimate.from_record(test[measure])}" for measure in measures)
        yield f"{name:<{width}} {edited:<9} {values}"
    for method, found in summary.get("methods", {}).items():
        if "not_run" in found:
            yield f"{words(method):<{width}} {'not run':<9} {found['not_run']}"
