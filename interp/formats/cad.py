"""Read the inputs of CAD and AdaCAD."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row

_ORDERS = ("Using only the references listed above, answer the following question:", "Answer the following question:")


def _read(row: Row) -> list[Item]:
    """Two rows an item, one with the context and one without; the gold answer is that of the context.

    What a model remembers is not part of the data.
    """
    row.value("input_index")
    answers = row.answers("gold_answers")
    prompts = sorted((Row(fields, row.file).text("context_string") for fields in row.value("rows")), key=len)
    if len(prompts) != 2:
        raise row.unexpected("input_index", f"in two rows that follow each other, not in {len(prompts)}")
    parts = [_parts(prompt) for prompt in prompts]
    (nothing, question), (context, asked) = parts
    if nothing or not context or question != asked:
        raise row.unexpected("context_string", "a question after a context, and the same without")
    return [Item(question, (), (Context("conflict", context, answers),))]


def _parts(prompt: str) -> tuple[str, str]:
    """Context and question of a prompt."""
    before, _, rest = prompt.rpartition("Question:")
    for order in _ORDERS:
        before = before.strip().removesuffix(order)
    return before.strip(), rest.strip().removesuffix("Answer:").strip()


FORMAT = Format(
    "cad",
    "CAD, AdaCAD",
    ("input_index", "context_string", "gold_answers"),
    "Shi et al. 2023, arXiv 2305.14739; Wang et al. 2024, arXiv 2409.07394",
    _read,
    together="input_index",
)
