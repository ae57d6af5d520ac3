"""Do the units of a schedule on a Ray cluster: each worker holds one model on its device, and is given units of it.

A worker that is killed, or whose machine is lost, is replaced, and its units are given to others; what it had found is
in the records. Machines share the folder of the work, under the same path, and have this package and the model.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from conflictscope.study.units import Done, Executor, Schedule, Unit, Worker
from interp.errors import UserError

LOCAL = "local"
"""The address of a cluster that is started here, and stopped when the work is done."""

# Units that take less than this together are given to a worker at once, so that the driver is not asked for each.
_SECONDS_AT_ONCE, _MOST_AT_ONCE = 2.0, 64
_RECENT = 0.9
_SECONDS_TO_ANSWER = 10


def on_ray(
    make_worker: Callable[[], Worker],
    shared: Path,
    *,
    address: str = LOCAL,
    workers: int | None = None,
    gpus: float | None = None,
) -> Executor:
    """Do units on a Ray cluster.

    Args:
        make_worker: Makes what does units, in a process of the cluster.
        shared: A path that every machine must see.
        address: Where the cluster is: ``auto`` finds the one that this machine belongs to; see ``ray.init``.
        workers: How many; by default as many as there are devices, or cores where there are none.
        gpus: How many devices each worker has; by default one where there are some.

    Returns:
        The executor. It raises ``UserError`` if Ray is not installed, there is no cluster, or workers cannot live.
    """

    def run(schedule: Schedule) -> Iterator[Done]:
        with _cluster(address) as ray:
            yield from _Driver(ray, make_worker, shared, **_resources(ray, workers, gpus)).run(schedule)

    return run


def _resources(ray: Any, workers: int | None, gpus: float | None) -> dict[str, Any]:
    """How many workers there are, and what each has."""
    there = ray.cluster_resources()
    cores, devices = int(there.get("CPU", 1)), there.get("GPU", 0)
    each: float = (1 if devices else 0) if gpus is None else gpus
    most = int(devices // each) if each else cores
    if each and not most:
        raise UserError(f"The cluster has {devices:g} GPUs, and each worker wants {each:g}; give fewer --gpus.")
    count = workers or most
    return {"count": count, "num_gpus": each, "num_cpus": max(1, cores // count) if count <= cores else cores / count}


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Join a cluster, or start one, for the length of a ``with`` block.

    Raises:
        UserError: If Ray is not installed, or there is no cluster.
    """
    # Ray would send reports.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = import_module("ray")
    except ModuleNotFoundError:
        raise UserError("Ray is not installed; install it with: pip install 'conflictscope[ray]'") from None
    started = {"include_dashboard": False} if address == LOCAL else {}
    try:
        _check_there(address)
        ray.init(LOCAL if address == LOCAL else address, log_to_driver=False, logging_level="error", **started)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"There is no Ray cluster at {address} ({reason}); start one, or give --ray local.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_there(address: str) -> None:
    """See that something listens at an address, as Ray waits for minutes.

    Raises:
        OSError: If nothing does.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()


class _Holder:
    """What lives in a process of the cluster."""

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self._worker = make_worker()

    def run(self, units: list[Unit], shared: Path) -> list[Done] | str:
        """Do units; or the name of a machine that does not see the path."""
        return [self._worker.run(unit) for unit in units] if shared.exists() else socket.gethostname()


@dataclass
class _Driver:
    """Gives units to workers, and takes back what they did.

    Attributes:
        ray: The module, joined to a cluster.
        make_worker: Makes what does units.
        shared: A path that every machine must see.
        count: How many workers there are.
        num_cpus, num_gpus: What each of them has.
    """

    ray: Any
    make_worker: Callable[[], Worker]
    shared: Path
    count: int
    num_cpus: float
    num_gpus: float
    _held: dict[Any, tuple[str, str]] = field(default_factory=dict, init=False)
    _running: dict[Any, tuple[Any, list[Unit]]] = field(default_factory=dict, init=False)
    _seconds: dict[str, float] = field(default_factory=dict, init=False)
    _lost_in_a_row: int = field(default=0, init=False)

    def run(self, schedule: Schedule) -> Iterator[Done]:
        """Do all units; workers are told to end in any case."""
        idle = [self._new_worker() for _ in range(min(self.count, max(1, len(schedule.units) - schedule.n_done)))]
        try:
            while not schedule.is_finished:
                idle = [worker for worker in idle if not self._give(worker, schedule)]
                # A unit may have made room for more workers than were needed at first.
                while len(self._held) < self.count and schedule.n_ready:
                    if not self._give(worker := self._new_worker(), schedule):
                        idle.append(worker)
                if not self._running:
                    raise RuntimeError(
                        f"{len(schedule.units) - schedule.n_done} units wait for others that are not there."
                    )
                for worker, finished in self._finished(schedule):
                    idle.append(worker)
                    yield from finished
        finally:
            for worker in self._held:
                self.ray.kill(worker)

    def _new_worker(self) -> Any:
        resources = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        worker = self.ray.remote(**resources)(_Holder).remote(self.make_worker)
        self._held[worker] = ("", "")
        return worker

    def _give(self, worker: Any, schedule: Schedule) -> bool:
        """Give a worker units, if there are some."""
        holders = Counter(model for model, _ in self._held.values())
        units = schedule.take(self._held[worker], self._at_once(schedule), holders)
        if units:
            self._held[worker] = (units[0].model, units[0].study)
            self._running[worker.run.remote(units, self.shared)] = (worker, units)
        return bool(units)

    def _at_once(self, schedule: Schedule) -> int:
        """How many units a worker is given together: few where each takes long, or others would have none."""
        each = max(self._seconds.values(), default=_SECONDS_AT_ONCE)
        return max(1, min(_MOST_AT_ONCE, int(_SECONDS_AT_ONCE / max(each, 1e-6)), schedule.n_ready // (2 * self.count)))

    def _finished(self, schedule: Schedule) -> Iterator[tuple[Any, list[Done]]]:
        """Wait for workers; each that has finished, with what it did; one that was lost is replaced.

        Raises:
            UserError: If workers do not live, or do not see the folder.
        """
        self.ray.wait(list(self._running))
        ready, _ = self.ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for ref in ready:
            worker, units = self._running.pop(ref)
            try:
                finished = self.ray.get(ref)
            except self.ray.exceptions.RayError as error:
                self._lost(worker, error)
                schedule.lost(units)
                yield self._new_worker(), []
                continue
            if isinstance(finished, str):
                raise UserError(f"{finished} does not see {self.shared}; put --out where all machines find it.")
            self._lost_in_a_row = 0
            for done in finished:
                schedule.finish(done)
                step = schedule.units[done.id].step
                before = self._seconds.setdefault(step, done.seconds)
                self._seconds[step] = _RECENT * before + (1 - _RECENT) * done.seconds
            yield worker, finished

    def _lost(self, worker: Any, error: Exception) -> None:
        del self._held[worker]
        self._lost_in_a_row += 1
        if self._lost_in_a_row > 2 * self.count + 10:
            reason = " ".join(str(error).split())
            raise UserError(f"{self._lost_in_a_row} workers in a row were lost before one did anything: {reason}")
