"""Read zsRE."""

from __future__ import annotations

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    """The question with an answer, as the context of the question itself and of its paraphrase.

    Memory is ``answers``; ``pred`` is what some model answered, often wrongly.
    """
    question, memory, new = row.text("src"), row.answers("answers"), row.text("alt")
    contexts = (
        Context("conflict", f"{question} {new}.", (new,)),
        Context("aligned", f"{question} {memory[0]}.", memory),
    )
    asked = [(question, "question"), *((text, "paraphrase") for text in row.answers("rephrase"))]
    return [Item(text, memory, contexts, row.text("subject"), template=template) for text, template in asked]


FORMAT = Format(
    "zsre", "zsRE", ("subject", "src", "rephrase", "alt", "answers"), "Levy et al. 2017, arXiv 1706.04115", _read
)
