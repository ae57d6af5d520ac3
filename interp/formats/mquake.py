"""Read MQuAKE."""

from __future__ import annotations

from collections.abc import Mapping

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row, distinct


def _read(row: Row) -> list[Item]:
    """Questions of several hops; the contexts state the hops that were edited, as edited and as they are."""
    rewrites = [_rewrite(row, one) for one in row.value("requested_rewrite") or ()]
    if not rewrites:
        raise row.unexpected("requested_rewrite", "a list with at least one rewrite")
    memory = distinct(row.text("answer"), *row.aliases("answer_alias"))
    edited = distinct(row.text("new_answer"), *row.aliases("new_answer_alias"))
    contexts = (
        Context("conflict", " ".join(f"{stem} {new}." for _, stem, _, new in rewrites), edited),
        Context("aligned", " ".join(f"{stem} {true}." for _, stem, true, _ in rewrites), memory),
    )
    case = str(row.value("case_id"))
    return [
        Item(question, memory, contexts, rewrites[0][0], f"{len(rewrites)} edited", key=f"{case}.{number}")
        for number, question in enumerate(row.answers("questions"), 1)
    ]


def _rewrite(row: Row, rewrite: object) -> tuple[str, str, str, str]:
    """Subject, statement without its object, true object and new one."""
    fields = Row(rewrite) if isinstance(rewrite, Mapping) else None
    if fields is None or "{}" not in (prompt := fields.text("prompt")):
        raise row.unexpected("requested_rewrite", "a list of objects with a prompt that has {} for its subject")
    subject = fields.text("subject")
    return subject, prompt.replace("{}", subject), fields.text("target_true.str"), fields.text("target_new.str")


FORMAT = Format(
    "mquake",
    "MQuAKE",
    ("case_id", "requested_rewrite", "questions", "answer", "new_answer"),
    "Zhong et al. 2023, arXiv 2305.14795",
    _read,
)
