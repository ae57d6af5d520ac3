"""Compare conflict detectors on the same prompts: phrasings, relations and subjects that nothing was fitted on.

1. Make prompts of every variant about facts that the model knows (``interp.families``): train and dev in learned
   families about seen relations; on test's subjects four parts, with seen or unseen families and relations.
2. Record, at the last token, every head's z and the residual stream of the upper layers, and the final residual stream
   of the bare questions. Recordings are kept, so that a run that was killed goes on.
3. Fit what has many weights on train, and choose strengths, ranks and sites on dev. What reads a few numbers (two
   passes, head lens, number of tokens) has nothing to fit but their weights, which is done on dev.
4. Score the four parts, which nothing was chosen on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from conflictscope.detectors import DETECTORS_VERSION, JOINT, Detecting, Detector, Head, Part, middle_layers
from conflictscope.study.data import Prompts
from conflictscope.study.lab import Lab
from conflictscope.tables import written
from interp.activation_store import ActivationStore, texts_digest
from interp.activations import sites_of
from interp.anatomy import Anatomy
from interp.attribution.scores import top_heads
from interp.conflicts import SPLITS, ConflictSet
from interp.errors import UserError
from interp.facts import Fact, build_conflicts, usable_facts
from interp.families import UNSEEN_FAMILIES, VARIANTS, worded_conflicts
from interp.files import write_json, write_parquet, write_text
from interp.fingerprints import fingerprint
from interp.inputs import tokenizer_of
from interp.known import kept_known_facts
from interp.records import Records
from interp.statistics import rate
from probes.conflict_detectors import judged
from probes.joint import STRENGTHS
from probes.quality import score_probabilities

TESTED: Mapping[str, str] = {
    "seen": "all seen",
    "unseen_families": "unseen phrasings",
    "unseen_relations": "unseen relations",
    "unseen_both": "both unseen",
}
"""The parts of test, and what is new in each besides the subjects."""
UNSEEN_RELATIONS = ("headquarters", "currency")
HEADS = 5
"""How many heads of each kind are read."""
KEPT_SHARES = (0.95, 0.9, 0.8)
"""The shares of conflicts that thresholds are set to keep."""

_TESTED_FACTS, _QUICK_FACTS = 40, 24
_CURVE = (1, 2, 4, 8, 16, 32, 64)


def detecting_parts(
    seen: Mapping[str, Sequence[Fact]],
    unseen: Mapping[str, Sequence[Fact]],
    tokenizer: Any,
    *,
    each: int = 3,
    seed: int = 0,
) -> dict[str, ConflictSet]:
    """Make the prompts of train, dev and the four parts of test.

    Args:
        seen: Facts of the relations that are learned from.
        unseen: Facts of relations that are only tested on.
        tokenizer: Writes chats.
        each: How many families are drawn for each fact and variant on train; elsewhere they are fewer.
        seed: Decides splits, draws and what conflicts with what.

    Raises:
        UserError: If there are too few facts.
    """
    tested = {
        name: random.Random(f"{seed}/{name}").sample(list(facts), min(len(facts), _TESTED_FACTS))
        for name, facts in seen.items()
    }
    fewer = max(1, each - 1)
    made = partial(worded_conflicts, tokenizer=tokenizer, seed=seed)
    return {
        "train": made(seen, each=each, splits=("train",)),
        "dev": made(seen, each=fewer, splits=("dev",)),
        "seen": made(tested, each=1, splits=("test",)),
        "unseen_families": made(tested, each=fewer, splits=("test",), families=UNSEEN_FAMILIES),
        "unseen_relations": made(unseen, each=each, splits=("test",)),
        "unseen_both": made(unseen, each=each, splits=("test",), families=UNSEEN_FAMILIES),
    }


def compare_detectors(
    model: nn.Module,
    name: str,
    relations: Sequence[str],
    unseen_relations: Sequence[str],
    out: Path,
    *,
    each: int = 3,
    seed: int = 0,
    quick: bool = False,
) -> dict[str, Any]:
    """Compare all detectors and write ``detectors.json``, ``scores.parquet`` and ``detectors.md``.

    Args:
        model: The model, or a bridge around it.
        name: What it was loaded by.
        relations: The relations that are learned from.
        unseen_relations: Relations that are only tested on.
        out: The folder; finished steps in its ``records`` are reused.
        each: How many families are drawn for each fact and variant on train.
        seed: Decides all that is drawn.
        quick: Use little of everything: a check that all runs, not a measurement.

    Returns:
        What is written to ``detectors.json``.

    Raises:
        UserError: If a relation is both seen and unseen, or the model knows too little.
    """
    if both := [relation for relation in relations if relation in unseen_relations]:
        raise UserError(f"The relation {both[0]} cannot be seen and unseen; leave it out of one of the two.")
    records = Records(out / "records", model=fingerprint(model))
    facts = {r: usable_facts(r)[: _QUICK_FACTS if quick else None] for r in (*relations, *unseen_relations)}
    known = kept_known_facts(model, facts, records)
    seen, unseen = ({r: known[r] for r in names} for names in (relations, unseen_relations))
    asked = detecting_parts(seen, unseen, tokenizer_of(model), each=1 if quick else each, seed=seed)
    memory, context = _found_heads(model, name, seen, records, seed, quick)
    parts = {p: _recorded(model, name, p, prompts, (*memory, *context), records, seed) for p, prompts in asked.items()}
    bench = Detecting(model, parts, memory, context, seed, STRENGTHS[2:3] if quick else STRENGTHS)
    basis = [*(prompts.digest for prompts in asked.values()), memory, context, seed, list(bench.strengths)]
    detectors, ceiling, curve = _detected(bench, records, basis, _CURVE[:3] if quick else _CURVE)
    thresholds = records.json("thresholds", basis, lambda: bench.thresholds(KEPT_SHARES), version=DETECTORS_VERSION)
    about = {"model": name, "relations": list(relations), "unseen_relations": list(unseen_relations), "seed": seed}
    about |= {"each": each, "quick": quick, "memory_heads": memory, "context_heads": context}
    return write_detectors(out, about, parts, detectors, curve=curve, ceiling=ceiling, thresholds=thresholds)


def _detected(
    bench: Detecting, records: Records, basis: Sequence[Any], counts: Sequence[int]
) -> tuple[list[Detector], list[Detector], list[dict[str, Any]]]:
    """All detectors, those of the ceiling, and the curve; each group is kept when it is made."""
    kept = partial(records.json, depends_on=basis, version=DETECTORS_VERSION)

    def made(group: str, make: Callable[[], list[Detector]]) -> list[Detector]:
        return [_from_record(one) for one in kept(f"detectors-{group}", compute=partial(_to_records, make))]

    detectors = [detector for group, make in bench.makers.items() for detector in made(group, make)]
    detectors += bench.ensembles(detectors)
    return detectors, made("ceiling", bench.ceiling), kept("curve", compute=partial(bench.curve, counts))


def _found_heads(
    model: nn.Module, name: str, facts: Mapping[str, Sequence[Fact]], records: Records, seed: int, quick: bool
) -> tuple[list[Head], list[Head]]:
    """The heads that push most towards memory and towards the context, by path patching on train's subjects."""
    conflicts = build_conflicts(facts, seed=seed, kinds=("conflict",))
    train, dev, test = (conflicts.select(split=split) for split in SPLITS)
    prompts = Prompts(train, dev, test, conflicts.name, tuple(facts))
    scores = Lab(model, name, prompts, records, seed=seed, quick=quick).head_scores["logit_diff"]
    memory, context = (top_heads(scores.ranked(towards), HEADS) for towards in ("memory", "context"))
    return memory, [head for head in context if head not in memory] or context


def _recorded(
    model: nn.Module, name: str, part: str, prompts: ConflictSet, heads: Sequence[Head], records: Records, seed: int
) -> Part:
    """Record a part, or read what was recorded of it."""
    anatomy = Anatomy(model)
    n, middle = anatomy.n_layers, middle_layers(anatomy)
    last = anatomy.site("block", n - 1)
    layers = sorted({*range(middle.start, n), *(layer for layer, _ in heads)})
    sites = [*sites_of(model, ["z"], layers), *sites_of(model, ["residual"], middle)]
    store = partial(ActivationStore.record, model=model, name=name, seed=seed, dtype=torch.float16, patience=-1)
    states = store(
        records.folder / f"recording-{prompts.digest[:12]}",
        prompts=prompts,
        sites=list(dict.fromkeys([*sites, last])),
        progress=f"Recording: {part.replace('_', ' ')}",
    )
    if part == "train":
        return Part(prompts, states)
    bare = list(dict.fromkeys(example.bare_prompt for example in prompts))
    asked = store(
        records.folder / f"recording-{texts_digest(bare)[:12]}",
        prompts=bare,
        sites=[last],
        progress=f"Recording: {part.replace('_', ' ')}, bare questions",
    )
    rows = {text: row for row, text in enumerate(bare)}
    return Part(prompts, states, asked[last][[rows[example.bare_prompt] for example in prompts]])


def _to_records(make: Callable[[], list[Detector]]) -> list[dict[str, Any]]:
    return [
        {
            "name": d.name,
            "passes": d.passes,
            "about": dict(d.about),
            "scores": {part: scores.tolist() for part, scores in d.scores.items()},
        }
        for d in make()
    ]


def _from_record(record: Mapping[str, Any]) -> Detector:
    scores = {part: torch.tensor(values) for part, values in record["scores"].items()}
    return Detector(record["name"], record["passes"], scores, record["about"])


def judged_part(detector: Detector, name: str, part: Part, *, seed: int = 0) -> dict[str, Any]:
    """Judge a detector on a part: against all other prompts, and against each variant alone.

    Args:
        detector: The detector.
        name: The part's name.
        part: The part.
        seed: Seed of the bootstrap.

    Returns:
        By ``all`` and by variant the records of ``auroc``, ``auprc`` and ``false_alarms``, and the ``prevalence``;
        ``all`` has the ``calibration_error`` too.
    """
    scores, found = detector.scores[name], {}
    for variant in ("all", *VARIANTS[1:]):
        rows = [i for i, own in enumerate(part.variants) if own in (VARIANTS[0], variant) or variant == "all"]
        labels, subjects = [part.is_conflict[i] for i in rows], [part.subjects[i] for i in rows]
        if len(set(labels)) == 2:
            one = judged(scores[rows], labels, subjects, seed=seed)
            found[variant] = {
                **{m: getattr(one, m).to_record() for m in ("auroc", "auprc", "false_alarms")},
                "prevalence": one.prevalence,
            }
    odds = scores.double()
    probabilities = torch.stack([(-odds).sigmoid(), odds.sigmoid()], 1).numpy()
    labels = torch.tensor(part.is_conflict).long().numpy()
    quality = score_probabilities(probabilities, labels, part.subjects, ranking=odds.numpy(), seed=seed)
    found["all"]["calibration_error"] = quality.calibration_error.to_record()
    return found


def _judged_on(detector: Detector, parts: Mapping[str, Part], seed: int) -> dict[str, Any]:
    judged_parts = {name: judged_part(detector, name, part, seed=seed) for name, part in parts.items()}
    return {"name": detector.name, "passes": detector.passes, "about": dict(detector.about), "parts": judged_parts}


def _passing(
    detectors: Sequence[Detector], parts: Mapping[str, Part], thresholds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Which share of each variant passes the thresholds of the probe of several layers, in each part."""
    (joint,) = (detector for detector in detectors if detector.name == JOINT)
    found = []
    for keep, threshold in thresholds.items():
        opened: dict[str, Any] = {}
        for name, part in parts.items():
            passes, variants = (joint.scores[name] > threshold).double().numpy(), np.array(part.variants)
            subjects = np.array(part.subjects)
            opened[name] = {
                variant: rate(passes[variants == variant], subjects[variants == variant].tolist()).to_record()
                for variant in VARIANTS
                if (variants == variant).any()
            }
        found.append({"keep": float(keep), "threshold": threshold, "parts": opened})
    return found


def write_detectors(
    out: Path,
    about: Mapping[str, Any],
    parts: Mapping[str, Part],
    detectors: Sequence[Detector],
    *,
    curve: Sequence[Mapping[str, Any]],
    ceiling: Sequence[Detector],
    thresholds: Mapping[str, float],
) -> dict[str, Any]:
    """Judge all detectors on the parts of test, and write what is found.

    Args:
        out: The folder.
        about: What the record says of the comparison.
        parts: The parts.
        detectors: The detectors.
        curve: From ``Detecting.curve``.
        ceiling: From ``Detecting.ceiling``.
        thresholds: From ``Detecting.thresholds``.

    Returns:
        What is written to ``detectors.json``.
    """
    scored = {name: part for name, part in parts.items() if name != "train"}
    tested, seed = {name: parts[name] for name in TESTED}, about["seed"]
    record = {
        **about,
        "prompts": {name: len(part.prompts) for name, part in parts.items()},
        "detectors": [_judged_on(detector, tested, seed) for detector in detectors],
        "curve": list(curve),
        "thresholds": _passing(detectors, tested, thresholds),
        "ceiling": [_judged_on(one, {"unseen_families": tested["unseen_families"]}, seed) for one in ceiling],
    }
    frames = [
        pl.DataFrame(
            {
                "part": [name] * len(part.prompts),
                **{key: [getattr(e, key) for e in part.prompts] for key in ("id", "subject", "relation", "template")},
                "variant": part.variants,
                **{detector.name: detector.scores[name].tolist() for detector in detectors},
            }
        )
        for name, part in scored.items()
    ]
    write_parquet(out / "scores.parquet", pl.concat(frames))
    write_text(out / "detectors.md", detectors_table(record))
    write_json(out / "detectors.json", record)
    return record


def detectors_table(record: Mapping[str, Any]) -> str:
    """Write a record of detectors as tables in Markdown.

    Args:
        record: From ``compare_detectors``.
    """
    found, ceiling = ([(d["name"], d["passes"], d["parts"]) for d in record[key]] for key in ("detectors", "ceiling"))

    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def measure(title: str, name: str) -> str:
        rows = [[d, f"{passes:g}", *(written(by[part]["all"][name]) for part in TESTED)] for d, passes, by in found]
        return f"## {title}\n\n" + table(["detector", "passes", *TESTED.values()], rows)

    kinds = [variant.replace("_", " ") for variant in VARIANTS[1:]]

    def by_kind(title: str, part: str, judged: Sequence[tuple[str, float, Any]]) -> str:
        rows = [
            [d, *(written(by[part].get(kind, {}).get("auroc")) for kind in ("all", *VARIANTS[1:]))]
            for d, _, by in judged
        ]
        return f"## {title}\n\n" + table(["detector", "all", *kinds], rows)

    curve = [
        [
            str(point["families"]),
            f"{point['prompts']:.0f}",
            f"{point['auroc']:.3f} ({point['low']:.3f} to {point['high']:.3f})",
            f"{point['same_number']:.3f}",
        ]
        for point in record["curve"]
    ]
    head = ["families", "prompts", "AUROC (worst to best draw)", "as many prompts of all families"]
    passing = [
        [f"{found['keep']:g}", title, *(written(found["parts"][part].get(variant)) for variant in VARIANTS)]
        for found in record["thresholds"]
        for part, title in TESTED.items()
    ]
    return "\n".join(
        [
            f"# Conflict detectors of {record['model']}\n",
            measure("AUROC", "auroc"),
            measure("AUPRC", "auprc"),
            measure("False alarms at 95 % of conflicts kept", "false_alarms"),
            measure("Expected calibration error", "calibration_error"),
            *(by_kind(f"AUROC against each kind, {title}", part, found) for part, title in TESTED.items()),
            f"## What passes thresholds that are conformal over families ({JOINT})\n\n"
            + (table(["to keep", "part", VARIANTS[0], *kinds], passing) if passing else "Dev has too few families.\n"),
            f"## Unseen phrasings by the number of families fitted on ({JOINT})\n\n" + table(head, curve),
            by_kind("AUROC if fitted on the unseen phrasings themselves, other subjects", "unseen_families", ceiling),
        ]
    )
