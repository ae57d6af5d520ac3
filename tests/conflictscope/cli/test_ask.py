from dataclasses import replace

import pytest
import torch

from conflictscope.cli.ask import _as_data, _table
from conflictscope.explore.looks import Asked, Explorer
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interventions.config import InterventionFile
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run = test_cli.run
SENTENCE = "The capital of Japan is"
CONTEXT = ("--context", "The capital of Japan is Lima.")
ANSWERS = ("--memory-answer", "Tokyo", "--context-answer", "Lima")


@pytest.fixture
def llama(tiny_directories):
    return str(tiny_directories["llama"])


def test_a_question_is_asked_without_and_with_its_context(run, llama):
    code, output, _ = run("ask", SENTENCE, *CONTEXT, *ANSWERS, "--model", llama)
    assert code == 0
    assert {"without context", "with context", "P(Tokyo), memory", "P(Lima), context"} <= set(
        map(str.strip, output.splitlines()[1].split("┃"))
    )
    assert "unedited" in output
    assert "Heads that write most towards context" in output


def test_probabilities_are_those_of_the_models_own_logits(tiny_llama):
    look = Explorer(tiny_llama, name="tiny").look(Asked(SENTENCE, "Lima is big.", "Tokyo", "Lima"))
    with torch.no_grad():
        logits = tiny_llama.original_model(**tiny_llama.tokenizer(look.example.prompt, return_tensors="pt")).logits
    expected = [
        f"{logits[0, -1].softmax(-1)[tiny_llama.tokenizer(f' {a}')['input_ids'][0]]:.2g}" for a in ("Tokyo", "Lima")
    ]
    columns = _table(look).columns
    assert [next(iter(column.cells)) for column in columns[-2:]] == expected


def test_a_question_becomes_data_that_other_commands_read(run, llama, tmp_path):
    assert run("ask", SENTENCE, *CONTEXT, *ANSWERS, "--model", llama, "--out", "mine.jsonl")[0] == 0
    conflict, bare = ConflictSet.load(tmp_path / "mine.jsonl")
    assert (conflict.kind, bare.kind) == ("conflict", "none")
    assert (conflict.memory_answers, conflict.context_answers) == (("Tokyo",), ("Lima",))
    assert bare.prompt == SENTENCE
    assert run("evaluate", "--data", "mine.jsonl", "--split", "all", "--model", llama)[0] == 0
    arguments = ("--split", "all", "--baseline", "zero", "--out", "heads.parquet")
    assert run("attribute", "--data", "mine.jsonl", "--model", llama, *arguments)[0] == 0


def test_an_edit_is_tried_next_to_the_model_as_it_is(run, llama, tmp_path, tiny_llama):
    edit = HeadScaling.of([(1, 1), (2, 0)], 0.0)
    InterventionFile.of([edit], name="edit", model=ModelIdentity.of(tiny_llama, "tiny")).save(tmp_path / "edit.json")
    code, output, _ = run("ask", SENTENCE, *CONTEXT, *ANSWERS, "--model", llama, "--config", "edit.json")
    assert code == 0
    assert {"unedited", "edited"} <= {line.split("│")[1].strip() for line in output.splitlines() if "│" in line}


def test_answers_that_cannot_race_are_told_apart_from_an_error(run, llama):
    code, output, error = run(
        "ask", SENTENCE, *CONTEXT, "--memory-answer", "Lima", "--context-answer", "Lima", "--model", llama
    )
    assert code == 0
    assert "P(" not in output
    assert "Memory and context both answer Lima" in error


def test_an_empty_context_is_refused(run, llama):
    assert_one_sentence(run("ask", SENTENCE, "--context", " ", "--model", llama), "There is no context")


def test_a_context_that_agrees_is_kept_as_one(run, llama, tmp_path):
    answers = ("--memory-answer", "Tokyo", "--context-answer", "Tokyo")
    code, output, error = run("ask", SENTENCE, *CONTEXT, *answers, "--model", llama, "--out", "mine.jsonl")
    assert code == 0
    assert "Memory and context both answer Tokyo" in " ".join(f"{output} {error}".split())
    example = next(iter(ConflictSet.load(tmp_path / "mine.jsonl")))
    assert (example.kind, example.context_answers) == ("aligned", ("Tokyo",))


def test_a_question_whose_answers_are_not_known_is_not_kept(tiny_llama):
    look = Explorer(tiny_llama, name="tiny").look(Asked(SENTENCE, "Lima is big.", "Tokyo", "Lima"))
    for source in ("memory", "context"):
        unknown = replace(look, example=replace(look.example, **{f"{source}_answers": ()}))
        with pytest.raises(UserError, match=f"--{source}-answer"):
            _as_data(unknown)
