"""Attribute or record a large data set in parts that may be made anywhere, and put them together.

The parts depend on the data alone, so that what is put together is, to the last digit, what one process makes.
"""

from __future__ import annotations

import hashlib
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
        parts: The folder for the prompts, and for what is made of parts of them; every machine sees it.
        options: What else decides the result, by name.
    """

    load: Callable[[], nn.Module]
    asked: Callable[[], tuple[nn.Module, ConflictSet]]
    parts: Path
    options: Mapping[str, Any]
    _held: tuple[nn.Module, ConflictSet] | None = field(default=None, init=False)

    def units(self, said: str) -> list[Unit]:
        """The units that are known before the prompts are.

        Args:
            said: All that decides the result: other words are other work.
        """
        digest = hashlib.sha256(said.encode()).hexdigest()[:12]
        return [Unit(f"{digest}/prompts", "", digest, "prompts")]

    def run(self, unit: Unit) -> Done:
        """Do one unit; what keeps it from being done is told in its result."""
        return timed(unit, self._run)

    def _run(self, unit: Unit, told: Callable[[str], None]) -> tuple[Unit, ...]:
        del told
        if unit.step == "prompts":
            self._held = model, prompts = self.asked()
            prompts.save(self.parts / _PROMPTS)
            write_json(self.parts / _NAME, prompts.name)
            count = self.begin(model, prompts)
            parts = [Unit(f"{unit.study}/part/{n}", "", unit.study, "part", str(n)) for n in range(count)]
            needs = tuple(one.id for one in parts)
            return (*parts, Unit(f"{unit.study}/merge", "", unit.study, "merge", "", needs))
        if self._held is None:
            loaded = ConflictSet.load(self.parts / _PROMPTS)
            self._held = self.load(), ConflictSet(read_json(self.parts / _NAME), loaded.examples)
        if unit.step == "part":
            self.make(*self._held, int(unit.what))
        else:
            self.merge(*self._held)
        return ()

    @abstractmethod
    def begin(self, model: nn.Module, prompts: ConflictSet) -> int:
        """Prepare what parts need, and count them."""

    @abstractmethod
    def make(self, model: nn.Module, prompts: ConflictSet, number: int) -> None:
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

    def begin(self, model: nn.Module, prompts: ConflictSet) -> int:
        """Find what each example is corrupted with, once for all blocks."""
        examples, _ = scorable(model, prompts)
        baseline, seed = self.options["baseline"], self.options["seed"]
        if baseline == "mean":
            raise UserError("A mean over all examples needs all of them at once; take --baseline zero, or no --ray.")
        write_json(self.parts / "partners.json", partners_of(examples, baseline, seed))
        return n_blocks(model, prompts)

    def make(self, model: nn.Module, prompts: ConflictSet, number: int) -> None:
        """Score one block."""
        partners = read_json(self.parts / "partners.json")
        options: dict[str, Any] = {"metrics": (self.metric,), "blocks": [number], "partners": partners}
        scores = path_patching(model, prompts, **self.options, **options)
        scores[self.metric].save(self._part(number))

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

    def begin(self, model: nn.Module, prompts: ConflictSet) -> int:
        """Make the folder, or see that it is one of this recording."""
        self._record(model, prompts, ())
        counted = {name: self.options[name] for name in ("positions", "dtype")}
        return ActivationStore.n_shards(model, prompts, self.sites(model), **counted)

    def make(self, model: nn.Module, prompts: ConflictSet, number: int) -> None:
        """Record one shard."""
        self._record(model, prompts, (number,))

    def merge(self, model: nn.Module, prompts: ConflictSet) -> None:
        """Clear what killed workers left half-written.

        Raises:
            UserError: If a shard is missing.
        """
        if not self._record(model, prompts, ()).complete:
            raise UserError(f"A shard of {self.out} is missing; run the same command again.")

    def _record(self, model: nn.Module, prompts: ConflictSet, only: tuple[int, ...]) -> ActivationStore:
        return ActivationStore.record(self.out, model, prompts, self.sites(model), **self.options, only=only)


def done_in_parts(work: Sharded, said: str, executor: Executor) -> None:
    """Do work in parts; what was killed goes on where it stopped.

    Args:
        work: The work.
        said: All that decides its result.
        executor: What does its units.

    Raises:
        UserError: If one of them cannot be done.
    """
    work.parts.mkdir(parents=True, exist_ok=True)
    journal = Journal(work.parts / "units.jsonl")
    schedule = Schedule(work.units(said), journal.read())
    for done in executor(schedule):
        journal.append([done])
        if done.failed is not None:
            raise UserError(done.failed)
