"""Folders of small studies of every kind, as the commands write them, made up without a model."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from conflictscope.study.data import TESTED_PHRASINGS
from conflictscope.study.measure import Result, measures_of, pooled
from conflictscope.study.record import HEADS, UNEDITED, Measured, StudyRecord, write_examples
from conflictscope.study.run import example_frame
from interp.answers import DIRECTIONS, Direction
from interp.attribution.scores import HeadScores
from interp.conflicts import CONTEXT_KINDS, ConflictExample, ConflictSet
from interp.evaluation import UsageReport
from interp.facts import HELD_OUT_PHRASING, SEEN_PHRASINGS, STUDY_PHRASINGS, build_conflicts, load_facts
from interp.files import write_json, write_parquet

N_LAYERS, N_HEADS = 30, 9
MODEL = {
    "name": "tiny",
    "architecture": "LlamaForCausalLM",
    "n_layers": N_LAYERS,
    "n_heads": N_HEADS,
    "d_head": 8,
    "d_model": 64,
    "fingerprint": "31a9c6f130d1",
}
RATES = {UNEDITED: (0.3, 0.4), "context": (0.05, 0.85), "memory": (0.7, 0.03), "random": (0.28, 0.42)}
"""Share of conflict prompts answered from memory and from context, by what the model is turned towards."""
METHODS = ("pruning", "value_scaling", "mean_ablation", "learned_gates")
HEADS_OF: dict[Direction, tuple[tuple[int, int, float], ...]] = {
    "context": ((20, 1, 0.0), (23, 4, 0.0)),
    "memory": ((23, 2, 0.0), (28, 2, 0.0)),
}
BUDGETS = {"none": 0.02, "neutral": 0.02, "aligned": 0.2, "irrelevant": 0.2}


@cache
def asked() -> ConflictSet:
    """About a thousand test prompts."""
    test = conflicts().select(split="test")
    return ConflictSet(test.name, tuple(e for e in test if e.template in TESTED_PHRASINGS[e.kind]))


@cache
def conflicts() -> ConflictSet:
    """All prompts about two relations."""
    return build_conflicts({relation: list(load_facts(relation)) for relation in ("capital", "currency")})


@cache
def answered(towards: str, seed: int = 0) -> UsageReport:
    """What a model that is turned that way might answer."""
    rng = random.Random(f"{towards}/{seed}")
    memory, context = RATES[towards]

    def row(example: ConflictExample) -> dict[str, Any]:
        drawn = rng.random()
        if example.kind != "conflict":
            usage = "memory" if drawn < 0.9 else "other"
        else:
            usage = "memory" if drawn < memory else "context" if drawn < memory + context else "other"
        answers = {"memory": example.memory_answers, "context": example.context_answers, "other": ("no idea",)}
        return {
            **{
                name: getattr(example, name)
                for name in ("id", "subject", "relation", "template", "kind", "split", "prompt")
            },
            "answer": answers[usage][0],
            "usage": usage,
            "logit_difference": rng.gauss(0, 5) if example.context_answers else None,
            "memory_span_match": float(usage == "memory"),
        }

    return UsageReport(
        pl.DataFrame([row(example) for example in asked()], schema_overrides={"logit_difference": pl.Float64})
    )


@cache
def measures(towards: str, seed: int = 0) -> dict[str, Any]:
    """The measures of these answers."""
    unedited = None if towards == UNEDITED else answered(UNEDITED)
    return measures_of(result(towards, seed), unedited)


def result(towards: str, seed: int = 0) -> Result:
    """What is measured of these answers."""
    return Result(answered(towards, seed), _divergences(towards), None, closed_book=True)


def _divergences(towards: str) -> np.ndarray:
    return np.linspace(0, 0.1 * (towards != UNEDITED), 40)


def edited(method: str, towards: Direction, seed: int = 0, **about: Any) -> Measured:
    """What a method chose for a source, measured on test."""
    settings: dict[str, Any] = {
        "choices": ("best",),
        "cost": {"speed": 0.97, "low": 0.95, "high": 0.99},
        "file": f"interventions/{method}-towards_{towards}.json",
        **about,
    }
    name = f"{method.replace('_', ' ')}, towards {towards}"
    return Measured(name, method, measures(towards, seed), towards, **settings)


def control(of: Measured, name: str = "random heads", **about: Any) -> Measured:
    """Two random draws next to it, measured together."""
    test = measures_of(pooled([result("random", seed) for seed in range(2)]), answered(UNEDITED))
    return Measured(
        f"{name}, towards {of.towards}",
        of.method,
        test,
        of.towards,
        control_of=of.name,
        draws=2,
        moved=of.moved,
        **about,
    )


def head_edit(method: str, towards: Direction, seed: int = 0, **about: Any) -> Measured:
    """An edit of two heads."""
    heads = HEADS_OF[towards]
    does = f"2 heads: {', '.join(f'{layer}.{head} x {scale:g}' for layer, head, scale in heads)}"
    return edited(method, towards, seed, heads=heads, moved=2, does=does, **about)


def study(folder: Path, kind: str, conditions: list[Measured], winner: str, **parts: Any) -> Path:
    """Write a study of these conditions, in which one method wins in both directions, with its answers."""
    shown = {c.name: answered(c.towards, seed) for seed, c in enumerate(conditions) if c.towards and c.draws == 1}
    conditions = [Measured(UNEDITED, UNEDITED, measures(UNEDITED)), *conditions]
    record = StudyRecord(
        kind,
        f"conflictscope {kind} --model tiny --relation capital --relation currency --seed 7",
        MODEL,
        {
            "name": "capital+currency",
            "relations": ["capital", "currency"],
            "asked": 120,
            "counts": conflicts().counts(),
            "phrasings": {
                "learned": list(SEEN_PHRASINGS),
                "tested": list(STUDY_PHRASINGS),
                "held_out": HELD_OUT_PHRASING,
            },
            "digest": asked().digest,
        },
        {
            "seed": 7,
            "quick": False,
            "budgets": BUDGETS,
            "device": "cpu",
            "dtype": "float32",
            "versions": {"torch": "2.9.0"},
            "winners": {d: f"{winner.replace('_', ' ')}, towards {d}" for d in DIRECTIONS},
        },
        tuple(conditions),
        **parts,
    )
    record.save(folder)
    write_examples(folder, example_frame(asked(), {UNEDITED: answered(UNEDITED), **shown}))
    return folder


def head_scores() -> HeadScores:
    """Scores of 270 heads on twelve prompts."""
    values = torch.randn(12, N_LAYERS, N_HEADS, generator=torch.Generator().manual_seed(0)) / 4
    subjects = tuple(f"subject {i // 3}" for i in range(12))
    return HeadScores(values, tuple(map(str, range(12))), subjects, "path_patching", "logit_diff", "tiny", "d", {})


def write_demo(folder: Path) -> Path:
    """What ``demo`` leaves: eight edits of heads, controls of the best two, all that was tried, and head scores."""
    conditions: list[Measured] = []
    for d in DIRECTIONS:
        for method in METHODS:
            choices = ("best", "within_budget") if method == "pruning" else ("best",)
            conditions.append(head_edit(method, d, len(conditions), choices=choices))
            if method == "pruning":
                conditions.append(control(conditions[-1], does="2 heads: 0.0 x 0, 1.2 x 0"))
    tried = [
        {
            "method": method,
            "towards": d,
            "settings": {"heads": k},
            "does": f"{k} heads",
            "moved": k,
            "rate": 0.4 + 0.05 * k + 0.01 * n,
            # The least gain ruled the first of each out.
            "kept": 0.95 - 0.02 * k - 0.01 * n if k > 1 else None,
            "damage": {guard: 0.01 * k for guard in BUDGETS} if k > 1 else None,
            "spent": 0.5 * k if k > 1 else None,
        }
        for d in DIRECTIONS
        for n, method in enumerate(METHODS)
        for k in (1, 2, 4, 8)
    ]
    head_scores().save(folder / HEADS)
    return study(folder, "demo", conditions, "pruning", tried=tried)


def write_dial(folder: Path) -> Path:
    """What ``dial fit`` leaves: two ends, their controls and the curve in between."""
    scales = ((20, 1, 0.4), (23, 4, 1.5))
    does = "2 heads: 20.1 x 0.4, 23.4 x 1.5; feed-forward layers: 3 x 0.9"
    ends = [edited("dial", d, 2 * n, heads=scales, moved=3, does=does) for n, d in enumerate(DIRECTIONS)]
    damage = {guard: 0.01 for guard in BUDGETS}
    curve = [
        {"trust": t / 4, "memory_rate": (4 - t) / 10, "context_rate": (4 + t) / 10, "kept": 0.9, "damage": damage}
        for t in range(-4, 5)
    ]
    halfway = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 80}
    asked_for = {"rate": 0.6, "test": {"learned_phrasings": halfway, "held_out_phrasing": halfway}}
    details = {
        "dial": {f"towards_{d}": {**asked_for, "trust": t} for d, t in zip(DIRECTIONS, (0.5, -0.5), strict=True)}
    }
    conditions = [c for end in ends for c in (end, control(end, "random scales"))]
    return study(folder, "dial", conditions, "dial", lines={"trust": curve}, details=details)


def write_gate(folder: Path) -> Path:
    """What ``gate fit`` leaves of one direction: the edit everywhere, behind its gate, and behind a random one."""
    shares = {kind: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 80} for kind in CONTEXT_KINDS}
    kept = {
        "gain": {"value": 0.97, "low": 0.9, "high": 1.0, "n": 300},
        "none": {"value": 0.05, "low": 0.0, "high": 0.1, "n": 80},
    }
    gate = {
        "site": "blocks.17.attn.hook_out",
        "threshold": -1.5,
        "dev": {"auroc": 0.95, "opened": 0.4},
        **{key: {**shares, "held_out_phrasing": shares} for key in ("opened", "random_opened")},
        **{key: {**kept, "held_out_phrasing": kept} for key in ("kept", "random_kept")},
    }
    everywhere = head_edit("everywhere", "context", 0)
    gated = edited(
        "gate", "context", 1, moved=2, does="2 heads, where a probe of blocks.17.attn.hook_out sees a conflict"
    )
    blind = Measured(
        "random gate, towards context",
        "gate",
        measures("context", 2),
        "context",
        control_of=gated.name,
        does="a random probe",
    )
    return study(folder, "gate", [everywhere, gated, blind], "gate", details={"gate": {"towards_context": gate}})


def write_compare(folder: Path) -> Path:
    """What ``compare`` leaves: methods of every sort, one that could not run, one that is not applicable everywhere."""
    conditions: list[Measured] = []
    for d in DIRECTIONS:
        conditions += [
            edited("caa", d, len(conditions), moved=1, does="direction after layer 16 (add, strength 4, all tokens)"),
            edited(
                "spare", d, len(conditions) + 1, moved=40, does="40 features of layers 14, 15 (alpha 2, last tokens)"
            ),
        ]
        conditions.append(control(conditions[-1], "random features", does="40 features as frequent"))
    decoding = edited("context_aware_decoding", "context", len(conditions), does="next token by CAD, alpha 0.5")
    test = {**decoding.test, "closed_book_accuracy": None, "neutral_kl": None}
    conditions.append(Measured(decoding.name, decoding.method, test, "context", ("within_budget",), does=decoding.does))
    by_dose = [{"strength": s, "memory_rate": 0.3 - s / 10, "context_rate": 0.4 + s / 10} for s in (0.5, 1.0, 2.0)]
    return study(
        folder,
        "compare",
        conditions,
        "caa",
        not_run={"probe": "Both sources are needed."},
        lines={"strength of caa": by_dose},
    )


def write_probes(folder: Path) -> Path:
    """What ``probe score`` leaves."""
    sites = [
        f"blocks.{layer}.{part}" for layer in range(N_LAYERS) for part in ("hook_out", "attn.hook_out", "mlp.hook_out")
    ]
    rows = []

    def note(label: str, probe: str, group: str, site: str, measure: str, value: float) -> None:
        about = {"label": label, "probe": probe, "group": group, "site": site, "chosen": site == sites[50]}
        rows.append({**about, "measure": measure, "value": value, "low": value - 0.05, "high": value + 0.05, "n": 300})

    for label in ("conflict", "source"):
        for number, site in enumerate(sites):
            note(label, "fitted", "test", site, "auroc", 0.5 + 0.004 * number)
            note(label, "shuffled labels", "test", site, "auroc", 0.5)
        note(label, "fitted", "unseen phrasing", sites[50], "auroc", 0.66)
        note(label, "floor", "test", "embed.hook_out", "auroc", 0.52)
    write_parquet(folder / "scores.parquet", pl.DataFrame(rows))
    data = {"name": "capital+currency", "digest": asked().digest, "prompts": len(asked())}
    about = {"model": {"name": "tiny", "fingerprint": MODEL["fingerprint"]}, "data": data, "seed": 7}
    write_json(folder / "scores.json", {**about, "held_out_template": HELD_OUT_PHRASING})
    return folder


WRITERS = {
    "demo": write_demo,
    "dial": write_dial,
    "gate": write_gate,
    "compare": write_compare,
    "probes": write_probes,
}
