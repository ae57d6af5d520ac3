"""Write tasks of lm-evaluation-harness from conflict data: damage and gain of an edit, measured without a network.

    conflictscope_closed_book      questions alone; the right answer is memory's
    conflictscope_aligned          with a context that says the same
    conflictscope_irrelevant       with a context about something else
    conflictscope_conflict         with a context that says otherwise, whose answer counts as the right one
    conflictscope_text             neutral texts, whose perplexity is measured

All but the last are multiple choice among answers that the data gives to questions of the same relation. An edit that
does no harm leaves all but the fourth as they are.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from interp.conflicts import ConflictExample, ConflictSet, ContextKind, subject_key
from interp.errors import UserError
from interp.evaluation import neutral_texts
from interp.files import atomic_directory, write_json
from interp.inputs import joins_at_once

TASKS: dict[ContextKind, str] = {
    "none": "conflictscope_closed_book",
    "aligned": "conflictscope_aligned",
    "irrelevant": "conflictscope_irrelevant",
    "conflict": "conflictscope_conflict",
}
"""The tasks of questions, by the kind of their contexts."""
TEXT = "conflictscope_text"
"""The task of neutral texts."""
CHOICES = 4
"""How many answers a question has, where there are as many."""
_VERSION = 1.0


def write_tasks(folder: str | Path, conflicts: ConflictSet, *, seed: int = 0) -> dict[str, int]:
    """Write a new folder of tasks for ``lm_eval --include_path``; all together are the group ``conflictscope``.

    The harness reads the questions from where the folder is written, so that it has to be written again elsewhere.

    Args:
        folder: The folder; it must not exist.
        conflicts: The questions; those with no other answers to choose from are left out.
        seed: Of the choice and the order of answers.

    Returns:
        How many questions or texts each task has, by its name; a kind without questions gives no task.

    Raises:
        UserError: If there is no question, or the folder exists.
    """
    others = _answers(conflicts)
    questions: dict[str, list[dict[str, Any]]] = {
        name: list(_questions(conflicts.select(kind=kind), others, seed)) for kind, name in TASKS.items()
    }
    documents = {name: rows for name, rows in questions.items() if rows}
    if not documents:
        raise UserError(
            f"{conflicts.name} has no question with several answers to choose from; give data with more questions of a "
            "relation."
        )
    documents[TEXT] = [{"text": text} for text in neutral_texts()]
    target = Path(folder).resolve()
    with atomic_directory(folder) as written:
        for name, rows in documents.items():
            (written / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
            # JSON is YAML too.
            write_json(written / f"{name}.yaml", _task(name, target / f"{name}.jsonl"))
        write_json(written / "conflictscope.yaml", {"group": "conflictscope", "task": list(documents)})
    return {name: len(rows) for name, rows in documents.items()}


def _task(name: str, rows: Path) -> dict[str, Any]:
    """The harness's description of a task."""
    if name == TEXT:
        asked = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        metrics = {"word_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
    else:
        asked = {"output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_target": "right"}
        # What stands between a prompt and its answer is in the choices.
        asked |= {"doc_to_choice": "choices", "target_delimiter": ""}
        metrics = {"acc": "mean", "acc_norm": "mean"}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        **asked,
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": name != TEXT}
            for metric, aggregation in metrics.items()
        ],
        "metadata": {"version": _VERSION},
    }


def _answers(conflicts: ConflictSet) -> Mapping[str, Sequence[str]]:
    """The answers that the data gives to questions of each relation, once each."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for example in conflicts:
        for answers in (example.memory_answers, example.context_answers):
            for answer in answers[:1]:
                found[example.relation].setdefault(subject_key(answer), answer)
    return {relation: list(answers.values()) for relation, answers in found.items()}


def _questions(conflicts: ConflictSet, others: Mapping[str, Sequence[str]], seed: int) -> Iterator[dict[str, Any]]:
    for example in conflicts:
        right, wrong = example.memory_answers, ()
        if example.kind == "conflict":
            right, wrong = example.context_answers, example.memory_answers
        choices = [right[0], *wrong[:1], *_drawn(example, others[example.relation], CHOICES - 1 - len(wrong[:1]), seed)]
        if len(choices) < 2:
            continue
        order = random.Random(f"{seed}:{example.id}:order").sample(range(len(choices)), len(choices))
        space = "" if joins_at_once(example.prompt) else " "
        yield {
            "id": example.id,
            "prompt": example.prompt,
            "choices": [f"{space}{choices[i]}" for i in order],
            "right": order.index(0),
        }


def _drawn(example: ConflictExample, answers: Sequence[str], count: int, seed: int) -> list[str]:
    """Answers to other questions, none of which either source gives to this one."""
    own = {subject_key(answer) for answer in (*example.memory_answers, *example.context_answers)}
    rest = [answer for answer in answers if subject_key(answer) not in own]
    return random.Random(f"{seed}:{example.id}").sample(rest, min(count, len(rest)))
