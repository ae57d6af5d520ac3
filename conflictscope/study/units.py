"""Cut studies into units of work that may run anywhere, and hand them out.

A unit is a model, what it is asked, and one step of a study. All that it finds is kept in records under what decides
it, so that a unit may be killed and run again: it goes on where it stopped, and computes nothing that is known.

    prompts      ask what the model knows
    share        make one of the things that several methods start from: head scores, recorded states, ...
    choose       let dev choose of one method
    tests        list what is measured on test, once all methods are chosen: one more unit for each
    test         measure one condition on test
    record       write the study's record from all that is known

Attributing and recording are cut too: into prompts, parts of them, and a merge.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import logging
import os
import socket
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from interp.errors import Caution, UserError

Step = Literal["prompts", "share", "choose", "tests", "test", "record", "part", "merge"]

_log = logging.getLogger(__name__)

MOST_LOSSES = 20
"""How often a unit is given to another worker after its own was lost, before it is given up."""


@dataclass(frozen=True)
class Unit:
    """A unit of work.

    Attributes:
        id: Its name; the same for the same work.
        model: What a worker holds for it: the digest of the model's setting.
        study: Of which study: the digest of its setting.
        step: Which step.
        what: Of what: a method, what is shared, or a condition's folder.
        needs: The units that come before it.
        cost: How long it takes, roughly, relative to others; what takes longest goes first.
    """

    id: str
    model: str
    study: str
    step: Step
    what: str = ""
    needs: tuple[str, ...] = ()
    cost: float = 1.0


@dataclass(frozen=True)
class Done:
    """What a unit left besides what is in the records.

    Attributes:
        id: The unit.
        seconds: How long it took.
        worker: Who did it.
        new: Units that it found.
        said: Sentences about what was found.
        failed: Why it could not be done; ``None`` if it was.
        crashed: Whether that may be its worker's fault: an error that is not the user's.
    """

    id: str
    seconds: float
    worker: str = ""
    new: tuple[Unit, ...] = ()
    said: tuple[str, ...] = ()
    failed: str | None = None
    crashed: bool = False


class Worker(Protocol):
    """What does units."""

    def run(self, unit: Unit) -> Done:
        """Do one unit; errors are told in its result."""
        ...


Executor = Callable[["Schedule"], Iterator[Done]]
"""Does all units of a schedule, and tells of each as soon as it is done."""


class Schedule:
    """Which units are ready, which wait for others, and who should do which.

    A worker is given units of the study that it holds, else of the model that it holds, else of the model that has most
    to do for each worker that holds it. A unit that fails takes the rest of its study with it, and no other.
    """

    def __init__(self, units: Iterable[Unit] = (), done: Iterable[Done] = ()) -> None:
        self.units: dict[str, Unit] = {}
        self.seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self._done: set[str] = set()
        self._known = {one.id: one for one in done}
        self._waits: dict[str, int] = {}
        self._needed_by: dict[str, list[str]] = defaultdict(list)
        self._of_study: dict[str, list[str]] = defaultdict(list)
        self._ready: dict[str, dict[str, list[tuple[float, int, str]]]] = defaultdict(lambda: defaultdict(list))
        self._n_ready: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._number = itertools.count()
        self.add(units)

    @property
    def n_done(self) -> int:
        """How many units were done, or given up."""
        return len(self._done)

    @property
    def n_ready(self) -> int:
        """How many units could be done now."""
        return sum(self._n_ready.values())

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.n_done == len(self.units)

    def is_done(self, unit_id: str) -> bool:
        """Whether a unit was done, and not given up."""
        return unit_id in self._done and self.units[unit_id].study not in self.failed

    def add(self, units: Iterable[Unit]) -> None:
        """Take more units; those that were done before are done at once, with those that they found."""
        waiting = list(units)
        while waiting:
            new = [unit for unit in {unit.id: unit for unit in waiting}.values() if unit.id not in self.units]
            self.units |= {unit.id: unit for unit in new}
            waiting = []
            for unit in new:
                self._of_study[unit.study].append(unit.id)
                if (known := self._known.get(unit.id)) is not None:
                    self._done.add(unit.id)
                    self.seconds[unit.id] = known.seconds
                    waiting += known.new
                elif unit.study in self.failed:
                    self._done.add(unit.id)
            # After that, so that each is ready once.
            for unit in new:
                open_needs = [one for one in unit.needs if one not in self._done]
                self._waits[unit.id] = len(open_needs)
                for one in open_needs:
                    self._needed_by[one].append(unit.id)
                if unit.id in self._done:
                    self._release(unit.id)
                elif not open_needs:
                    self._push(unit)

    def take(
        self, held: tuple[str, str] = ("", ""), most: int = 1, holders: Mapping[str, int] | None = None
    ) -> list[Unit]:
        """Up to so many units of one study, for a worker that holds this model and this study; none if none is ready.

        Args:
            held: Model and study.
            most: How many at most.
            holders: How many workers hold each model.
        """
        counts, taken = holders or {}, list[Unit]()
        while self.n_ready and not taken:
            model, study = held
            if not self._n_ready[model]:
                model = max(self._n_ready, key=lambda one: self._n_ready[one] / (1 + counts.get(one, 0)))
            studies = self._ready[model]
            if study not in studies:
                study = max(studies, key=lambda one: len(studies[one]))
            queue = studies[study]
            while queue and len(taken) < most:
                *_, unit_id = heapq.heappop(queue)
                self._n_ready[model] -= 1
                # Those of a study that was given up stay in the queue.
                if unit_id not in self._done:
                    taken.append(self.units[unit_id])
            if not queue:
                del studies[study]
        return taken

    def finish(self, done: Done) -> None:
        """Note what a unit left: others become ready, or its study is given up."""
        if done.id in self._done:
            return
        self.seconds[done.id] = done.seconds
        if done.failed is not None:
            self._give_up(self.units[done.id].study, done.failed)
            return
        self._done.add(done.id)
        self._release(done.id)
        self.add(done.new)

    def lost(self, units: Iterable[Unit], reason: str = "", weight: int = 1) -> None:
        """Make units ready again whose worker was lost; one that was lost too often takes its study with it.

        Args:
            units: The units.
            reason: What is known of why.
            weight: For how many losses it counts.
        """
        for unit in units:
            self._losses[unit.id] += weight
            if unit.id in self._done:
                continue
            if self._losses[unit.id] > MOST_LOSSES:
                lost = f"{unit.step} {unit.what} lost its worker again and again; look at memory"
                self._give_up(unit.study, reason or lost)
            else:
                self._push(unit)

    def _push(self, unit: Unit) -> None:
        # What takes longest goes first; of others those that came first.
        heapq.heappush(self._ready[unit.model][unit.study], (-unit.cost, next(self._number), unit.id))
        self._n_ready[unit.model] += 1

    def _release(self, unit_id: str) -> None:
        """Make ready what waited for this unit alone."""
        for other in self._needed_by.pop(unit_id, ()):
            self._waits[other] -= 1
            if not self._waits[other] and other not in self._done:
                self._push(self.units[other])

    def _give_up(self, study: str, reason: str) -> None:
        self.failed.setdefault(study, reason)
        given_up = [unit_id for unit_id in self._of_study[study] if unit_id not in self._done]
        self._done.update(given_up)
        # Other studies may wait for what this one was to make for all; they will make it themselves.
        for unit_id in given_up:
            self._release(unit_id)


@dataclass
class Journal:
    """What was done, one JSON object a line, so that work that was killed goes on where it stopped.

    Attributes:
        path: The file.
    """

    path: Path
    _written: int = field(default=0, init=False)

    def read(self, has_record: Callable[[str], bool] = lambda _: False) -> list[Done]:
        """What was done and did not fail, but for merges and records that are no longer there; they are written anew.

        A line that was being written as its writer was killed is left out.

        Args:
            has_record: Whether the record that was written of a study is still there.
        """
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            record["new"] = tuple(Unit(**{**unit, "needs": tuple(unit["needs"])}) for unit in record["new"])
            found.append(Done(**{**record, "said": tuple(record["said"])}))

        def stands(one: Done) -> bool:
            study, _, step = one.id.rpartition("/")
            # Others may have written in their place.
            return one.failed is None and step != "merge" and (step != "record" or has_record(study))

        return [one for one in found if stands(one)]

    def append(self, done: Sequence[Done]) -> None:
        """Write what was done, and wait until it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as stream:
            stream.seek(0, os.SEEK_END)
            if not self._written and stream.tell():
                # Maybe half a line.
                stream.write(b"\n")
            for one in done:
                stream.write(json.dumps(dataclasses.asdict(one)).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._written += len(done)


def timed(unit: Unit, work: Callable[[Unit, Callable[[str], None]], Sequence[Unit]]) -> Done:
    """Do a unit, and tell how long it took and what it left; what keeps it from being done is told too.

    Args:
        unit: The unit.
        work: Does it: takes what takes sentences about what was found, and gives the units that it found.
    """
    start, said, new, failed, crashed = time.monotonic(), list[str](), (), None, False
    with warnings.catch_warnings(record=True) as cautions:
        warnings.simplefilter("once", Caution)
        try:
            new = tuple(work(unit, said.append))
        except UserError as error:
            failed = str(error)
        except Exception as error:
            # What is wrong with one unit is no reason to lose others.
            _log.exception("%s failed", unit.id)
            failed, crashed = f"{unit.step} {unit.what}: {type(error).__name__}: {error}", True
    noted = [f"Note: {one.message}" for one in cautions if issubclass(one.category, Caution)]
    worker = f"{socket.gethostname()}:{os.getpid()}"
    return Done(unit.id, time.monotonic() - start, worker, new, (*noted, *said), failed, crashed)


def serial(make_worker: Callable[[], Worker]) -> Executor:
    """Do one unit after the other, in this process."""

    def run(schedule: Schedule) -> Iterator[Done]:
        worker, held = make_worker(), ("", "")
        while taken := schedule.take(held):
            for unit in taken:
                held = (unit.model, unit.study)
                done = worker.run(unit)
                schedule.finish(done)
                yield done

    return run


def spent(schedule: Schedule) -> list[dict[str, Any]]:
    """Where the time went: seconds by step and method, the longest first."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    counts: Counter[tuple[str, str]] = Counter()
    for unit_id, took in schedule.seconds.items():
        unit = schedule.units[unit_id]
        place = (unit.step, unit.what if unit.step in ("choose", "share") else "")
        seconds[place] += took
        counts[place] += 1
    return [
        {"step": step, "what": what, "units": counts[step, what], "hours": round(took / 3600, 4)}
        for (step, what), took in sorted(seconds.items(), key=lambda pair: -pair[1])
    ]
