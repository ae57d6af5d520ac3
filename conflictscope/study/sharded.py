"""Attribute or record a large data set in parts that may be made anywhere, and put them together.

The parts depend on the data alone, so that what is put together is, to the last digit, what one process makes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from conflictscope.study.units import Done, Executor, Journal, Schedule, Unit, timed
from interp.activation_store import ActivationStore
from interp.activations import sites_of
from interp.attribution.examples import scorable
from interp.attribution.path_patching import Metric, n_blocks, partners_of, path_patching
from interp.attribution.scores import HeadScores
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.files import read_json, write_json

_PROMPTS, _NAME = "prompts.jsonl", "name.json"


@dataclass
class Sharded(ABC):
    """Work on a data set that is done in parts.

    Attributes:
        load: Loads the model.
        asked: Loads the model, and makes the prompts.
        parts: The folder for the prompts, and for what is made of parts of them, of this work alone; every machine sees
            it.
        options: What else decides the result, by name.
    """

    load: Callable[[], nn.Module]
    asked: Callable[[], tuple[nn.Module, ConflictSet]]
    parts: Path
    options: Mapping[str, Any]
    _held: tuple[nn.Module, ConflictSet] | None = field(default=None, init=False)

    def run(self, unit: Unit) -> Done:
        """Do one unit; what keeps it from being done is told in its result."""
        return timed(unit, self._run)

    def _run(self, unit: Unit, told: Callable[[str], None]) -> tuple[Unit, ...]:
        del told
        if unit.step == "prompts":
            self._held = model, prompts = self.asked()
            begun = self.begin(model, prompts)
            prompts.save(self.parts / _PROMPTS)
            write_json(self.parts / _NAME, prompts.name)
            parts = [Unit(f"{unit.study}/part/{what}", "", unit.study, "part", what) for what in begun]
            needs = tuple(one.id for one in parts)
            return (*parts, Unit(f"{unit.study}/merge", "", unit.study, "merge", "", needs))
        if self._held is None:
            loaded = ConflictSet.load(self.parts / _PROMPTS)
            self._held = self.load(), ConflictSet(read_json(self.parts / _NAME), loaded.examples)
        if unit.step == "part":
            self.make(*self._held, unit.what)
        else:
            self.merge(*self._held)
        return ()

    @abstractmethod
    def begin(self, model: nn.Module, prompts: ConflictSet) -> Sequence[str]:
        """Prepare what parts need, and name them."""

    @abstractmethod
    def make(self, model: nn.Module, prompts: ConflictSet, part: str) -> None:
        """Make one part."""

    @abstractmethod
    def merge(self, model: nn.Module, prompts: ConflictSet) -> None:
        """Put all parts together."""


@dataclass
class ShardedAttribution(Sharded):
    """Path patching in blocks of examples; the scores go to a file.

    Attributes:
        out: The file, see ``HeadScores.save``.
        metric: What is attributed.
    """

    out: Path = Path("heads.parquet")
    metric: Metric = "logit_diff"

    def begin(self, model: nn.Module, prompts: ConflictSet) -> Sequence[str]:
        """Find what each example is corrupted with, once for all blocks."""
        examples, _ = scorable(model, prompts)
        baseline, seed = self.options["baseline"], self.options["seed"]
        if baseline == "mean":
            raise UserError("A mean over all examples needs all of them at once; take --baseline zero, or no --ray.")
        write_json(self.parts / "partners.json", partners_of(examples, baseline, seed))
        return [str(number) for number in range(n_blocks(model, prompts))]

    def make(self, model: nn.Module, prompts: ConflictSet, part: str) -> None:
        """Score one block."""
        partners = read_json(self.parts / "partners.json")
        options: dict[str, Any] = {"metrics": (self.metric,), "blocks": [int(part)], "partners": partners}
        scores = path_patching(model, prompts, **self.options, **options)
        scores[self.metric].save(self._part(int(part)))

    def merge(self, model: nn.Module, prompts: ConflictSet) -> None:
        """Put the blocks together in their order."""
        blocks = range(n_blocks(model, prompts))
        HeadScores.merged([HeadScores.load(self._part(number)) for number in blocks]).save(self.out)

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:05d}.parquet"


@dataclass
class ShardedRecording(Sharded):
    """A recording whose shards are made apart.

    Attributes:
        out: The folder of the recording.
        sites: Names the sites of a model that are recorded.
    """

    out: Path = Path("recording")
    sites: Callable[[nn.Module], Sequence[str]] = sites_of

    def begin(self, model: nn.Module, prompts: ConflictSet) -> Sequence[str]:
        """Make the folder, or see that it is one of this recording; say which prompts each shard holds."""
        self._record(model, prompts, {})
        decided = {name: self.options[name] for name in ("positions", "dtype")}
        shards = ActivationStore.shard_prompts(model, prompts, self.sites(model), **decided)
        return [f"{number}:{held.start}:{held.stop}" for number, held in enumerate(shards)]

    def make(self, model: nn.Module, prompts: ConflictSet, part: str) -> None:
        """Record one shard."""
        number, start, stop = map(int, part.split(":"))
        self._record(model, prompts, {number: range(start, stop)})

    def merge(self, model: nn.Module, prompts: ConflictSet) -> None:
        """Clear what killed workers left half-written.

        Raises:
            UserError: If a shard is missing.
        """
        if not self._record(model, prompts, {}).complete:
            raise UserError(f"A shard of {self.out} is missing; run the same command again.")

    def _record(self, model: nn.Module, prompts: ConflictSet, only: Mapping[int, range]) -> ActivationStore:
        return ActivationStore.record(self.out, model, prompts, self.sites(model), **self.options, only=only)


def done_in_parts(work: Sharded, executor: Executor) -> None:
    """Do work in parts; what was killed goes on where it stopped.

    Raises:
        UserError: If one of them cannot be done.
    """
    work.parts.mkdir(parents=True, exist_ok=True)
    journal = Journal(work.parts / "units.jsonl")
    name = work.parts.name
    schedule = Schedule([Unit(f"{name}/prompts", "", name, "prompts")], journal.read())
    for done in executor(schedule):
        journal.append([done])
        if done.failed is not None:
            raise UserError(done.failed)
