"""Say what a comparison takes before anything is loaded: prompts, FLOPs and hours, from what was measured elsewhere.

What a method takes to choose is told in units of measuring one condition on test, which is known in FLOPs: so many
prompts of so many tokens, and answers to them. ``assets/costs.json`` holds what was measured of each method on the
default model; ``python -m benchmarks.costs`` writes it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from conflictscope.study.comparison import DEV_TEXTS, Comparing
from conflictscope.study.data import Prompts
from conflictscope.study.method import method_named
from conflictscope.study.setting import StudySetting
from conflictscope.study.units import Done, Unit
from interp.answers import COMPLETION_TOKENS
from interp.files import assets_directory, read_json
from interp.models import load_config, resolve_device
from interp.plan import Shapes
from interp.records import Records

# Tokens of a word of prose, which differ little between tokenizers.
_TOKENS_OF_A_WORD = 1.4
# Rows and columns of the product that says how fast this machine is, and for how long it is asked.
_ROWS, _SECONDS = 1024, 0.3
_PFLOP, _HOUR = 1e15, 3600


@dataclass(frozen=True)
class Load:
    """What a study takes.

    Attributes:
        tested: Prompts on test.
        tokens: Tokens of one of them, on average.
        flops: Of measuring one condition on test.
        steps: What each step takes, in units of that: ``prompts``, ``share``, ``choose`` by method, ``test``.
        tests: How many conditions are measured on test, about.
    """

    tested: int
    tokens: float
    flops: float
    steps: Mapping[tuple[str, str], float]
    tests: int

    @property
    def all_flops(self) -> float:
        """Of the whole study."""
        return self.flops * (sum(self.steps.values()) + self.tests)


def expected(comparing: Comparing) -> pl.DataFrame:
    """What each study takes at most, were all facts known, and what all take together.

    Hours are those of this machine's device, by how fast it multiplies.

    Raises:
        UserError: If a model's configuration or a data set cannot be read.
    """
    devices = {setting.model.device for setting in comparing.settings.values()}
    speeds = {name: flops_a_second(resolve_device(name)) * measured()["efficiency"] for name in devices}
    rows = []
    for setting in comparing.settings.values():
        speed = speeds[setting.model.device]
        load = load_of(setting, [method.name for method in comparing.plan.chosen_methods])
        rows.append(
            {
                "model": setting.model.name,
                "data": setting.data.name,
                "seed": str(setting.seed),
                "prompts": load.tested,
                "tokens": round(load.tokens),
                "units": len(load.steps) + load.tests + 2,
                "PFLOP": round(load.all_flops / _PFLOP, 2),
                "hours": round(load.all_flops / speed / _HOUR, 2),
            }
        )
    frame = pl.DataFrame(rows)
    together = {name: frame[name].sum() for name in ("prompts", "units", "PFLOP", "hours")}
    mean = round(float(frame["tokens"].mean() or 0))  # pyright: ignore[reportArgumentType]
    total = pl.DataFrame([{"model": "all", "data": "", "seed": "", "tokens": mean, **together}])
    return pl.concat([frame, total.select(frame.columns)])


def load_of(setting: StudySetting, methods: Iterable[str], shapes: Shapes | None = None) -> Load:
    """What a study takes at most.

    Args:
        setting: The study.
        methods: The names of its methods; one that was not measured takes as long as those that need the same.
        shapes: Those of the model; by default read from its configuration.
    """
    shapes = Shapes.of(load_config(setting.model.name)) if shapes is None else shapes
    tested, tokens = size(setting)
    names, known = list(methods), measured()
    used = {shared for name in names for shared in method_named(name).starts_from}
    steps = {("prompts", ""): known["prompts"]}
    steps |= {("share", name): sharing(name, known["share"]) for name in sorted({*used, DEV_TEXTS})}
    steps |= {("choose", name): choosing(name, known["choose"]) for name in names}
    flops = tested * shapes.answer_flops(max(1, round(tokens)), COMPLETION_TOKENS)
    return Load(tested, tokens, flops, steps, round(1 + known["tests"] * len(names)))


def sharing(name: str, known: Mapping[str, float]) -> float:
    """What it takes to make what methods share: as measured, or as long as the longest of these."""
    return known.get(name, max(known.values()))


def choosing(name: str, known: Mapping[str, float]) -> float:
    """What a method takes to choose: as measured, or as long as those that need the same, or the longest."""
    if name in known:
        return known[name]
    alike = [cost for other, cost in known.items() if method_named(other).needs == method_named(name).needs]
    return statistics.median(alike) if alike else max(known.values())


def size(setting: StudySetting) -> tuple[int, float]:
    """How many prompts test has at most, and the mean of their tokens, about."""
    prompts = _most(setting)
    words = [len(example.prompt.split()) for example in prompts.test]
    return len(words), _TOKENS_OF_A_WORD * statistics.mean(words)


def _most(setting: StudySetting) -> Prompts:
    # Nothing is asked, so that nothing is kept.
    with tempfile.TemporaryDirectory() as folder:
        return setting.prompts(None, Records(Path(folder)))


def measured() -> dict[str, Any]:
    """What was measured of steps and methods, in units of measuring one condition on test, and of the machine."""
    return read_json(assets_directory() / "costs.json")


def ratios(done: Mapping[str, Done], units: Mapping[str, Unit]) -> dict[str, Any]:
    """What steps and methods took in finished studies, in units of measuring one condition on test: medians of studies.

    Args:
        done: What was done, by unit.
        units: The units.
    """
    tests: dict[str, list[float]] = defaultdict(list)
    for name, one in done.items():
        if units[name].step == "test":
            tests[units[name].study].append(one.seconds)
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, one in done.items():
        unit = units[name]
        if unit.step in ("prompts", "share", "choose") and unit.study in tests:
            took[unit.step, unit.what].append(one.seconds / statistics.median(tests[unit.study]))
    medians = {place: round(statistics.median(values), 2) for place, values in took.items()}
    methods = {what: cost for (step, what), cost in medians.items() if step == "choose"}
    return {
        "prompts": medians["prompts", ""],
        "share": {what: cost for (step, what), cost in medians.items() if step == "share"},
        "choose": methods,
        "tests": round(statistics.median(len(some) for some in tests.values()) / len(methods), 2),
        "test_seconds": round(statistics.median(statistics.median(some) for some in tests.values()), 2),
    }


def flops_a_second(device: torch.device | str = "cpu") -> float:
    """How many FLOPs a second a device of this machine computes in a product of matrices, float32."""
    one = torch.rand(_ROWS, _ROWS, device=device)
    count, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < _SECONDS:
        # Its result is read, so that a device has finished.
        (one @ one)[0, 0].item()
        count += 1
    return count * 2 * _ROWS**3 / took
