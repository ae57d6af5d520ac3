"""The second job: record activations of conflict prompts, probe them, and say how good the probes are.

Probes train on the train split and choose strength, site and threshold on dev, in all phrasing families but one.
They are scored on held-out subjects, in the families they know and in the one they do not, next to three controls:
probes fitted to shuffled labels, a floor that sees nothing but what is no evidence (the last token's embedding, or
phrasing and relation), and probes that have never seen the relation that they are scored on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor

from conflictscope.records import Records
from interp.activations import ActivationStore, site_kind
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import measure_usage
from interp.facts import HELD_OUT_PHRASING, PHRASINGS, build_conflicts, known_facts, relation_named
from interp.files import write_json, write_parquet
from interp.models import fingerprint
from interp.plots import save_figure
from interp.statistics import Estimate
from probes.detector import CONFLICT_CLASSES, SOURCE_CLASSES, ConflictDetector
from probes.linear import LinearProbe, Method, ProbeSet
from probes.patterns import patterns_by_group
from probes.plots import activation_patterns, auroc_by_layer, projection_by_layer, reliability_curve
from probes.quality import ProbeScore

Label = Literal["conflict", "source"]
LABELS: tuple[Label, ...] = get_args(Label)
EMBEDDING = "embed.hook_out"

_CLASSES: dict[Label, tuple[str, ...]] = {"conflict": CONFLICT_CLASSES, "source": SOURCE_CLASSES}
_GROUPS = ("seen phrasings", "unseen phrasing")


def conflicts_for_probes(
    model: Any, folder: Path, relations: Sequence[str], *, seed: int, progress: bool = True
) -> ConflictSet:
    """Conflicting and aligned prompts in every phrasing family in which the model itself gives the memory answer.

    What it answers closed-book is kept under ``folder``, so that a second call does not ask again.
    """
    records = Records(folder, model=fingerprint(model), seed=seed)
    facts = {}
    for relation in [relation_named(name).name for name in relations]:
        label = f"Closed-book: {relation}" if progress else None
        known = records.json(
            f"known-{relation}", [], lambda: [f.subject for f in known_facts(model, relation, progress=label)]
        )
        facts[relation] = [fact for fact in load_facts(relation) if fact.subject in known]
    everything = build_conflicts(facts, seed=seed, phrasings=tuple(PHRASINGS))
