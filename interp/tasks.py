"""Ask about one passage what takes no knowledge, the passage's, memory's, or both (Sun et al. 2025, arXiv 2506.06485).

    none      copy the sentence that answers the question: what it says does not matter
    context   answer according to the passage
    memory    answer from what one knows, whatever the passage says
    both      name what the passage says and what one knows

Passage, answers and kinds stay as they are. What should be followed where passage and memory disagree is said by the
template, ``task-memory`` for example, and ``Task.expected``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from interp.answers import Usage
from interp.causes import CAUSES
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.facts import PHRASINGS, SOURCE, relation_named
from interp.sentences import unfinished_sentence
from interp.statistics import Estimate

TaskName = Literal["none", "context", "memory", "both"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
_CHOICES = f"{', '.join(TASKS[:-1])} or {TASKS[-1]}"

# Whose contexts are the relation's sentence and no more.
_PLAIN = PHRASINGS["question"]
_BARE = PHRASINGS["document"]


@dataclass(frozen=True)
class Task:
    """What is asked about a passage.

    Attributes:
        name: Which knowledge the answer takes.
    """

    name: TaskName

    @property
    def template(self) -> str:
        """What prompts of this task are called, as their phrasing family, if their contexts have no cause."""
        return f"task-{self.name}"

    @property
    def expected(self) -> Usage:
        """Which source an answer uses that does as it is told, where the two disagree; copying uses the context."""
        return "context" if self.name == "none" else self.name

    def of(self, conflicts: ConflictSet) -> ConflictSet:
        """The same passages, asked by this task.

        Args:
            conflicts: Prompts of facts in the wording ``question``, as ``build_conflicts`` makes them, or with the
                contexts of a ``Cause``. Those without a context stay the plain question, as do bare prompts.

        Raises:
            UserError: If there is none of these.
        """
        passages = [e for e in conflicts if e.source == SOURCE and _is_passage(e.template)]
        if not passages:
            raise UserError(
                f"{conflicts.name} has no facts in the wording {_PLAIN.name!r}, or with a cause, to set tasks about; "
                "build it from facts."
            )
        return ConflictSet(conflicts.name, tuple(map(self._of_example, passages)))

    def _of_example(self, example: ConflictExample) -> ConflictExample:
        relation = relation_named(example.relation)
        template = self.template if example.template == _PLAIN.name else f"{example.template}-{self.template}"
        stem = relation.stem.format(subject=example.subject)
        bare = _BARE.bare(relation).format(subject=example.subject, answer="")
        question, begun = self._asked(example, stem)
        return replace(
            example,
            id=f"{relation.name}/{example.subject}/{template}/{example.kind}",
            question=question if example.contexts else example.question,
            template=template,
            prompt=f"Passage: {example.context}\n\n{question}\n{begun}" if example.contexts else bare,
            bare_prompt=bare,
        )

    def _asked(self, example: ConflictExample, stem: str) -> tuple[str, str]:
        """What is asked, and what the answer begins with."""
        question = example.question
        lower = question[:1].lower() + question[1:]
        begun = stem[:1].lower() + stem[1:]
        return {
            "none": (
                f"Copy from the passage, word for word, the sentence that answers this question: {question}",
                f"Sentence: {_up_to_answer(example) or stem}",
            ),
            "context": (f"According to the passage, {lower}", f"Answer: According to the passage, {begun}"),
            "memory": (
                f"Whatever the passage says: as far as you know, {lower}",
                f"Answer: As far as I know, {begun}",
            ),
            "both": (
                f"{question} Say in one sentence what the passage answers, and what you know yourself.",
                "Answer: According to the passage,",
            ),
        }[self.name]


def _up_to_answer(example: ConflictExample) -> str:
    """How the sentence of the passage that gives its answer begins; empty where it gives none."""
    if not example.context_answers:
        return ""
    [before, *_] = re.split(rf"(?<!\w){re.escape(example.context_answers[0])}(?!\w)", example.context, maxsplit=1)
    # A subject may have a mark in it that ends no sentence here, as "Whaam!" has.
    masked = before.replace(example.subject, "x" * len(example.subject))
    return before[unfinished_sentence(masked) :].strip()


def asked_by(conflicts: ConflictSet, tasks: Sequence[str] = TASKS) -> ConflictSet:
    """Ask about the passages of a set by each of several tasks; see ``Task.of``.

    Raises:
        UserError: If there is no such task, or no passage.
    """
    sets = [task_named(name).of(conflicts) for name in dict.fromkeys(tasks)]
    return ConflictSet(conflicts.name, tuple(example for some in sets for example in some))


def task_of(template: str) -> Task:
    """The task of a template.

    Raises:
        UserError: If it is that of no task.
    """
    for name in TASKS:
        if template.endswith(Task(name).template):
            return Task(name)
    raise UserError(
        f"{template!r} is the template of no task ({_CHOICES}); make prompts with `conflictscope data build --task`."
    )


def as_expected(report: UsageReport) -> Mapping[str, Estimate]:
    """How often answers to conflict prompts use the source that their task expects, by template.

    Raises:
        UserError: If a prompt is of no task, or there is no conflict prompt.
    """
    conflict = report.select(kind="conflict")
    templates = conflict.frame["template"].unique(maintain_order=True).to_list()
    if not templates:
        raise UserError("There is no conflict prompt of a task; make some with `conflictscope data build --task`.")
    return {name: conflict.select(template=name).rate(task_of(name).expected) for name in templates}


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        UserError: If there is none; the message lists those there are.
    """
    for known in TASKS:
        if name == known:
            return Task(known)
    raise UserError(f"There is no task {name!r}; choose {_CHOICES}.")


def _is_passage(template: str) -> bool:
    return template == _PLAIN.name or (template.split("-")[0] in CAUSES and "-task-" not in template)
