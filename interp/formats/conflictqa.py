"""Read ConflictQA."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item, too_long
from interp.formats.row import Row, distinct


def _read(row: Row) -> list[Item]:
    """Memory is what the authors' model answered closed-book; both memories are passages that it wrote.

    The evidence that was found for either answer, where a row has it, is a context of its own.
    """
    memory, counter = row.text("memory_answer"), row.text("counter_answer")
    contexts = [
        Context("conflict", row.text("counter_memory"), (counter,)),
        Context("aligned", row.text("parametric_memory"), (memory,)),
    ]
    if row.has(found := "counter_memory_aligned_evidence"):
        contexts.append(Context("conflict", row.text(found), (counter,), "evidence"))
    if row.has(found := "parametric_memory_aligned_evidence"):
        contexts.append(Context("aligned", row.text(found), (memory,), "evidence"))
    return [Item(row.text("question"), distinct(memory), tuple(contexts), unusable=too_long(memory, counter))]


FORMAT = Format(
    "conflictqa",
    "ConflictQA",
    ("question", "memory_answer", "parametric_memory", "counter_answer", "counter_memory"),
    "Xie et al. 2023, arXiv 2305.13300",
    _read,
)
