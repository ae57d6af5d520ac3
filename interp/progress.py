"""Show how far long work is: all progress bars are made here, and can be turned off here.

A bar is shown on standard error, where that is a terminal or a notebook, and vanishes when the work is done. Elsewhere,
as in a log, a line says every half minute what is done and how far it is. With ``CONFLICTSCOPE_PROGRESS=off`` in the
environment there is neither. What a bar would say is logged too, as information.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

SWITCH = "CONFLICTSCOPE_PROGRESS"

_EVERY = 30.0
"""Seconds between two lines, of all work together."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def bars_shown() -> bool:
    """Say whether bars are shown at all: unless ``$CONFLICTSCOPE_PROGRESS`` is ``off``."""
    return os.environ.get(SWITCH, "on") != "off"


@contextmanager
def counted(label: str | None, total: int | None = None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar for the length of a ``with`` block, which is told how many more are done.

    Args:
        label: What is done; ``None`` shows no bar.
        total: How many there are to do; ``None`` where there is nothing to count, and only time passes.
        done: How many are done already.
    """
    if label is not None:
        _log.info(label)
    if label is None or not bars_shown():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not (console.is_interactive or console.is_jupyter):
        yield _Lines(console, label, total, done).advance
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


class _Lines:
    """Says how far work is, in a line now and then."""

    # Since the process started, or since the last line.
    last: ClassVar[float] = time.monotonic()

    def __init__(self, console: Console, label: str, total: int | None, done: int) -> None:
        self._console, self._label, self._total, self._done = console, label, total, done
        self.advance(0)

    def advance(self, count: int) -> None:
        """Count what is done."""
        self._done += count
        if (now := time.monotonic()) - _Lines.last >= _EVERY:
            _Lines.last = now
            far = f": {self._done} of {self._total}" if self._total is not None else ""
            self._console.print(f"{self._label}{far}", markup=False, highlight=False, soft_wrap=True)


def tracked(items: Iterable[_T], label: str | None) -> Iterator[_T]:
    """Go through items with a bar.

    Args:
        items: What is gone through.
        label: What is done; ``None`` shows no bar.
    """
    with counted(label, len(items) if isinstance(items, Sized) else None) as advance:
        for item in items:
            yield item
            advance(1)
