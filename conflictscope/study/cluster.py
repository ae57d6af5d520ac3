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
# An error counts as so many losses of a worker: a third one is the unit's own.
_WEIGHT_OF_A_CRASH = 8
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
    """How many workers there are, and what each has.

    Raises:
        UserError: If no machine has what a worker wants.
    """
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, devices = (sum(node.get(kind, 0) for node in there) for kind in ("CPU", "GPU"))
    each: float = (1 if devices else 0) if gpus is None else gpus
    fits = int(sum(node.get("GPU", 0) // each for node in there)) if each else max(1, int(cores))
    if not fits:
        raise UserError(f"No machine of the cluster has {each:g} GPUs, which each worker wants; give fewer --gpus.")
    # Where there are devices, more workers than fit on them would wait for ever.
    count = min(workers or fits, fits) if each else workers or fits
    return {"count": count, "gpus": each, "threads": max(1, int(cores) // count)}


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

    def sees(self, shared: Path) -> str | None:
        """The name of this machine, if it does not see the path."""
        return None if shared.exists() else socket.gethostname()

    def run(self, units: list[Unit]) -> list[Done]:
        """Do units, up to one that crashes."""
        finished = []
        for unit in units:
            finished.append(self._worker.run(unit))
            if finished[-1].crashed:
                break
        return finished


@dataclass
class _Driver:
    """Gives units to workers, and takes back what they did.

    Attributes:
        ray: The module, joined to a cluster.
        make_worker: Makes what does units.
        shared: A path that every machine must see.
        count: How many workers there are.
        gpus: How many devices each of them has.
        threads: How many threads each of them computes with.
    """

    ray: Any
    make_worker: Callable[[], Worker]
    shared: Path
    count: int
    gpus: float
    threads: int
    _held: dict[Any, tuple[str, str]] = field(default_factory=dict, init=False)
    _running: dict[Any, tuple[Any, list[Unit]]] = field(default_factory=dict, init=False)
    _seconds: dict[str, float] = field(default_factory=dict, init=False)
    _stillborn: int = field(default=0, init=False)

    def run(self, schedule: Schedule) -> Iterator[Done]:
        """Do all units; workers are told to end in any case."""
        try:
            for _ in range(self.count):
                self._start_worker()
            idle: list[Any] = []
            while not schedule.is_finished:
                idle = [worker for worker in idle if not self._give(worker, schedule)]
                if len(idle) == self.count:
                    left = len(schedule.units) - schedule.n_done
                    raise RuntimeError(f"{left} units wait for others that are not there.")
                for worker, finished in self._finished(schedule):
                    if worker is not None:
                        idle.append(worker)
                    yield from finished
        finally:
            for worker in self._held:
                self.ray.kill(worker)

    def _start_worker(self) -> None:
        """Start a worker; it is given units once it is there, as machines may be long in coming."""
        options = {"num_cpus": 0, "num_gpus": self.gpus, "scheduling_strategy": "SPREAD"}
        threads = {"env_vars": {"OMP_NUM_THREADS": str(self.threads)}}
        worker = self.ray.remote(**options, runtime_env=threads)(_Holder).remote(self.make_worker)
        self._held[worker] = ("", "")
        self._running[worker.sees.remote(self.shared)] = (worker, [])

    def _give(self, worker: Any, schedule: Schedule) -> bool:
        """Give a worker units, if there are some: several where they are short."""
        holders = Counter(model for model, _ in self._held.values())
        units = schedule.take(self._held[worker], 1, holders)
        if not units:
            return False
        held = self._held[worker] = (units[0].model, units[0].study)
        each = self._seconds.get(units[0].step, _SECONDS_AT_ONCE)
        more = min(_MOST_AT_ONCE, int(_SECONDS_AT_ONCE / max(each, 1e-6)), schedule.n_ready // (2 * self.count)) - 1
        if more > 0:
            units += schedule.take(held, more, holders)
        self._running[worker.run.remote(units)] = (worker, units)
        return True

    def _finished(self, schedule: Schedule) -> Iterator[tuple[Any, list[Done]]]:
        """Wait for workers; each that is free, if it lives, with what it did.

        Raises:
            UserError: If workers do not come to life, or do not see the folder.
        """
        self.ray.wait(list(self._running))
        ready, _ = self.ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for ref in ready:
            worker, units = self._running.pop(ref)
            try:
                found = self.ray.get(ref)
            except self.ray.exceptions.RayError as error:
                self._replace(worker, error if not units else None)
                schedule.lost(units)
                yield None, []
                continue
            if not units:
                if found is not None:
                    raise UserError(f"{found} does not see {self.shared}; put --out where all machines find it.")
                self._stillborn = 0
                yield worker, []
                continue
            finished = [done for done in found if not done.crashed]
            for done in finished:
                schedule.finish(done)
                step = schedule.units[done.id].step
                before = self._seconds.setdefault(step, done.seconds)
                self._seconds[step] = _RECENT * before + (1 - _RECENT) * done.seconds
            if len(finished) < len(units):
                # Maybe its device is broken, and would fail whatever it is given.
                self.ray.kill(worker)
                self._replace(worker)
                crashed, *others = units[len(finished) :]
                schedule.lost([crashed], str(found[-1].failed), _WEIGHT_OF_A_CRASH)
                schedule.lost(others, weight=0)
                yield None, finished
                continue
            yield worker, finished

    def _replace(self, worker: Any, stillborn: Exception | None = None) -> None:
        """Start another worker for one that was lost."""
        del self._held[worker]
        self._stillborn += stillborn is not None
        if stillborn is not None and self._stillborn > 2 * self.count + 10:
            reason = " ".join(str(stillborn).split())
            raise UserError(f"{self._stillborn} workers in a row were lost before they could begin: {reason}")
        self._start_worker()
