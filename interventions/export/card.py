"""Write the card of an exported edit: what it was made from, what it changes, and what was measured of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from interventions.config import InterventionFile

PROMPTS = "prompts.json"
"""What an exported folder calls the prompts that ``verify`` asks."""


def card(
    file: InterventionFile,
    model: str,
    about: str,
    own: Mapping[str, str | int],
    *,
    measured: Mapping[str, Any],
    tags: Sequence[str] = (),
    library: str = "transformers",
) -> Iterator[str]:
    """Give the lines of a card in Markdown, with the head that model hubs read.

    Args:
        file: The intervention file, at its setting.
        model: What the base model was loaded by.
        about: What was written, in a sentence or two.
        own: What is said in the table of this form alone.
        measured: What was measured of the edit.
        tags: For the hub, besides our own.
        library: For the hub: what loads it.
    """
    dials = file.dials
    kinds = ", ".join(f"`{kind}`" for kind in dict.fromkeys(entry.kind for entry in file.interventions))
    yield from (
        "---",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(('conflictscope', *tags))}]",
        "---",
        "",
        f"# {file.name}",
        "",
        about,
        "",
        "| | |",
        "|---|---|",
        f"| made from | `{model}` |",
        f"| intervention file | {file.name} |",
    )
    if file.towards is not None:
        yield f"| strengthens | {file.towards} |"
    yield f"| kinds of change | {kinds} |"
    yield from (f"| trust, from -1 (memory) to 1 (context) | {dial.trust:+g} |" for dial in dials)
    yield from (f"| {what} | {value} |" for what, value in own.items())
    for dial in dials:
        if dial.calibration:
            yield from (
                "",
                "Conflict prompts answered from memory and from the context, by the first token, on dev:",
                "",
                "| trust | memory | context |",
                "|---:|---:|---:|",
            )
            yield from (f"| {p.trust:+g} | {p.memory_rate:.3f} | {p.context_rate:.3f} |" for p in dial.calibration)
    if measured:
        yield from ("", "Measured when the intervention file was made, not with this:", "")
        yield from ("```json", json.dumps(measured, indent=2, ensure_ascii=False), "```")
