"""Four questions about one passage: what is asked, what is expected, and how answers are counted."""

import polars as pl
import pytest

from interp.causes import Cause
from interp.errors import UserError
from interp.evaluation import UsageReport, measure_usage
from interp.facts import build_conflicts, load_facts
from interp.tasks import TASKS, Task, as_expected, asked_by, task_of
from tests.tiny import tiny_conflicts

FACTS = [
    fact for fact in load_facts("capital") if fact.subject in {"France", "Japan", "Italy", "Peru", "Kenya", "Cuba"}
]


@pytest.fixture(scope="module")
def conflicts():
    return build_conflicts({"capital": FACTS})


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        (
            "none",
            "Copy from the passage, word for word, the sentence that answers this question: What is the capital of "
            "Peru?\nSentence: The capital of Peru is",
        ),
        (
            "context",
            "According to the passage, what is the capital of Peru?\n"
            "Answer: According to the passage, the capital of Peru is",
        ),
        (
            "memory",
            "Whatever the passage says: as far as you know, what is the capital of Peru?\n"
            "Answer: As far as I know, the capital of Peru is",
        ),
        (
            "both",
            "What is the capital of Peru? Say in one sentence what the passage answers, and what you know yourself.\n"
            "Answer: According to the passage,",
        ),
    ],
)
def test_each_task_asks_in_its_own_words(conflicts, name, asked):
    [peru] = [e for e in Task(name).of(conflicts).select(kind="conflict") if e.subject == "Peru"]
    city = peru.context_answers[0]
    assert peru.memory_answers[0] == "Lima" != city
    assert peru.prompt == f"Passage: The capital of Peru is {city}.\n\n{asked}"
    assert peru.bare_prompt == "Question: What is the capital of Peru?\nAnswer: The capital of Peru is"
    assert (peru.template, peru.question) == (f"task-{name}", asked.splitlines()[0])


def test_all_kinds_are_asked_by_all_tasks_about_the_same_passages(conflicts):
    made = asked_by(conflicts)
    plain = conflicts.select(templates=["question"])
    assert made.counts()["by_template"] == {f"task-{name}": len(plain) for name in TASKS}
    for name in TASKS:
        some = made.select(templates=[f"task-{name}"])
        same = ("subject", "kind", "contexts", "memory_answers", "context_answers", "split")
        assert [[getattr(e, n) for n in same] for e in some] == [[getattr(e, n) for n in same] for e in plain]
        assert all(e.prompt == e.bare_prompt and "passage" not in e.question for e in some.select(kind="none"))
    assert asked_by(conflicts, ["both", "both"]).digest == Task("both").of(conflicts).digest


def test_contexts_with_a_cause_keep_it(conflicts):
    cause = Cause("temporal", "high").of(conflicts)
    made = asked_by(cause, ["memory"])
    assert made.counts()["by_template"] == {"temporal-high-task-memory": len(cause)}
    assert [e.contexts for e in made] == [e.contexts for e in cause]
    assert task_of("temporal-high-task-memory") == Task("memory")
    with pytest.raises(UserError, match="to set tasks about"):
        asked_by(made)


@pytest.mark.parametrize(
    ("cause", "begun"),
    [
        (Cause("semantic", "high"), "The capital of Peru, the province, is"),
        (Cause("temporal", "high"), "As of 2031, the capital of Peru is"),
        (Cause("misinformation", "low"), "A chain letter that nobody signed says that the capital of Peru is"),
    ],
)
def test_what_is_copied_begins_as_its_sentence_does(conflicts, cause, begun):
    made = {e.kind: e for e in Task("none").of(cause.of(conflicts)) if e.subject == "Peru"}
    assert all(made[kind].prompt.endswith(f"\nSentence: {begun}") for kind in ("conflict", "aligned"))
    assert all(f"{begun} {made[kind].context_answers[0]}" in made[kind].context for kind in ("conflict", "aligned"))
    assert made["irrelevant"].prompt.endswith("\nSentence: The capital of Peru is")


@pytest.mark.parametrize(
    ("relation", "subject", "begun"),
    [
        ("composer", "H.M.S. Pinafore", "The composer of H.M.S. Pinafore, the television theme, was"),
        ("painter", "Whaam!", "The painter of Whaam!, the stage set, was"),
    ],
)
def test_marks_within_a_subject_end_no_sentence(relation, subject, begun):
    facts = {relation: load_facts(relation)}
    asked = Task("none").of(Cause("semantic").of(build_conflicts(facts)))
    [one] = [e for e in asked.select(kind="conflict") if e.subject == subject]
    assert one.prompt.endswith(f"\nSentence: {begun}")
    [plain] = [e for e in Task("none").of(build_conflicts(facts)).select(kind="conflict") if e.subject == subject]
    assert plain.prompt.endswith(f"\nSentence: The {relation} of {subject} was")


def test_copying_and_reading_follow_the_context_and_knowing_memory():
    assert [Task(name).expected for name in TASKS] == ["context", "context", "memory", "both"]


def test_what_is_expected_is_counted_by_task():
    """By hand: of conflicts 2 of 2 copy, 1 of 2 recall, 1 of 2 name both; what agrees is not counted."""
    answers = [("none", "context"), ("none", "context"), ("memory", "context"), ("memory", "memory")]
    answers += [("both", "both"), ("both", "context")]
    rows = [
        {"subject": str(i % 2), "template": f"task-{name}", "kind": "conflict", "usage": usage}
        for i, (name, usage) in enumerate(answers)
    ]
    rows.append({"subject": "0", "template": "task-memory", "kind": "aligned", "usage": "both"})
    found = as_expected(UsageReport(pl.DataFrame(rows)))
    assert {name: estimate.value for name, estimate in found.items()} == {
        "task-none": 1.0,
        "task-memory": 0.5,
        "task-both": 0.5,
    }
    assert all(estimate.n == 2 for estimate in found.values())
    other = UsageReport(pl.DataFrame([{**rows[0], "template": "question"}]))
    with pytest.raises(UserError, match="'question' is the template of no task"):
        as_expected(other)
    with pytest.raises(UserError, match="no conflict prompt of a task"):
        as_expected(UsageReport(pl.DataFrame(rows[-1:])))


def test_a_model_is_measured_by_task(conflicts, tiny_plain):
    made = asked_by(conflicts, ["context", "memory"]).select(kind="conflict")
    report = measure_usage(tiny_plain("mistral"), made, max_new_tokens=2)
    assert set(as_expected(report)) == {"task-context", "task-memory"}


def test_what_is_not_made_of_facts_is_refused():
    with pytest.raises(UserError, match="tiny has no facts in the wording 'question', or with a cause"):
        Task("memory").of(tiny_conflicts())
    with pytest.raises(UserError, match="There is no task 'all'; choose none, context, memory or both"):
        asked_by(tiny_conflicts(), ["all"])
