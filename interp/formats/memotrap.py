"""Read MemoTrap."""

from __future__ import annotations

import re
from collections.abc import Iterable

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row

# Where the stem begins: after an order to write or to translate something, or at the first option.
_MEMOTRAP_STEM = re.compile(r'Write .*?"[^"]*"[^":]*: |Translate .*?\nto:\n|.*?\n(?=A\. )', re.DOTALL)
_MEMOTRAP_OPTION = re.compile(r"^([A-Z])\. (.+)$", re.MULTILINE)


def _read(row: Row) -> list[Item]:
    """The instruction is the context; the class that it does not ask for is the memorised one.

    The multiple-choice part tells each event in eight ways that share only their options: these are the subject, so
    that no event is in two splits. The text of an option is an alias of its letter.
    """
    prompt, classes = row.text("prompt"), row.texts("classes")
    demanded = row.choice("answer_index", classes)
    if not (instruction := _MEMOTRAP_STEM.match(prompt)):
        raise row.unexpected("prompt", "an order to write or translate, or a question with options")
    stem = prompt[instruction.end() :]
    options = dict(_MEMOTRAP_OPTION.findall(stem))

    def named(choices: Iterable[str]) -> tuple[str, ...]:
        return tuple(text for choice in choices for text in (choice, options.get(choice)) if text)

    conflict = Context("conflict", prompt, named([demanded]))
    if not (memory := named(choice for choice in classes if choice != demanded)):
        raise row.unexpected("classes", "a list of different texts")
    return [Item(stem, memory, (conflict,), " / ".join(sorted(options.values())), completion=True)]


FORMAT = Format(
    "memotrap",
    "MemoTrap",
    ("prompt", "classes", "answer_index"),
    "Liu and Liu 2023, github.com/liujch1998/memo-trap",
    _read,
)
