"""Options of the commands whose work can be done on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interp.errors import UserError

if TYPE_CHECKING:
    from conflictscope.study.units import Executor, Worker

_option = partial(typer.Option, rich_help_panel="Cluster")


@dataclass(frozen=True)
class Cluster:
    """Where work is done."""

    ray: Annotated[
        str | None,
        _option(
            metavar="ADDRESS",
            help="Work on a Ray cluster: its address, auto for this machine's, or local to start one here.",
        ),
    ] = None
    workers: Annotated[int | None, _option(min=1, help="Workers; else one a GPU, or one a core.")] = None
    gpus: Annotated[float | None, _option(min=0, help="GPUs of each worker; else one, if any.")] = None

    def check(self) -> None:
        """See that options go together.

        Raises:
            UserError: If they do not.
        """
        if self.ray is None and (self.workers, self.gpus) != (None, None):
            raise UserError("--workers and --gpus belong to --ray; add --ray local, or leave them out.")

    def executor(self, make_worker: Callable[[], Worker], shared: Path) -> Executor:
        """What does units: a cluster, or this process.

        Args:
            make_worker: Makes what does units, in any process.
            shared: The folder that every machine must see.

        Raises:
            UserError: If options do not go together.
        """
        from conflictscope.study.cluster import on_ray
        from conflictscope.study.units import serial

        self.check()
        if self.ray is None:
            return serial(make_worker)
        return on_ray(make_worker, shared, address=self.ray, workers=self.workers, gpus=self.gpus)
