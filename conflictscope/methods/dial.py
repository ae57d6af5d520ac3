"""Make both directions' learned scales one dial: calibrate it on dev, ask it for a rate, write it down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from conflictscope.methods._heads import HeadMethod
from conflictscope.methods.learned_scales import ENDS, dial_of, learned
from conflictscope.study.choice import line
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.measure import measure
from figures.dial import dial_curve
from figures.theme import save_figure
from interp.answers import DIRECTIONS, Direction
from interp.evaluation import UsageReport
from interventions.config import InterventionFile
from interventions.dial import DialPoint, TrustDial
from interventions.fitting.scale_training import ScaleTraining

SETTINGS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
"""Where a dial is calibrated."""


def fitted_dial(lab: Lab, training: ScaleTraining) -> TrustDial:
    """Both directions' learned scales as a dial at 0, calibrated.

    Args:
        lab: The lab; its budgets and its seed are the training's.
        training: What else decides the learning.

    Raises:
        UserError: If the data lacks a kind of prompts, nothing could be moved within the budgets, or numbers leave the
            range of the model's dtype.
    """
    dial = dial_of({towards: learned(lab, towards, training)[0] for towards in DIRECTIONS})
    points = (DialPoint(*(one[name] for name in ("trust", "memory_rate", "context_rate"))) for one in curve(lab, dial))
    return replace(dial, calibration=tuple(points))


def curve(lab: Lab, dial: TrustDial) -> list[dict[str, Any]]:
    """What dev measures at each of the calibration's settings; see ``conflictscope.study.choice.line``."""
    return line(lab, "trust", {trust: at(dial, trust) for trust in SETTINGS})


def at(dial: TrustDial, trust: float) -> Condition:
    """The dial at a setting, as a condition; at its ends it does what ``LearnedScales`` does at strength 1."""
    towards: Direction | None = next((d for d in DIRECTIONS if trust * ENDS[d] > 0), None)
    return Condition("dial", towards, {"trust": trust}, (dial.at(trust),))


@dataclass(frozen=True)
class DialEnds(HeadMethod):
    """Take a dial that was learned elsewhere, at its ends; it is no method that is found by name.

    Attributes:
        dial: The dial.
    """

    name = "dial"
    dial: TrustDial

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """The end."""
        del lab
        return [at(self.dial, ENDS[towards])]


def asked_for_halfway(lab: Lab, dial: TrustDial, towards: Direction) -> dict[str, Any]:
    """The rate on test when a calibrated dial is asked for the one halfway between trust 0 and its end.

    Returns:
        The ``rate`` that was asked for, the ``trust`` that the calibration gives for it, and estimates of the rate on
        ``test``: of whole answers, where the calibration is of their first token; for the phrasings that dev has as
        ``learned_phrasings`` and, where test has one that dev lacks, for that as ``held_out_phrasing``.

    """
    rates = {p.trust: p.context_rate if towards == "context" else p.memory_rate for p in dial.calibration}
    wanted = (rates[0.0] + rates[ENDS[towards]]) / 2
    trust = dial.trust_for(towards, wanted)
    report = measure(lab, at(dial, trust)).report.select(kind="conflict")
    held_out = lab.prompts.held_out
    parts = {
        "learned_phrasings": report.frame.filter(pl.lit(held_out is None) | (pl.col("template") != held_out)),
        "held_out_phrasing": report.frame.filter(template=held_out),
    }
    return {
        "rate": wanted,
        "trust": trust,
        "test": {name: UsageReport(part).rate(towards).to_record() for name, part in parts.items() if len(part)},
    }


def save_dial(
    lab: Lab, dial: TrustDial, out: Path, *, measured: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Write the dial's intervention file ``dial.json``, and its calibration as the figure ``dial.html``.

    Args:
        lab: Where the dial was learned.
        dial: The dial, calibrated.
        out: The folder.
        measured: What test measures, by setting: ``unedited``, ``trust -1``, ``trust +1``.
        settings: What decided the learning, and with what it was made.
    """
    about = {"method": "learned_scales", "chosen_on": "dev", "data": lab.prompts.digest}
    InterventionFile.of(
        [dial],
        name=f"{lab.name}: trust dial",
        model=lab.identity,
        provenance={**about, "relations": list(lab.prompts.relations), **settings},
        measured=measured,
    ).save(out / "dial.json")
    save_figure(dial_curve([vars(point) for point in dial.calibration]), out / "dial.html")
