"""How commands get what they work on: prompts, layers, files."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conflictscope.cli.options import BatchSizeOption, MaxNewTokensOption, Model, PromptsArgument
from interp.errors import UserError


@dataclass(frozen=True)
class Prompted(Model):
    """Prompts that a model answers, without an edit and with it."""

    file: PromptsArgument = None
    max_new_tokens: MaxNewTokensOption = 8
    batch_size: BatchSizeOption = 32

    def answer(self, edit: Any, save: Path | None) -> None:
        """Answer the prompts without and with an intervention file, and save that file if it is wanted."""
        from interp.generation import continue_greedily
        from interventions.base import applied

        def answers(texts: list[str]) -> list[str]:
            return continue_greedily(
                model, texts, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
            ).answers

        with prompt_batches(self.file, self.batch_size) as batches:
            model = self.load()
            edit.check(model)
            if save is not None:
                edit.save(save)
            for batch in batches:
                texts = [prompt.text for prompt in batch]
                plain = answers(texts)
                with applied(model, edit):
                    edited = answers(texts)
                write_lines(
                    {"id": prompt.id, "unedited": before, "edited": after}
                    for prompt, before, after in zip(batch, plain, edited, strict=True)
                )


def write_lines(rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as JSON lines to standard output."""
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


@contextmanager
def prompt_batches(file: Path | None, batch_size: int) -> Iterator[Iterator[list[Prompt]]]:
    """Read the prompts of a file, or of standard input, in batches.

    Raises:
        UserError: Before all else, if there are none.
    """
    stream = sys.stdin if file in (None, Path("-")) else file.open(encoding="utf-8")
    with stream:
        batches = read_prompts(stream, batch_size)
        first = next(batches, None)
        if first is None:
            raise UserError("There are no prompts; give a file with one a line, or pipe them in.")
        yield itertools.chain([first], batches)


class Prompt(NamedTuple):
    """A prompt and what its reader calls it."""

    id: str
    text: str


def read_prompts(lines: Iterable[str], batch_size: int) -> Iterator[list[Prompt]]:
    """Prompts from lines, each a text or a JSON object with ``prompt`` and maybe ``id``, a few at a time.

    Raises:
        UserError: If a line that starts like a JSON object is none with a prompt; the message names it. Or if the
            lines are no text.
    """
    batch: list[Prompt] = []
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            # Some editors begin a file with a byte order mark.
            batch.append(_prompt(line.removeprefix("\ufeff").rstrip("\n"), number))
            if len(batch) == batch_size:
                yield batch
                batch = []
    except UnicodeDecodeError as error:
        raise UserError(f"The prompts are not UTF-8 text ({error}); convert them.") from error
    if batch:
        yield batch


def _prompt(line: str, number: int) -> Prompt:
    if not line.lstrip().startswith("{"):
        return Prompt(str(number), line)
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"Line {number} is not valid JSON ({error}); mend or remove it.") from error
    if not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise UserError(f"Line {number} has no text in a field named prompt; add one.")
    return Prompt(str(row.get("id", number)), row["prompt"])


def layers_of(text: str | None) -> list[int] | None:
    """Read the layers that a text like ``0-9,12`` names.

    Raises:
        UserError: If it is not of that form.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--layers takes numbers and ranges like 0-9,12, not {text!r}.")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(layers))


def listed_layers(saes: Any) -> str:
    """List the layers of autoencoders, for a sentence."""
    return ", ".join(str(sae.layer) for sae in saes)


def columns_of(by: str, allowed: Sequence[str]) -> list[str]:
    """The columns that --by names, separated by commas.

    Raises:
        UserError: If one is none of those that a table can be broken down by.
    """
    columns = [column.strip() for column in by.split(",") if column.strip()]
    if unknown := [column for column in columns if column not in allowed]:
        raise UserError(f"--by cannot break down by {unknown[0]!r}; choose among {', '.join(allowed)}.")
    return columns


def check_parquet(path: Path) -> None:
    """Check that a path ends as a Parquet file's does.

    Raises:
        UserError: If it does not.
    """
    if path.suffix != ".parquet":
        raise UserError(f"--out is a Parquet file; give a name that ends in .parquet, not {path.name}.")
