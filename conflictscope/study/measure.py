"""Measure a condition once: its answers to test's prompts, what it does to ordinary text, and what it costs.

Gain and damage are paired with the unedited model, prompt by prompt, with intervals by subject. The cost is the number
of tokens per second relative to the unedited model on the same prompts, timed in turns.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, get_args

import numpy as np
import polars as pl
from torch import Tensor, nn

from conflictscope.study.condition import AS_IS, Condition
from interp.abilities import ABILITIES_VERSION, Ability, ability_items, first_tokens
from interp.anatomy import transformers_model
from interp.answers import USAGES
from interp.conflicts import ConflictSet
from interp.evaluation import ANSWERS_VERSION, GUARDS, UsageReport, divergence, measure_usage, neutral_texts
from interp.generation import MAX_NEW_TOKENS, continue_greedily, gathered_logits
from interp.reading import ALL_LAYERS_AT_END, READING_VERSION, ReadPrompts
from interp.statistics import bootstrap_mean, paired_difference, rate
from interventions.base import EDITS_VERSION, applied, changed_by

if TYPE_CHECKING:
    from interp.records import Records

COST_VERSION = 5
"""Version of how the cost is measured."""

AGREE = 1.1
"""By how much rounds that were timed differ at most for their speed to be clear: the largest over the smallest."""

ABILITIES = ability_items()
"""What edits should leave alone, as it is asked in studies."""
# Some are asked with several wrong words.
_ASKED = [item.prompt for item in ABILITIES]
_TIMED, _ROUNDS, _TOKENS = 4, 3, 4
_FEW_TEXTS = 8


@dataclass(frozen=True)
class Result:
    """What one condition, or several draws of a control, did.

    Attributes:
        report: The answers to test's prompts.
        divergences: Of each neutral text, nats; ``None`` where the condition does not say what happens to text.
        cost: ``speed``, relative to the unedited model, and the lowest and highest of the rounds; ``None`` unmeasured.
        closed_book: Whether the condition does anything to prompts without a context.
        able: Whether the right word is the more probable one, for each item of ``interp.abilities``; ``None`` where
            these are not asked, or the condition does not say what happens to text.
    """

    report: UsageReport
    divergences: np.ndarray | None
    cost: Mapping[str, float] | None
    closed_book: bool
    able: np.ndarray | None = None


class Bench(Protocol):
    """What conditions are measured on, for example a ``Lab``: a model, what is asked, and where results are kept."""

    model: nn.Module
    records: Records
    seed: int
    reading: Reading

    @property
    def asked(self) -> ConflictSet:
        """Test's prompts."""
        ...

    @property
    def abilities(self) -> bool:
        """Whether what edits should leave alone is asked too."""
        ...


class Reading:
    """Prompts and ordinary text that an unedited model read once, for all conditions.

    Args:
        model: The model, or a bridge around it, unedited.
        asked: Test's prompts.
        few: Whether few texts are read and nothing is timed: a check that all runs, not a measurement.
        new_tokens: Longest answer, in tokens.
    """

    def __init__(
        self, model: nn.Module, asked: ConflictSet, *, few: bool = False, new_tokens: int = MAX_NEW_TOKENS
    ) -> None:
        self.model = model
        self.asked = asked
        self.few = few
        self.new_tokens = new_tokens
        self.ordinary = neutral_texts()[: _FEW_TEXTS if few else None]

    @cached_property
    def prompts(self) -> ReadPrompts:
        """Test's prompts."""
        prompts = [example.prompt for example in self.asked]
        return ReadPrompts(self.model, prompts, new_tokens=self.new_tokens, progress="Reading test's prompts")

    @cached_property
    def pairs(self) -> ReadPrompts:
        """Test's prompts, with their contexts and without them."""
        prompts = [example.prompt for example in self.asked]
        bare = [example.bare_prompt or example.prompt for example in self.asked]
        label = "Reading test's prompts without contexts too"
        return ReadPrompts(self.model, prompts, without=bare, new_tokens=self.new_tokens, progress=label)

    @cached_property
    def texts(self) -> ReadPrompts:
        """Ordinary text."""
        return ReadPrompts(self.model, self.ordinary, ends=True)

    @cached_property
    def unedited(self) -> Tensor:
        """Logits at the ends of ordinary text, ``(n_texts, d_vocab)``."""
        return gathered_logits(self.texts.next_logits(), len(self.ordinary))

    @cached_property
    def abilities(self) -> tuple[ReadPrompts, Tensor]:
        """The items of ``interp.abilities``, and the first tokens of what may follow: right and wrong, ``(n, 2)``."""
        read = ReadPrompts(self.model, [item.prompt for item in ABILITIES], progress="Reading abilities")
        return read, first_tokens(self.model, ABILITIES)


def measure(lab: Bench, condition: Condition) -> Result:
    """Measure a condition on test; what does the same is measured once and kept in ``lab.records``."""
    asked, digest, model = lab.asked, condition.digest, lab.model
    changed = changed_by(condition.edits)

    def answers() -> UsageReport:
        read = (lab.reading.prompts, changed) if condition.changes_text and changed != "whole" else None
        if not condition.edits and not condition.changes_text:
            if condition.decoding is None:
                prompts = [example.prompt for example in condition.asked(asked)]
                read = ReadPrompts(model, prompts, new_tokens=lab.reading.new_tokens, edited=False), ALL_LAYERS_AT_END
            elif condition.prompting == AS_IS:
                read = lab.reading.pairs, ALL_LAYERS_AT_END
        with applied(model, *condition.edits):
            label = f"On test: {condition.name}"
            return measure_usage(
                model,
                condition.asked(asked),
                combined=condition.combined,
                read=read,
                max_new_tokens=lab.reading.new_tokens,
                progress=label,
            )

    def divergences() -> list[float]:
        unedited = lab.reading.unedited
        with applied(model, *condition.edits):
            edited = gathered_logits(lab.reading.texts.next_logits(changed), len(unedited))
        return divergence(unedited, edited).tolist()

    def able() -> list[bool]:
        read, tokens = lab.reading.abilities
        with applied(model, *condition.edits):
            logits = gathered_logits(read.next_logits(changed), len(tokens)).cpu().gather(1, tokens)
        return (logits[:, 0] > logits[:, 1]).tolist()

    version = (ANSWERS_VERSION, EDITS_VERSION, READING_VERSION)
    longer = [lab.reading.new_tokens] if lab.reading.new_tokens != MAX_NEW_TOKENS else []
    report = lab.records.usage("test", [digest, asked.digest, *longer], answers, version=version)
    kl = None
    if condition.changes_text:
        kl = np.array(lab.records.json("neutral_kl", [digest, lab.reading.ordinary], divergences, version=version[1:]))
    can = None
    if lab.abilities and condition.changes_text:
        hits = lab.records.json("abilities", [digest], able, version=(ABILITIES_VERSION, *version[1:]))
        can = np.array(hits, dtype=float)
    cost = None
    # A random control costs what it controls.
    if digest is not None and condition.control_of is None and not lab.reading.few:
        device = str(next(transformers_model(model).parameters()).device)
        where = [digest, asked.digest, device, lab.seed]
        cost = lab.records.json("cost", where, lambda: _cost(lab, condition), version=COST_VERSION)
    return Result(report, kl, cost, closed_book=condition.decoding is None, able=can)


def pooled(results: Sequence[Result]) -> Result:
    """Several draws as one."""
    if len(results) == 1:
        return results[0]
    kls = [result.divergences for result in results if result.divergences is not None]
    able = [result.able for result in results if result.able is not None]
    report = UsageReport(pl.concat([result.report.frame for result in results]))
    kl, can = (np.mean(some, axis=0) if some else None for some in (kls, able))
    return Result(report, kl, results[0].cost, results[0].closed_book, can)


def measures_of(result: Result, unedited: UsageReport | None = None, able: np.ndarray | None = None) -> dict[str, Any]:
    """What a record says of a result: estimates by measure, ``None`` where a measure does not apply.

    Args:
        result: What was measured.
        unedited: The unedited model's answers: ``change`` then holds for each rate and accuracy how it changed,
            prompt by prompt. ``None`` for the unedited model itself.
        able: ``Result.able`` of the unedited model, if it was asked.
    """
    conflict = result.report.select(kind="conflict")

    def rates(part: UsageReport) -> dict[str, dict[str, Any]]:
        return {f"{usage}_rate": part.rate(usage).to_record() for usage in USAGES}

    record: dict[str, Any] = {**rates(conflict), "memorisation_ratio": conflict.memorisation_ratio().to_record()}
    for measure_name, kind in GUARDS.items():
        part = result.report.select(kind=kind)
        applies = len(part.frame) and (kind != "none" or result.closed_book)
        record[measure_name] = part.accuracy().to_record() if applies else None
    kl = result.divergences
    record["neutral_kl"] = None if kl is None else bootstrap_mean(kl, range(len(kl))).to_record()
    record["by_template"] = {
        template: rates(conflict.select(template=template))
        for template in conflict.frame["template"].unique(maintain_order=True)
    }
    if result.able is not None:
        record |= _ability_measures(result.able)
    elif able is not None:
        record["abilities_accuracy"] = None
    if unedited is not None:
        changes = result.report.changes(unedited)
        if result.able is not None and able is not None:
            changes["abilities_accuracy"] = paired_difference(able, result.able, _ASKED)
        record["change"] = {name: one.to_record() for name, one in changes.items() if record[name] is not None}
    return record


def _ability_measures(able: np.ndarray) -> dict[str, Any]:
    """The share of items whose right word is the more probable one, of all and of each ability."""
    # Several draws of a control are a mean of zeros and ones.
    estimate = rate if np.isin(able, (0, 1)).all() else bootstrap_mean
    of_each = {name: [item.ability == name for item in ABILITIES] for name in get_args(Ability)}
    return {
        "abilities_accuracy": estimate(able, _ASKED).to_record(),
        "by_ability": {name: float(able[rows].mean()) for name, rows in of_each.items()},
    }


def _cost(lab: Bench, condition: Condition) -> dict[str, float]:
    """Tokens per second relative to the unedited model: the median of rounds in turns, two where these agree.

    Of each the first token is generated once before, to warm up.
    """
    conflicts = list(lab.asked.select(kind="conflict"))
    chosen = random.Random(lab.seed).sample(conflicts, min(_TIMED, len(conflicts)))
    plain = ConflictSet("timed", tuple(chosen))
    timed = {example.id for example in plain}
    # How one is asked may depend on the others.
    asked = ConflictSet("timed", tuple(e for e in condition.asked(lab.asked) if e.id in timed))
    rule = condition.combined

    def seconds(*, edited: bool, tokens: int = _TOKENS) -> float:
        examples = asked if edited else plain
        prompts = [example.prompt for example in examples]
        bare = [example.bare_prompt or example.prompt for example in examples]
        with applied(lab.model, *(condition.edits if edited else ())):
            start = time.perf_counter()
            two_streams: dict[str, Any] = {"without": bare, "combined": rule} if edited and rule is not None else {}
            # Answers come back as text, so that a device has finished by then.
            continue_greedily(lab.model, prompts, **two_streams, max_new_tokens=tokens)
            return time.perf_counter() - start

    for edited in (False, True):
        seconds(edited=edited, tokens=1)
    ratios: list[float] = []
    while len(ratios) < 2 or (len(ratios) < _ROUNDS and max(ratios) > AGREE * min(ratios)):
        # Neither goes first every time.
        order = (False, True) if len(ratios) % 2 else (True, False)
        took = {edited: seconds(edited=edited) for edited in order}
        ratios.append(took[False] / took[True])
    return {"speed": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
