"""Folders of small studies of every kind, as the commands write them, made up without a model."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from conflictscope.demo_study import METHODS, TEST_PHRASINGS, condition_record
from conflictscope.examples import UNEDITED, condition_of, example_frame, write_examples
from interp.answers import DIRECTIONS
from interp.attribution.scores import HeadScores
from interp.conflicts import CONTEXT_KINDS, ConflictExample, ConflictSet
from interp.evaluation import UsageReport
from interp.facts import HELD_OUT_PHRASING, LEARNED_PHRASINGS, SEEN_PHRASINGS, build_conflicts, load_facts
from interp.files import write_json, write_parquet

N_LAYERS, N_HEADS = 30, 9
MODEL = {
    "name": "tiny",
    "architecture": "LlamaForCausalLM",
    "n_layers": N_LAYERS,
    "n_heads": N_HEADS,
    "d_model": 64,
    "fingerprint": "31a9c6f130d1",
}
_ASKED = ("id", "subject", "relation", "template", "kind", "split", "prompt")
RATES = {UNEDITED: (0.3, 0.4), "context": (0.05, 0.85), "memory": (0.7, 0.03), "random": (0.28, 0.42)}
"""Share of conflict prompts answered from memory and from context, by what the model is turned towards."""


@cache
def asked() -> ConflictSet:
    """About a thousand test prompts."""
    facts = {relation: list(load_facts(relation)) for relation in ("capital", "currency")}
    test = build_conflicts(facts).select(split="test")
    return ConflictSet(test.name, tuple(e for e in test if e.template in TEST_PHRASINGS[e.kind]))


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
    return condition_record(answered(towards, seed), np.linspace(0, 0.1 * (towards != UNEDITED), 40), unedited)


def summary_basis(phrasings: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """What all summaries say about model, data and settings."""
    return {
        "model": MODEL,
        "data": {
            "relations": ["capital", "currency"],
            "counts": asked().counts(),
            "phrasings": {**phrasings, "held_out": HELD_OUT_PHRASING},
            "digest": asked().digest,
        },
        "settings": {"seed": 7, "dtype": "float32", "versions": {"torch": "2.9.0"}, **settings},
    }


def head_scores() -> HeadScores:
    """Scores of 270 heads on twelve prompts."""
    values = torch.randn(12, N_LAYERS, N_HEADS, generator=torch.Generator().manual_seed(0)) / 4
    subjects = tuple(f"subject {i // 3}" for i in range(12))
    return HeadScores(values, tuple(map(str, range(12))), subjects, "path_patching", "logit_diff", "tiny", "d", {})


def write_demo(folder: Path) -> Path:
    """What ``demo`` leaves: 8 edits and the unedited model."""
    draws = [{"heads": [[0, 0, 0.0]], "around": "zero"}] * 2
    heads = {"context": [[20, 1, 0.0], [23, 4, 0.0]], "memory": [[23, 2, 0.0], [28, 2, 0.0]]}
    edits = {
        method: {
            f"towards_{d}": {"heads": heads[d], "around": "zero", "chosen_on": "dev", "test": measures(d, seed)}
            for d in DIRECTIONS
        }
        for seed, method in enumerate(METHODS)
    }
    summary = {
        **summary_basis({"seen": list(SEEN_PHRASINGS)}, quick=False),
        "baseline": {"test": measures(UNEDITED)},
        **{f"towards_{d}": {"method": "pruning", **edits["pruning"][f"towards_{d}"]} for d in DIRECTIONS},
        "random_heads": {
            f"towards_{d}": {"draws": draws, "test": measures("random", seed)} for seed, d in enumerate(DIRECTIONS)
        },
        "methods": edits,
    }
    shown = {condition_of(method, d): answered(d, seed) for seed, method in enumerate(METHODS) for d in DIRECTIONS}
    write_examples(folder, example_frame(asked(), {UNEDITED: answered(UNEDITED), **shown}))
    head_scores().save(folder / "heads.parquet")
    write_json(folder / "summary.json", summary)
    return folder


def write_dial(folder: Path) -> Path:
    """What ``dial fit`` leaves."""
    halfway = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 80}
    budget = {"budget": 0.02, "context_budget": 0.2, "max_scales": 40, "steps": 7, "feed_forward": True}
    summary = {
        **summary_basis(
            {"learned_from": list(LEARNED_PHRASINGS), "tested": list(SEEN_PHRASINGS)},
            subjects={"train": 40, "dev": 24, "test": 40},
            **budget,
        ),
        "baseline": {"test": measures(UNEDITED)},
        **{
            f"towards_{d}": {
                "heads": [[20, 1, 0.4], [23, 4, 1.5]],
                "feed_forward": [[3, 0.9]],
                "around": "zero",
                "test": measures(d, 10),
            }
            for d in DIRECTIONS
        },
        "random_heads": {
            f"towards_{d}": {
                "draws": [{"heads": [[0, 0, 0.4]], "feed_forward": [], "around": "zero"}] * 2,
                "test": measures("random", seed),
            }
            for seed, d in enumerate(DIRECTIONS, start=10)
        },
        "calibration": [
            {"trust": t / 4, "memory_rate": (4 - t) / 10, "context_rate": (4 + t) / 10} for t in range(-4, 5)
        ],
        "asked": {
            f"towards_{d}": {
                "rate": 0.6,
                "trust": 0.5 if d == "context" else -0.5,
                "test": {"learned_phrasings": halfway, "held_out_phrasing": halfway},
            }
            for d in DIRECTIONS
        },
    }
    ends = {f"towards {d}": answered(d, 10) for d in DIRECTIONS}
    write_examples(folder, example_frame(asked(), {UNEDITED: answered(UNEDITED), **ends}))
    write_json(folder / "summary.json", summary)
    return folder


def write_gate(folder: Path) -> Path:
    """What ``gate fit`` leaves."""
    shares = {kind: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 80} for kind in CONTEXT_KINDS}
    kept = {
        "gain": {"value": 0.97, "low": 0.9, "high": 1.0, "n": 300},
        "none": {"value": 0.05, "low": 0, "high": 0.1, "n": 80},
    }
    opened = {"opened": {**shares, "held_out_phrasing": shares}}
    reports = {
        UNEDITED: answered(UNEDITED),
        "everywhere": answered("context", 20),
        "gated": answered("context", 21),
        "random_gate": answered("context", 22),
    }
    summary = {
        **summary_basis(
            {"learned_from": list(LEARNED_PHRASINGS), "tested": list(SEEN_PHRASINGS)},
            keep=0.95,
            subjects={"train": 40, "dev": 24, "test": 40},
        ),
        "intervention": "tiny towards context",
        "towards": "context",
        "gate": {"site": "blocks.17.attn.hook_out", "threshold": -1.5, "dev": {"auroc": 0.95}, "test": opened},
        "random_gate": {"test": opened},
        "conditions": {
            UNEDITED: measures(UNEDITED),
            "everywhere": measures("context", 20),
            "gated": measures("context", 21),
            "random_gate": measures("context", 22),
        },
        "kept": {name: {**kept, "held_out_phrasing": kept} for name in ("gated", "random_gate")},
    }
    named = {name.replace("_", " "): report for name, report in reports.items()}
    write_examples(folder, example_frame(asked(), named))
    write_json(folder / "summary.json", summary)
    return folder


def write_control(folder: Path) -> Path:
    """What ``steer fit`` and ``spare fit`` leave together."""
    steering = {"layer": 16, "strength": 4.0, "tokens": "last_prompt"}
    spare = {"layers": [14, 15, 16], "share": 0.1, "alpha": 2.0, "tokens": "last_prompt", "alpha_form": "targets"}
    methods = {
        **dict.fromkeys(("actadd", "random_direction", "caa", "probe", "task_vector"), steering),
        **dict.fromkeys(("spare", "remove_only", "add_only", "random_features", "constant"), spare),
    }
    turned = {name: "random" if name.startswith("random") else None for name in methods}
    results = {
        "basis": {
            "model": {"name": "tiny", "fingerprint": MODEL["fingerprint"]},
            "data": {"name": "capital+currency", "digest": asked().digest, "test_subjects": 64},
            "seed": 7,
            "tokens": "last_prompt",
        },
        UNEDITED: measures(UNEDITED),
        "methods": {
            name: {
                f"towards_{d}": {
                    "settings": settings,
                    "draws": 1,
                    "test": measures(turned[name] or d, seed % len(METHODS)),
                }
                for d in DIRECTIONS
            }
            for seed, (name, settings) in enumerate(methods.items())
        },
    }
    reports = {
        condition_of(name, d): answered(turned[name] or d, seed % len(METHODS))
        for seed, name in enumerate(methods)
        for d in DIRECTIONS
        if name != "random_features"
    }
    write_examples(folder, example_frame(asked(), {UNEDITED: answered(UNEDITED), **reports}))
    write_json(folder / "results.json", results)
    return folder


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
    "control": write_control,
    "probes": write_probes,
}
