"""Show how far long work is: all progress bars are made here, and can be turned off here.

A bar is shown on standard error, where that is a terminal or a notebook, and vanishes when the work is done. With
``CONFLICTSCOPE_PROGRESS=off`` in the environment there is none. What a bar would say is logged too, as information.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

SWITCH = "CONFLICTSCOPE_PROGRESS"

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
    # Where neither is the case, each bar would leave an empty line.
    nowhere = not (console.is_interactive or console.is_jupyter)
    with Progress(console=console, transient=True, disable=nowhere) as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


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
