"""Read ConFiQA."""

from __future__ import annotations

import ast
import json
from typing import Any

from interp.formats.items import Context, Format, Item
from interp.formats.row import Row, distinct


def _read(row: Row) -> list[Item]:
    memory = distinct(row.text("orig_answer"), *row.aliases("orig_alias"))
    counterfactual = distinct(row.text("cf_answer"), *row.aliases("cf_alias"))
    contexts = (
        Context("conflict", row.text("cf_context"), counterfactual),
        Context("aligned", row.text("orig_context"), memory),
    )
    return [Item(row.text("question"), memory, contexts, *_first_hop(row))]


def _first_hop(row: Row) -> tuple[str, str]:
    """The subject that a chain of facts starts from, and its relations; empty where the row does not name them."""
    if not row.has("orig_path_labeled"):
        return "", ""
    path = row.value("orig_path_labeled")
    if isinstance(path, str):
        path = _literal(path)
    hops = [path] if isinstance(path, list | tuple) and len(path) == 3 and isinstance(path[0], str) else path
    if not (
        isinstance(hops, list | tuple)
        and hops
        and all(isinstance(hop, list | tuple) and len(hop) == 3 for hop in hops)
        and all(isinstance(part, str) and part.strip() for hop in hops for part in hop)
    ):
        raise row.unexpected("orig_path_labeled", "a list of (subject, relation, object)")
    return hops[0][0].strip(), " / ".join(hop[1].strip() for hop in hops)


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


FORMAT = Format(
    "confiqa",
    "ConFiQA",
    ("question", "orig_context", "cf_context", "orig_answer", "cf_answer"),
    "Bi et al. 2024, arXiv 2412.15280",
    _read,
)
