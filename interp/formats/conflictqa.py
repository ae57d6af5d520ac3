"""Read ConflictQA."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item, too_long
from interp.formats.row import Row, distinct


def _read(row: Row) -> list[Item]:
    """Memory is what the authors' model answered closed-book; both memories are passages that it wrote.

    The evidence that was found for either answer, where a row has it, is a context of its own.
    """
    memory, counter = row.text("memory_answer"), row.text("counter_answer")
    fields = {
        "": ("counter_memory", "parametric_memory"),
        "evidence": ("counter_memory_aligned_evidence", "parametric_memory_aligned_evidence"),
    }
    contexts = [
        Context(kind, row.text(field), (answer,), template)
        for template, both in fields.items()
        for kind, field, answer in (("conflict", both[0], counter), ("aligned", both[1], memory))
        if not template or row.has(field)
    ]
    return [Item(row.text("question"), distinct(memory), tuple(contexts), unusable=too_long(memory, counter))]


FORMAT = Format(
    "conflictqa",
    "ConflictQA",
    ("question", "memory_answer", "parametric_memory", "counter_answer", "counter_memory"),
    "Xie et al. 2023, arXiv 2305.13300",
    _read,
)
