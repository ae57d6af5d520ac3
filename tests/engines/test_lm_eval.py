"""What a real lm-evaluation-harness says of an edited model: hooked, folded into the weights, and as an adapter.

`make engines` runs this alone, since it needs the harness: CONFLICTSCOPE_EVAL_PYTHON names the interpreter of an
environment with ConflictScope and its extras lm-eval, inspect-ai and adapters.
"""

import json
import os
import subprocess

import pytest
import torch

from conflictscope.elsewhere.tasks import write_tasks
from interp.facts import build_conflicts, usable_facts
from interp.models import cached_path, load_model
from interventions.bake import write_folded
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dola import DoLa
from interventions.export.lora import write_adapters
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.steering import Steering

PYTHON = os.environ["CONFLICTSCOPE_EVAL_PYTHON"]
MODEL, QUESTIONS = "smollm2-135m", 8
HEADS = HeadScaling.of([(23, 4), (23, 5), (24, 4), (29, 1)], 0.0)
DIRECTION = 6 * torch.randn(576, generator=torch.Generator().manual_seed(0))
STEERED = Steering(20, DIRECTION, tokens="last_prompt")
EDITS = {
    "heads": HEADS,
    "steered": STEERED,
    "gated": ConflictGate("block", 4, DIRECTION, 0.0, 0.0, (HEADS,)),
    "dola": DoLa((10, 20)),
}


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, device="cpu")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A folder with an intervention file of each edit, the heads in their other forms, and tasks."""
    root = tmp_path_factory.mktemp("eval")
    identity = ModelIdentity.of(model, MODEL)
    for name, edit in EDITS.items():
        InterventionFile.of([edit], name=name, model=identity).save(root / f"{name}.json")
    heads = InterventionFile.load(root / "heads.json")
    write_folded(MODEL, heads, root / "baked", prompts=["The capital of Peru is"])
    write_adapters(MODEL, heads, root / "lora", name="heads", prompts=["The capital of Peru is"])
    conflicts = build_conflicts({"capital": usable_facts("capital")[:40]})
    write_tasks(root / "tasks", conflicts.select(split="test"))
    return root


@pytest.fixture(scope="module")
def asked(folder):
    """Asks the harness: for each question the log likelihoods of its choices, by the hash of the question."""

    def ask(command, arguments, task="conflictscope_conflict", expected=0):
        out = folder / f"out-{len(list(folder.iterdir()))}"
        options = ["--include_path", folder / "tasks", "--tasks", task, "--limit", str(QUESTIONS), "--batch_size", "4"]
        options += ["--device", "cpu", "--log_samples", "--output_path", out]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
        done = subprocess.run(
            [PYTHON, "-m", *command, "--model_args", arguments, *options],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == expected, done.stderr[-4000:]
        if expected:
            return done.stderr.strip().splitlines()[-1]
        (path,) = out.rglob("samples_*.jsonl")
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return {row["doc"]["prompt"]: _choices(row) for row in rows}

    return ask


def _choices(row):
    return {choice: float(value) for choice, ((value, _),) in zip(row["doc"]["choices"], row["resps"], strict=True)}


OURS, THEIRS = ["conflictscope.elsewhere.lm_eval", "--model", "conflictscope"], ["lm_eval", "--model", "hf"]


def close(found, expected):
    assert found.keys() == expected.keys()
    for prompt, choices in expected.items():
        assert found[prompt] == pytest.approx(choices, abs=1e-2)


def test_an_edit_has_the_same_likelihoods_hooked_folded_and_as_an_adapter(folder, asked):
    hooked = asked(OURS, f"pretrained={MODEL},config={folder / 'heads.json'}")
    assert len(hooked) == QUESTIONS
    close(asked(THEIRS, f"pretrained={folder / 'baked'},dtype=float32"), hooked)
    close(asked(THEIRS, f"pretrained={cached_path(MODEL)},peft={folder / 'lora'},dtype=float32"), hooked)
    plain = asked(OURS, f"pretrained={MODEL}")
    close(asked(THEIRS, f"pretrained={cached_path(MODEL)},dtype=float32"), plain)
    with pytest.raises(AssertionError):
        close(plain, hooked)


@pytest.mark.parametrize("name", ["steered", "gated"])
def test_an_edit_that_follows_prompts_has_the_likelihoods_that_generating_gives(model, folder, asked, name):
    found = asked(OURS, f"pretrained={MODEL},config={folder / f'{name}.json'}")
    tokenizer = model.tokenizer
    with applied(model, EDITS[name]):
        for prompt, choices in list(found.items())[:3]:
            for choice, value in choices.items():
                ids = tokenizer(prompt + choice)["input_ids"]
                length = len(tokenizer(prompt)["input_ids"])
                assert value == pytest.approx(_generated(model, ids[:length], ids[length:]), abs=1e-2)


def _generated(model, prompt, answer):
    """The log likelihood of an answer that ``generate`` has no choice but to give."""
    output = model.generate(
        torch.tensor([prompt]),
        prefix_allowed_tokens_fn=lambda _, ids: [answer[len(ids) - len(prompt)]],
        max_new_tokens=len(answer),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return sum(float(step[0].log_softmax(-1)[token]) for step, token in zip(output.logits, answer, strict=True))


def test_what_would_be_wrong_is_refused_in_a_sentence(folder, asked):
    arguments = f"pretrained={MODEL},config={folder / 'steered.json'}"
    assert "Error: steered acts at certain tokens" in asked(OURS, arguments, "conflictscope_text", expected=2)
    arguments = f"pretrained={MODEL},config={folder / 'dola.json'}"
    assert "Error: dola gives answers no probability at all" in asked(OURS, arguments, expected=2)
