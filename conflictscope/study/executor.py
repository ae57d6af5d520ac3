"""Measure conditions here, or each in a fresh process from files alone.

The unit of work is a model, what is asked, and a condition. Everything that decides a unit's result is in its folder,
and results are kept in the study's records under what decides them: a unit may run anywhere, any number of times, and
what was killed goes on where it stopped. Whoever has many machines runs ``run_unit`` there, for example as a Ray task.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from conflictscope.study.condition import Condition
from conflictscope.study.measure import Reading, Result, measure
from interp.anatomy import BLUEPRINTS, SHIPPED
from interp.blueprints import register
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.files import read_json, write_json
from interp.fingerprints import fingerprint
from interp.inputs import BATCH_TOKENS
from interp.models import load_model
from interp.proposal import written
from interp.records import Records

if TYPE_CHECKING:
    from conflictscope.study.lab import Lab

_BLUEPRINT = "blueprint.json"

Executor = Callable[["Lab", Sequence[Condition]], None]
"""Sees that conditions are measured and their results are in the lab's records."""


@dataclass
class UnitBench:
    """What a unit is measured on; see ``conflictscope.study.measure.Bench``."""

    model: nn.Module
    asked: ConflictSet
    records: Records
    seed: int
    few: InitVar[bool] = False
    reading: Reading = field(init=False)

    def __post_init__(self, few: bool) -> None:
        self.reading = Reading(self.model, self.asked, few=few)


def serial(lab: Lab, conditions: Sequence[Condition]) -> None:
    """Measure one condition after the other, in this process."""
    for condition in conditions:
        measure(lab, condition)


def in_processes(lab: Lab, conditions: Sequence[Condition]) -> None:
    """Measure each condition in a fresh process that loads the model anew, one after the other.

    Raises:
        UserError: If a process fails; what others measured is kept.
    """
    for condition in conditions:
        folder = write_unit(lab, condition)
        done = subprocess.run([sys.executable, "-m", __name__, folder], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"{condition.name} could not be measured in {folder}: {reason}")


def write_unit(lab: Lab, condition: Condition) -> Path:
    """Write all that decides a unit to a folder of its own below the lab's records."""
    folder = lab.records.folder / "units" / f"{lab.asked.digest[:12]}-{condition.digest or 'unedited'}"
    condition.save(folder, lab.identity)
    lab.asked.save(folder / "asked.jsonl")
    anatomy = lab.anatomy
    network: Any = anatomy.model
    # The same way of computing attention, so that the same digits come out.
    attention = {"attention": network.config._attn_implementation}
    loaded_with = {**getattr(network, "loaded_with", {}), **attention}
    about = {
        "model": lab.name,
        "device": "auto" if loaded_with.get("device_map") else str(anatomy.device),
        "dtype": str(anatomy.dtype).removeprefix("torch."),
        "batch_tokens": getattr(network, "batch_tokens", BATCH_TOKENS),
        "loaded_with": loaded_with,
    }
    if anatomy.architecture not in SHIPPED:
        write_json(folder / _BLUEPRINT, written(anatomy.architecture, BLUEPRINTS[anatomy.architecture]))
    write_json(folder / "unit.json", {**about, "seed": lab.seed, "few": lab.quick})
    return folder


def run_unit(folder: Path) -> Result:
    """Measure the unit in a folder, from its files alone; its result goes to the records that the folder lies in.

    Raises:
        UserError: If something cannot be read or does not fit.
    """
    unit = read_json(folder / "unit.json")
    # Methods register the kinds of prompting and decoding that a condition may name.
    from conflictscope.study.method import registered

    registered()
    if (folder / _BLUEPRINT).is_file():
        register(folder / _BLUEPRINT)
    where = {key: unit[key] for key in ("device", "dtype", "batch_tokens")}
    model = load_model(unit["model"], **where, **unit["loaded_with"])
    records = Records(folder.parents[1], model=fingerprint(model))
    asked = ConflictSet.load(folder / "asked.jsonl")
    return measure(UnitBench(model, asked, records, unit["seed"], unit["few"]), Condition.load(folder))


if __name__ == "__main__":
    run_unit(Path(sys.argv[1]))
