"""A run's folder: finished steps are kept, so that a run that is repeated or was killed reuses them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from interp.attribution.scores import HeadScores
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.files import read_json, write_json
from interp.inputs import INPUTS_VERSION

_T = TypeVar("_T")
_NOTHING = object()

Version = int | Sequence[int]


class Records:
    """Results of finished steps in a folder, each under a key made of everything that decides it.

    Part of the key is the version of the code that a step runs: the constants ``..._VERSION`` next to that code, which
    are raised when it would give other results. A step that runs several such pieces has all their versions.

    Args:
        folder: Where the results lie.
        **basis: What every step depends on: the model's fingerprint, for example. The version of how texts become a
            model's inputs is added.
    """

    def __init__(self, folder: Path, **basis: Any) -> None:
        self.folder = folder
        self._basis = {**basis, "inputs": INPUTS_VERSION}

    def json(self, step: str, depends_on: Any, compute: Callable[[], Any], *, version: Version) -> Any:
        """The JSON result of ``step``: read if it is there, else computed and kept."""
        path = self.place(step, depends_on, ".json", version=version)
        return self._kept(path, read_json, lambda path, result: write_json(path, result), compute)

    def usage(self, step: str, depends_on: Any, compute: Callable[[], UsageReport], *, version: Version) -> UsageReport:
        """The same for a usage report."""
        return self._kept(
            self.place(step, depends_on, ".parquet", version=version),
            lambda path: UsageReport(pl.read_parquet(path)),
            lambda path, report: report.save(path),
            compute,
        )

    def head_scores(
        self, step: str, depends_on: Any, compute: Callable[[], dict[Any, HeadScores]], *, version: Version
    ) -> dict[str, HeadScores]:
        """The same for head scores by metric; they are kept together in one folder."""

        def read(folder: Path) -> dict[str, HeadScores]:
            return {name: HeadScores.load(folder / f"{name}.parquet") for name in read_json(folder / "metrics.json")}

        def write(folder: Path, scores: dict[Any, HeadScores]) -> None:
            for name, values in scores.items():
                values.save(folder / f"{name}.parquet")
            # Written last: a folder without it is a step that did not finish.
            write_json(folder / "metrics.json", list(scores))

        return self._kept(self.place(step, depends_on, "", version=version), read, write, compute)

    def place(self, step: str, depends_on: Any, suffix: str, *, version: Version) -> Path:
        """The file of a step: another one for anything else that it depends on, and for another version of it."""
        key = json.dumps([self._basis, step, version, depends_on], sort_keys=True, default=str)
        return self.folder / f"{step}-{hashlib.sha256(key.encode()).hexdigest()[:12]}{suffix}"

    def _kept(
        self,
        path: Path,
        read: Callable[[Path], _T],
        write: Callable[[Path, _T], None],
        compute: Callable[[], _T],
    ) -> _T:
        if (known := _read_if_there(path, read)) is not _NOTHING:
            return known
        result = compute()
        # Another worker may have been faster, and others gone on from what it found.
        if (known := _read_if_there(path, read)) is not _NOTHING:
            return known
        write(path, result)
        return result


def _read_if_there(path: Path, read: Callable[[Path], Any]) -> Any:
    """What a file or folder holds; nothing where it is not there, or was damaged since it was written."""
    if path.exists():
        with contextlib.suppress(UserError, OSError, pl.exceptions.PolarsError):
            return read(path)
    return _NOTHING
