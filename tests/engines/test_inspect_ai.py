"""A real Inspect against hooks: answers of an edited model to a task's samples, and what is refused.

`make engines` runs this alone, since it needs the harness: see ``test_lm_eval``.
"""

import json
import subprocess

import pytest

from interp.chat import chat_text
from interp.generation import greedy_texts
from interp.models import load_model
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.engines.test_lm_eval import DIRECTION, MODEL, PYTHON

QUESTIONS = ["What is the capital of Japan?", "Name a colour.", "What is the opposite of hot?"]
EDIT = Steering(20, DIRECTION, tokens="answer")
TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.tool import bash
from inspect_ai.solver import generate, use_tools

@task
def asked(tools: bool = False):
    samples = [Sample(input=question, target="x") for question in {questions}]
    return Task(samples, solver=[*([use_tools(bash())] if tools else []), generate()], scorer=includes())
"""


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, device="cpu")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    InterventionFile.of([EDIT], name="edit", model=ModelIdentity.of(model, MODEL)).save(root / "edit.json")
    (root / "task.py").write_text(TASK.format(questions=QUESTIONS))
    return root


def evaluated(folder, *options):
    """What Inspect logs of the task: its status, error and samples."""
    logs = folder / f"logs-{len(list(folder.iterdir()))}"
    command = [PYTHON, "-m", "inspect_ai", "eval", "task.py", "--model", f"conflictscope/{MODEL}", *options]
    command += ["--log-dir", str(logs), "--log-format", "json", "--display", "none"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    logged = list(logs.glob("*.json"))
    assert logged, done.stderr[-4000:] + done.stdout[-4000:]
    return json.loads(logged[0].read_text(encoding="utf-8"))


def answers(log):
    return [sample["output"]["choices"][0]["message"]["content"] for sample in log["samples"]]


def test_samples_are_answered_as_the_edited_model_answers_each_alone(model, folder):
    prompts = [chat_text(model.tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    plain = greedy_texts(model, model.tokenizer, prompts, max_new_tokens=12)
    with applied(model, EDIT):
        edited = greedy_texts(model, model.tokenizer, prompts, max_new_tokens=12)
    assert plain != edited
    assert answers(evaluated(folder, "--max-tokens", "12")) == plain
    log = evaluated(folder, "-M", "edit=edit.json", "--max-tokens", "12")
    assert answers(log) == edited
    assert log["status"] == "success"


def test_stop_sequences_end_an_answer_before_them(folder):
    (whole, *_) = answers(evaluated(folder, "--max-tokens", "12", "--limit", "1"))
    stop = whole.split()[2]
    (found,) = evaluated(folder, "--max-tokens", "12", "--limit", "1", "--stop-seqs", stop)["samples"]
    assert found["output"]["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert found["output"]["choices"][0]["stop_reason"] == "stop"


def test_a_seed_draws_the_same_answers(folder):
    warm = ("--temperature", "1.5", "--max-tokens", "12")
    first, again, other = (answers(evaluated(folder, *warm, "--seed", seed)) for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "said"),
    [(("-T", "tools=true"), "calls no tools"), (("--logprobs",), "has no setting logprobs")],
)
def test_what_there_is_not_is_refused_in_a_sentence(folder, options, said):
    log = evaluated(folder, "--max-tokens", "4", *options)
    assert log["status"] == "error"
    assert said in log["error"]["message"]
