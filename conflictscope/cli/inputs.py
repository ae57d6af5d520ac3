"""How commands get what they work on: models, data, prompts, layers."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from conflictscope.cli.options import DEFAULT_RELATION
from interp.errors import UserError


def model_and_data(
    model: str, relation: list[str] | None, data: Path | None, seed: int, device: str, dtype: str
) -> tuple[Any, Any]:
    """Load the model, and load conflict data from a file or build it from what the model knows.

    Raises:
        UserError: If both a file and relations are given, or one of them cannot be loaded.
    """
    from interp.conflicts import ConflictSet
    from interp.facts import build_conflicts, known_facts, relation_named
    from interp.models import load_model

    if data is not None and relation:
        raise UserError("Give --data or --relation, not both.")
    conflicts = None if data is None else ConflictSet.load(data)
    names = [relation_named(name).name for name in relation or [DEFAULT_RELATION]]
    bridge = load_model(model, device=device, dtype=dtype)
    if conflicts is None:
        facts = {name: known_facts(bridge, name, progress=f"Closed-book: {name}") for name in names}
        conflicts = build_conflicts(facts, seed=seed)
    return bridge, conflicts


def answer_edited(
    edit: Any,
    file: Path | None,
    save: Path | None,
    model: str,
    max_new_tokens: int,
    batch_size: int,
    device: str,
    dtype: str,
) -> None:
    """Answer prompts without and with an intervention file, and save that file if it is wanted."""
    from interp.generation import continue_greedily
    from interp.models import load_model
    from interventions.base import applied

    with prompt_batches(file, batch_size) as batches:
        bridge = load_model(model, device=device, dtype=dtype)
        edit.model.check(bridge)
        if save is not None:
            edit.save(save)
        for batch in batches:
            texts = [prompt.text for prompt in batch]
            plain = continue_greedily(bridge, texts, max_new_tokens=max_new_tokens, batch_size=batch_size).answers
            with applied(bridge, edit):
                edited = continue_greedily(bridge, texts, max_new_tokens=max_new_tokens, batch_size=batch_size).answers
            for prompt, before, after in zip(batch, plain, edited, strict=True):
                sys.stdout.write(json.dumps({"id": prompt.id, "unedited": before, "edited": after}) + "\n")
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


def check_parquet(path: Path) -> None:
    """Check that a path ends as a Parquet file's does.

    Raises:
        UserError: If it does not.
    """
    if path.suffix != ".parquet":
        raise UserError(f"--out is a Parquet file; give a name that ends in .parquet, not {path.name}.")
