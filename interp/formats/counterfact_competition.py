"""Read CounterFact, in the format of Competition of Mechanisms."""

from __future__ import annotations

import re

from interp.formats.items import Context, Format, Item, given_away
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    stem, prompt = row.text("base_prompt"), row.text("prompt")
    true, new = row.text("target_true"), row.text("target_new")
    told = prompt.removesuffix(stem)
    places = list(re.finditer(rf"(?<!\w){re.escape(new)}(?!\w)", told))
    if not prompt.endswith(stem) or not places:
        raise row.unexpected("prompt", f"a text that says {new!r} and ends with the base prompt {stem!r}")
    conflict = Context("conflict", prompt, (new,))
    aligned = Context("aligned", f"{told[: places[-1].start()]}{true}{told[places[-1].end() :]}{stem}", (true,))
    subject = row.text("subject")
    unusable = given_away(subject, stem, (true,), (new,))
    return [Item(stem, (true,), (conflict, aligned), subject, completion=True, unusable=unusable)]


FORMAT = Format(
    "counterfact-competition",
    "CounterFact, in the format of Competition of Mechanisms",
    ("base_prompt", "target_true", "target_new", "prompt", "subject"),
    "Ortu et al. 2024, arXiv 2402.11655",
    _read,
)
