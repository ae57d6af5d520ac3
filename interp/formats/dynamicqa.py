"""Read DynamicQA."""

from __future__ import annotations

import re

from interp.formats.items import INSIDE_A_WORD, Context, Format, Item, inside_a_word
from interp.formats.row import Row, distinct

_PARTS = ("static", "temporal", "disputable")


def _read(row: Row) -> list[Item]:
    """The disputable part has no placeholder: its contexts say ``obj`` themselves.

    The parts, which lie in files of these names, are static, temporal and disputable facts.
    """
    obj, replacement, context = row.text("obj"), row.text("replace_name"), row.text("context")
    place = r"\[ENTITY\]" if "[ENTITY]" in context else rf"(?<!\w){re.escape(obj)}(?!\w)"
    if not re.search(place, context):
        raise row.unexpected("context", f"a text with [ENTITY] or {obj!r} in it")
    memory = distinct(obj, *row.aliases("possible_answers"))
    contexts = (
        Context("conflict", re.sub(place, lambda _: replacement, context), (replacement,)),
        Context("aligned", re.sub(place, lambda _: obj, context), memory),
    )
    unusable = INSIDE_A_WORD if inside_a_word("[ENTITY]", context) else ""
    relation = row.text("prop") if row.has("prop") else ""
    part = next((part for part in _PARTS if row.file.lower().startswith(part)), "")
    return [Item(row.text("question"), memory, contexts, row.text("subj"), relation, part, unusable=unusable)]


FORMAT = Format(
    "dynamicqa",
    "DynamicQA",
    ("subj", "obj", "question", "context", "replace_name"),
    "Marjanović et al. 2024, arXiv 2407.17023",
    _read,
)
