"""Load public data sets, or convert them to conflict data row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from interp.conflicts import ConflictSet, write_examples
from interp.errors import UserError
from interp.formats.items import Format
from interp.formats.known import FORMATS, format_names
from interp.formats.reading import Markup, OnError, Reading


class Loaded(NamedTuple):
    """What ``load_dataset`` gives back.

    Attributes:
        conflicts: The examples, in the order of the files; the set is named after the format.
        skipped: One sentence for each malformed row, with its place in the file.
        left_out: One sentence for each item that could not be measured, or copies another, with its place.
    """

    conflicts: ConflictSet
    skipped: list[str]
    left_out: list[str]


class Converted(NamedTuple):
    """What ``convert_dataset`` gives back.

    Attributes:
        examples: How many were written.
        skipped: As in ``Loaded``.
        left_out: As in ``Loaded``.
        reasons: How many items were left out for each reason.
    """

    examples: int
    skipped: list[str]
    left_out: list[str]
    reasons: Counter[str]


def load_dataset(
    path: str | Path | Sequence[str | Path],
    format: str,
    *,
    on_error: OnError = "stop",
    seed: int = 0,
    markup: Markup = "keep",
) -> Loaded:
    """Read a data set from local files.

    An id is template, row number (CounterFact: ``case_id``) and kind; it does not change when other rows are skipped.
    Of several files, the name stands before the number. Subjects that differ in spelling alone (``subject_key``) get
    the first spelling.

    Args:
        path: A ``.json`` (an array, or one object a line), ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file, or
            several.
        format: One of ``format_names()``.
        on_error: What to do with a row that cannot be read: ``stop`` raises, ``skip`` reports it in the result.
        seed: Decides the splits, which are by subject, or by question where rows name no subject.
        markup: What becomes of tags, entities and split punctuation in contexts, questions and answers: ``keep``
            leaves them as published evaluations do, ``clean`` takes them out (``interp.formats.markup.cleaned``).

    Raises:
        UserError: If the format is not known, a file cannot be read, nothing is left, or a row is bad.
    """
    reading = Reading(_paths(path), format_named(format), on_error, seed, markup)
    examples = tuple(reading.examples())
    return Loaded(ConflictSet(format, examples), reading.skipped, reading.left_out)


def convert_dataset(
    path: str | Path | Sequence[str | Path],
    format: str,
    out: str | Path,
    *,
    on_error: OnError = "stop",
    seed: int = 0,
    markup: Markup = "keep",
) -> Converted:
    """Write the examples of a data set as conflict data, row by row: what ``load_dataset(...).conflicts.save`` writes.

    Args:
        path: As for ``load_dataset``.
        format: One of ``format_names()``.
        out: The JSON lines file to write, atomically.
        on_error: As for ``load_dataset``.
        seed: Decides the splits.
        markup: As for ``load_dataset``.

    Raises:
        UserError: As ``load_dataset`` does, or if ``out`` is one of the files to read.
    """
    paths = _paths(path)
    if same := [file for file in paths if Path(out).exists() and file.exists() and file.samefile(out)]:
        raise UserError(f"{out} is to be written, but {same[0]} is read from it; give another name to write to.")
    reading = Reading(paths, format_named(format), on_error, seed, markup)
    written = write_examples(out, reading.examples())
    return Converted(written, reading.skipped, reading.left_out, reading.reasons)


def format_named(format: str) -> Format:
    """The public format of this name.

    Raises:
        UserError: If there is none; the message lists those there are.
    """
    if format not in FORMATS:
        raise UserError(f"The format {format!r} is not known; known are {', '.join(format_names())}.")
    return FORMATS[format]


def _paths(path: str | Path | Sequence[str | Path]) -> list[Path]:
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    if not paths:
        raise UserError("There is no file to read; give one at least.")
    if repeated := [name for name, count in Counter(one.stem for one in paths).items() if count > 1]:
        raise UserError(
            f"Two of the files are called {repeated[0]}; ids carry the names of files, so rename one or leave it out."
        )
    return paths
