"""The third job: control the source of answers by features (SpARE) and by directions (steering), on the same prompts.

1. Keep the facts that the model knows; build prompts in the phrasings in which it knows them.
2. Record the residual stream at the last token of conflict prompts of the train and dev split, and answer them.
3. Fit on train: what features and directions have to do with the source of the answers.
4. For both directions and every method let candidates (layers, strength, ...) compete on dev by the first token of the
   answers. Of those that are as good as the best within one standard error take the one that keeps most facts
   closed-book.
5. Measure the winners on test: held-out subjects, phrasings of which one is unseen; and what they damage.

``fit_spare`` and ``fit_steering`` do this for their methods and add to the same ``results.json``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor

from conflictscope.demo_study import (
    RANDOM_DRAWS,
    TEST_PHRASINGS,
    as_good_as_the_best,
    condition_record,
    measure_edits,
    pooled_record,
    versions,
)
from conflictscope.examples import UNEDITED, condition_of, example_frame, read_examples, write_examples
from conflictscope.probing import conflicts_for_probes
from conflictscope.saes import check_unseen
from conflictscope.study.records import Records
from conflictscope.tables import MEASURES, written
from interp.activation_store import ActivationStore
from interp.activations import record
from interp.anatomy import Anatomy
from interp.answers import DIRECTIONS, Direction
from interp.conflicts import CONTEXT_KINDS, ConflictSet, Split
from interp.errors import UserError
from interp.evaluation import ANSWERS_VERSION, AnswerStarts, UsageReport
from interp.facts import HELD_OUT_PHRASING
from interp.files import read_json, write_json
from interp.generation import ReadPrompts, tracked
from interp.inputs import first_token_id
from interp.models import fingerprint
from interp.sae import SparseAutoencoder
from interventions.base import EDITS_VERSION, applied
from interventions.config import InterventionFile, effect_digest
from interventions.features import AlphaForm, EditedFeatures, FeatureEdit
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from interventions.tokens import Tokens
from probes.detector import SOURCE_CLASSES
from probes.feature_selection import FeatureStatistics, matched_random_features, select_features
from probes.linear import ProbeSet

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SteeringMethod = Literal["actadd", "caa", "probe", "task_vector"]
STEERING_METHODS: tuple[SteeringMethod, ...] = get_args(SteeringMethod)
SPARE_METHODS = ("spare", "remove_only", "add_only", "random_features", "constant")
METHODS = (*STEERING_METHODS, "random_direction", *SPARE_METHODS)

SHARES = (0.1, 0.3, 0.5)
ALPHAS = (1.0, 2.0, 4.0)
STRENGTHS = (1.0, 2.0, 4.0, 8.0)
REPLACED = (0.5, 1.0)

_DEV_SUBJECTS = 40
_GUARDS = ("none", "aligned")
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Edit:
    """Something that is done to the model.

    Attributes:
        interventions: What is applied, in order.
        settings: What tells it from other edits of the same method, as it is reported.
    """

    interventions: tuple[Steering | FeatureEdit, ...]
    settings: Mapping[str, Any]


class Control:
    """Data, fitting and measurement that all methods share; finished steps are kept in ``out/records``.

    Args:
        model: The bridge.
        name: What the model was loaded by.
        relations: Relations to build conflicts from; not used with ``conflicts``.
        out: The folder.
        conflicts: Conflict data of every kind to use instead, with its splits; all of its phrasings are tested.
        test_subjects: How many subjects are tested at most; a random sample of the test split.
        tokens: The tokens that SpARE, ActAdd, probe direction and task vector act on: ``last_prompt`` or ``answer``,
            whose first token is decided by the last of the prompt, as the choice on dev assumes.
        seed: Decides splits, conflicts, the tested subjects and the random control.

    Raises:
        UserError: If ``out`` holds results on other data, or the dev or test split lacks a kind of prompts.
    """

    def __init__(
        self,
        model: TransformerBridge,
        name: str,
        *,
        relations: Sequence[str],
        out: Path,
        conflicts: ConflictSet | None = None,
        test_subjects: int = 64,
        tokens: Literal["last_prompt", "answer"] = "last_prompt",
        seed: int = 0,
    ) -> None:
        self.model = model
        self.name = name
        self.out = out
        self.seed = seed
        self.tokens: Tokens = tokens
        self.anatomy = Anatomy(model)
        self.records = Records(out / "records", model=fingerprint(model))
        self._answers: dict[str, UsageReport] = {}
        self._test_phrasings: Mapping[str, Sequence[str]] | None = None
        if conflicts is None:
            self._test_phrasings = TEST_PHRASINGS
            conflicts = conflicts_for_probes(model, relations, folder=out / "records", seed=seed, kinds=CONTEXT_KINDS)
        self.conflicts = conflicts
        self._chosen_on = self._sampled("dev", _DEV_SUBJECTS)
        self._tested = self._sampled("test", test_subjects)
        self._basis = {
            "model": {"name": name, "fingerprint": fingerprint(model)},
            "data": {"name": conflicts.name, "digest": conflicts.digest, "test_subjects": len(self._tested)},
            "seed": seed,
            "tokens": tokens,
        }
        path = out / "results.json"
        self._results = read_json(path) if path.exists() else {}
        if self._results and self._results.get("basis") != self._basis:
            raise UserError(
                f"{path} holds results of another model, other data or settings; give another --out, or the options "
                "it was made with."
            )
        for split, part in (("dev", self._dev(*CONTEXT_KINDS)), ("test", self._test())):
            if missing := [kind for kind in CONTEXT_KINDS if not len(part.select(kind=kind))]:
                raise UserError(
                    f"The {split} split has no prompts of the kind {missing[0]!r}, to measure gain and damage on; "
                    "give data of every kind and split, or relations that the model knows more of."
                )

    @cached_property
    def store(self) -> ActivationStore:
        """Last-token residual streams of the conflict prompts of train and dev, and what each was answered from."""
        known = [e for e in self.conflicts.select(kind="conflict") if e.split != "test"]
        prompts = ConflictSet(self.conflicts.name, tuple(e for e in known if e.template != HELD_OUT_PHRASING))
        sites = [self.anatomy.site("block", layer) for layer in range(self.anatomy.n_layers)]
        return ActivationStore.record(
            self.out / "recording",
            self.model,
            prompts,
            sites,
            "last",
            name=self.name,
            seed=self.seed,
            answers=True,
            progress="Recording and answering",
        )

    @cached_property
    def answered(self) -> pl.DataFrame:
        """The rows of the recording that were answered from one source, with their number as ``row``."""
        index = self.store.index.with_row_index("row")
        return index.filter(pl.col("usage").is_in(SOURCE_CLASSES))

    def train_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Residual streams ``(n, d_model)`` of the train split after a block, and whether the context was followed."""
        chosen = self.answered.filter(split="train")
        if (sources := chosen["usage"].n_unique()) < 2:
            raise UserError(
                f"The answers to {chosen.height} prompts of the train split follow {sources} of the two sources; both "
                "sources are needed: give more prompts, other relations, or another model."
            )
        states = self.store.read(self.anatomy.site("block", layer), chosen["row"].to_list())
        return states, torch.tensor((chosen["usage"] == "context").to_list())

    def best(self, edits: Sequence[Edit], towards: Direction, label: str) -> Edit:
        """The winner on dev."""
        conflicts, guard = self._dev("conflict"), self._dev(*_GUARDS)
        version = (ANSWERS_VERSION, EDITS_VERSION)
        effects = [effect_digest(edit.interventions) for edit in edits]

        def usages(edit: Edit) -> list[str]:
            with applied(self.model, *edit.interventions):
                return self._dev_starts.report().frame["usage"].to_list()

        answers = [
            self.records.json("dev", [conflicts.digest, effect], lambda edit=edit: usages(edit), version=version)
            for edit, effect in zip(tracked(edits, f"{label} towards {towards}"), effects, strict=True)
        ]
        frame = pl.DataFrame({"subject": [example.subject for example in conflicts]})
        reports = [UsageReport(frame.with_columns(usage=pl.Series(usage))) for usage in answers]
        rates = [usage.count(towards) / len(usage) for usage in answers]
        kept = {
            index: self.records.json(
                "dev_guard",
                [guard.digest, effects[index]],
                lambda edit=edits[index]: self._kept(edit),
                version=version,
            )
            for index in as_good_as_the_best(reports, towards)
        }
        return edits[max(kept, key=lambda index: (kept[index], rates[index]))]

    def measured(self, method: str, edit: Edit | None) -> tuple[UsageReport, np.ndarray]:
        """Answers on test, and the KL at the end of every neutral text."""
        interventions = () if edit is None else edit.interventions
        return measure_edits(
            self.model,
            self.records,
            self._test(),
            interventions,
            label=f"Test: {method}",
            neutral_position="last",
        )

    def unedited(self) -> dict[str, Any]:
        """What the model does without an edit, on test."""
        return condition_record(*self.measured(UNEDITED, None))

    def verify(self, method: str, towards: Direction, edits: Sequence[Edit]) -> dict[str, Any]:
        """Measure a method's edit on test, or several draws of it together, and write the first as a file."""
        measured = [self.measured(f"{method} towards {towards}", edit) for edit in edits]
        unedited, _ = self.measured(UNEDITED, None)
        if len(edits) == 1:
            self._answers[condition_of(method, towards)] = measured[0][0]
        result = {
            "settings": dict(edits[0].settings),
            "draws": len(edits),
            "test": pooled_record(measured, unedited),
        }
        InterventionFile.of(
            edits[0].interventions,
            name=f"{self.name}: {method} towards {towards}",
            towards=towards,
            model=ModelIdentity.of(self.model, self.name),
            provenance={"method": method, "chosen_on": "dev", **self._basis, "versions": versions()},
            measured={"test": result["test"], "unedited": self.unedited()},
        ).save(self.out / "interventions" / f"{method}-towards_{towards}.json")
        return result

    def add_results(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Put results by method into ``out/results.json``, next to those of other methods on the same data."""
        kept = self._results or {"basis": self._basis, "unedited": self.unedited(), "methods": {}}
        self._results = {**kept, "methods": {**kept["methods"], **results}}
        examples = example_frame(self._test(), {UNEDITED: self.measured(UNEDITED, None)[0], **self._answers})
        if (earlier := read_examples(self.out)) is not None:
            others = earlier.filter(~pl.col("condition").is_in(examples["condition"].unique().implode()))
            examples = pl.concat([examples, others])
        write_examples(self.out, examples)
        write_json(self.out / "results.json", self._results)
        return self._results

    def _sampled(self, split: Split, count: int) -> set[str]:
        """At most ``count`` subjects of a split, at random."""
        subjects = self.conflicts.select(split=split).subjects
        return set(random.Random(self.seed).sample(subjects, min(count, len(subjects))))

    def _dev(self, *kinds: str) -> ConflictSet:
        dev = (e for e in self.conflicts.select(split="dev") if e.subject in self._chosen_on)
        chosen = (e for e in dev if e.kind in kinds and e.template != HELD_OUT_PHRASING)
        return ConflictSet(self.conflicts.name, tuple(chosen))

    def _test(self) -> ConflictSet:
        test = self.conflicts.select(split="test")
        by_kind = self._test_phrasings
        chosen = (e for e in test if e.subject in self._tested and (by_kind is None or e.template in by_kind[e.kind]))
        return ConflictSet(self.conflicts.name, tuple(chosen))

    @cached_property
    def _dev_starts(self) -> AnswerStarts:
        return AnswerStarts(self.model, self._dev("conflict"))

    @cached_property
    def _dev_guard(self) -> tuple[ReadPrompts, Tensor]:
        """Closed-book and aligned prompts, and the first token of the right answer to each."""
        guard = self._dev(*_GUARDS)
        right = [first_token_id(self.model, example.prompt, example.memory_answers[0]) for example in guard]
        return ReadPrompts(self.model, [example.prompt for example in guard]), torch.tensor(right)

    def _kept(self, edit: Edit) -> float:
        prompts, right = self._dev_guard
        with applied(self.model, *edit.interventions):
            return (prompts.next_tokens() == right).float().mean().item()


def fit_steering(
    control: Control,
    methods: Sequence[SteeringMethod] = STEERING_METHODS,
    *,
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, Any]:
    """Fit, choose and measure the steering baselines; see ``Control.add_results``.

    With ``actadd`` comes its control: a random direction of the same length in the same place.

    Args:
        control: The data.
        methods: The methods.
        layers: Layers that compete; ``None`` takes every second one, but for the first and last few.
        strengths: Strengths that compete. A task vector replaces half or all of what is there instead.

    Raises:
        UserError: If none of the methods can run; where some can, the results say why the others can't.
    """
    n_layers = control.anatomy.n_layers
    competing = range(n_layers // 6, n_layers - n_layers // 10, 2) if layers is None else layers
    refused: dict[str, UserError] = {}
    for method in methods:
        try:
            candidates = _steering_candidates(control, method, competing, strengths)
        except UserError as error:
            refused[method] = error
            continue
        found: dict[str, dict[str, Any]] = {method: {}}
        for towards in DIRECTIONS:
            best = control.best(candidates[towards], towards, method)
            found[method][f"towards_{towards}"] = control.verify(method, towards, [best])
            if method == "actadd":
                measured = control.verify("random_direction", towards, [_random_direction(best, control.seed)])
                found.setdefault("random_direction", {})[f"towards_{towards}"] = measured
        control.add_results(found)
    if refused.keys() == set(methods):
        raise next(iter(refused.values()))
    return control.add_results({method: {"not_run": str(error)} for method, error in refused.items()})


def _random_direction(edit: Edit, seed: int) -> Edit:
    """The same with vectors of the same length that point anywhere."""
    generator = torch.Generator().manual_seed(seed)
    replaced = []
    for steering in edit.interventions:
        assert isinstance(steering, Steering)
        direction = torch.randn(len(steering.vector), generator=generator)
        replaced.append(replace(steering, vector=direction * steering.vector.norm() / direction.norm()))
    return Edit(tuple(replaced), {**edit.settings, "variant": "random"})


def _steering_candidates(
    control: Control, method: SteeringMethod, layers: Sequence[int], strengths: Sequence[float]
) -> dict[Direction, list[Edit]]:
    """Every layer with every strength."""
    vectors: dict[Direction, dict[int, Tensor]] = {"context": {}, "memory": {}}
    if method == "caa":
        vectors["context"] = _contrastive_vectors(control, layers)
    elif method == "probe":
        vectors["context"] = _probe_vectors(control, layers)
    else:
        for layer in layers:
            states, follows = control.train_states(layer)
            context, memory = states[follows].mean(0), states[~follows].mean(0)
            if method == "task_vector":
                vectors["context"][layer], vectors["memory"][layer] = context, memory
            else:
                vectors["context"][layer] = context - memory
    if method != "task_vector":
        vectors["memory"] = {layer: -vector for layer, vector in vectors["context"].items()}
    replaces = method == "task_vector"
    tokens: Tokens = "answer" if method == "caa" else control.tokens
    return {
        towards: [
            Edit(
                (Steering(layer, vector, strength, tokens, "replace" if replaces else "add"),),
                {"layer": layer, "strength": strength, "tokens": tokens},
            )
            for layer, vector in by_layer.items()
            for strength in (REPLACED if replaces else strengths)
        ]
        for towards, by_layer in vectors.items()
    }


def _contrastive_vectors(control: Control, layers: Iterable[int]) -> dict[int, Tensor]:
    """Mean activation over the tokens of the context's answer less that over memory's, after the same prompts."""
    sites = {layer: control.anatomy.site("block", layer) for layer in layers}
    known = control.conflicts.select(kind="conflict", split="train")
    prompts = ConflictSet(known.name, tuple(e for e in known if e.template != HELD_OUT_PHRASING))
    context, memory = (
        record(control.model, prompts, list(sites.values()), position, progress=f"Recording {position}")
        for position in ("context_answer", "memory_answer")
    )
    return {layer: context[site].mean(0) - memory[site].mean(0) for layer, site in sites.items()}


def _probe_vectors(control: Control, layers: Iterable[int]) -> dict[int, Tensor]:
    """The source probe's direction, as long as the difference of the means."""
    sites = {layer: control.anatomy.site("block", layer) for layer in layers}
    rows = control.store.rows(control.answered["row"].to_list())
    probes = ProbeSet.fit(
        {site: rows[site] for site in sites.values()},
        control.answered["usage"].to_list(),
        validation=(control.answered["split"] == "dev").to_list(),
        classes=SOURCE_CLASSES,
        progress="Source probes",
    )
    vectors = {}
    for layer, site in sites.items():
        states, follows = control.train_states(layer)
        difference = states[follows].mean(0) - states[~follows].mean(0)
        vectors[layer] = probes[site].direction * difference.norm()
    return vectors


def fit_spare(
    control: Control,
    saes: Sequence[SparseAutoencoder],
    *,
    shares: Sequence[float] = SHARES,
    alphas: Sequence[float] = ALPHAS,
    alpha_form: AlphaForm = "targets",
) -> dict[str, Any]:
    """Fit SpARE, choose layers, share and alpha on dev, and measure it and its ablations; see ``Control.add_results``.

    The ablations use what was chosen for SpARE itself:

        remove_only, add_only   one half of the edit
        random_features         as many features that fire as often, twice
        constant                what the edit of each layer does to unedited streams on average, whatever the input

    Args:
        control: The data.
        saes: Autoencoders of the model's layers; all runs of neighbouring ones compete.
        shares: Shares of information to choose among: the published K.
        alphas: To choose among.
        alpha_form: What alpha multiplies.

    Raises:
        UserError: If an autoencoder does not fit the model, or was trained on subjects that are tested here.
    """
    for sae in saes:
        sae.check(control.model, control.name)
    if repeated := [sae.layer for sae in saes if [other.layer for other in saes].count(sae.layer) > 1]:
        raise UserError(f"There are several SAEs of layer {repeated[0]}; give one for each layer.")
    check_unseen(saes, (example.subject for example in control.conflicts if example.split != "train"))
    fitted = [_FittedFeatures.of(control, sae) for sae in saes]
    runs = [fitted[i:j] for i in range(len(fitted)) for j in range(i + 1, len(fitted) + 1)]
    results: dict[str, Any] = {method: {} for method in SPARE_METHODS}
    for towards in DIRECTIONS:

        def edit(run: Sequence[_FittedFeatures], share: float, alpha: float, towards: Direction = towards) -> Edit:
            layers = tuple(features.edited(share, towards) for features in run)
            return Edit(
                (FeatureEdit(layers, alpha, alpha_form, control.tokens),),
                {
                    "layers": [features.sae.layer for features in run],
                    "share": share,
                    "alpha": alpha,
                    "alpha_form": alpha_form,
                    "tokens": control.tokens,
                    "features": [part.sae.d_sae for part in layers],
                    "saes": [features.sae.digest[:12] for features in run],
                },
            )

        candidates = {
            (tuple(features.sae.layer for features in run), share, alpha): edit(run, share, alpha)
            for run, share, alpha in itertools.product(runs, shares, alphas)
        }
        best = control.best(list(candidates.values()), towards, "spare")
        run = [features for features in fitted if features.sae.layer in best.settings["layers"]]
        variants = _ablations(best, run, towards, control.seed)
        for method, edits in {"spare": [best], **variants}.items():
            results[method][f"towards_{towards}"] = control.verify(method, towards, edits)
    return control.add_results(results)


@dataclass(frozen=True, eq=False)
class _FittedFeatures:
    """An autoencoder and what its features have to do with the source, on train."""

    sae: SparseAutoencoder
    states: Tensor
    statistics: FeatureStatistics

    @classmethod
    def of(cls, control: Control, sae: SparseAutoencoder) -> _FittedFeatures:
        states, follows = control.train_states(sae.layer)
        there = sae.to(control.anatomy.device)
        encoded = torch.cat([there.encode(part.to(control.anatomy.device)) for part in states.split(_ROWS_AT_ONCE)])
        statistics = FeatureStatistics.of(encoded, follows)
        return cls(sae, states, replace(statistics, **{k: v.cpu() for k, v in vars(statistics).items()}))

    def edited(self, share: float, towards: Direction) -> EditedFeatures:
        return self.edited_as(*self.sets(share, towards), towards)

    def sets(self, share: float, towards: Direction) -> tuple[list[int], list[int]]:
        """Features to remove and features to add."""
        selected = select_features(self.statistics.information, self.statistics.expectation, share)
        return (selected.memory, selected.context) if towards == "context" else (selected.context, selected.memory)

    def edited_as(self, removed: list[int], added: list[int], towards: Direction) -> EditedFeatures:
        means = (self.statistics.memory_mean, self.statistics.context_mean)
        away, to = means if towards == "context" else reversed(means)
        return EditedFeatures.of(self.sae, removed, away[removed], added, to[added])


def _ablations(best: Edit, run: Sequence[_FittedFeatures], towards: Direction, seed: int) -> dict[str, list[Edit]]:
    (spare,) = best.interventions
    assert isinstance(spare, FeatureEdit)
    share = best.settings["share"]
    sets = {features.sae.layer: features.sets(share, towards) for features in run}

    def variant(name: str, layers: Iterable[EditedFeatures]) -> Edit:
        edited = tuple(layers)
        settings = {**best.settings, "variant": name, "features": [layer.sae.d_sae for layer in edited]}
        return Edit((replace(spare, layers=edited),), settings)

    def random_layer(features: _FittedFeatures, draw: int) -> EditedFeatures:
        removed, added = sets[features.sae.layer]
        drawn = matched_random_features(features.statistics, [*removed, *added], seed + draw)
        return features.edited_as(drawn[: len(removed)], drawn[len(removed) :], towards)

    constant = []
    for features, layer in zip(run, spare.layers, strict=True):
        change = layer.change(features.states, spare.alpha, spare.alpha_form).mean(0)
        constant.append(Steering(features.sae.layer, change, 1.0, spare.tokens))
    return {
        "remove_only": [variant("remove_only", (f.edited_as(sets[f.sae.layer][0], [], towards) for f in run))],
        "add_only": [variant("add_only", (f.edited_as([], sets[f.sae.layer][1], towards) for f in run))],
        "random_features": [
            variant(f"random {draw}", (random_layer(features, draw) for features in run))
            for draw in range(RANDOM_DRAWS)
        ],
        "constant": [Edit(tuple(constant), {**best.settings, "variant": "constant"})],
    }


def results_table(results: Mapping[str, Any]) -> pl.DataFrame:
    """Results as a table of text: a row for each method and direction; one that can't run says why."""

    def cells(test: Mapping[str, Any]) -> dict[str, str]:
        return {name: written(test[name]) for name in MEASURES}

    rows = [{"method": "unedited", "towards": "", **cells(results["unedited"])}]
    for towards in DIRECTIONS:
        for method in METHODS:
            found = results["methods"].get(method, {})
            if f"towards_{towards}" in found:
                test = found[f"towards_{towards}"]["test"]
                rows.append({"method": method, "towards": towards, **cells(test)})
    for method, found in results["methods"].items():
        if "not_run" in found:
            reason = f"not run: {found['not_run']}"
            rows.append({"method": method, "towards": reason, **dict.fromkeys(MEASURES, "")})
    return pl.DataFrame(rows)
