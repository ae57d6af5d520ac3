"""Small studies of several models, data sets and seeds, as ``compare`` writes them, made up without a model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from conflictscope.study.measure import Result, measures_of
from conflictscope.study.record import UNEDITED, Choice, Measured, StudyRecord, write_examples
from conflictscope.study.run import example_frame
from interp.answers import DIRECTIONS, Direction
from interp.conflicts import ConflictExample, ConflictSet
from interp.evaluation import UsageReport
from interp.facts import build_conflicts, load_facts

BUDGETS = {"none": 0.02, "neutral": 0.02, "aligned": 0.2, "irrelevant": 0.2}
METHODS = {
    "pruning": (0.5, 0.2, 1.0),
    "caa": (0.3, 0.1, 0.9),
    "spare": (0.2, 0.05, 0.7),
    "spare_constant": (0.1, 0.1, 0.7),
}
"""For each method the share of answers that it turns, the share of guards that it spoils, and its speed."""
_SHOWN = ("id", "subject", "relation", "template", "kind", "split", "prompt")


@cache
def asked(relation: str, seed: int) -> ConflictSet:
    """Test's prompts in two phrasings."""
    test = build_conflicts({relation: list(load_facts(relation))[:70]}, seed=seed).select(split="test")
    return ConflictSet(relation, tuple(e for e in test if e.template in ("question", "statement")))


def answered(relation: str, seed: int, who: str, turned: float, spoilt: float, towards: Direction) -> UsageReport:
    """What a model might answer of which an edit turns some answers and spoils others."""

    def row(example: ConflictExample) -> dict[str, Any]:
        # The unedited model is the same under every edit.
        before = random.Random(f"{relation}/{seed}/{example.id}").random()
        now = random.Random(f"{who}/{relation}/{seed}/{example.id}").random()
        if example.kind == "conflict":
            usage = towards if now < turned else "memory" if before < 0.4 else "context" if before < 0.8 else "other"
        else:
            usage = "other" if now < spoilt or before < 0.1 else "memory"
        answers = {"memory": example.memory_answers, "context": example.context_answers, "other": ("no idea",)}
        return {
            **{name: getattr(example, name) for name in _SHOWN},
            "answer": answers[usage][0],
            "usage": usage,
            "logit_difference": before - now,
            "memory_span_match": float(usage == "memory"),
        }

    return UsageReport(pl.DataFrame([row(example) for example in asked(relation, seed)]))


def write_study(
    folder: Path,
    *,
    model: str = "tiny",
    relation: str = "capital",
    seed: int = 0,
    methods: Mapping[str, tuple[float, float, float]] = METHODS,
    not_run: Mapping[str, str] | None = None,
    unfit: tuple[str, ...] = (),
    to_come: tuple[str, ...] = (),
    **settings: Any,
) -> Path:
    """Write a study in which each method has one condition by both choices, and the first a random control.

    Args:
        folder: Where.
        model: The model's name.
        relation: The data set.
        seed: The seed.
        methods: What they do.
        not_run: Methods that could not run, and why.
        unfit: Methods of which nothing fits the budget.
        to_come: Methods that are not measured yet.
        settings: What else the record's settings say.
    """
    before = answered(relation, seed, "", 0, 0, "context")
    reports, refused = {UNEDITED: before}, dict(not_run or {})
    conditions = [Measured(UNEDITED, UNEDITED, measures_of(Result(before, np.zeros(5), None, True)))]
    for towards in DIRECTIONS:
        for method, (turned, spoilt, speed) in methods.items():
            name = f"{method.replace('_', ' ')}, towards {towards}"
            choices: tuple[Choice, ...] = ("best",) if method in unfit else ("best", "within_budget")
            if method in unfit:
                refused[f"{name}, within budget"] = (
                    "No candidate stays within the damage budget on dev, also moved back."
                )
            # Decoding has nothing to combine without a context.
            closed_book = method != "adacad"
            report = reports[name] = answered(relation, seed, f"{model}{method}", turned, spoilt, towards)
            test = measures_of(Result(report, np.full(5, spoilt) if closed_book else None, None, closed_book), before)
            cost = {"speed": speed, "low": speed - 0.1, "high": speed + 0.1}
            conditions.append(Measured(name, method, test, towards, choices, cost=cost))
            if method == next(iter(methods)):
                drawn = answered(relation, seed, f"{model}random", 0.05, spoilt, towards)
                test = measures_of(Result(drawn, np.full(5, spoilt), None, True), before)
                random_name = f"random heads for {name}"
                conditions.append(Measured(random_name, "random_heads", test, towards, control_of=name, draws=2))
    StudyRecord(
        "compare",
        f"conflictscope compare --model {model} --relation {relation} --seed {seed}",
        {"name": model, "fingerprint": f"print of {model}"},
        {"name": relation, "digest": asked(relation, seed).digest},
        {"seed": seed, "quick": False, "budgets": BUDGETS, "winners": {}, **settings},
        tuple(conditions),
        not_run=refused,
        to_come=to_come,
    ).save(folder)
    write_examples(folder, example_frame(asked(relation, seed), reports))
    return folder


def write_plan(root: Path) -> Path:
    """Write two models on two data sets with two seeds below ``root``; one method cannot run, or fit, everywhere."""
    for model in ("tiny", "small"):
        for relation in ("capital", "currency"):
            for seed in (0, 1):
                methods = dict(METHODS)
                not_run = {}
                if (model, relation) == ("small", "currency"):
                    del methods["caa"]
                    not_run = {"caa": "It needs <both> sources & more."}
                unfit = ("spare",) if seed == 1 and model == "tiny" else ()
                folder = root / "studies" / model / relation / str(seed)
                write_study(
                    folder, model=model, relation=relation, seed=seed, methods=methods, not_run=not_run, unfit=unfit
                )
    return root
