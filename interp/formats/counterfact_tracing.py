"""Read counterfact-tracing."""

from __future__ import annotations

from interp.formats.items import Format, Item, told
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    """The prompt with an answer, as a statement, before the prompt."""
    prompt = row.text("prompt")
    item = told(prompt, prompt, row.text("target_true"), row.text("target_false"), row.text("subject"))
    return [item._replace(relation=row.text("relation_id") if row.has("relation_id") else "")]


FORMAT = Format(
    "counterfact-tracing",
    "counterfact-tracing",
    ("prompt", "target_true", "target_false", "subject"),
    "Nanda 2022, from Meng et al. 2022, arXiv 2202.05262",
    _read,
)
