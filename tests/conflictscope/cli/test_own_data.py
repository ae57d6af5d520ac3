"""A table of one's own, from the file to every kind of command; chats and examples on the command line."""

import shutil

import polars as pl
import pytest

from interp.conflicts import ConflictSet
from interp.models import load_model
from interventions.config import InterventionFile
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from tests.conflictscope.cli.test_cli import assert_one_sentence, run

run = run
TOWNS = ["Where is {n}?", "{n} is in A{n}.", "A{n}", "B{n}"]


@pytest.fixture
def table(tmp_path):
    lines = ["Question,Context,Answer,Memory", *(",".join(TOWNS).format(n=f"town{n}") for n in range(20))]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    return tmp_path / "mine.csv"


@pytest.fixture
def chatting(tiny_directories, tmp_path):
    """A model directory with a chat template."""
    folder = shutil.copytree(tiny_directories["llama"], tmp_path / "tiny-instruct")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}A:")
    return folder


def test_a_table_goes_through_the_commands(run, table, chatting, tmp_path):
    code, _, error = run("data", "build", "--from", table, "--out", "mine.jsonl", "--all-facts")
    assert code == 0
    assert "Read 20 rows of" in error
    assert "question from 'Question', context from 'Context', answer from 'Answer', memory from 'Memory'" in error
    built = ConflictSet.load("mine.jsonl")
    assert built.counts()["by_kind"] == {"conflict": 20, "aligned": 20, "irrelevant": 20, "none": 20}
    model = ("--model", chatting, "--data", "mine.jsonl", "--split", "all")
    assert run("evaluate", *model, "--by", "kind", "--out", "u.parquet")[0] == 0
    assert len(pl.read_parquet("u.parquet")) == 80
    code, _, _ = run("evaluate", *model, "--reliance", "r.parquet", "--out", "u.parquet")
    assert code == 0
    assert {"token", "gain", "divergence"} <= set(pl.read_parquet("r.parquet").columns)
    assert (tmp_path / "r.html").exists()
    assert run("attribute", *model, "--method", "direct-logits", "--out", "h.parquet")[0] == 0
    sampling = ("--samples", 2, "--max-new-tokens", 2)
    code, out, _ = run("persuasion", *model, "--by", "kind", *sampling, "--out", "p.parquet")
    assert code == 0
    assert "coherent_persuasion" in out
    assert "change of semantic_entropy" in out
    assert "less that of" in out
    assert set(pl.read_parquet("p.parquet")["kind"]) == {"conflict", "aligned", "irrelevant"}


def test_a_table_in_place_of_conflict_data_is_told_the_way(run, table, chatting):
    asked = ("evaluate", "--model", chatting, "--data", table)
    assert_one_sentence(
        run(*asked), f"is a table, not conflict data; make that of it with `conflictscope data build --from {table}`"
    )


def test_what_is_asked_of_a_table_is_checked(run, table):
    assert_one_sentence(run("data", "build", "--limit", 3), "belong to --from")
    assert_one_sentence(run("data", "build", "--from", table, "--relation", "capital"), "Give --from or --relation")
    assert_one_sentence(run("data", "build", "--from", table, "--column", "question"), "--column takes ROLE=NAME")
    assert_one_sentence(run("data", "build", "--from", table, "--column", "question=Frage"), "no column 'Frage'")
    assert_one_sentence(run("data", "build", "--from", "none.csv"), "There is no none.csv")


@pytest.mark.parametrize("form", [("--format", "chat"), ("--format", "auto", "--shots", "2"), ("--shots", "2")])
def test_prompts_are_asked_in_the_form_that_is_wanted(run, table, chatting, form):
    run("data", "build", "--from", table, "--out", "mine.jsonl", "--all-facts")
    code, _, _ = run("evaluate", "--model", chatting, "--data", "mine.jsonl", *form, "--out", "u.parquet")
    assert code == 0
    prompts = pl.read_parquet("u.parquet").filter(kind="conflict")["prompt"].to_list()
    assert all(prompt.startswith("user: ") for prompt in prompts) == ("--format" in form)
    turns = 3 if "--shots" in form else 1
    assert {prompt.count("Where is") for prompt in prompts} == {turns}


def test_one_question_and_texts_of_ones_own_are_asked_in_a_chat(run, chatting, tmp_path):
    asked = ("ask", "Where is Ys?", "--context", "Ys is in A.", "--memory-answer", "B", "--context-answer", "A")
    assert run(*asked, "--model", chatting, "--format", "chat", "--answer-prefix", "In", "--out", "asked.jsonl")[0] == 0
    with_context, bare = (example.prompt for example in ConflictSet.load("asked.jsonl"))
    question = "Question: Where is Ys?\nAnswer in a few words.\nA: In"
    assert (with_context, bare) == (f"user: Context:\nYs is in A.\n\n{question}", f"user: {question}")
    identity = ModelIdentity.of(load_model(str(chatting), device="cpu"), str(chatting))
    InterventionFile.of([HeadScaling.of([(0, 0)], 0.0)], name="edit", model=identity).save(tmp_path / "edit.json")
    replies = {}
    for form in ("chat", "completion"):
        code, replies[form], _ = run("generate", chatting, "Hello", "--config", "edit.json", "--format", form)
        assert code == 0
    assert replies["chat"] != replies["completion"]


def test_a_form_that_cannot_be_had_is_told(run, table, chatting, tiny_directories):
    run("data", "build", "--from", table, "--out", "mine.jsonl", "--all-facts")
    plain = ("evaluate", "--model", tiny_directories["llama"], "--data", "mine.jsonl")
    assert_one_sentence(run(*plain, "--format", "chat"), "has no chat template; ask with --format completion")
    assert_one_sentence(run(*plain, "--system", "Be brief."), "A system message belongs to a chat")
    told = ("--model", chatting, "--data", "mine.jsonl", "--at-answer", "--split", "all")
    assert_one_sentence(run("attribute", *told), "names what memory or context says")
    assert_one_sentence(run("attribute", *told, "--method", "representations"), "leave out --at-answer")
    whole = (*told[:4], "--whole-answer", "--reliance", "r.parquet")
    assert_one_sentence(run("evaluate", *whole), "leave out --whole-answer and decoding rules, or --reliance")


def test_facts_are_asked_with_several_documents(run):
    several = ("--against", 2, "--agreeing", 1, "--position", "last")
    code, _, _ = run("data", "build", "--all-facts", "--relation", "capital", *several, "--out", "d.jsonl")
    assert code == 0
    built = ConflictSet.load("d.jsonl")
    assert {len(e.contexts) for e in built} == {0, 3}
    assert {e.template for e in built} == {"2-against-1-last"}
    assert_one_sentence(run("data", "build", "--all-facts", "--position", "last"), "say how many")


def test_all_that_a_model_says_is_judged_where_it_is_asked(run, table, tiny_directories):
    run("data", "build", "--from", table, "--out", "mine.jsonl", "--all-facts")
    model = ("--model", tiny_directories["llama"], "--data", "mine.jsonl", "--max-new-tokens", 12)
    run("evaluate", *model, "--out", "first.parquet")
    run("evaluate", *model, "--whole-answer", "--out", "whole.parquet")
    first, whole = (pl.read_parquet(f"{name}.parquet")["answer"].to_list() for name in ("first", "whole"))
    assert all(long.startswith(short) for short, long in zip(first, whole, strict=True))
    assert sum(map(len, whole)) >= sum(map(len, first))


def test_facts_contradict_memory_for_a_cause_and_are_asked_by_task(run):
    facts = ("data", "build", "--all-facts", "--relation", "capital", "--out", "c.jsonl")
    assert run(*facts, "--cause", "temporal", "--plausibility", "high")[0] == 0
    built = ConflictSet.load("c.jsonl")
    assert {e.template for e in built} == {"temporal-high"}
    assert all("As of 2031, the capital of" in e.context for e in built.select(kind="conflict"))
    assert run(*facts, "--cause", "semantic", "--task", "none", "--task", "memory")[0] == 0
    assert {e.template for e in ConflictSet.load("c.jsonl")} == {"semantic-task-none", "semantic-task-memory"}
    assert run(*facts, "--task", "both")[0] == 0
    assert {e.template for e in ConflictSet.load("c.jsonl")} == {"task-both"}


def test_causes_and_tasks_that_do_not_go_with_the_rest_are_told(run, table):
    facts = ("data", "build", "--all-facts")
    assert_one_sentence(run(*facts, "--plausibility", "low"), "--plausibility is that of a cause; say which")
    assert_one_sentence(run(*facts, "--task", "all"), "There is no task 'all'; choose none, context, memory or both")
    assert_one_sentence(run(*facts, "--cause", "temporal", "--against", 1), "are for facts with one document")
    assert_one_sentence(run(*facts, "--from", table, "--task", "memory"), "are for facts with one document")
